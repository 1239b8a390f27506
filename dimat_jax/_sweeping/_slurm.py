"""Runs a sweep on a Slurm cluster, through submitit: an array of jobs, one for a run.

A job that is pre-empted, or that reaches its time limit, saves what it has done. Then
submitit puts it into the queue again, and its run goes on from there.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console

from dimat_jax._signals import deferrable
from dimat_jax._sweeping._job import LOG, inherited_jax_options, run_job
from dimat_jax._sweeping._plan import Job, in_order, unfinished
from dimat_jax._sweeping._progress import View
from dimat_jax.errors import UserError, first_line

__all__ = ["make_executor", "parse_options", "run_on_slurm"]

# The seconds between two looks at the jobs. submitit asks Slurm less often than that.
_INTERVAL = 1.0
# How often a job that reaches its time limit is put into the queue again.
_MOST_TIMEOUTS = 100
# Options that are lists of shell commands or arguments.
_LISTS = ("setup", "teardown", "srun_args")
# Options that start several processes for one job. A run is a single process.
_REFUSED = ("nodes", "ntasks_per_node", "tasks_per_node", "array_parallelism")


def parse_options(given: Sequence[str]) -> dict[str, Any]:
    """Reads options of submitit that are written as KEY=VALUE.

    Args:
        given: The texts. The keys `setup`, `teardown` and `srun_args` may be repeated.

    Raises:
        UserError: A text has no "=", or an option cannot be set.
    """
    options: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--slurm={text}: expected KEY=VALUE, as in partition=gpu")
        if key in _REFUSED:
            raise UserError(
                f"--slurm={text}: the sweep sets {key} itself; a run is one process, "
                "and --jobs says how many runs go on at a time"
            )
        if key in _LISTS:
            options.setdefault(key, []).append(value)
        else:
            options[key] = int(value) if value.isdecimal() else value
    return options


def make_executor(
    workdir: Path, n_jobs: int | None, options: Mapping[str, Any], cluster: str
) -> Any:
    """Makes submitit's executor.

    Args:
        workdir: The sweep's folder. submitit keeps its files in `workdir`/submitit.
        n_jobs: How many runs go on at a time; None leaves it to the cluster.
        options: The options by name, see `parse_options`.
        cluster: "slurm"; or "local", which starts all jobs on this machine.

    Raises:
        UserError: submitit or Slurm is missing, or an option is wrong.
    """
    submitit = _submitit()
    if cluster == "slurm":
        if submitit.SlurmExecutor.affinity() < 0:
            raise UserError(
                "--launcher=slurm: this machine has no Slurm (no program srun); start "
                "the sweep on a login node of the cluster, or use --launcher=local"
            )
        if not {"time", "timeout_min"} & options.keys():
            raise UserError(
                "--launcher=slurm needs the time limit of a job in minutes: "
                "--slurm=time=MINUTES. A run that takes longer goes on in another job"
            )
    executor = submitit.AutoExecutor(
        workdir / "submitit" / "%j",
        cluster=cluster,
        slurm_max_num_timeout=_MOST_TIMEOUTS,
        local_max_num_timeout=_MOST_TIMEOUTS,
    )
    general = submitit.AutoExecutor._typed_parameters()
    named = {
        key if key in general else f"slurm_{key}": value
        for key, value in options.items()
    }
    named.setdefault("name", workdir.resolve().name)
    if n_jobs is not None:
        named["slurm_array_parallelism"] = n_jobs
    try:
        executor.update_parameters(**named)
    except (NameError, ValueError, AssertionError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"--slurm: {message}") from error
    return executor


def run_on_slurm(
    jobs: Sequence[Job], executor: Any, console: Console | None = None
) -> dict[str, str]:
    """Runs every run as a job of the cluster, and waits for all of them.

    A run that fails stops no other run. If this process receives a signal, it cancels
    the jobs.

    Args:
        jobs: The runs. Those that have finished are left alone.
        executor: What `make_executor` has made.
        console: Where the runs are shown while they go on.

    Returns:
        The reasons of the runs that have failed, by name.
    """
    jobs = in_order(unfinished(jobs))
    failures: dict[str, str] = {}
    if not jobs:
        return failures
    left: list[tuple[Job, Any]] = []
    with deferrable() as signals, View(jobs, console) as view:
        signals.defer()
        try:
            call = _Run(inherited_jax_options())
            left += zip(jobs, executor.map_array(call, jobs), strict=True)
            started = set()
            while left and not signals.number:
                time.sleep(_INTERVAL)
                for job, submitted in list(left):
                    is_done = submitted.done()
                    if job.name not in started and (
                        is_done or submitted.state == "RUNNING"
                    ):
                        started.add(job.name)
                        view.start(job.name)
                    if is_done:
                        left.remove((job, submitted))
                        reason = _reason(submitted)
                        view.end(job.name, reason)
                        if reason is not None:
                            log = job.workdir / LOG
                            failures[job.name] = f"{reason}; log: {log}"
                view.refresh()
        finally:
            for _, submitted in left:
                submitted.cancel(check=False)
    return failures


class _Run:
    """What a job computes. submitit calls `checkpoint` before a job is queued again.

    Args:
        jax_options: See `run_job`.
    """

    def __init__(self, jax_options: Mapping[str, Any]):
        self._jax_options = jax_options

    def __call__(self, job: Job) -> str | None:
        return run_job(job, self._jax_options)

    def checkpoint(self, job: Job) -> Any:
        # The run's own checkpoints are in its folder, so the same call goes on.
        return _submitit().helpers.DelayedSubmission(self, job)


def _reason(job: Any) -> str | None:
    """Finds out why a job has failed; None if it has not."""
    try:
        return job.result()
    except Exception as error:
        line = first_line(error)
        return f"its job ended, {job.state}: {line}; see {job.paths.stderr}"


def _submitit() -> ModuleType:
    try:
        import submitit
    except ModuleNotFoundError:
        raise UserError(
            "--launcher=slurm needs submitit: pip install 'dimat_jax[slurm]'"
        ) from None
    return submitit
