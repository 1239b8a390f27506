"""Turns lists of indices into batches on the devices.

The devices hold inputs as they are stored (images as uint8): every device holds the
training inputs of the agents that live there, and a copy of those that all share. The
examples for training, matching and evaluation are lists of indices into these inputs.
The lists are drawn on the host from seeds. Gathering, normalising and
augmenting run inside of the jitted step.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Key, Shaped

from dimat_jax.data._small_shards import SMALL_SHARDS, WAYS
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
    "own_samples",
    "normalised",
    "place_pool",
    "share",
]


FLIP = Option(
    "augmentation.flip",
    False,
    "Whether training images are mirrored left to right with probability 1/2. Inputs "
    "that are no images are refused.",
)
PAD = Option(
    "augmentation.pad",
    0,
    "The number of black pixels that are added on every side of a training image "
    "before it is cropped at random to its old size. Inputs that are no images are "
    "refused.",
    at_least=0,
    unit="pixels",
)


class Batch(NamedTuple):
    """Examples of one agent. For stacked agents every field has another leading axis.

    Attributes:
        inputs: normalised images or other inputs, float32; or tokens, int32.
        labels: the classes of the images, or labels of another kind.
        mask: False for entries that only fill up the batch and must not count.
    """

    inputs: Shaped[Array, "batch ..."]
    labels: Shaped[Array, "batch ..."]
    mask: Bool[Array, " batch"]


class Pool(NamedTuple):
    """Images that all agents share, of which every device holds a copy.

    Attributes:
        images: the pixels as stored, or other inputs; see `sources.Split`.
        labels: the classes of the images.
        mean: the mean of each channel, subtracted for normalisation.
        std: the standard deviation of each channel, the divisor of normalisation.
    """

    images: Shaped[Array, "samples ..."]
    labels: Shaped[Array, "samples ..."]
    mean: Float[Array, " channels"]
    std: Float[Array, " channels"]


def place_pool(
    split: Split, mean: np.ndarray, std: np.ndarray, placement: Placement
) -> Pool:
    """Places a split on every device. `mean` and `std` are in units of its pixels."""
    return Pool(*placement.replicate((*split, np.float32(mean), np.float32(std))))


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random changes of training images, drawn independently for every example.

    Attributes:
        flip: whether to mirror images left to right, with probability 1/2.
        pad: the number of black pixels added on every side before images are cropped to
            their size at a random position.
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
    """Reads one agent's batch from a pool. It is pure; call it within `jax.jit`.

    The key is consumed by the augmentation. Without a key nothing is augmented.
    """
    images = jnp.take(pool.images, indices, axis=0)
    inputs = normalised(images, pool.mean, pool.std, key, augmentation)
    return Batch(inputs, jnp.take(pool.labels, indices, axis=0), mask)


def normalised(
    images: Shaped[Array, "batch ..."],
    mean: Float[Array, " channels"],
    std: Float[Array, " channels"],
    key: Key[Array, ""] | None,
    augmentation: Augmentation,
) -> Shaped[Array, "batch ..."]:
    """Augments images, if there is a key, and normalises their channels.

    Tokens (int32) stay as they are.
    """
    if images.dtype == jnp.int32:
        return images
    if key is not None and augmentation != NO_AUGMENTATION:
        images = _augment(images, augmentation, key)
    channels = (1,) * (images.ndim - 1) + (-1,)
    mean, std = (x.reshape(channels) for x in (mean, std))
    return (images.astype(jnp.float32) - mean) / std


def _augment(
    images: Shaped[Array, "batch height width channels"],
    augmentation: Augmentation,
    key: Key[Array, ""],
) -> Shaped[Array, "batch height width channels"]:
    """Flips and shifts images by indexing. Pixels outside of an image are black."""
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
    rows = jnp.broadcast_to(rows, (size, height))
    columns = jnp.broadcast_to(columns, (size, width))
    inside = _within(rows, height)[:, :, None] & _within(columns, width)[:, None, :]
    # Gathering whole rows and then whole columns is several times faster than gathering
    # single pixels.
    images = jax.vmap(lambda x, i: jnp.take(x, i, axis=0, mode="clip"))(images, rows)
    images = jax.vmap(lambda x, i: jnp.take(x, i, axis=1, mode="clip"))(images, columns)
    return jnp.where(inside[..., None], images, 0)


def _within(positions: Array, size: int) -> Array:
    return (positions >= 0) & (positions < size)


class Sampler:
    """Chooses each agent's examples at each step, from the seed and the step alone.

    An epoch has as many steps as the largest shard needs, which is the number of its
    examples divided by the batch size, rounded up. All orders are random, and every
    agent and epoch has its own. What agents with smaller shards do in the meantime
    decides which objective the agents minimise together:

    - "repeat": they go round their shards again, and all batches are full. Every agent
      counts 1/N, and all examples of an agent count the same.
    - "idle": they have seen each example once, and have all-False masks until the end
      of the epoch. If a batch then counts with its share of unmasked examples, every
      example counts the same, and an agent counts by the size of its shard.

    Args:
        shards: for each agent, the indices of its examples.
        batch_size: the number of examples for each agent and step.
        seed: the seed of the orders.
        small_shards: "repeat" or "idle".

    Attributes:
        batch_size: the number of examples for each agent and step.
        steps_per_epoch: the number of steps in an epoch.

    Raises:
        ValueError: the batch size is below 1.
        OptionError: `small_shards` has another value.
    """

    def __init__(
        self,
        shards: Sequence[np.ndarray],
        batch_size: int,
        seed: Sequence[int],
        small_shards: str = SMALL_SHARDS.default,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        SMALL_SHARDS.check(small_shards)
        self._shards = list(shards)
        self._seed = seed
        self._spend = WAYS[small_shards]
        self.batch_size = batch_size
        self.steps_per_epoch = max(-(-len(shard) // batch_size) for shard in shards)
        self._epoch = lru_cache(maxsize=1)(self._draw_epoch)

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The int32 indices and the bool mask of one step, both `[agents, batch]`."""
        epoch, position = divmod(step, self.steps_per_epoch)
        indices, mask = self._epoch(epoch)
        return indices[:, position], mask[:, position]

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        n = self.steps_per_epoch * self.batch_size
        batches = []
        for agent, shard in enumerate(self._shards):
            rng = np.random.default_rng([*self._seed, agent, epoch])
            seen = self._spend(shard, n, rng)
            batches.append(chunked(seen, self.batch_size, self.steps_per_epoch))
        indices, mask = zip(*batches, strict=True)
        return np.stack(indices), np.stack(mask)


