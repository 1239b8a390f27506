"""The training examples that matching and BatchNorm look at, chosen by a config."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from dimat_jax import _randomness
from dimat_jax._division import Division
from dimat_jax.data import selection
from dimat_jax.data._own import OwnReader
from dimat_jax.data.pipeline import Samples, share
from dimat_jax.data.sources import Dataset
from dimat_jax.options import SEED
from dimat_jax.placement import Placement

__all__ = ["Examples", "draw_subset"]

# The purpose of `_randomness` for which an evaluation chooses. What it looks at is not
# sent to the agents.
_MEASURE = "own_for_evaluation"


class Examples:
    """Chooses training examples by a config.

    Args:
        fields: the config's fields by path; empty values are resolved.
        dataset: the data set.
        division: who gets which training images.
        rows: for each agent the positions of its images among those of its device.
        read_own: a function that returns the reader of each agent's own images.
        placement: the devices on which the agents live.
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        dataset: Dataset,
        division: Division,
        rows: Sequence[np.ndarray],
        read_own: Callable[[], OwnReader],
        placement: Placement,
    ):
        self._fields, self._dataset, self._placement = fields, dataset, placement
        self._division, self._rows, self._read_own = division, rows, read_own
        self._shared: dict[tuple[str, int, int], Samples] = {}
        # The images that agents have to get, by their origin and number.
        self._sent: dict[tuple[str, int], np.ndarray] = {}

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
            share=partial(self._share, purpose, batch_size, "trained_on"),
            share_held_out=partial(self._share, purpose, batch_size, "held_out"),
            batch_size=batch_size,
        )
        return choice.data.entry(data)(available, samples)

    def choose_shared(self, choice: selection.Choice) -> Samples | None:
        """Returns examples of a choice for a model that belongs to no agent.

        Where agents look at their own images, these are a sample of all agents' images.
        It has as many images as an agent looks at.
        """
        data, samples, batch_size = (self._fields[option.path] for option in choice)
        if data != "own":  # agents draw nothing here
            return self.choose(choice, _MEASURE, 0)
        most = max(map(len, self._rows))
        size = min(samples or most, most)
        return self._share(_MEASURE, batch_size, "trained_on", size)

    @property
    def image_bytes(self) -> int:
        """Bytes, as uint8 pixels, of the shared images at which agents have looked.

        Every agent has to get them, except for those of its own shard. Images that only
        an evaluation looks at are not counted.
        """
        if not self._sent:
            return 0
        shared = np.unique(np.concatenate(list(self._sent.values())))
        own = np.isin(shared, self._division.trained_on).sum()
        missing = len(self._division.shards) * len(shared) - int(own)
        return missing * self._dataset.train.images[0].nbytes

    def _share(self, purpose: str, batch_size: int, origin: str, size: int) -> Samples:
        """Makes samples of training images that all agents share, once per kind.

        Args:
            purpose: the purpose for which they are chosen.
            batch_size: the number of images in a batch.
            origin: the field of `Division` that holds the images to choose from.
            size: the number of images; 0 for all of them.
        """
        available = getattr(self._division, origin)
        seed = self._fields[SEED.path]
        chosen = available[draw_subset(len(available), size, seed, "proxy")]
        if purpose != _MEASURE:
            self._sent[origin, size] = chosen
        if (origin, size, batch_size) not in self._shared:
            dataset = self._dataset
            self._shared[origin, size, batch_size] = share(
                dataset.train,
                chosen,
                dataset.mean,
                dataset.std,
                batch_size,
                self._placement,
            )
        return self._shared[origin, size, batch_size]


def draw_subset(available: int, size: int, seed: int, purpose: str) -> np.ndarray:
    """Draws `size` (0: all) of the indices below `available`, by the seed.

    The indices are shuffled. Some data sets are stored class by class, and a batch of
    one class would have other statistics than the whole set.
    """
    rng = np.random.default_rng(_randomness.seeds(seed, purpose))
    return rng.permutation(available)[: size or None]
