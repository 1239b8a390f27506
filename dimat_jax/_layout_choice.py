"""Chooses how the agents of a run share a device."""

from collections.abc import Callable
from typing import Any, NamedTuple

from dimat_jax._layouts import CHUNK
from dimat_jax.config import Config
from dimat_jax.placement import AUTO, BATCHING, Batching, automatic

__all__ = ["LayoutChoice", "choose"]


class LayoutChoice(NamedTuple):
    """A layout, and the reason for it.

    Attributes:
        batching: the name of the layout.
        chunk: the number of agents in a chunk, for the layout "chunks".
        reason: why the layout was chosen: a clause in words.
    """

    batching: Batching
    chunk: int
    reason: str

    @property
    def name(self) -> str:
        """The layout in words, e.g. "chunks of 4"."""
        of_size = f" of {self.chunk}" if self.batching == "chunks" else ""
        return f"{self.batching}{of_size}"


def choose(
    config: Config, device: Any, n_local: int, convolves: Callable[[], bool]
) -> LayoutChoice:
    """Returns the layout that a config names, or the one that suits model and device.

    Nothing is timed here.

    Args:
        config: the run's config.
        device: one of the devices.
        n_local: the number of agents on a device.
        convolves: finds out whether the model has convolutions.
    """
    named, chunk = config.placement.batching, config.placement.chunk
    if named != AUTO.name:
        return LayoutChoice(named, chunk, f"{BATCHING.path} says so")
    if n_local == 1:
        return LayoutChoice("vmap", chunk, "every agent has a device of its own")
    batching = automatic(device.platform, convolves())
    having = "with" if convolves() else "without"
    reason = f"it suits models {having} convolutions on {device.device_kind}"
    return LayoutChoice(batching, CHUNK.default, reason)
