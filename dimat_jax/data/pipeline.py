"""From index lists to batches on the devices.

A split's images stay on the devices as stored (uint8), once for each device. What an
agent trains on, is matched on and is evaluated on are lists of indices into them, drawn
on the host from seeds; the gather, the normalisation and the augmentation run inside
the jitted step.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Key, UInt8

from dimat_jax.data.sources import Split
from dimat_jax.options import Option
from dimat_jax.placement import Placement

__all__ = [
    "Augmentation",
    "Batch",
    "Pool",
    "Reader",
    "Sampler",
    "Samples",
    "chunked",
    "draw_own",
    "load",
    "place_pool",
]


FLIP = Option(
    "augmentation.flip",
    False,
    "Whether training images are mirrored left to right with probability 1/2.",
)
PAD = Option(
    "augmentation.pad",
    0,
    "The number of black pixels that are added on every side of a training image "
    "before it is cropped at random to its old size.",
    at_least=0,
    unit="pixels",
)


class Batch(NamedTuple):
    """Examples of one agent; stacked agents add a leading axis to every field.

    Attributes:
        inputs: normalised images, float32.
        labels: their classes.
        mask: False where an entry only fills up the batch, and counts nowhere.
    """

    inputs: Float[Array, "batch height width channels"]
    labels: Int32[Array, " batch"]
    mask: Bool[Array, " batch"]


class Pool(NamedTuple):
    """A split on the devices, whole on each, with what normalises it."""

    images: UInt8[Array, "samples height width channels"]
    labels: Int32[Array, " samples"]
    mean: Float[Array, " channels"]
    std: Float[Array, " channels"]


def place_pool(
    split: Split, mean: np.ndarray, std: np.ndarray, placement: Placement
) -> Pool:
    """Places a split on the devices. `mean` and `std` are in units of its pixels."""
    return Pool(*placement.replicate((*split, np.float32(mean), np.float32(std))))


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random changes of training images, drawn independently for every example.

    Attributes:
        flip: mirror left and right with probability 1/2.
        pad: pad with this many black pixels on every side, and crop to the old size.
    """

    flip: bool = FLIP.default
    pad: int = PAD.default


NO_AUGMENTATION = Augmentation()


def load(
    pool: Pool,
    indices: Int32[Array, " batch"],
    mask: Bool[Array, " batch"],
    key: Key[Array, ""] | None = None,
    augmentation: Augmentation = NO_AUGMENTATION,
) -> Batch:
    """Reads one agent's batch out of a pool. Pure; call it within `jax.jit`.

    The key, consumed, is for the augmentation; without one nothing is augmented.
    """
    images = jnp.take(pool.images, indices, axis=0)
    if key is not None:
        images = _augment(images, augmentation, key)
    inputs = (images.astype(jnp.float32) - pool.mean) / pool.std
    return Batch(inputs, jnp.take(pool.labels, indices, axis=0), mask)


def _augment(images, augmentation: Augmentation, key):
    """Flips and shifts by indexing: a window that leaves the image reads black."""
    size, height, width, _ = images.shape
    flip_key, row_key, column_key = jax.random.split(key, 3)
    rows = jnp.arange(height)[None, :]
    columns = jnp.arange(width)[None, :]
    if augmentation.flip:
        flipped = jax.random.bernoulli(flip_key, shape=(size, 1))
        columns = jnp.where(flipped, width - 1 - columns, columns)
    if pad := augmentation.pad:
        rows = rows + jax.random.randint(row_key, (size, 1), -pad, pad + 1)
        columns = columns + jax.random.randint(column_key, (size, 1), -pad, pad + 1)
    if not augmentation.flip and not pad:
        return images
    rows = jnp.broadcast_to(rows, (size, height))
    columns = jnp.broadcast_to(columns, (size, width))
    inside = _within(rows, height)[:, :, None] & _within(columns, width)[:, None, :]
    # Axis by axis: a gather of whole rows is several times faster than one of pixels.
    images = jax.vmap(lambda x, i: jnp.take(x, i, axis=0, mode="clip"))(images, rows)
    images = jax.vmap(lambda x, i: jnp.take(x, i, axis=1, mode="clip"))(images, columns)
    return jnp.where(inside[..., None], images, 0)


