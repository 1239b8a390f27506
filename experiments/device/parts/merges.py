"""A merge by phase: the first call, which compiles, and later calls."""

import time

import jax
import numpy as np

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
    sizes = _TINY if settings.tiny else _SIZES
    return [
        Cell(
            f"resnet20 width {width:g}, {_AGENTS} agents on a ring, {images} images",
            _LIMIT,
            _measure(settings, width, images),
        )
        for width, images in sizes
    ]


def _measure(settings: Settings, width: float, images: int):
    def measure(log: Log) -> None:
        layouts = read_record(settings.out / "layouts.json")
        layout = best_layout(layouts, "resnet20", width, _AGENTS)
        config = step_config(
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
        experiment = Experiment(config)
        log.note(width=width, agents=_AGENTS, images=images, layout=layout)
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
