"""Times a merge round by phase, and compares it with a local epoch."""

import statistics
from typing import Any

import jax

from dimat_jax._bench._record import Bench, Settings, table
from dimat_jax._bench._timing import Side, Timing, race
from dimat_jax._bench._worker import Program, config_from, jax_program
from dimat_jax.config import Config, fields_of, record_of
from dimat_jax.errors import UserError
from dimat_jax.experiment import Experiment

__all__ = ["BENCH"]


def run(config: Config, settings: Settings) -> dict[str, Any]:
    """Times a merge round by phase, in seconds and in local epochs.

    Raises:
        UserError: the config's algorithm does not merge.
    """
    if not record_of(fields_of(config)).merges:
        raise UserError(f"config.algorithm is {config.algorithm!r}; it does not merge")
    fields = config.to_dict()
    steps = {"config": fields, "steps": settings.steps}
    timings = race(
        [
            Side("merge", "dimat_jax._bench.merge:merge_rounds", {"config": fields}),
            Side("steps", "dimat_jax._bench._steps:local_steps", steps),
        ],
        settings.repeats,
    )
    merge, local = timings["merge"], timings["steps"]
    epoch = local.median / settings.steps * local.facts[0]["steps_per_epoch"]
    return {
        "sides": {name: timing.record() for name, timing in timings.items()},
        "seconds": merge.median,
        "seconds_by_phase": _by_phase(merge),
        "local_epoch_seconds": epoch,
        "merge_per_local_epoch": merge.median / epoch,
    }


def merge_rounds(config: dict[str, Any]) -> Program:
    """Makes a program that merges once in each call. Its facts are the phases."""
    experiment = Experiment(config_from(config))
    state = experiment.algorithm.init(experiment.initial_variables())
    number = 0

    def call() -> dict[str, Any]:
        nonlocal state, number
        number += 1
        state, metrics = experiment.algorithm.communicate(
            state,
            experiment.merge_data(number),
            experiment.network_at_round(number),
            jax.random.key(0),
        )
        jax.block_until_ready(state)
        return metrics["merge_seconds"]

    return jax_program(call)


def _by_phase(timing: Timing) -> dict[str, float]:
    """Returns the median seconds of each phase of a merge."""
    return {
        phase: statistics.median(facts[phase] for facts in timing.facts)
        for phase in timing.facts[0]
    }


def show(result: dict[str, Any]) -> str:
    """Writes the seconds of each phase, of the whole merge and of a local epoch."""
    rows = [
        *result["seconds_by_phase"].items(),
        ("a merge round", result["seconds"]),
        ("the first, with compilation", result["sides"]["merge"]["first_call_seconds"]),
        ("a local epoch", result["local_epoch_seconds"]),
        ("a merge round / a local epoch", result["merge_per_local_epoch"]),
    ]
    return table(["", "seconds"], rows)


BENCH = Bench("merge", run, show)
