"""Tests programs that are asked to end, or that find another one at work."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from dimat_jax._metrics import read_evaluations
from tests.sweeping.small import rows

ROOT = Path(__file__).parents[2]
# Rounds that take seconds, whose steps take milliseconds.
LONG = (
    "--config=configs/quickstart.py:wa",
    "--config.agents=3",
    "--config.rounds=1",
    "--config.local_epochs=0",
    "--config.local_steps=3000",
    "--config.data.train_size=300",
    "--config.data.test_size=100",
    "--config.pretrain.epochs=1",
)
SWEEP = """
from tests.sweeping.small import long

def get_runs():
    return {"a": long(rounds=20_000), "b": long(rounds=20_000, seed=1)}
"""


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def starts(*arguments: str) -> subprocess.Popen[str]:
        compiled = os.environ["DIMAT_TEST_COMPILED"]
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": compiled}
        environment.pop("PJRT_NPROC", None)
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**environment, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield starts
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def train(workdir: Path, *arguments: str) -> tuple[str, ...]:
    return ("-m", "experiments.train", *LONG, f"--workdir={workdir}", *arguments)


def sweep(tmp_path: Path, workdir: Path, *arguments: str) -> tuple[str, ...]:
    (tmp_path / "sweep.py").write_text(SWEEP)
    given = (f"--sweep={tmp_path / 'sweep.py'}", f"--workdir={workdir}")
    return ("-m", "experiments.sweep", *given, *arguments)


def wait_for_rows(path: Path, n_rows: int) -> None:
    deadline = time.monotonic() + 120
    while len(read_evaluations(path)) < n_rows and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(read_evaluations(path)) >= n_rows


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def times(folder: Path) -> dict[Path, int]:
    """When each file of a folder was changed, but for the sign of life."""
    return {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.name != ".running.json"
    }


@pytest.mark.every_nth(3)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_within_seconds_and_nothing_is_lost(
    tmp_path, start, number
):
    process = start(*train(tmp_path / "run"))
    wait_for_rows(tmp_path / "run", 2)  # The first round is in its steps.
    time.sleep(1.0)
    at = time.monotonic()
    process.send_signal(number)
    code, out, err = ended(process)
    assert time.monotonic() - at < 15
    assert code == 128 + number, err
    assert "Traceback" not in err
    assert f"{number.name}: the run finishes its step and saves" in err
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"{number.name}: the run has ended after local step ")
    assert last.endswith(
        ", and everything is saved; the same command goes on from the last checkpoint"
    )
    step = int(last.partition("local step ")[2].partition(",")[0])
    assert 4 < step < 3004  # within the round, after four steps of pre-training

    if number == signal.SIGTERM:
        whole = start(*train(tmp_path / "whole"))
        again = start(*train(tmp_path / "run"))
        code, out, err = ended(again)
        assert code == 0, err
        assert f"going on after local step {step}" in out
        assert "has died" not in out
        assert ended(whole)[0] == 0
        assert rows(tmp_path / "run") == rows(tmp_path / "whole")


PROGRAM = """
import hashlib, sys, time
from dimat_jax import _signals

_signals._GRACE_SECONDS = 1.0
_signals.start()
with _signals.deferrable() as signals:
    if "defers later" in sys.argv:
        print("begun", flush=True)
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            signals.defer()
        while not signals.number:
            time.sleep(0.1)
        sys.exit(128 + signals.number)
    if "defers" in sys.argv:
        signals.defer()
    print("begun", flush=True)
    if "computes" in sys.argv:
        # Python runs no handler meanwhile, as while JAX compiles.
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2**31 - 1)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            time.sleep(0.1)
        except KeyboardInterrupt:
            pass  # A callback of JAX may do that.
