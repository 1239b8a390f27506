"""One process at a time works in a folder, and the others learn which one."""

import errno
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dimat_jax import _lock
from dimat_jax._lock import LOCK_FILES, LockError, check_free, check_held, held

ROOT = Path(__file__).parents[1]
HOLD = """
import sys
from pathlib import Path
from dimat_jax import _lock

def no_locks(self, *args, **kwargs):
    raise OSError(37, "No locks available")

def machine():
    return sys.argv[3]

if sys.argv[2] == "no locks":
    _lock.FileLock.acquire = no_locks
if sys.argv[3]:
    _lock._machine = machine
_lock._BEAT_SECONDS = 0.1
_lock._PATIENCE_SECONDS = 3.0
_lock._SETTLE_SECONDS = 0.5
try:
    with _lock.held(Path(sys.argv[1]), print):
        print("held", flush=True)
        sys.stdin.read()
except _lock.LockError as error:
    print(error, flush=True)
    sys.exit(2)
"""


@pytest.fixture
def hold(tmp_path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts processes that hold the lock of a folder until their input ends."""
    started: list[subprocess.Popen[str]] = []

    def start(locks: str = "", machine: str = "") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path / "run"), locks, machine],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def quick(monkeypatch) -> None:
    """Signs of life every tenth of a second, and a patience of half a second."""
    monkeypatch.setattr(_lock, "_BEAT_SECONDS", 0.1)
    monkeypatch.setattr(_lock, "_PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(_lock, "_SETTLE_SECONDS", 0.3)


class NoLocks:
    """What `FileLock` is on a file system that has no locks."""

    def __init__(self, path: Path, timeout: float, fallback_to_soft: bool):
        pass

    def acquire(self) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def release(self) -> None:
        pass


def test_a_second_process_is_refused_and_learns_who_the_first_is(hold, tmp_path):
    folder, before = tmp_path / "run", time.time()
    first = hold()
    assert first_line(first) == "held"
    there = names(folder)
    with pytest.raises(LockError) as error, held(folder, print):
        pass
    message = str(error.value)
    assert message.startswith(
        f"{folder} is in use by another process: process {first.pid} on "
        f"{socket.gethostname()}, since "
    )
    since = message.partition("since ")[2].partition(". Wait until")[0]
    at = time.mktime(time.strptime(since, "%Y-%m-%d %H:%M:%S %z"))
    assert before - 2 <= at <= time.time()
    with pytest.raises(LockError, match=f"process {first.pid} on"):
        check_free(folder)
    assert names(folder) == there == set(LOCK_FILES)
    # As soon as the first one ends, the folder is free.
    first.communicate("")
    check_free(folder)
    notes: list[str] = []
    with held(folder, notes.append):
        pass
    assert not notes


def test_the_lock_of_a_process_that_was_killed_is_taken_over_with_a_note(
    hold, tmp_path
):
    folder, first = tmp_path / "run", hold()
    assert first_line(first) == "held"
    first.kill()
    first.wait()
    check_free(folder)
    notes: list[str] = []
    with held(folder, notes.append):
        holder = json.loads((folder / LOCK_FILES[1]).read_text())
        assert holder["pid"] == os.getpid()
    (note,) = notes
    assert note.startswith(f"{folder} was in use by process {first.pid} on ")
    assert note.endswith(", which has died")
    assert not (folder / LOCK_FILES[1]).exists()


@pytest.mark.parametrize("locks", ["", "no locks"])
def test_a_process_of_another_host_is_alive_as_long_as_it_gives_signs(
    hold, tmp_path, quick, monkeypatch, locks
):
    """Whether the file system has no locks, or locks that hold on one host only."""
    folder, first = tmp_path / "run", hold("no locks", "another machine")
    assert first_line(first) == "held"
    if locks:
        monkeypatch.setattr(_lock, "FileLock", NoLocks)
    monkeypatch.setattr(_lock, "_PATIENCE_SECONDS", 10.0)
    notes: list[str] = []
    refusal = f"process {first.pid} on"
    with pytest.raises(LockError, match=refusal), held(folder, notes.append):
        pass
    with pytest.raises(LockError, match=refusal):
        check_free(folder)
    assert "looking for a sign of life" in notes[0]
    first.kill()
    first.wait()
    monkeypatch.setattr(_lock, "_PATIENCE_SECONDS", 0.5)
    check_free(folder)
    notes.clear()
    with held(folder, notes.append):
        pass
    assert notes[-1].endswith(", which has died")


def test_of_many_processes_that_start_at_once_one_gets_the_folder(hold):
    """Each believes to be on a machine of its own, and there are no locks."""
    processes = [hold("no locks", f"machine {i}") for i in range(5)]
    lines = [first_line(process) for process in processes]
    while any("looking for a sign" in line for line in lines):
        lines = [
            first_line(process) if "looking for a sign" in line else line
            for process, line in zip(processes, lines, strict=True)
        ]
    assert lines.count("held") == 1, lines
    (winner,) = (p for p, line in zip(processes, lines, strict=True) if line == "held")
    for process, line in zip(processes, lines, strict=True):
        if process is not winner:
            assert f"in use by another process: process {winner.pid}" in line
            process.communicate()
            assert process.returncode == 2


def test_of_many_processes_that_take_over_at_once_one_gets_the_folder(hold):
    dead = hold("no locks", "a machine that fails")
    assert first_line(dead) == "held"
    dead.kill()
    dead.wait()
    processes = [hold("no locks", f"machine {i}") for i in range(4)]
    last = []
    for process in processes:
        line = first_line(process)
        while "looking for" in line or "which has died" in line:
            line = first_line(process)
        last.append(line)
    assert last.count("held") == 1, last


def test_a_process_whose_lock_was_taken_over_may_not_go_on(tmp_path, quick):
    with held(tmp_path, print) as lock:
        lock.check()
        path = tmp_path / LOCK_FILES[1]
        other = {**json.loads(path.read_text()), "host": "far", "pid": 7, "token": "x"}
        path.write_text(json.dumps(other))
        deadline = time.monotonic() + 10
        with pytest.raises(LockError, match="was taken over by process 7 on far"):
            while time.monotonic() < deadline:
                lock.check()
                time.sleep(0.02)
    # The lock of the other process stays.
    assert json.loads(path.read_text()) == other


def test_a_damaged_file_counts_as_a_process_that_has_just_begun(tmp_path, quick):
    (tmp_path / LOCK_FILES[1]).write_text('{"host": "ha')
    notes: list[str] = []
    start = time.monotonic()
    with held(tmp_path, notes.append):
        assert time.monotonic() - start > 0.5
    assert notes[-1] == f"{tmp_path} was in use by another process, which has died"


def test_the_file_of_a_process_that_began_meanwhile_is_not_taken_over(
    tmp_path, quick, monkeypatch
):
    path, expect_dead = tmp_path / LOCK_FILES[1], _lock._expect_dead

    def holder(name: str) -> str:
        fields = {"host": name, "pid": 7, "since": "", "machine": name, "token": name}
        return json.dumps(fields)

    def ends_and_another_begins(*args: Any) -> None:
        monkeypatch.setattr(_lock, "_expect_dead", is_alive)
        expect_dead(*args)
        path.write_text(holder("second"))

    def is_alive(folder: Path, found: Any, *args: Any) -> None:
        assert found[1].host == "second"
        raise LockError("the second one is alive")

    path.write_text(holder("first"))
    monkeypatch.setattr(_lock, "_expect_dead", ends_and_another_begins)
    with pytest.raises(LockError, match="the second one"), held(tmp_path, print):
        pass
    assert json.loads(path.read_text())["host"] == "second"


@pytest.mark.parametrize("enter", [check_free, lambda folder: held(folder, print)])
def test_a_file_that_may_not_be_read_is_refused_at_once(tmp_path, monkeypatch, enter):
    """As that of another user, whose files nobody else may read."""
    (tmp_path / LOCK_FILES[1]).write_text("{}")
    open_file = Path.open

    def may_not_read(path: Path, mode: str = "r", **options: Any) -> Any:
        if path.name == LOCK_FILES[1] and mode == "r":
            # Without an end the test would hang, and it may run as root.
            assert next(tries) < 5
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_file(path, mode, **options)

    tries = itertools.count()
    monkeypatch.setattr(Path, "open", may_not_read)
    with pytest.raises(LockError, match="Permission denied"), enter(tmp_path):
        pass


def test_a_marker_file_does_not_count_as_a_lock_of_the_system(tmp_path, monkeypatch):
    """filelock makes such a file where the system lacks locks, unless told not to."""
    fcntl = pytest.importorskip("fcntl")

    def lacks_locks(*args: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", lacks_locks)
    with _lock._locked_by_system(tmp_path) as has_system:
        assert not has_system


def test_a_process_that_was_suspended_looks_before_it_writes(tmp_path):
    """The thread that gives signs of life was suspended too."""
    with held(tmp_path, print):
        check_held(tmp_path)
        path = tmp_path / LOCK_FILES[1]
        other = {**json.loads(path.read_text()), "host": "far", "pid": 7, "token": "x"}
        path.write_text(json.dumps(other))
        with pytest.raises(LockError, match="was taken over by process 7 on far"):
            check_held(tmp_path / ".." / tmp_path.name)
    check_held(tmp_path)


def test_signs_of_life_are_given_until_the_end(tmp_path, quick):
    path = tmp_path / LOCK_FILES[1]
    with held(tmp_path, print):
        before = path.stat().st_mtime_ns
        deadline = time.monotonic() + 10
        while path.stat().st_mtime_ns == before and time.monotonic() < deadline:
            time.sleep(0.02)
        assert path.stat().st_mtime_ns > before
    assert not path.exists()
    assert threading.active_count() < 50


def test_a_block_within_a_block_shares_the_lock_but_another_thread_does_not(tmp_path):
    errors: list[str] = []

    def enter() -> None:
        try:
            with held(tmp_path, print):
                pass
        except LockError as error:
            errors.append(str(error))

    with held(tmp_path, print) as outer:
        with held(tmp_path / ".." / tmp_path.name, print) as inner:
            assert inner is outer
        assert (tmp_path / LOCK_FILES[1]).exists()
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    (message,) = errors
    assert f"process {os.getpid()} on" in message


def test_a_folder_into_which_nothing_is_written_leaves_no_trace(tmp_path):
    folder = tmp_path / "a" / "b"
    with held(folder, print):
        assert folder.is_dir()
    assert not names(tmp_path)
    folder.mkdir(parents=True)
    with held(folder, print):
        pass
    assert not names(folder)
    with held(folder, print):
        (folder / "config.json").touch()
    assert names(folder) == {"config.json", LOCK_FILES[0]}


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(LockError, match="cannot be written: "),
        held(tmp_path / "file" / "run", print),
    ):
        pass
    assert names(tmp_path) == {"file"}


def test_looking_whether_a_folder_is_free_writes_nothing(tmp_path):
    check_free(tmp_path / "missing")
    check_free(tmp_path)
    assert not names(tmp_path)