def _within(positions, size):
    return (positions >= 0) & (positions < size)


class Sampler:
    """Which examples each agent sees at each step: a pure function of seed and step.

    In an epoch every agent goes once through its own shard, in an order of its own.
    Agents with small shards finish early and idle (an all-False mask) until the one
    with the largest is through.

    Args:
        shards: for each agent, the indices of its examples.
        batch_size: examples for each agent and step.
        seed: entropy for the orders.
    """

    def __init__(
        self, shards: Sequence[np.ndarray], batch_size: int, seed: Sequence[int]
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self._shards = list(shards)
        self._seed = seed
        self.batch_size = batch_size
        self.steps_per_epoch = max(-(-len(shard) // batch_size) for shard in shards)
        self._epoch = lru_cache(maxsize=1)(self._draw_epoch)

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices int32 and mask bool, both `[agents, batch]`, of one step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        indices, mask = self._epoch(epoch)
        return indices[:, position], mask[:, position]

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        orders = [
            np.random.default_rng([*self._seed, agent, epoch]).permutation(shard)
            for agent, shard in enumerate(self._shards)
        ]
        indices, mask = zip(
            *(
                chunked(order, self.batch_size, self.steps_per_epoch)
                for order in orders
            ),
            strict=True,
        )
        return np.stack(indices), np.stack(mask)


def chunked(
    indices: np.ndarray, batch_size: int, n_batches: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a list of indices into batches, filled up at the end.

    Returns:
        indices int32 `[batches, batch]` (index 0 of the list where filled up) and mask
        bool of the same shape.
    """
    n_batches = n_batches or -(-len(indices) // batch_size)
    filled = np.full(n_batches * batch_size, indices[0], np.int32)
    filled[: len(indices)] = indices
    mask = np.arange(len(filled)) < len(indices)
    shape = (n_batches, batch_size)
    return filled.reshape(shape), mask.reshape(shape)


@dataclasses.dataclass(frozen=True)
class Samples:
    """A fixed set of examples, without augmentation, to be passed over in batches.

    Iterating yields `Batch`es: `[batch, ...]` if all agents share them, else
    `[slots, batch, ...]`.

    Attributes:
        load: makes a batch of indices and mask.
        indices: `[batches, batch]` if shared, else `[batches, agents, batch]`.
        mask: as `indices`; False where an entry only fills up the batch.
        shared: whether all agents see the same examples.
    """

    load: Callable[[np.ndarray, np.ndarray], Batch]
    indices: np.ndarray
    mask: np.ndarray
    shared: bool

    def __iter__(self) -> Iterator[Batch]:
        for indices, mask in zip(self.indices, self.mask, strict=True):
            yield self.load(indices, mask)


class Reader:
    """Makes `Samples` of one pool. Its programs compile once, however many it makes."""

    def __init__(self, pool: Pool, placement: Placement):
        load_shared = jax.jit(load)
        load_own = jax.jit(placement.per_agent(load, in_axes=(None, 0, 0)))
        self._load_shared = lambda *i: load_shared(pool, *placement.replicate(i))
        self._load_own = lambda *i: load_own(pool, *placement.put(i))

    def shared(self, indices: np.ndarray, batch_size: int) -> Samples:
        """The same examples, `indices` int[samples], for everyone."""
        return Samples(self._load_shared, *chunked(indices, batch_size), shared=True)

    def own(self, indices: Sequence[np.ndarray], batch_size: int) -> Samples:
        """Everyone's own examples: `indices[agent]` is int[samples], of any length."""
        n_batches = max(-(-len(own) // batch_size) for own in indices)
        chunks = [chunked(own, batch_size, n_batches) for own in indices]
        return Samples(
            self._load_own,
            np.stack([i for i, _ in chunks], axis=1),
            np.stack([m for _, m in chunks], axis=1),
            shared=False,
        )


def draw_own(
    shards: Sequence[np.ndarray], size: int, seed: Sequence[int]
) -> list[np.ndarray]:
    """A random part of each agent's shard: `size` examples, or all it has (0: all)."""
    return [
        np.random.default_rng([*seed, agent]).permutation(shard)[: size or None]
        for agent, shard in enumerate(shards)
    ]
