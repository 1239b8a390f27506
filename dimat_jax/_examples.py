"""The training examples that matching and BatchNorm look at, chosen by a config."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from dimat_jax import _randomness
from dimat_jax.data import selection
from dimat_jax.data._own import OwnReader
from dimat_jax.data.pipeline import Samples, share
from dimat_jax.data.sources import Dataset
from dimat_jax.options import SEED
from dimat_jax.placement import Placement

__all__ = ["Examples", "draw_subset"]


class Examples:
    """Chooses training examples by a config.

    Args:
        fields: the config's fields by path; empty values are resolved.
        dataset: the data set.
        rows: for each agent the positions of its images among those of its device.
        read_own: a function that returns the reader of each agent's own images.
        placement: the devices on which the agents live.
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        dataset: Dataset,
        rows: Sequence[np.ndarray],
        read_own: Callable[[], OwnReader],
        placement: Placement,
    ):
        self._fields, self._dataset, self._placement = fields, dataset, placement
        self._rows, self._read_own = rows, read_own
        self._shared: dict[tuple[int, int], Samples] = {}
        # No agent needs these images, so they are not among those that agents share.
        self._measuring: Samples | None = None

    def choose(
        self, choice: selection.Choice, purpose: str, number: int
    ) -> Samples | None:
        """Returns the examples that the config chooses; None if it chooses none.

        Args:
            choice: the options of the choice.
            purpose: a purpose of `_randomness`, by which an agent chooses among its own
                images.
            number: the round or the step for which it chooses.
        """
        data, samples, batch_size = (self._fields[option.path] for option in choice)
        available = selection.Available(
            read_own=self._read_own(),
            shards=self._rows,
            seed=[*_randomness.seeds(self._fields[SEED.path], purpose), number],
            share=partial(self._share, batch_size=batch_size),
            batch_size=batch_size,
        )
        return choice.data.entry(data)(available, samples)

    def choose_shared(self, choice: selection.Choice) -> Samples | None:
        """Returns examples of a choice for a model that belongs to no agent.

        Where agents look at their own images, these are a sample of all agents' images.
        It has as many images as an agent looks at.
        """
        data, samples, batch_size = (self._fields[option.path] for option in choice)
        if data != "own":
            return self.choose(choice, "own", 0)  # agents draw nothing here
        if self._measuring is None:
            most = max(map(len, self._rows))
            self._measuring = self._sample(min(samples or most, most), batch_size)
        return self._measuring

    def _share(self, size: int, batch_size: int) -> Samples:
        """Makes samples of training images that all agents share, once per size."""
        if (size, batch_size) not in self._shared:
            self._shared[size, batch_size] = self._sample(size, batch_size)
        return self._shared[size, batch_size]

    def _sample(self, size: int, batch_size: int) -> Samples:
        """Draws training images (0: all), and places them on every device."""
        train, seed = self._dataset.train, self._fields[SEED.path]
        chosen = draw_subset(len(train.labels), size, seed, "proxy")
        statistics = (self._dataset.mean, self._dataset.std)
        return share(train, chosen, *statistics, batch_size, self._placement)


def draw_subset(available: int, size: int, seed: int, purpose: str) -> np.ndarray:
    """Draws `size` (0: all) of the indices below `available`, by the seed.

    The indices are shuffled. Some data sets are stored class by class, and a batch of
    one class would have other statistics than the whole set.
    """
    rng = np.random.default_rng(_randomness.seeds(seed, purpose))
    return rng.permutation(available)[: size or None]
