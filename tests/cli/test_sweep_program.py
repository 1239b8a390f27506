"""Tests the program `sweep` with several jobs, as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from dimat_jax._metrics import read_evaluations
from tests.sweeping.small import rows

ROOT = Path(__file__).parents[2]
SWEEP = """
from tests.sweeping.small import long, small

def get_runs():
    broken = small(optimizer__name="sgd", optimizer__learning_rate=1e30)
    return {"dimat": small("dimat"), "wa": small("wa"), "broken": broken}
"""
LONG = """
from tests.sweeping.small import long

def get_runs():
    return {"a": long(rounds=20_000), "b": long(rounds=20_000, seed=1)}
"""


def start(tmp_path: Path, sweep: str, *arguments: str) -> subprocess.Popen[str]:
    (tmp_path / "sweep.py").write_text(sweep)
    program = [sys.executable, "-m", "experiments.sweep"]
    given = [f"--sweep={tmp_path / 'sweep.py'}", *arguments]
    compiled = os.environ["DIMAT_TEST_COMPILED"]
    return subprocess.Popen(
        [*program, *given],
        cwd=ROOT,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": compiled},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(tmp_path: Path, sweep: str, *arguments: str) -> tuple[int, str, str]:
    """Runs the program; returns its exit code and what it prints."""
    process = start(tmp_path, sweep, *arguments)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def wait_for(path: Path, n_rows: int) -> None:
    deadline = time.monotonic() + 120
    while len(read_evaluations(path)) < n_rows and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.slow
def test_two_jobs_write_the_same_rows_as_one_and_both_tell_what_failed(tmp_path):
    ended = [
        run(tmp_path, SWEEP, f"--workdir={tmp_path / jobs}", f"--jobs={jobs}")
        for jobs in ("1", "2")
    ]
    for jobs, (code, out, err) in zip("12", ended, strict=True):
        assert code == 1
        assert "1 of 3 runs have failed; the same command tries them again" in err
        assert "    broken: diverged: the training loss of agent(s)" in err
        assert f"wrote {tmp_path / jobs / 'report.md'}" in out
        assert (tmp_path / jobs / "report.md").is_file()
    for name in ("dimat", "wa"):
        assert rows(tmp_path / "1" / name) == rows(tmp_path / "2" / name)
        summary = json.loads((tmp_path / "2" / name / "summary.json").read_text())
        assert summary["round"] == 2


@pytest.mark.every_nth(3)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jobs=0"], "--jobs=0"),
        (["--seeds=0"], "--seeds=0"),
        (["--jobs=9999"], "--jobs=9999 needs as many CPU cores"),
        (["--launcher=pbs"], "value should be one of <local|slurm>"),
        (["--slurm=time=60"], "--slurm has no effect without --launcher=slurm"),
        (["--jobs_per_device=2"], "has no effect with one job at a time"),
        (
            ["--launcher=slurm", "--slurm=time=60", "--jobs_per_device=2"],
            "--jobs_per_device=2 has no effect with --launcher=slurm",
        ),
    ],
)
def test_bad_flags_end_with_one_message_before_anything_is_written(
    tmp_path, arguments, message
):
    code, _, err = run(tmp_path, SWEEP, f"--workdir={tmp_path / 'out'}", *arguments)
    assert code == 2
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_dry_run_prints_a_table_and_writes_nothing(tmp_path):
    code, out, err = run(tmp_path, SWEEP, f"--workdir={tmp_path / 'out'}", "--dry_run")
    assert code == 0, err
    assert "shared with dimat" in out and "with --jobs=1 about" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_interrupted_sweep_ends_its_runs_and_says_how_to_go_on(tmp_path):
    workdir = tmp_path / "out"
    process = start(tmp_path, LONG, f"--workdir={workdir}", "--jobs=2")
    wait_for(workdir / "a", 12)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted; the same command goes on from the last checkpoint" in err
    for name in ("a", "b"):
        assert not (workdir / name / "summary.json").exists()
        FileLock(workdir / name / ".running").acquire(timeout=0)


@pytest.mark.slow
def test_the_runs_of_a_sweep_that_is_killed_end_by_themselves(tmp_path):
    workdir = tmp_path / "out"
    process = start(tmp_path, LONG, f"--workdir={workdir}", "--jobs=2")
    wait_for(workdir / "a", 12)
    process.kill()
    process.communicate(timeout=120)
    for name in ("a", "b"):
        FileLock(workdir / name / ".running").acquire(timeout=60)
        assert not (workdir / name / "summary.json").exists()
