"""A merge by phase, and by the schedule of the published code.

The first call, which compiles, and later calls are measured.
"""

import time

import jax
import numpy as np

from dimat_jax._bench._published import PublishedSchedule
from dimat_jax.experiment import Experiment
from experiments.device._cells import Cell, Log, read_record
from experiments.device._subject import step_config
from experiments.device.parts import Settings
from experiments.device.parts.layouts import best_layout

__all__ = ["cells"]

_AGENTS = 5
_REPEATS = 2
# The width of the ResNet-20, and the number of images that merging looks at.
_SIZES = ((1, 1000), (8, 1000), (1, 5000), (8, 5000))
# The limit of a cell in seconds.
_LIMIT = 40
_TINY = ((0.25, 100), (0.25, 200))


def cells(settings: Settings) -> list[Cell]:
    """The cells of this part."""
    found = []
    for width, images in _TINY if settings.tiny else _SIZES:
        name = f"resnet20 width {width:g}, {_AGENTS} agents on a ring, {images} images"
        found.append(Cell(name, _LIMIT, _measure(settings, width, images)))
        published = _measure_published(settings, width, images)
        found.append(Cell(f"{name}, published schedule", _LIMIT, published))
    return found


def _experiment(settings: Settings, width: float, images: int, log: Log) -> Experiment:
    layouts = read_record(settings.out / "layouts.json")
    layout = best_layout(layouts, "resnet20", width, _AGENTS)
    log.note(width=width, agents=_AGENTS, images=images, layout=layout)
    return Experiment(
        step_config(
            "resnet20",
            width,
            _AGENTS,
            layout=layout,
            batch=16 if settings.tiny else 100,
            algorithm="dimat",
            topology="ring",
            merge__match_data="proxy",
            merge__match_samples=images,
            batch_norm__data="proxy",
            batch_norm__samples=images,
        )
    )


def _measure(settings: Settings, width: float, images: int):
    """Measures the library's merge, and its phases."""

    def measure(log: Log) -> None:
        experiment = _experiment(settings, width, images, log)
        state = experiment.algorithm.init(experiment.initial_variables())
        later, phases = [], []
        for number in range(1, 2 + _REPEATS):
            data = experiment.merge_data(number)
            network = experiment.network_at_round(number)
            key = experiment.communication_key(number)
            started = time.perf_counter()
            state, metrics = experiment.algorithm.communicate(state, data, network, key)
            jax.block_until_ready(state)
            seconds = time.perf_counter() - started
            if number == 1:
                log.note(first_seconds=seconds, first_phases=metrics["merge_seconds"])
                continue
            later.append(seconds)
            phases.append(metrics["merge_seconds"])
            log.note(
                later_seconds=float(np.median(later)),
                later_phases={
                    name: float(np.median([phase[name] for phase in phases]))
                    for name in phases[0]
                },
            )

    return measure


def _measure_published(settings: Settings, width: float, images: int):
    """Measures the same merge by the schedule of the published code."""

    def measure(log: Log) -> None:
        experiment = _experiment(settings, width, images, log)
        merge = PublishedSchedule(experiment.task)
        agents = experiment.initial_variables()
        network = experiment.network_at_round(1)
        samples = experiment.merge_data(1).match
        assert samples is not None
        times = []
        for _ in range(1 + _REPEATS):
            started = time.perf_counter()
            jax.block_until_ready(merge(agents, samples, network))
            times.append(time.perf_counter() - started)
            log.note(first_seconds=times[0])
        log.note(later_seconds=float(np.median(times[1:])))

    return measure
