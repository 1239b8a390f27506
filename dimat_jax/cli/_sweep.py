"""Runs a sweep: many configs, one after the other or side by side, and a report on all.

    dimat sweep --sweep=NAME --workdir=DIR [--seeds=N] [--jobs=K] [--dry_run]
        [--data_dir=DATA]
    dimat sweep --sweep=NAME --workdir=DIR --launcher=slurm --slurm=time=60
        --slurm=partition=gpu --slurm=gpus_per_node=1 [--slurm=KEY=VALUE ...]

NAME is a bundled sweep (`dimat show sweeps`) or the path of a file that defines
`get_runs() -> {name: config}`. Each run has a folder of its own, DIR/name. Runs that
pre-train the same agents share them, in DIR/pretrained: one of them trains, the others
wait for it. The same command goes on with a sweep that was killed. A run that fails
does not keep the others from running; the reasons are listed at the end, and the exit
code is then 1. With --seeds=N every run is repeated with the seeds 0 to N - 1, and the
report gives means and deviations over the seeds.

With --jobs=K, K runs go on at a time. Each has a process of its own, its part of the
CPU cores and of the GPUs, and a log, DIR/name/run.log. With --launcher=slurm every run
is a job of a Slurm array, and K jobs go on at a time; --slurm passes options to
submitit. A job that is pre-empted goes on from its last checkpoint. With
--jobs_per_device=N at most N jobs share a GPU of this machine, and its memory.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
from absl import flags

from dimat_jax import _sweeping
from dimat_jax._folders import check_output
from dimat_jax._lock import check_free, held
from dimat_jax.cli import _bundled, _program, _report
from dimat_jax.errors import SweepError, UserError
from dimat_jax.placement import request_cpu_devices
from dimat_jax.sweeps import over_seeds

__all__ = ["COMMAND"]


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("sweep", None, "The sweep to run.", required=True)
    flags.DEFINE_string("workdir", None, "The folder for all runs.", required=True)
    flags.DEFINE_string("data_dir", None, "Replaces every config's data.dir.")
    flags.DEFINE_integer(
        "seeds",
        None,
        "Repeats every run with so many seeds, from 0 on.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "jobs",
        None,
        "The number of runs that go on at a time. By default 1 on this machine, and as "
        "many as Slurm starts there.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "jobs_per_device",
        1,
        "How many jobs of this machine may share a GPU and its memory.",
        lower_bound=1,
    )
    flags.DEFINE_enum("launcher", "local", ["local", "slurm"], "Where the runs go on.")
    flags.DEFINE_multi_string(
        "slurm", [], "An option of submitit, KEY=VALUE. The flag may be repeated."
    )
    flags.DEFINE_bool(
        "dry_run", False, "Only lists the runs, and estimates how long they take."
    )


def main(arguments: list[str]) -> None:
    """Runs the sweep and reports on it."""
    _program.expect_no(arguments)
    given, workdir = flags.FLAGS, Path(flags.FLAGS.workdir)
    # An empty path would be that of the current folder.
    check_output(given.workdir, "--workdir")
    on_slurm, n_jobs = given.launcher == "slurm", given.jobs or 1
    options = _sweeping.parse_options(given.slurm)
    if options and not on_slurm:
        raise UserError("--slurm has no effect without --launcher=slurm")
    if on_slurm and given.jobs_per_device > 1:
        raise UserError(
            f"--jobs_per_device={given.jobs_per_device} has no effect with "
            "--launcher=slurm: Slurm gives every job devices of its own"
        )
    shares = _sweeping.share_out(1 if on_slurm else n_jobs, given.jobs_per_device)
    if on_slurm or given.dry_run or n_jobs > 1:
        # The runs get the accelerators. This process would take their memory.
        jax.config.update("jax_platforms", "cpu")
    configs = _bundled.load_runs(given.sweep)
    if given.seeds:
        configs = over_seeds(configs, given.seeds)
    jobs = _sweeping.prepare(configs, workdir, given.data_dir)
    if not on_slurm:
        # The machines of a cluster may have other data and more memory than this one.
        # The checks start JAX, which then has the devices that the runs need.
        request_cpu_devices(max(job.config.placement.cpu_devices for job in jobs))
        _sweeping.check_here(jobs)
    if given.dry_run:
        if on_slurm:
            n_jobs = given.jobs or len(jobs)
        print(_sweeping.describe(jobs, shares[0], n_jobs))
        return
    with held(workdir, print):
        for job in jobs:
            check_free(job.workdir)
        if on_slurm:
            executor = _sweeping.make_executor(workdir, given.jobs, options, "slurm")
            failures = _sweeping.run_on_slurm(jobs, executor)
        elif n_jobs > 1:
            failures = _sweeping.run_side_by_side(jobs, shares)
        else:
            failures = _sweeping.run_here(jobs)
        _report_on(workdir, len(jobs), failures)


def _report_on(workdir: Path, n_runs: int, failures: Mapping[str, str]) -> None:
    """Writes the report, and then lists the runs that have failed.

    Raises:
        SweepError: At least one run has failed.
        UserError: There is nothing to report on, although no run has failed.
    """
    try:
        _report.report_on([workdir], workdir)
    except UserError:
        # If every run has failed before its first evaluation, only the failures matter.
        if not failures:
            raise
    if failures:
        lines = [f"    {name}: {reason}" for name, reason in failures.items()]
        raise SweepError(
            f"{len(failures)} of {n_runs} runs have failed; the same command tries "
            "them again\n" + "\n".join(lines)
        )


COMMAND = _program.Command("sweep", __doc__, main, define_flags, resumes=True)
