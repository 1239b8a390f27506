"""Images that a device holds for the agents that live there, and for no others."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Key, Shaped

from dimat_jax._slots import per_device, slots_of_devices
from dimat_jax.data.pipeline import (
    NO_AUGMENTATION,
    Augmentation,
    Batch,
    Samples,
    normalised,
    own_samples,
)
from dimat_jax.data.sources import Split
from dimat_jax.placement import Placement

__all__ = ["Holdings", "OwnPool", "OwnReader", "load_own", "place_own_pool"]


class Holdings:
    """The images that each device holds, as lists of indices into a split.

    The copies of agents that fill up the last slots get no images.

    Args:
        shards: for each agent the indices of its images. An agent may have several
            lists, one for each phase of a run.
        placement: the devices on which the agents live.

    Attributes:
        placement: the devices on which the agents live.
        of_device: for each device the indices that it holds, ascending.
        most: the number of images on the device that holds the most of them.
    """

    def __init__(self, *shards: Sequence[np.ndarray], placement: Placement):
        self.placement = placement
        self.of_device = [
            _union([phase[agent] for phase in shards for agent in agents])
            for agents in self._agents_of_devices()
        ]
        self.most = max(map(len, self.of_device))

    def rows(self, shards: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns where the devices hold the images of each agent's shard.

        Args:
            shards: for each agent indices that its device holds.

        Returns:
            for each agent the positions in the list of its device, in the order of the
            shard.
        """
        return [
            np.searchsorted(held, shards[agent])
            for held, agents in zip(
                self.of_device, self._agents_of_devices(), strict=True
            )
            for agent in agents
        ]

    def _agents_of_devices(self) -> list[list[int]]:
        n_agents = self.placement.n_agents
        slots = slots_of_devices(self.placement)
        return [[int(slot) for slot in row if slot < n_agents] for row in slots]


def _union(shards: Sequence[np.ndarray]) -> np.ndarray:
    if not shards:
        return np.zeros(0, np.int64)
    return np.unique(np.concatenate(shards))


class OwnPool(NamedTuple):
    """The images of each device's own agents. Only this device holds them.

    Attributes:
        images: the pixels as stored, or other inputs. Zeros fill up the devices that
            hold fewer images than others.
        labels: the classes of the images.
        mean: the mean of each channel, as of `Pool`.
        std: the standard deviation of each channel, as of `Pool`.
    """

    images: Shaped[Array, "devices samples ..."]
    labels: Shaped[Array, "devices samples ..."]
    mean: Float[Array, " channels"]
    std: Float[Array, " channels"]


def place_own_pool(
    split: Split, mean: np.ndarray, std: np.ndarray, holdings: Holdings
) -> OwnPool:
    """Places on each device the images of a split that it holds.

    A process reads only the images of its own devices from the host's arrays, which may
    be mapped from a file.
    """
    placement = holdings.placement

    def place(array: np.ndarray) -> Array:
        def read(index):
            held = holdings.of_device[index[0].start or 0]
            rows = np.zeros((1, holdings.most, *array.shape[1:]), array.dtype)
            rows[0, : len(held)] = array[held]
            return rows

        shape = (placement.mesh.shape["agents"], holdings.most, *array.shape[1:])
        return jax.make_array_from_callback(shape, placement.sharding, read)

    statistics = placement.replicate((np.float32(mean), np.float32(std)))
    return OwnPool(place(split.images), place(split.labels), *statistics)


def load_own(
    placement: Placement,
    pool: OwnPool,
    indices: Int32[Array, "slots batch"],
    mask: Bool[Array, "slots batch"],
    keys: Key[Array, " slots"] | None = None,
    augmentation: Augmentation = NO_AUGMENTATION,
) -> Batch:
    """Reads all agents' batches, each from the images that its device holds.

    It is pure; call it within `jax.jit`.

    Args:
        placement: the devices on which the agents live.
        pool: the images.
        indices: the positions among the images of the device (see `Holdings.rows`).
        mask: False for entries that only fill up the batch.
        keys: the keys that the augmentation consumes; None: nothing is augmented.
        augmentation: the random changes.
    """

    def take_rows(images, labels, rows):
        # The copies of agents in the last slots have positions on other devices. They
        # may read any image.
        return tuple(
            jnp.take(array[0], rows, axis=0, mode="clip") for array in (images, labels)
        )

    images, labels = per_device(placement, take_rows)(pool.images, pool.labels, indices)

    def normalise(images, mean, std, *key):
        return normalised(images, mean, std, key[0] if key else None, augmentation)

    statistics = (pool.mean, pool.std)
    key = () if keys is None else (keys,)
    axes = (0, None, None, *[0] * len(key))
    inputs = placement.per_agent(normalise, axes)(images, *statistics, *key)
    return Batch(inputs, labels, mask)


class OwnReader:
    """Makes samples of each agent's own. All of them share a compiled program.

    Args:
        pool: the images.
        placement: the devices on which the agents live.
    """

    def __init__(self, pool: OwnPool, placement: Placement):
        load = jax.jit(lambda *i: placement.split_batch(load_own(placement, *i)))
        self._load = lambda *i: load(pool, *placement.put(i))

    def __call__(self, indices: Sequence[np.ndarray], batch_size: int) -> Samples:
        """Makes samples. `indices[agent]` are positions on the agent's device."""
        return own_samples(self._load, indices, batch_size)
