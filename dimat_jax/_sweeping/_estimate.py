"""Says what a sweep would do, and about how long it would take."""

import heapq
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from tabulate import tabulate

from dimat_jax._chosen import number_of_agents
from dimat_jax._metrics import evaluations, read_rows
from dimat_jax._pretrain import SharedAgents
from dimat_jax._sweeping._plan import Job, in_order, pretraining_key
from dimat_jax._sweeping._shares import Share
from dimat_jax._sweeping._timing import CALIBRATION_STEPS, Timing, seconds_of
from dimat_jax.config import Config, fields_of, resolved
from dimat_jax.experiment import Experiment

__all__ = ["describe"]


class _Plan(NamedTuple):
    """What a run would do from now on.

    Attributes:
        job: The run.
        state: "new", "finished", or how far the run is.
        agents: The number of agents.
        pretraining: Where its pre-trained agents come from.
        steps_alone: The local steps of pre-training that are left.
        steps: The local steps of the rounds that are left.
        rounds: The number of rounds, and the steps of a round.
        waits_for: The key of the pre-training that another run does first, or None.
    """

    job: Job
    state: str
    agents: int
    pretraining: str
    steps_alone: int
    steps: int
    rounds: str
    waits_for: str | None


def describe(jobs: Sequence[Job], share: Share, n_jobs: int) -> str:
    """Lists the runs and what each would do, and estimates the hours.

    Nothing is written into the sweep's folder. Experiments are built in this process,
    so JAX should be bound to the CPU. Where no run has been timed, a few local steps
    are timed with the layout that is chosen without a race. On GPUs and TPUs a run may
    be faster, because it takes the layout that is the fastest there (`_race.settled`).

    Args:
        jobs: The runs.
        share: What one of the jobs that run at a time has of this machine.
        n_jobs: The number of these jobs.

    Returns:
        A text of several lines.
    """
    plans = _plans(in_order(jobs))
    times = _Times(jobs)
    calibrated = times.calibrate(plans, share)
    seconds = [_seconds(plan, times) for plan in plans]
    rows = [
        [
            *(plan.job.name, plan.state, plan.agents, plan.pretraining, plan.rounds),
            _hours(sum(both)),
        ]
        for plan, both in zip(plans, seconds, strict=True)
    ]
    headings = ["run", "state", "agents", "pre-training", "rounds x steps", "hours"]
    total = _hours(sum(map(sum, seconds)))
    side_by_side = _hours(_makespan(plans, seconds, n_jobs))
    lines = [tabulate(rows, headings, disable_numparse=True), ""]
    if calibrated:
        lines.append(
            "Runs of this kind have not been timed in this folder, so "
            f"{CALIBRATION_STEPS} local steps were timed: {', '.join(calibrated)}. "
            "They ran with the layout that is chosen without a race; on GPUs and TPUs "
            "a run may choose a faster one. "
            "Compiling, merging and evaluating come on top."
        )
    lines.append(
        f"Together {total} hours; with --jobs={n_jobs} about {side_by_side} hours."
    )
    return "\n".join(lines)


def _hours(seconds: float) -> str:
    """The hours as a text. A tenth of an hour or more needs no further digits."""
    hours = seconds / 3600
    return f"{hours:.1f}" if hours >= 0.1 else f"{hours:.2g}"


def _plans(jobs: Sequence[Job]) -> list[_Plan]:
    """Finds out what each run would do from now on."""
    leaders: dict[str, str] = {}
    plans = []
    for job in jobs:
        experiment = Experiment(job.config)
        rounds, steps = job.config.rounds, experiment.local_steps
        alone, text, waits_for = experiment.pretrain_steps, "none", None
        rows = read_rows(job.workdir)
        done = rows[-1]["step"] if rows else 0
        key = pretraining_key(job.config)
        state = _how_far(rows)
        if job.is_finished:
            alone, state, done, text = 0, "finished", rounds * steps, "done"
        elif evaluations(rows):
            done, alone, text = done - alone, 0, "done"
        elif rows:
            done, alone = 0, alone - done
            text = f"{alone} steps"
        elif alone:
            text = f"{alone} steps"
            path = SharedAgents(experiment).path
            if path is not None and path.exists():
                alone, text = 0, "agents are there"
            elif key in leaders:
                alone, text, waits_for = 0, f"shared with {leaders[key]}", key
            elif key is not None:
                leaders[key] = job.name
        plans.append(
            _Plan(
                job=job,
                state=state,
                agents=experiment.placement.n_agents,
                pretraining=text,
                steps_alone=alone,
                steps=max(0, rounds * steps - done),
                rounds=f"{rounds} x {steps}",
                waits_for=waits_for,
            )
        )
    return plans