"""


@pytest.mark.parametrize(
    ("arguments", "signals"),
    [
        (("swallows",), [signal.SIGINT]),
        (("computes",), [signal.SIGTERM]),
        (("defers",), [signal.SIGINT, signal.SIGINT]),
        (("defers", "computes"), [signal.SIGTERM, signal.SIGINT]),
    ],
)
def test_a_program_ends_even_if_python_cannot_end_it(start, arguments, signals):
    process = start("-c", PROGRAM, *arguments)
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.5)
    at = time.monotonic()
    for number in signals:
        process.send_signal(number)
        time.sleep(0.7)
    code, _, err = ended(process)
    assert time.monotonic() - at < 10
    assert code == 128 + signals[-1]
    assert f"ended by {signals[-1].name}" in err and "Traceback" not in err


@pytest.mark.parametrize("seconds", [0.0, 0.2, 0.5, 1.0, 2.0])
def test_ctrl_c_shows_no_traceback_while_a_program_starts(start, tmp_path, seconds):
    begin = "print('begun', flush=True); from dimat_jax.cli import main; "
    arguments = ["train", *LONG, f"--workdir={tmp_path / 'run'}"]
    early = "from dimat_jax import _signals; _signals.end_at_once(); "
    process = start("-c", f"{early}{begin}main({arguments!r})")
    assert process.stdout.readline() == "begun\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    code, _, err = ended(process)
    assert code == 130 and "Traceback" not in err
    assert "ended by SIGINT" in err or "interrupted" in err or "SIGINT: the" in err


def test_a_signal_whose_exception_is_swallowed_still_ends_what_begins_after_it(start):
    process = start("-c", PROGRAM, "defers later")
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    code, _, err = ended(process)
    assert code == 130 and "SIGINT: the run finishes its step and saves" in err


def refused(start, command: Sequence[str], first: subprocess.Popen[str]) -> None:
    code, _, err = ended(start(*command))
    assert code == 2, err
    (message,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert f" is in use by another process: process {first.pid} on " in message
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_second_run_is_refused_and_changes_nothing(tmp_path, start):
    workdir = tmp_path / "run"
    first = start(*train(workdir, "--config.rounds=1000"))
    wait_for_rows(workdir, 2)
    before = {path: path.stat().st_mtime_ns for path in workdir.glob("[!.]*.json")}
    there = {path.name for path in workdir.iterdir()}
    refused(start, train(workdir, "--config.rounds=1000"), first)
    for path, changed in before.items():
        assert path.stat().st_mtime_ns == changed, path
    assert {path.name for path in workdir.iterdir()} == there
    first.send_signal(signal.SIGKILL)
    first.wait()
    # A dead process is no obstacle.
    second = start(*train(workdir, "--config.rounds=1000"))
    lines: list[str] = []
    while not any("test accuracy" in line for line in lines):
        lines.append(second.stdout.readline())
        assert lines[-1], second.stderr.read()
    (note,) = [line for line in lines if "has died" in line]
    assert f"{workdir} was in use by process {first.pid} on " in note


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sweeps_and_runs_keep_out_of_each_others_folders(tmp_path, start, jobs):
    workdir = tmp_path / "out"
    n_jobs = f"--jobs={jobs}"
    first = start(*sweep(tmp_path, workdir, n_jobs))
    wait_for_rows(workdir / "a", 5)
    refused(start, sweep(tmp_path, workdir, n_jobs), first)
    code, _, err = ended(start(*sweep_run(tmp_path, workdir / "a")))
    assert code == 2 and "is in use by another process: process " in err
    first.send_signal(signal.SIGTERM)
    code, _, err = ended(first)
    assert code == 143 and "Traceback" not in err, err
    assert "the same command goes on from the last checkpoint" in err

    # A sweep that finds a run of its own at work begins nothing.
    run = start(*sweep_run(tmp_path, workdir / "a"))
    with contextlib.suppress(OSError):
        deadline = time.monotonic() + 60
        while not (workdir / "a" / ".running.json").exists():
            assert time.monotonic() < deadline and run.poll() is None
            time.sleep(0.02)
    before = times(workdir / "b")
    refused(start, sweep(tmp_path, workdir, n_jobs), run)
    assert times(workdir / "b") == before


def sweep_run(tmp_path: Path, workdir: Path) -> tuple[str, ...]:
    """The command of a run that is also the run "a" of the sweep."""
    shared = workdir.parent / "pretrained"
    (tmp_path / "alone.py").write_text(
        "from tests.sweeping.small import long\n\n"
        "def get_config():\n"
        "    config = long(rounds=20_000)\n"
        f"    config.pretrain.cache_dir = {str(shared)!r}\n"
        "    return config\n"
    )
    config = f"--config={tmp_path / 'alone.py'}"
    return ("-m", "experiments.train", config, f"--workdir={workdir}")
