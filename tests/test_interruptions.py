"""Runs that are interrupted within a round come to the same results bit by bit."""

import contextlib
import gc
import logging
import os
import select
import signal
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dimat_jax import _pauses, _signals, train
from dimat_jax._checkpoint import Checkpoints
from dimat_jax._lock import LOCK_FILES
from dimat_jax._metrics import read_rows
from dimat_jax._signals import deferrable
from dimat_jax.config import drop_unread
from dimat_jax.errors import Interrupted
from dimat_jax.workdir import load_agents
from tests.sweeping.small import rows, small
from tests.test_metrics import points

# The run has three steps in an epoch, two epochs of pre-training, and two rounds.
STEPS = 12


def config(algorithm: str = "wa", **changes: Any) -> Any:
    fields = {"batch_size": 34, "pretrain__batch_size": 34, **changes}
    return small(algorithm, **fields)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> dict[str, Path]:
    """The workdirs of runs that were never interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    for algorithm in ("wa", "cdmsgd"):
        train.run(config(algorithm), folder / algorithm, lambda line: None)
    return {path.name: path for path in folder.iterdir()}


def weights(workdir: Path) -> Any:
    return load_agents(workdir)[1]


def assert_same(workdir: Path, expected: Path) -> None:
    assert rows(workdir) == rows(expected)
    jax.tree.map(np.testing.assert_array_equal, weights(workdir), weights(expected))


@pytest.fixture
def interrupt(monkeypatch):
    """Sends a signal to this process after so many of its local steps."""
    original = _pauses.RunPauses.after_step

    def set_up(after: int, number: signal.Signals = signal.SIGTERM) -> None:
        done = []

        def after_step(self, *args: Any) -> None:
            done.append(args)
            if len(done) == after:
                # Signals are deferred from the first step on.
                self._signals.defer()
                signal.raise_signal(number)
            original(self, *args)

        monkeypatch.setattr(_pauses.RunPauses, "after_step", after_step)

    return set_up


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["wa", "cdmsgd"])
@pytest.mark.parametrize("every", [1, 2, 7])
def test_a_run_that_is_interrupted_again_and_again_comes_to_the_same_results(
    tmp_path, finished, interrupt, capfd, algorithm, every
):
    done, lines = 0, []
    interrupt(every)
    while True:
        try:
            train.run(config(algorithm), tmp_path / "run", lines.append)
        except Interrupted as error:
            done += every
            assert error.exit_code == 128 + signal.SIGTERM
            assert str(error) == (
                f"SIGTERM: the run has ended after local step {done}, and everything "
                "is saved"
            )
            interrupt(every)
            continue
        break
    assert (STEPS - 1) // every * every <= done <= STEPS
    going_on = [line for line in lines if line.startswith("going on")]
    expected = [f"going on after local step {n}" for n in range(every, done + 1, every)]
    assert going_on == expected
    assert "SIGTERM: the run finishes its step and saves" in capfd.readouterr().err
    assert_same(tmp_path / "run", finished[algorithm])


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["after_merge", "before_merge"])
@pytest.mark.parametrize("frame", ["own", "joint"])
def test_a_run_that_merges_within_rounds_may_be_interrupted_after_each_step(
    tmp_path, interrupt, gradient, frame
):
    changes = {"merge__every": 2, "merge__unit": "steps", "merge__frame": frame}
    merging = config("dimat", merge__gradient=gradient, **changes)
    train.run(merging, tmp_path / "finished", lambda line: None)
    interruptions, ended = 0, False
    while not ended:
        interrupt(1)
        try:
            train.run(merging, tmp_path / "run", lambda line: None)
            ended = True
        except Interrupted:
            interruptions += 1
    # Before a merge, its step is a part of the communication. Each of the two rounds
    # has a part of two steps, and one of a single step.
    steps = STEPS if gradient == "after_merge" else STEPS - 2
    assert interruptions == steps
    assert_same(tmp_path / "run", tmp_path / "finished")


@pytest.mark.slow
def test_epochs_of_a_long_round_are_reported_alike_after_interruptions(
    tmp_path, interrupt
):
    """The last interruption but one comes right after the last step of an epoch."""
    changes = {"local_epochs": 3, "rounds": 1, "pretrain__epochs": 0}
    long = drop_unread(config("wa", **changes))
    train.run(long, tmp_path / "finished", lambda line: None)
    for after in (1, 1, 1, 1):
        interrupt(after)
        with pytest.raises(Interrupted):
            train.run(long, tmp_path / "run", lambda line: None)
    interrupt(STEPS)
    train.run(long, tmp_path / "run", lambda line: None)
    assert [row.get("epoch") for row in rows(tmp_path / "run")] == [
        *(None, None),
        *(1, 2, 3),
        None,
    ]
    assert_same(tmp_path / "run", tmp_path / "finished")


@pytest.mark.slow
def test_a_run_whose_merges_take_every_step_may_be_interrupted(tmp_path, interrupt):
    changes = {"merge__every": 1, "merge__unit": "steps"}
    merging = config("wa", merge__gradient="before_merge", **changes)
    train.run(merging, tmp_path / "finished", lambda line: None)
    # The first steps are those of pre-training.
    for after in (STEPS - 3, 1, 1):
        interrupt(after)
        with pytest.raises(Interrupted):
            train.run(merging, tmp_path / "run", lambda line: None)
    interrupt(STEPS)
    train.run(merging, tmp_path / "run", lambda line: None)
    assert_same(tmp_path / "run", tmp_path / "finished")


@pytest.mark.slow
def test_a_run_may_be_loaded_and_moved_within_a_round(tmp_path, finished, interrupt):
    interrupt(8)
    with pytest.raises(Interrupted):
        train.run(config(), tmp_path / "run", lambda line: None)
    assert jax.tree.leaves(weights(tmp_path / "run"))[0].shape[0] == 3
    interrupt(10**9)
    on_two = config(placement__cpu_devices=2)
    train.run(on_two, tmp_path / "run", lambda line: None)
    for ours, theirs in zip(rows(tmp_path / "run"), rows(finished["wa"]), strict=True):
        measure = "test_loss_mean" if "test_loss" in ours else "train_loss_mean"
        assert ours[measure] == pytest.approx(theirs[measure], rel=1e-4)


def test_tensorboard_shows_each_number_once_and_all_of_them(tmp_path, interrupt):
    while True:
        interrupt(4)
        try:
            train.run(config(), tmp_path, lambda line: None)
            break
        except Interrupted:
            pass
    expected = [
        (f"{row['phase']}/{name}", row["step"], pytest.approx(value))
        for row in read_rows(tmp_path)
        for name, value in row.items()
        if type(value) in (int, float) and name not in ("round", "step", "epoch")
    ]
    expected += [
        (f"{row['phase']}_by_agent/{name}/{agent}", row["step"], pytest.approx(value))
        for row in read_rows(tmp_path)
        for name in ("test_accuracy", "test_loss", "train_accuracy", "train_loss")
        for agent, value in enumerate(row.get(name, ()))
    ]
    assert len(expected) > 60
    assert points(tmp_path) == sorted(expected, key=lambda point: point[:2])


@pytest.mark.slow
def test_damaged_rows_come_back_from_the_checkpoint(
    tmp_path, finished, interrupt, caplog
):
    interrupt(8)
    with pytest.raises(Interrupted):
        train.run(config(), tmp_path, lambda line: None)
    path = tmp_path / "metrics.jsonl"
    first, *others = path.read_bytes().splitlines(keepends=True)
    assert len(others) == 3
    path.write_bytes(first + first + b"{")
    interrupt(10**9)
    with caplog.at_level(logging.WARNING):
        train.run(config(), tmp_path, lambda line: None)
    assert f"{path} did not hold the rows" in caplog.text
    assert_same(tmp_path, finished["wa"])
    # And once more when the run has finished.
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    lines: list[str] = []
    train.run(config(), tmp_path, lines.append)
    assert lines[1:] == [
        "its rows were damaged, and are restored from its last checkpoint"
    ]
    assert path.read_bytes() == whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_each_signal_has_its_exit_code_and_leaves_no_lock(tmp_path, interrupt, number):
    before = signal.getsignal(number)
    interrupt(7, number)
    with pytest.raises(Interrupted) as error:
        train.run(config(), tmp_path, lambda line: None)
    assert error.value.exit_code == 128 + number
    assert signal.getsignal(number) == before
    assert not (tmp_path / LOCK_FILES[1]).exists()


@pytest.mark.slow
def test_a_checkpoint_is_due_after_some_minutes_within_a_round(
    tmp_path, finished, monkeypatch
):
    """A run that is then killed goes on from there."""
    saves: list[tuple[int, int, int]] = []
    original = train.Results.save

    def save(self, state: Any, totals: Any = None) -> None:
        original(self, state, totals)
        progress = self.progress
        saves.append((progress.epoch, progress.round, progress.within))

    monkeypatch.setattr(train.Results, "save", save)
    always = config(checkpoint__every_minutes=1e-9)
    train.run(always, tmp_path / "always", lambda line: None)
    # After the last step of a round, the round is finished first.
    assert saves == [
        *[(0, 0, 1), (0, 0, 2), (1, 0, 1), (1, 0, 2), (2, 0, 0)],
        *[(2, 0, 1), (2, 0, 2), (2, 1, 0), (2, 1, 1), (2, 1, 2), (2, 2, 0)],
    ]
    assert_same(tmp_path / "always", finished["wa"])

    class Killed(Exception):
        pass

    def die(self, state: Any, totals: Any = None) -> None:
        save(self, state, totals)
        if len(saves) == 9:
            self.wait()
            raise Killed

    saves.clear()
    monkeypatch.setattr(train.Results, "save", die)
    with pytest.raises(Killed):
        train.run(always, tmp_path / "killed", lambda line: None)
    lines: list[str] = []
    train.run(always, tmp_path / "killed", lines.append)
    assert "going on after local step 10" in lines[1]
    assert_same(tmp_path / "killed", finished["wa"])


@pytest.mark.parametrize("minutes", [0.0, 15.0])
def test_no_checkpoint_is_written_within_a_round_before_it_is_due(
    tmp_path, monkeypatch, minutes
):
    saved = []
    original = Checkpoints.save

    def save(self, number: int, *args: Any, **kwargs: Any) -> None:
        saved.append(number)
        original(self, number, *args, **kwargs)

    monkeypatch.setattr(Checkpoints, "save", save)
    every = config(checkpoint__every_minutes=minutes)
    train.run(every, tmp_path, lambda line: None)
    assert saved == [2, 3, 4]


def test_a_second_signal_ends_a_run_at_once(tmp_path, monkeypatch):
    """In a program of its own, it ends the process; see `tests/cli`."""
    original = _pauses.RunPauses.after_step

    def after_step(self, *args: Any) -> None:
        self._signals.defer()
        signal.raise_signal(signal.SIGINT)
        # Terminals and shells may send a signal twice at once.
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.6)
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)
        original(self, *args)

    monkeypatch.setattr(_pauses.RunPauses, "after_step", after_step)
    with pytest.raises(Interrupted, match="everything is saved"):
        train.run(config(), tmp_path, lambda line: None)


@pytest.mark.parametrize("second_ends", [True, False])
def test_a_second_signal_ends_a_program_at_once_unless_its_parent_does(
    monkeypatch, second_ends
):
    """The parent of a sweep's run repeats a signal that both have received."""
    left: list[int] = []

    def leave(number: int) -> None:
        left.append(number)
        raise SystemExit

    reader, writer = os.pipe()
    monkeypatch.setattr(_signals, "_second_ends", second_ends)
    monkeypatch.setattr(_signals, "_ONCE_SECONDS", 0.05)
    monkeypatch.setattr(_signals, "_expect_end", lambda number: None)
    monkeypatch.setattr(_signals, "_leave", leave)

    def watch() -> None:
        with contextlib.suppress(SystemExit):
            _signals._watch(reader)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    os.write(writer, bytes([signal.SIGTERM]))
    time.sleep(0.2)
    os.write(writer, bytes([signal.SIGTERM]))
    thread.join(1.0)
    assert left == ([signal.SIGTERM] if second_ends else [])
    # The second signal was read.
    assert not select.select([reader], [], [], 0)[0]