def _how_far(rows: Sequence[dict[str, Any]]) -> str:
    """How far a run has come, from all of its rows."""
    if not rows:
        return "new"
    last = rows[-1]
    if last["phase"] == "pretraining":
        return f"pre-trained for {last['epoch']} epochs"
    return f"in round {last['round']}"


class _Times:
    """Seconds of a local step for each image of a batch, by the kind of run.

    The time of a run of the same algorithm is taken where there is one. It includes
    merges and evaluations. Else it is that of any run of the same model and size.

    Args:
        jobs: The runs. Those that are in their folders already have been timed.
    """

    def __init__(self, jobs: Sequence[Job]):
        self._found: dict[tuple[str, str], list[float]] = {}
        for job in jobs:
            config, rows = job.config, read_rows(job.workdir)
            alone = [row for row in rows if row["phase"].startswith("pretrain")]
            if alone and alone[-1]["step"]:
                seconds = alone[-1]["seconds_total"] / alone[-1]["step"]
                self._add(config, "alone", seconds / config.pretrain.batch_size)
            evaluated = evaluations(rows)
            if not evaluated:
                continue
            first, last = evaluated[0], evaluated[-1]
            if last["step"] > first["step"]:
                seconds = last["seconds_total"] - first["seconds_total"]
                seconds /= last["step"] - first["step"]
                self._add(config, config.algorithm, seconds / config.batch_size)

    def _add(self, config: Config, algorithm: str, seconds: float) -> None:
        self._found.setdefault((_kind(config), algorithm), []).append(seconds)

    def calibrate(self, plans: Sequence[_Plan], share: Share) -> list[str]:
        """Times a few steps for every kind of run that has not been timed.

        Args:
            plans: What the runs would do.
            share: What the timed process has of this machine.

        Returns:
            The names of the runs that were timed.
        """
        names = []
        for plan in plans:
            known = {kind for kind, _ in self._found}
            if plan.steps_alone + plan.steps and _kind(plan.job.config) not in known:
                timed = Timing(plan.job.config, share).wait()
                assert timed is not None  # It has waited for as long as it takes.
                batch_size = plan.job.config.batch_size
                self._add(plan.job.config, "", timed.seconds / batch_size)
                names.append(plan.job.name)
        return names

    def of(self, config: Config, algorithm: str) -> float:
        """The seconds of a local step for each image of a batch.

        Args:
            config: The config, of whose kind at least one run has been timed.
            algorithm: The algorithm, or "alone" for pre-training.
        """
        kind = _kind(config)
        if same := self._found.get((kind, algorithm)):
            return statistics.median(same)
        return statistics.median(
            seconds
            for (other, _), found in self._found.items()
            if other == kind
            for seconds in found
        )


def _kind(config: Config) -> str:
    """A text that is equal for runs of the same model and size."""
    fields = resolved(fields_of(config))
    parts = ("model.", "placement.", "data.name")
    chosen = {path: v for path, v in fields.items() if path.startswith(parts)}
    return repr([number_of_agents(fields), sorted(chosen.items())])


def _seconds(plan: _Plan, times: _Times) -> tuple[float, float]:
    """The seconds that are left of pre-training, and of the rounds."""
    config = plan.job.config
    alone = times.of(config, "alone") if plan.steps_alone else 0.0
    together = times.of(config, config.algorithm) if plan.steps else 0.0
    return seconds_of(config, plan.steps_alone, plan.steps, alone, together)


def _makespan(
    plans: Sequence[_Plan], seconds: Sequence[tuple[float, float]], n_jobs: int
) -> float:
    """The seconds until the last run ends, if they start in order."""
    free = [0.0] * n_jobs
    agents_at: dict[str | None, float] = {}
    for plan, (alone, rounds) in zip(plans, seconds, strict=True):
        start = heapq.heappop(free)
        if plan.waits_for is not None:
            start = max(start, agents_at[plan.waits_for])
        elif plan.steps_alone:
            agents_at[pretraining_key(plan.job.config)] = start + alone
        heapq.heappush(free, start + alone + rounds)
    return max(free)
