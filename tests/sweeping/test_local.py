"""Runs go on side by side, and the failure of one leaves the others alone."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dimat_jax import train
from dimat_jax._metrics import read_evaluations
from dimat_jax._sweeping import _local, run_here, run_side_by_side
from dimat_jax._sweeping._job import failure_reason
from dimat_jax._sweeping._shares import Share
from dimat_jax.errors import NonFiniteError, UserError
from tests.sweeping.small import MANY_ROUNDS, jobs, long, rows, small

TWO = [Share(None, {}, {})] * 2


def quiet(line: str) -> None:
    del line


def log_of(workdir: Path) -> str:
    return (workdir / "run.log").read_text()


def when(is_true: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Acts, in a thread, as soon as something is true."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while not is_true() and time.monotonic() < deadline:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.slow
def test_side_by_side_runs_give_the_same_numbers_and_failures_stop_nobody(
    tmp_path, capsys
):
    made = jobs(
        tmp_path,
        dimat=small("dimat"),
        diverges=small("wa", optimizer__name="sgd", optimizer__learning_rate=1e30),
        no_data=small(data__name="cifar10", data__dir=str(tmp_path / "nowhere")),
        wa=small("wa"),
    )
    failures = run_side_by_side(made, TWO)
    assert failures.keys() == {"diverges", "no_data"}
    assert failures["diverges"].startswith("diverged: the training loss of agent(s)")
    assert "nowhere" in failures["no_data"]
    for name, reason in failures.items():
        assert reason.endswith(f"; log: {tmp_path / name / 'run.log'}")
        assert "Traceback" in log_of(tmp_path / name)
    # One run has trained the agents, and the others have waited for them or found them.
    (agents,) = (tmp_path / "pretrained").glob("[!.]*")
    found = [
        name
        for name in ("dimat", "diverges", "wa")
        if str(agents) in log_of(tmp_path / name)
    ]
    assert "wa" in found
    assert "test accuracy" in capsys.readouterr().out

    for job in jobs(tmp_path / "here", dimat=small("dimat"), wa=small("wa")):
        train.run(job.config, job.workdir, quiet)
        assert rows(job.workdir) == rows(tmp_path / job.name)
        assert sum("test_accuracy" in row for row in rows(job.workdir)) == 5

    again = run_side_by_side(made, TWO)
    assert again.keys() == failures.keys()
    printed = capsys.readouterr().out
    for name in ("dimat", "wa"):
        assert f"{tmp_path / name} holds this run, finished" in printed


@pytest.mark.slow
def test_a_killed_run_is_told_and_goes_on_later_while_the_others_finish(tmp_path):
    made = jobs(tmp_path, victim=long(), other=small())

    def kill() -> None:
        (victim,) = (p for p in multiprocessing.active_children() if p.name == "victim")
        victim.kill()

    victim = tmp_path / "victim"
    thread = when(lambda: len(read_evaluations(victim)) > 11, kill)
    failures = run_side_by_side(made, TWO)
    thread.join()
    assert failures.keys() == {"victim"}
    assert failures["victim"].startswith("its process was ended by SIGKILL")
    assert "when memory runs out" in failures["victim"]
    assert made[1].is_finished and not made[0].is_finished

    assert run_side_by_side(made, TWO) == {}
    assert "going on after local step" in log_of(victim)
    assert len(read_evaluations(victim)) == 1 + 2 * MANY_ROUNDS


def test_a_second_signal_does_not_end_a_run_of_a_sweep_at_once(tmp_path, monkeypatch):
    """The parent repeats a signal that the system has sent to all of them."""
    before, given = signal.getsignal(signal.SIGINT), []
    monkeypatch.setattr(_local._signals, "start", lambda **kwargs: given.append(kwargs))
    monkeypatch.setattr(_local, "_end_with_parent", lambda: None)
    monkeypatch.setattr(_local, "run_job", lambda job, options: "its end")
    receiver, sender = multiprocessing.Pipe(duplex=False)
    (job,) = jobs(tmp_path, a=small())
    try:
        _local._child(job, {}, sender)
    finally:
        signal.signal(signal.SIGINT, before)
    assert receiver.recv() == "its end"
    assert given == [{"second_ends": False}]


@pytest.mark.slow
def test_a_terminated_sweep_ends_its_runs_and_they_go_on_later(tmp_path):
    made = jobs(tmp_path, a=long(), b=long(seed=1))
    both_run = lambda: all(len(read_evaluations(job.workdir)) > 11 for job in made)  # noqa: E731
    thread = when(both_run, lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run_side_by_side(made, TWO)
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before
    assert not multiprocessing.active_children()
    for job in made:
        assert not job.is_finished
        assert "Traceback" not in log_of(job.workdir)
    assert run_side_by_side(made[:1], TWO) == {}
    assert "going on after local step" in log_of(made[0].workdir)


def test_runs_in_this_process_fail_alone_too(tmp_path, capsys, monkeypatch):
    made = jobs(
        tmp_path,
        diverges=small("wa", optimizer__name="sgd", optimizer__learning_rate=1e30),
        no_data=small(data__name="cifar10", data__dir=str(tmp_path / "nowhere")),
        local=small("local"),
    )
    failures = run_here(made)
    assert list(failures) == ["diverges", "no_data"]
    assert made[2].is_finished
    printed = capsys.readouterr()
    assert "diverges: failed: diverged: the training loss" in printed.out
    assert "Traceback" not in printed.err

    def crash(*args):
        raise KeyError("a bug")

    monkeypatch.setattr(train, "run", crash)
    assert run_here(made[:1]) == {"diverges": "KeyError: 'a bug'"}
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NonFiniteError("the loss"), "diverged: the loss"),
        (UserError("no such file"), "no such file"),
        (MemoryError(), "out of memory: MemoryError"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: 9 GiB\nat"),
            "out of memory: RESOURCE_EXHAUSTED: 9 GiB",
        ),
        (
            UserError("vmap does not run: RESOURCE_EXHAUSTED: 9 GiB"),
            "out of memory: vmap does not run: RESOURCE_EXHAUSTED: 9 GiB",
        ),
        (KeyError("a"), "KeyError: 'a'"),
    ],
)
def test_the_reason_of_a_failure_is_one_line(error, reason):
    assert failure_reason(error) == reason
