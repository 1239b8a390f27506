"""Runs become jobs of submitit: on its local executor, and as files for Slurm."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import submitit

from dimat_jax import train
from dimat_jax._metrics import read_evaluations
from dimat_jax._sweeping import make_executor, parse_options, run_on_slurm
from dimat_jax._sweeping._job import inherited_jax_options
from dimat_jax._sweeping._slurm import _Run
from dimat_jax.errors import UserError
from tests.sweeping.small import MANY_ROUNDS, jobs, long, rows, small


def quiet(line: str) -> None:
    del line


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch) -> Path:
    """Programs that are called like Slurm's, and start nothing."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("srun", "sbatch"):
        (folder / name).write_text("#!/bin/sh\necho Submitted batch job 12\n")
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder


def test_options_are_numbers_texts_and_lists():
    given = ["time=60", "mem=8GB", "setup=module load cuda", "setup=a=b"]
    assert parse_options(given) == {
        "time": 60,
        "mem": "8GB",
        "setup": ["module load cuda", "a=b"],
    }


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("partition", "--slurm=partition: expected KEY=VALUE"),
        ("nodes=2", "a run is one process"),
        ("array_parallelism=3", "--jobs says how many"),
    ],
)
def test_options_that_cannot_be_set_are_refused(option, message):
    with pytest.raises(UserError, match=message):
        parse_options([option])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"partitoin": "gpu"}, "partitoin.*[Vv]alid.*partition"),
        ({"cpus_per_task": "many"}, "cpus_per_task.*expected type"),
    ],
)
def test_options_that_submitit_does_not_have_are_refused(
    tmp_path, fake_slurm, option, message
):
    with pytest.raises(UserError, match=message):
        make_executor(tmp_path, None, {"time": 60, **option}, "slurm")


def test_without_a_time_limit_a_sweep_is_refused(tmp_path, fake_slurm):
    with pytest.raises(UserError, match="--slurm=time=MINUTES"):
        make_executor(tmp_path, None, {}, "slurm")


def test_without_slurm_a_sweep_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="this machine has no Slurm"):
        make_executor(tmp_path, None, {"time": 60}, "slurm")
    assert not list(tmp_path.iterdir())


def test_without_submitit_a_sweep_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"pip install 'dimat_jax\[slurm\]'"):
        make_executor(tmp_path, None, {"time": 60}, "slurm")


def test_a_sweep_is_submitted_as_an_array_with_its_options(tmp_path, fake_slurm):
    options = {"time": 60, "partition": "gpu", "gpus_per_node": 1, "mem_gb": 8}
    workdir = tmp_path / "sweep"
    executor = make_executor(workdir, 2, options, "slurm")
    made = jobs(workdir, a=small(), b=small(seed=1), c=small(seed=2))
    submitted = executor.map_array(_Run({}), made)
    assert [job.job_id for job in submitted] == ["12_0", "12_1", "12_2"]
    # submitit keeps a copy for each of the jobs.
    scripts = workdir.glob("submitit/**/*submission*.sh")
    (script,) = {path.read_text() for path in scripts}
    lines = set(script.split("\n"))
    assert {
        "#SBATCH --array=0-2%2",
        "#SBATCH --time=60",
        "#SBATCH --partition=gpu",
        "#SBATCH --gpus-per-node=1",
        "#SBATCH --mem=8GB",
        "#SBATCH --job-name=sweep",
    } <= lines


@pytest.mark.slow
def test_the_runs_go_on_as_jobs_and_failures_stop_nobody(tmp_path, capsys):
    executor = make_executor(tmp_path, None, {"timeout_min": 10}, "local")
    made = jobs(
        tmp_path,
        wa=small("wa"),
        diverges=small("wa", optimizer__name="sgd", optimizer__learning_rate=1e30),
    )
    failures = run_on_slurm(made, executor)
    assert failures.keys() == {"diverges"}
    assert failures["diverges"].startswith("diverged: the training loss")
    assert "wa: round 2 trained" in capsys.readouterr().out
    (alone,) = jobs(tmp_path / "here", wa=small("wa"))
    train.run(alone.config, alone.workdir, quiet)
    assert rows(alone.workdir) == rows(tmp_path / "wa")

    assert run_on_slurm(made[:1], executor) == {}
    assert "holds this run, finished" in capsys.readouterr().out


@pytest.mark.slow
def test_a_job_that_is_preempted_goes_on_from_its_checkpoint(tmp_path):
    executor = make_executor(tmp_path, None, {"timeout_min": 10}, "local")
    (run,) = jobs(tmp_path, long=long())
    job = executor.submit(_Run(inherited_jax_options()), run)
    deadline = time.monotonic() + 120
    while len(read_evaluations(run.workdir)) < 12 and time.monotonic() < deadline:
        time.sleep(0.02)
    # The controller of submitit's local jobs passes on only SIGTERM, so the test sends
    # the signal of a pre-emption to the job's own process.
    preempt(job)
    assert job.result() is None
    assert run.is_finished
    log = (run.workdir / "run.log").read_text()
    assert log.count("going on after local step") == 1
    assert len(read_evaluations(run.workdir)) == 1 + 2 * MANY_ROUNDS


def preempt(job: submitit.Job) -> None:
    """Sends a pre-emption's signal to the children of a local job's controller."""
    table = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout
    for pid, parent in map(str.split, table.splitlines()):
        if parent == job.job_id:
            os.kill(int(pid), signal.SIGUSR2)