def chunked(
    indices: np.ndarray, batch_size: int, n_batches: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a list of indices into batches, and fills up the last ones.

    Args:
        indices: int[samples], at least one.
        batch_size: the number of indices in a batch.
        n_batches: the number of batches; None: as many as the indices need.

    Returns:
        int32 indices `[batches, batch]`, filled up with the first index of the list,
        and a bool mask of the same shape, which is False for these.
    """
    n_batches = n_batches or -(-len(indices) // batch_size)
    filled = np.full(n_batches * batch_size, indices[0], np.int32)
    filled[: len(indices)] = indices
    mask = np.arange(len(filled)) < len(indices)
    shape = (n_batches, batch_size)
    return filled.reshape(shape), mask.reshape(shape)


@dataclasses.dataclass(frozen=True)
class Samples:
    """A fixed set of examples that is read in batches, without augmentation.

    Iterating yields `Batch`es: `[batch, ...]` if all agents share the examples, else
    `[slots, batch, ...]`.

    Attributes:
        load: makes a batch from indices and a mask.
        indices: `[batches, batch]` if shared, else `[batches, agents, batch]`.
        mask: False for entries that only fill up a batch; of the shape of `indices`.
        shared: whether all agents use the same examples.
        as_needed: whether to read only as many batches as it takes.
        load_own: makes a batch from indices and a mask, both `[agents, batch]`; None if
            the examples cannot be divided among the agents.
    """

    load: Callable[[np.ndarray, np.ndarray], Batch]
    indices: np.ndarray
    mask: np.ndarray
    shared: bool
    as_needed: bool = False
    load_own: Callable[[np.ndarray, np.ndarray], Batch] | None = None

    def n_examples(self, n_batches: int) -> float:
        """Counts the examples of the first batches; of own ones, the mean of agents."""
        n_readers = 1 if self.shared else self.mask.shape[1]
        return float(self.mask[:n_batches].sum() / n_readers)

    def divided(self, n_agents: int, batch_size: int | None = None) -> "Samples":
        """Divides shared examples among the agents, each of which gets other batches.

        Args:
            n_agents: the number of agents.
            batch_size: the number of examples in a batch. None: the batches stay as
                they are. Some agents may get a batch without examples.

        Raises:
            ValueError: the examples are not shared, or cannot be divided.
        """
        if not self.shared or self.load_own is None:
            raise ValueError("only examples of a pool that agents share can be divided")
        size = batch_size or self.indices.shape[1]
        indices = self.indices[self.mask]
        # Every agent gets the same number of batches.
        n_each = -(-len(indices) // (size * n_agents))
        batches = chunked(indices, size, n_each * n_agents)
        indices, mask = (x.reshape(n_each, n_agents, size) for x in batches)
        return Samples(self.load_own, indices, mask, shared=False)

    def __iter__(self) -> Iterator[Batch]:
        for indices, mask in zip(self.indices, self.mask, strict=True):
            yield self.load(indices, mask)


def own_samples(
    load: Callable[[np.ndarray, np.ndarray], Batch],
    indices: Sequence[np.ndarray],
    batch_size: int,
) -> Samples:
    """Makes samples of each agent's own.

    Args:
        load: makes a batch from indices and a mask, both `[agents, batch]`.
        indices: `indices[agent]` are int[samples].
        batch_size: the number of examples in a batch.
    """
    n_batches = max(-(-len(own) // batch_size) for own in indices)
    chunks = [chunked(own, batch_size, n_batches) for own in indices]
    return Samples(
        load,
        np.stack([i for i, _ in chunks], axis=1),
        np.stack([m for _, m in chunks], axis=1),
        shared=False,
    )


class Reader:
    """Makes `Samples` from one pool. All of them share compiled programs."""

    def __init__(self, pool: Pool, placement: Placement):
        per_agent = placement.per_agent(load, in_axes=(None, 0, 0))
        load_shared = jax.jit(lambda *i: placement.split_batch(load(*i), shared=True))
        load_own = jax.jit(lambda *i: placement.split_batch(per_agent(*i)))
        self._load_shared = lambda *i: load_shared(pool, *placement.replicate(i))
        self._load_own = lambda *i: load_own(pool, *placement.put(i))

    def shared(self, indices: np.ndarray, batch_size: int) -> Samples:
        """Makes samples that all agents share. `indices` are int[samples]."""
        return Samples(
            self._load_shared,
            *chunked(indices, batch_size),
            shared=True,
            load_own=self._load_own,
        )

    def own(self, indices: Sequence[np.ndarray], batch_size: int) -> Samples:
        """Makes samples of each agent's own. `indices[agent]` are int[samples]."""
        return own_samples(self._load_own, indices, batch_size)


def share(
    split: Split,
    chosen: np.ndarray,
    mean: np.ndarray,
    std: np.ndarray,
    batch_size: int,
    placement: Placement,
) -> Samples:
    """Makes samples that all agents share. Every device holds the chosen images alone.

    Args:
        split: the images to choose from.
        chosen: int[samples], the indices of the images.
        mean: the mean of each channel, as of `Pool`.
        std: the standard deviation of each channel, as of `Pool`.
        batch_size: the number of images in a batch.
        placement: the devices on which the agents live.
    """
    pool = place_pool(
        Split(split.images[chosen], split.labels[chosen]), mean, std, placement
    )
    return Reader(pool, placement).shared(np.arange(len(chosen)), batch_size)


def draw_own(
    shards: Sequence[np.ndarray], size: int, seed: Sequence[int]
) -> list[np.ndarray]:
    """Draws `size` random examples of each agent's shard.

    A smaller shard gives all of its examples. A `size` of 0 means all examples.
    """
    return [
        np.random.default_rng([*seed, agent]).permutation(shard)[: size or None]
        for agent, shard in enumerate(shards)
    ]
