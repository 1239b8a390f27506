"""What is measured: one file a part. `PARTS` has them in the order in which they run.

A part is a function that takes `Settings` and returns cells.
"""

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path

from experiments.device._cells import Cell

__all__ = ["PARTS", "Part", "Settings", "cells_of"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all parts know.

    Attributes:
        work: the folder for files that nobody keeps.
        out: the folder of the JSON files. Later parts read the figures of earlier ones.
        data: the folder with CIFAR-100, as `data.dir` of a config; None if it is not
            there.
        seconds: the time limit of the part.
        tiny: whether sizes are so small that a CPU runs all parts in minutes. The
            figures then mean nothing.
    """

    work: Path
    out: Path
    data: Path | None
    seconds: float
    tiny: bool


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of the measurements.

    Attributes:
        name: the name of the part, of its file here, and of its JSON file.
        seconds: its time limit if all parts together have `TOTAL` seconds.
        summary: what it measures, in one sentence.
        beside: whether it runs beside the part before it. Parts that measure no times
            may share the machine.
    """

    name: str
    seconds: float
    summary: str
    beside: bool = False


PARTS: tuple[Part, ...] = (
    Part("facts", 45, "The machine, and how fast its matrix products are."),
    Part("algorithms", 100, "Whether every algorithm runs, from end to end."),
    Part("models", 100, "Whether every model runs, from end to end.", beside=True),
    Part("tests", 100, "Whether the tests marked `gpu` pass.", beside=True),
    Part("layouts", 250, "The layouts of agents that share a device."),
    Part("merges", 60, "A merge by phase, first and later calls."),
    Part("precision", 45, "bfloat16 against float32; model FLOPs utilisation."),
    Part("pytorch", 50, "The same single model in PyTorch."),
    Part("protocol", 170, "The paper's protocol on CIFAR-100, shortened."),
)
"""The budget. The protocol gets what the parts before it have left over, too."""


def cells_of(name: str, settings: Settings) -> Sequence[Cell]:
    """The cells of a part."""
    # A part is imported by its own worker alone: importing JAX starts the device.
    cells = importlib.import_module(f"{__name__}.{name}").cells(settings)
    if settings.tiny:
        # The limits suit a GPU. In a rehearsal the limit of the part is enough.
        return [cell._replace(seconds=settings.seconds) for cell in cells]
    return cells
