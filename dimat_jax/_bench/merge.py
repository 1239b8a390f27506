"""Times a merge round by phase, against the published schedule and with few images.

The sides start from the same agents in every call:

- published: the published code's schedule, with this library's computations;
- round: a merge round on the same images;
- few: a merge round on as many images as it takes (`match_samples="enough"`), and two
  batches of images for BatchNorm;
- steps: local steps, so that a merge can be counted in local epochs.

If the agents are trained ones, their accuracy right after the merge is measured too.
"""

import statistics
from typing import Any

import jax
import numpy as np

from dimat_jax._bench._agents import agents_of
from dimat_jax._bench._published import PublishedSchedule
from dimat_jax._bench._record import Bench, Settings, table
from dimat_jax._bench._steps import changed
from dimat_jax._bench._timing import Side, Timing, race, ratio
from dimat_jax._bench._worker import Program, config_from, jax_program
from dimat_jax.algorithms.base import MergeData, Variables
from dimat_jax.config import Config, fields_of, record_of
from dimat_jax.data.selection import (
    BATCH_SIZE,
    BN_BATCH_SIZE,
    BN_DATA,
    BN_SAMPLES,
    BN_WHEN,
    ENOUGH,
    MATCH_DATA,
    MATCH_SAMPLES,
)
from dimat_jax.errors import UserError
from dimat_jax.experiment import Experiment
from dimat_jax.tree import stack

__all__ = ["BENCH", "merge_side", "phase_seconds"]

FULL_IMAGES = 5000
"""The number of images of a merge with --full, if there are as many."""

_HERE = "dimat_jax._bench.merge"


def run(config: Config, settings: Settings) -> dict[str, Any]:
    """Times a merge round by phase, in seconds and in local epochs.

    Raises:
        UserError: the config's algorithm does not merge, or the agents do not fit.
    """
    record = record_of(fields_of(config))
    if not record.merges:
        raise UserError(f"config.algorithm is {config.algorithm!r}; it does not merge")
    sides = [merge_side("round", config, settings.agents)]
    if record.matches_activations:
        experiment = Experiment(config)
        n_images = _n_images(experiment, settings.full)
        n_few = min(2 * fields_of(config)[BATCH_SIZE.path], n_images)
        equal = _on_images(experiment, n_images, n_images)
        few = _on_images(experiment, ENOUGH, n_few)
        sides = [
            _side("published", "published_merges", equal, settings.agents),
            merge_side("round", equal, settings.agents),
            merge_side("few", few, settings.agents),
        ]
    steps = {"config": config.to_dict(), "steps": settings.steps}
    sides.append(Side("steps", "dimat_jax._bench._steps:local_steps", steps))
    timings = race(sides, settings.repeats)
    merges = {name: t for name, t in timings.items() if name != "steps"}
    return {
        "sides": {name: timing.record() for name, timing in timings.items()},
        "merges": {name: _merge_record(t, merges) for name, t in merges.items()},
        "merge_per_local_epoch": _per_epoch(timings, settings.steps),
    }


def merge_side(name: str, config: Config, agents: str) -> Side:
    """Returns the side that times a config's merge round; see `merge_rounds`."""
    return _side(name, "merge_rounds", config, agents)


def _side(name: str, program: str, config: Config, agents: str) -> Side:
    arguments = {"config": config.to_dict(), "agents": agents}
    return Side(name, f"{_HERE}:{program}", arguments)


def _n_images(experiment: Experiment, full: bool) -> int:
    """Returns the number of images of a merge, at most as many as there are."""
    available = len(experiment.dataset.train.labels)
    chosen = fields_of(experiment.config)[MATCH_SAMPLES.path]
    wanted = FULL_IMAGES if full else chosen if isinstance(chosen, int) else 0
    return min(wanted or available, available)


def _on_images(experiment: Experiment, match: int | str, recalibrate: int) -> Config:
    """Returns the config with shared images: for matching, and for BatchNorm."""
    fields = {MATCH_DATA.path: "proxy", MATCH_SAMPLES.path: match}
    if experiment.task.batch_statistics is not None:
        fields |= {
            BN_DATA.path: "proxy",
            BN_SAMPLES.path: recalibrate,
            BN_BATCH_SIZE.path: fields_of(experiment.config)[BATCH_SIZE.path],
            BN_WHEN.path: "communication",
        }
    return changed(experiment.config, fields)


# The programs =========================================================================


def merge_rounds(config: dict[str, Any], agents: str) -> Program:
    """Makes a program whose every call is a merge round of the same agents.

    Args:
        config: the config as a dict; see `config_from`.
        agents: the path of the agents; see `agents_of`.
    """
    experiment = Experiment(config_from(config))
    algorithm = experiment.algorithm
    state = algorithm.init(agents_of(experiment, agents))
    data, network = experiment.merge_data(1), experiment.network_at_round(1)
    accuracy = _Accuracy(experiment, agents)

    def call() -> dict[str, Any]:
        key = jax.random.key(0)
        merged, metrics = algorithm.communicate(state, data, network, key)
        jax.block_until_ready(merged)
        accuracy.merged = algorithm.variables(merged)
        return {
            "seconds_by_phase": metrics["merge_seconds"],
            "images": metrics.get("match_samples_used"),
        }

    return jax_program(call, accuracy)


