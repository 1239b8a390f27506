"""Races the layouts of agents that share a device.

For one model, width and number of agents, each layout trains the same agents; for the
others, those layouts do that have been the fastest so far. A cell measures the time of
the first step, which compiles, the time of a later step, and the memory in use. The
cells that decide most come first, since time may run out.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from dimat_jax._race import settled
from dimat_jax.workdir import Workdir
from experiments.device._cells import Cell, LeftOut, Log
from experiments.device._subject import BATCH, LAYOUTS, Steps, step_config
from experiments.device.parts import Settings

__all__ = ["Subject", "best_layout", "cells"]

# One agent alone runs without a layout; the option still needs a name.
_ALONE = "unroll"


class Subject(NamedTuple):
    """What is trained.

    Attributes:
        model: the architecture.
        width: the width of the model.
        agents: the number of agents.
    """

    model: str
    width: float
    agents: int

    def __str__(self) -> str:
        return f"{self.model} width {self.width:g}, {self.agents} agents"


_SUBJECTS = (
    Subject("resnet20", 1, 1),
    Subject("resnet20", 1, 5),
    Subject("resnet20", 8, 1),
    Subject("resnet20", 8, 5),
    Subject("vgg16", 1, 1),
    Subject("vgg16", 1, 5),
    Subject("resnet20", 1, 16),
    Subject("vit", 1, 1),
    Subject("vit", 1, 5),
    Subject("resnet20", 1, 32),
    Subject("mlp", 1, 1),
    Subject("mlp", 1, 5),
    Subject("resnet20", 8, 16),
    Subject("resnet20", 4, 1),
    Subject("resnet20", 4, 5),
    Subject("mlp", 1, 32),
    Subject("vit", 1, 16),
    Subject("vgg16", 1, 16),
    Subject("resnet20", 4, 16),
    Subject("vit", 1, 32),
    Subject("vgg16", 1, 32),
    Subject("mlp", 1, 16),
    Subject("resnet20", 8, 32),
    Subject("resnet20", 4, 32),
)
_TINY = (
    Subject("resnet20", 0.25, 1),
    Subject("resnet20", 0.25, 2),
    Subject("mlp", 0.25, 2),
)
# Layouts that differ from "vmap" in their convolutions alone.
_OF_CONVOLUTIONS = ("im2col", "grouped")
# The number of agents up to which unrolling them is measured: it compiles each anew.
_FEW = 5
# The limit of a cell in seconds, and of one with more than 5 agents.
_LIMIT, _LIMIT_OF_MANY = 45, 60
# The subject for which a run's own choice of a layout is measured, and the subject
# after which that happens. By then its programs are compiled.
_CHOICE, _CHOICE_AFTER = Subject("resnet20", 1, 5), Subject("resnet20", 8, 5)


def cells(settings: Settings) -> list[Cell]:
    """The cells of this part."""
    found = []
    for subject in _TINY if settings.tiny else _SUBJECTS:
        every = settings.tiny or subject == _CHOICE
        for layout in _layouts(subject, every):
            limit = _LIMIT if subject.agents <= 5 else _LIMIT_OF_MANY
            measure = _measure(settings, subject, layout, limit)
            found.append(Cell(f"{subject}, {layout}", limit, measure))
        if subject == _CHOICE_AFTER or settings.tiny and subject == _TINY[-1]:
            measure = _measure_choice(settings, _TINY[1] if settings.tiny else _CHOICE)
            found.append(Cell("what a run chooses", 3 * _LIMIT, measure))
    return found


def _layouts(subject: Subject, every: bool) -> Iterator[str]:
    """The layouts that are measured: every one, or those that a run chooses from."""
    convolves, few = subject.model != "mlp", subject.agents <= _FEW
    if subject.agents == 1:
        yield _ALONE
    elif every:
        # Few agents are hardly more than one chunk.
        layouts = [name for name in LAYOUTS if not few or " of " not in name]
        yield from (n for n in layouts if convolves or n not in _OF_CONVOLUTIONS)
    else:
        yield "grouped" if convolves else "vmap"
        yield "unroll" if few else "chunks of 4"


def _measure(settings: Settings, subject: Subject, layout: str, limit: float):
    batch = 8 if settings.tiny else BATCH

    def measure(log: Log) -> None:
        log.note(**subject._asdict(), layout=layout)
        _expect_to_finish(subject, layout, limit, log)
        steps = Steps(step_config(*subject, layout=layout, batch=batch))
        log.note(first_seconds=steps.first_seconds)
        seconds, spread = steps.seconds()
        log.note(
            step_seconds=seconds,
            spread=spread,
            images_per_second=subject.agents * batch / seconds,
        )
        log.note(host_seconds=steps.host_seconds())
        log.note(peak_bytes=steps.peak_bytes())

    return measure


def _measure_choice(settings: Settings, subject: Subject):
    """Measures which layout a run chooses by itself, and how long that takes."""

    def measure(log: Log) -> None:
        log.note(**subject._asdict(), layout="auto")
        batch = 8 if settings.tiny else BATCH
        # The choice that an earlier measurement has kept would hide this one's time.
        os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(dir=settings.work)
        started = time.perf_counter()
        folder = Workdir(settings.work / "no-such-run")
        # Only a long run times the layouts.
        config = step_config(*subject, batch=batch, rounds=100_000)
        experiment = settled(config, folder, lambda line: None)
        log.note(choice_seconds=time.perf_counter() - started)
        log.note(chosen=experiment.layout.name, reason=experiment.layout.reason)

    return measure


def _expect_to_finish(subject: Subject, layout: str, limit: float, log: Log) -> None:
    """Leaves a cell out that would compile longer than it may.

    The time to compile is extrapolated, in proportion to the agents, from the same
    model with fewer agents.
    """
    known = sorted(
        (figures["agents"], figures["first_seconds"])
        for figures in log.figures.values()
        if "first_seconds" in figures
        and (figures["model"], figures["width"]) == subject[:2]
        and (figures["layout"] == layout or figures["agents"] == 1)
        and figures["agents"] < subject.agents
    )
    if len(known) < 2:
        return
    (fewer, less), (more, longer) = known[-2:]
    slope = max(0.0, (longer - less) / (more - fewer))
    expected = longer + slope * (subject.agents - more)
    if expected > limit:
        raise LeftOut(f"the first step would take about {expected:.0f} s")


def best_layout(record: dict[str, Any], model: str, width: float, agents: int) -> str:
    """The fastest layout that this part has found, or "auto" if it found none.

    Without figures for this number of agents, those of the nearest number count.
    """
    found = [
        (abs(figures["agents"] - agents), figures["step_seconds"], figures["layout"])
        for figures in (cell["figures"] for cell in record["cells"].values())
        if "step_seconds" in figures
        and (figures["model"], figures["width"]) == (model, width)
        and figures["agents"] > 1
    ]
    return min(found)[2] if found else "auto"
