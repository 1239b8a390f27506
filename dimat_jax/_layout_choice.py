"""Chooses how the agents of a run share a device."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from dimat_jax._layouts import AUTO, BATCHING, CHUNK, automatic
from dimat_jax.config import Config

__all__ = ["LayoutChoice", "choose"]


class LayoutChoice(NamedTuple):
    """A layout, and the reason for it.

    Attributes:
        batching: the name of the layout.
        chunk: the number of agents in a chunk, for the layout "chunks".
        reason: why the layout was chosen: a clause in words.
        device: the kind of the devices for which it was chosen.
    """

    batching: str
    chunk: int
    reason: str
    device: str = ""

    @staticmethod
    def read(path: Path) -> "LayoutChoice":
        """Reads what `_asdict` has written as JSON.

        Raises:
            OSError: there is no such file.
            ValueError: the file holds no JSON.
            TypeError: the JSON has other fields.
        """
        return LayoutChoice(**json.loads(path.read_text()))

    @property
    def name(self) -> str:
        """The layout in words, e.g. "chunks of 4"."""
        of_size = f" of {self.chunk}" if self.batching == "chunks" else ""
        return f"{self.batching}{of_size}"


def choose(config: Config, device: Any, convolves: Callable[[], bool]) -> LayoutChoice:
    """Returns the layout that a config names, or the one that suits model and device.

    Nothing is timed here.

    Args:
        config: the run's config.
        device: one of the devices.
        convolves: finds out whether the model has convolutions.
    """
    kind = device.device_kind
    named, chunk = config.placement.batching, config.placement.chunk
    if named != AUTO.name:
        return LayoutChoice(named, chunk, f"{BATCHING.path} says so", kind)
    batching = automatic(device.platform, convolves())
    having = "with" if convolves() else "without"
    reason = f"it suits models {having} convolutions on {kind}"
    return LayoutChoice(batching, CHUNK.default, reason, kind)