def published_merges(config: dict[str, Any], agents: str) -> Program:
    """Makes a program whose every call merges by the published schedule.

    Args:
        config: the config as a dict; see `config_from`.
        agents: the path of the agents; see `agents_of`.
    """
    experiment = Experiment(config_from(config))
    merge = PublishedSchedule(experiment.task)
    start = agents_of(experiment, agents)
    samples, network = _shared(experiment.merge_data(1)), experiment.network_at_round(1)
    accuracy = _Accuracy(experiment, agents)

    def call() -> dict[str, Any]:
        merged = jax.block_until_ready(merge(start, samples, network))
        accuracy.merged = stack(merged)
        return {"images": samples.n_examples(len(samples.indices))}

    return jax_program(call, accuracy)


def _shared(data: MergeData):
    assert data.match is not None and data.match.shared
    return data.match


class _Accuracy:
    """Measures how well merged agents classify. A call returns it as a fact.

    Args:
        experiment: the experiment with the test images.
        agents: the path of the agents; "" for untrained ones, which are not measured.

    Attributes:
        merged: the agents after the latest merge.
    """

    def __init__(self, experiment: Experiment, agents: str):
        self._experiment, self._trained = experiment, bool(agents)
        self._measured: float | None = None
        self.merged: Variables | None = None

    def __call__(self) -> dict[str, Any]:
        if not self._trained:
            return {}
        # Every call merges the same agents, so one measurement is enough.
        if self._measured is None and self.merged is not None:
            found = self._experiment.evaluator(self.merged)
            self._measured = float(np.mean(found.accuracy))
        return {"accuracy": self._measured}


# The result ===========================================================================


def _merge_record(timing: Timing, merges: dict[str, Timing]) -> dict[str, Any]:
    """Returns what JSON holds of one way to merge, beside `Timing.record`."""
    if timing.unavailable:
        return {"unavailable": timing.unavailable}
    facts = timing.facts[-1]
    found: dict[str, Any] = {
        "seconds": timing.median,
        "compile_seconds": timing.compile_seconds,
        "peak_bytes": timing.peak_bytes,
        "images": facts.get("images"),
        "accuracy": facts.get("accuracy"),
        "seconds_by_phase": phase_seconds(timing),
    }
    if "published" in merges:
        found["published_per_this"] = ratio(merges["published"], timing)
    return found


def phase_seconds(timing: Timing) -> dict[str, float]:
    """Returns the median seconds of each phase of a merge.

    It is empty for a program that does not time its phases.
    """
    phases = [facts.get("seconds_by_phase", {}) for facts in timing.facts]
    return {
        phase: statistics.median(seconds[phase] for seconds in phases)
        for phase in phases[0]
    }


def _per_epoch(timings: dict[str, Timing], steps: int) -> float | None:
    """Returns how many local epochs a merge round takes."""
    found = ratio(timings["round"], timings["steps"])
    if found is None:
        return None
    return found * steps / timings["steps"].facts[0]["steps_per_epoch"]


ROWS = {
    "published_per_this": "times as fast as published",
    "seconds": "seconds",
    "compile_seconds": "more at the first call (compilation), s",
    "peak_gigabytes": "peak memory, GB",
    "images": "images to match on",
    "accuracy": "accuracy after the merge",
}
"""The rows of the table, by the field of `_merge_record`."""


def show(result: dict[str, Any]) -> str:
    """Writes a table with a column for each way to merge, and what a merge costs."""
    merges = {
        name: {**found, "peak_gigabytes": found.get("peak_bytes", 0) / 1e9}
        for name, found in result["merges"].items()
        if "unavailable" not in found
    }
    phases = {phase for found in merges.values() for phase in found["seconds_by_phase"]}
    rows = [
        [label, *(found.get(field) for found in merges.values())]
        for field, label in ROWS.items()
    ] + [
        [f"{phase}, s", *(f["seconds_by_phase"].get(phase) for f in merges.values())]
        for phase in sorted(phases)
    ]
    lines = [table(["a merge", *merges], rows)]
    lines += [
        f"{name} was not measured: {found['unavailable']}"
        for name, found in result["merges"].items()
        if "unavailable" in found
    ]
    per_epoch = result["merge_per_local_epoch"]
    if per_epoch is not None:
        lines.append(f"A merge round takes as long as {per_epoch:.3g} local epochs.")
    return "\n\n".join(lines)


BENCH = Bench("merge", run, show)
