"""A lock on a folder: one process at a time works there, and others learn which one.

    .running        a file that the system locks for as long as the process lives
    .running.json   who the process is: its host, its number, and since when it works

The system releases its lock when a process dies. On a network file system that lock may
hold on one machine only, or not at all. So the process also touches `.running.json`
every few seconds, as a sign of life to other machines. A process that finds the file
of another machine looks for these signs before it goes on. A process whose lock has
been taken, because it had stopped for a minute, learns that from the file too.
"""

import contextlib
import dataclasses
import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dimat_jax._temporary import temporary
from dimat_jax.errors import UserError, first_line, writing

__all__ = ["LOCK_FILES", "Lock", "LockError", "check_free", "check_held", "held"]

LOCK_FILES = (".running", ".running.json")
"""The two files of a lock. The second one is removed when the lock is released."""

# The seconds between two signs of life.
_BEAT_SECONDS = 5.0
# A process of another machine that gives no sign of life for so many seconds is dead.
# A network file system may show a change a few seconds late.
_PATIENCE_SECONDS = 60.0
# Two processes of different machines may take over the same lock. After so many seconds
# both read `.running.json` again, and the process that it names has the lock.
_SETTLE_SECONDS = 2.0
# The errors that mean that there is no file, or that it was removed while it was read.
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


class LockError(UserError):
    """Another process works in the folder. The message says which one."""


@dataclasses.dataclass(frozen=True)
class _Holder:
    """The process that works in a folder.

    Attributes:
        host: The name of its machine.
        pid: Its number there.
        since: The local time at which it began.
        machine: A text that differs between machines, and changes when one restarts.
        token: A text that no other lock has.
    """

    host: str
    pid: int
    since: str
    machine: str
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class Lock:
    """A lock that this process holds on a folder.

    Args:
        folder: The folder.
        holder: This process.
    """

    def __init__(self, folder: Path, holder: _Holder):
        self._folder = folder
        self._holder = holder
        self._thread = threading.get_ident()
        self._over = threading.Event()
        self._taken_by: _Holder | None = None
        threading.Thread(target=self._beat, daemon=True).start()

    @property
    def is_of_this_thread(self) -> bool:
        """Whether the thread that asks has taken the lock."""
        return self._thread == threading.get_ident()

    def look(self) -> None:
        """Reads who works in the folder now; see `check`.

        A thread does so every few seconds, but not while the process is suspended.
        """
        found = _read(self._folder)
        if found is not None and found[1] not in (None, self._holder):
            self._taken_by = found[1]

    def check(self) -> None:
        """Refuses to go on if another process is known to have the folder.

        Raises:
            LockError: This process was silent for so long that it counted as dead.
        """
        if self._taken_by is not None:
            raise LockError(
                f"{self._folder} was taken over by {self._taken_by}, because this "
                f"process gave no sign of life for {_PATIENCE_SECONDS:.0f} seconds"
            )

    def release(self) -> None:
        """Lets other processes work in the folder."""
        self._over.set()
        with contextlib.suppress(OSError):
            found = _read(self._folder)
            if found is not None and found[1] == self._holder:
                (self._folder / LOCK_FILES[1]).unlink(missing_ok=True)

    def _beat(self) -> None:
        path = self._folder / LOCK_FILES[1]
        while not self._over.wait(_BEAT_SECONDS):
            # Touching the file needs no space on the disk.
            with contextlib.suppress(OSError):
                self.look()
                if self._taken_by is not None:
                    return
                os.utime(path)


# The locks that this process holds, by their folders.
_held: dict[Path, Lock] = {}


@contextlib.contextmanager
def held(folder: Path, log: Callable[[str], None]) -> Iterator[Lock]:
    """Keeps other processes out of a folder for the time of a block.

    A block within a block of the same thread and folder shares its lock.

    Args:
        folder: The folder. It is made if it is missing, and removed again if nothing
            is written into it.
        log: A function that receives a line of text if the lock of a process that has
            died is taken over.

    Raises:
        LockError: Another process works in the folder, or it cannot be written.
    """
    folder = folder.resolve()
    outer = _held.get(folder)
    if outer is not None and outer.is_of_this_thread:
        yield outer
        return
    with _locked_by_system(folder) as has_system:
        try:
            holder = _claim(folder, has_system, log)
        except OSError as error:
            raise _unwritable(folder, error) from error
        lock = _held[folder] = Lock(folder, holder)
        try:
            yield lock
        finally:
            del _held[folder]
            lock.release()


def check_held(folder: Path) -> None:
    """Refuses to write into a folder if another process has taken its lock over.

    Nothing happens if this process has never had the folder's lock: of several
    processes of a run, one alone has it.

    Raises:
        LockError: This process was silent for so long that it counted as dead.
    """
    lock = _held.get(folder.resolve())
    if lock is not None:
        with contextlib.suppress(OSError):
            lock.look()
        lock.check()


def check_free(folder: Path) -> None:
    """Refuses a folder in which another process works. Nothing is written.

    Raises:
        LockError: Another process works there, or it cannot be found out.
    """
    folder = folder.resolve()
    try:
        found = _read(folder)
        if found is None:
            return
        with _locked_by_system(folder) as has_system:
            pass
        _expect_dead(folder, found, has_system, 2 * _BEAT_SECONDS)
    except OSError as error:
        path = folder / LOCK_FILES[1]
        raise LockError(f"{path} cannot be read: {first_line(error)}") from error