def test_before_there_is_anything_to_lose_a_signal_raises_at_once():
    with pytest.raises(Interrupted) as error, deferrable() as signals:
        signal.raise_signal(signal.SIGTERM)
    assert error.value.number == signal.SIGTERM and not signals.received


def test_a_signal_while_garbage_is_collected_is_raised_right_after_it():
    """Python ignores exceptions in callbacks of the collector."""
    raised = []

    def callback(phase: str, info: Any) -> None:
        del info
        if phase == "start" and not raised:
            raised.append(phase)
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.05)  # Python handles the signal here.

    gc.callbacks.append(callback)
    try:
        with pytest.raises(Interrupted), deferrable():
            gc.collect()
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                time.sleep(0.01)
    finally:
        gc.callbacks.remove(callback)
    assert raised


def test_a_signal_that_nothing_has_noticed_is_raised_at_the_end():
    with pytest.raises(Interrupted), deferrable() as signals:
        signals.defer()
        signal.raise_signal(signal.SIGHUP)
        assert signals.number == signal.SIGHUP


def test_a_signal_that_the_process_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with deferrable() as signals:
            signals.defer()
            signal.raise_signal(signal.SIGHUP)
            assert not signals.number
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_library_that_handles_a_signal_gets_it_after_the_run_has_saved():
    """submitit requeues a job of Slurm on SIGUSR2."""
    calls: list[str] = []
    before = signal.signal(signal.SIGUSR2, lambda *_: calls.append("requeue"))
    try:
        with deferrable():
            signal.raise_signal(signal.SIGUSR2)
            assert calls == ["requeue"]  # There is nothing to save yet.
        with pytest.raises(Interrupted) as error, deferrable() as signals:
            signals.defer()
            signal.raise_signal(signal.SIGUSR2)
            assert calls == ["requeue"]
            calls.append("saved")
        assert calls == ["requeue", "saved", "requeue"]
        assert error.value.number == signal.SIGUSR2
    finally:
        signal.signal(signal.SIGUSR2, before)