@contextlib.contextmanager
def _locked_by_system(folder: Path) -> Iterator[bool]:
    """Holds the system's lock for the time of a block.

    Yields:
        Whether the file system has locks.

    Raises:
        LockError: A process of this machine, or of another one, has the lock, or the
            folder cannot be written.
    """
    made, path = _missing(folder), folder / LOCK_FILES[0]
    has_system, is_new = True, not path.exists()
    # The marker file that filelock offers instead of missing locks would count as one
    # here. If its process dies on another machine, the marker stays.
    system = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        system.acquire()
    except Timeout:
        raise LockError(_refusal(folder)) from None
    except (OSError, NotImplementedError) as error:
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise _unwritable(folder, error) from error
        has_system = False
    try:
        yield has_system
    finally:
        # A run that was refused, for example because its data are missing, leaves no
        # trace. Elsewhere the file stays: removing it could give two processes a lock.
        with contextlib.suppress(OSError):
            if is_new and [each.name for each in folder.iterdir()] == [path.name]:
                path.unlink()
        for each in made:
            with contextlib.suppress(OSError):
                each.rmdir()  # A folder that is not empty stays.
        system.release()


def _unwritable(folder: Path, error: Exception) -> LockError:
    return LockError(f"{folder} cannot be written: {first_line(error)}")


def _claim(folder: Path, has_system: bool, log: Callable[[str], None]) -> _Holder:
    """Writes down that this process works in the folder."""
    holder = _Holder(
        host=socket.gethostname(),
        pid=os.getpid(),
        since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        machine=_machine(),
        token=uuid.uuid4().hex,
    )
    text, path = json.dumps(dataclasses.asdict(holder)) + "\n", folder / LOCK_FILES[1]
    while True:
        try:
            with path.open("x") as file:  # Only one process can make the file.
                try:
                    with writing(path):
                        file.write(text)
                        file.flush()
                except OSError:
                    # On a full disk, half a file would look like another process.
                    path.unlink()
                    raise
            return holder
        except FileExistsError:
            found = _read(folder)
        if found is not None and _has_died(folder, found, has_system, log):
            break
    unfinished = temporary(path)
    unfinished.write_text(text)
    os.replace(unfinished, path)
    if not _is_dead(found[1], has_system):
        time.sleep(_SETTLE_SECONDS)
        now = _read(folder)
        if now is None or now[1] != holder:
            raise LockError(_refusal(folder))
    return holder


def _has_died(
    folder: Path,
    found: tuple[int, _Holder | None],
    has_system: bool,
    log: Callable[[str], None],
) -> bool:
    """Whether the process that was found is dead, and its file is there as it was.

    A process that ends removes its file. Then another one may begin.

    Raises:
        LockError: The process is alive.
    """
    who = f"{folder} was in use by {found[1] or 'another process'}"
    if not _is_dead(found[1], has_system):
        seconds = f"{_PATIENCE_SECONDS:.0f} seconds"
        log(f"{who}; looking for a sign of life for {seconds}")
    _expect_dead(folder, found, has_system, _PATIENCE_SECONDS)
    if _read(folder) != found:
        return False
    log(f"{who}, which has died")
    return True


def _expect_dead(
    folder: Path,
    found: tuple[int, _Holder | None],
    has_system: bool,
    patience: float,
) -> None:
    """Refuses a folder whose holder is alive.

    Args:
        folder: The folder.
        found: What `_read` has found there.
        has_system: Whether this process has the system's lock, or has had it just now.
        patience: For how many seconds to look for a sign of life.

    Raises:
        LockError: The holder is alive.
    """
    if _is_dead(found[1], has_system):
        return
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        time.sleep(min(1.0, _BEAT_SECONDS / 5))
        now = _read(folder)
        if now is None:
            return  # The holder has ended.
        if now != found:
            raise LockError(_refusal(folder))


def _is_dead(holder: _Holder | None, has_system: bool) -> bool:
    """Whether the system's lock, which this process has, shows that another is dead."""
    return has_system and holder is not None and holder.machine == _machine()


def _read(folder: Path) -> tuple[int, _Holder | None] | None:
    """Reads who works in a folder.

    Returns:
        The time of the last sign of life, by the clock of the file system, and the
        process, None if the file is damaged. None if there is no file.

    Raises:
        OSError: There is a file that cannot be read, such as that of another user.
    """
    try:
        # A network file system shows the newest state to those who open a file.
        with (folder / LOCK_FILES[1]).open() as file:
            text, status = file.read(), os.fstat(file.fileno())
    except OSError as error:
        if error.errno in _NO_FILE:
            return None
        raise
    try:
        fields: dict[str, Any] = json.loads(text)
        return status.st_mtime_ns, _Holder(**fields)
    except (ValueError, TypeError):
        return status.st_mtime_ns, None


def _refusal(folder: Path) -> str:
    deadline, found = time.monotonic() + 1.0, None
    with contextlib.suppress(OSError):
        while (found := _read(folder)) is None or found[1] is None:
            if time.monotonic() > deadline:
                break  # The other process has just begun, or just ended.
            time.sleep(0.05)
    holder = found[1] if found else None
    who = holder or "a process that is just starting or ending"
    return (
        f"{folder} is in use by another process: {who}. Wait until it has ended, or "
        "choose another workdir"
    )


def _machine() -> str:
    """A text that differs between machines, and changes when one restarts."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _missing(folder: Path) -> list[Path]:
    """A folder and the folders above it, as far as they do not exist yet."""
    return [path for path in (folder, *folder.parents) if not path.exists()]
