"""What becomes of a process that is asked to end: by Ctrl-C, by `kill`, by a cluster.

A signal raises `Interrupted`, as Ctrl-C does in every Python program, as long as there
is nothing to lose. Once a run has done something that is on no disk, it defers signals:
it finishes its step, saves, and raises `Interrupted` then. A second signal ends it at
once.

In a program of its own (`start`), a thread watches the signals too. It ends the process
where Python cannot: while JAX compiles, or if a library has swallowed the exception.
"""

import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from dimat_jax.errors import Interrupted

__all__ = ["Signals", "deferrable", "end_at_once", "start"]

_WATCHED = ("SIGTERM", "SIGINT", "SIGHUP")
# Libraries that run jobs of a cluster handle these. They get them after the run has
# saved its state.
_PASSED_ON = ("SIGUSR1", "SIGUSR2")
# Terminals, shells and clusters often send several signals at once.
_ONCE_SECONDS = 0.5
# A program that does not end within so many seconds after `Interrupted` was raised is
# ended: some library may have swallowed the exception.
_GRACE_SECONDS = 10.0

_Handler = Callable[[int, FrameType | None], Any] | int | None


class Signals:
    """The signals that this process has received within a block.

    Args:
        ends: Whether this is a program of its own, which a second signal ends at once.
            Elsewhere a second signal raises `Interrupted`.

    Attributes:
        is_deferring: Whether signals are only noted.
        received: The signals that were noted, the first one first.
    """

    def __init__(self, ends: bool):
        self.is_deferring = False
        self.received: list[int] = []
        self._ends = ends
        self._first_at = 0.0
        self._outer: dict[int, _Handler] = {}

    @property
    def number(self) -> int:
        """The signal that was noted first; 0 if there is none."""
        return self.received[0] if self.received else 0

    def defer(self) -> None:
        """From now on signals are only noted, until the block ends."""
        self.is_deferring = True

    def install(self) -> None:
        """Handles the signals. Those that the process ignores stay ignored."""
        if _on_collection not in gc.callbacks:
            gc.callbacks.append(_on_collection)
        for name in (*_WATCHED, *_PASSED_ON):
            number = getattr(signal, name, None)
            if number is None:
                continue  # The system has no such signal.
            before = signal.getsignal(number)
            if before in (signal.SIG_IGN, None):
                continue
            if callable(before) or name in _WATCHED:
                self._outer[number] = before
                signal.signal(number, self._on_signal)

    def uninstall(self) -> None:
        """Gives the signals back to those who handled them before."""
        for number, handler in self._outer.items():
            signal.signal(number, handler)

    def pass_on(self) -> None:
        """Sends the noted signals to the libraries that handled them before."""
        received, self.received = self.received, []
        for number in received:
            if self._has_own_handler(number):
                signal.raise_signal(signal.Signals(number))

    def _has_own_handler(self, number: int) -> bool:
        """Whether a library handles a signal, and not Python or this module."""
        before = self._outer.get(number)
        own = (signal.default_int_handler, _leave)
        return callable(before) and before not in own and not _is_ours(before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Runs in the main thread, between two steps of Python."""
        now = time.monotonic()
        if not self.is_deferring:
            before = self._outer[number]
            if self._has_own_handler(number) and callable(before):
                before(number, frame)
            elif _is_in_collector(frame):
                # Python ignores exceptions there, so the signal comes again soon.
                main = threading.main_thread().ident
                threading.Timer(0.02, signal.pthread_kill, [main, number]).start()
            else:
                raise Interrupted(number)
            return
        if not self.received:
            self._first_at = now
            self.note(number)
            return
        if now - self._first_at > _ONCE_SECONDS and not self._ends:
            raise Interrupted(number)
        self.received.append(number)

    def note(self, number: int) -> None:
        """Notes a signal, and says so, unless one has been noted already."""
        if self.received:
            return
        self.received.append(number)
        text = f"{signal.Signals(number).name}: the run finishes its step and saves"
        if _second_ends:
            text += "; a second signal ends it at once"
        _print(text)


# The signals of the innermost block; the watching thread asks it.
_current: list[Signals] = []


@contextlib.contextmanager
def deferrable() -> Iterator[Signals]:
    """Handles signals for the time of a block, which may defer them.

    Outside of the main thread Python delivers no signals, so none is ever received.

    Raises:
        Interrupted: A signal was received. While signals are deferred, it is raised at
            the end of the block.
    """
    signals = Signals(ends=_watching)
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    signals.install()
    _current.append(signals)
    try:
        yield signals
    finally:
        number = signals.number
        _current.pop()
        signals.uninstall()
        signals.pass_on()
    if number:
        raise Interrupted(number)


# Whether a thread watches the signals.
_watching = False
# Whether a second signal ends this program at once.
_second_ends = True


def end_at_once() -> None:
    """Lets signals end this program with one line, while it has done nothing yet."""
    if threading.current_thread() is threading.main_thread():
        for name in _WATCHED:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _leave)


def start(second_ends: bool = True) -> None:
    """Lets signals raise `Interrupted` in this program, and end it if need be.

    Args:
        second_ends: Whether a second signal ends the program at once. A program that
            another one ends may receive the same signal from the system and, some time
            later, from the other program.
    """
    global _watching, _second_ends
    if _watching or threading.current_thread() is not threading.main_thread():
        return
    _second_ends = second_ends
    signals = Signals(ends=True)
    signals.install()
    _current.append(signals)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # The system writes each signal's number there at once, whatever Python does.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    _watching = True


def _watch(reader: int) -> None:
    """Ends the process after a second signal, or if the first one has no effect."""
    watched = {getattr(signal, name, None) for name in _WATCHED}
    first_at = 0.0
    while True:
        (number,) = os.read(reader, 1)
        if number not in watched or signal.getsignal(number) == signal.SIG_IGN:
            continue
        now = time.monotonic()
        if _second_ends and first_at and now - first_at > _ONCE_SECONDS:
            _leave(number)
        if not first_at:
            first_at = now
            threading.Thread(target=_expect_end, args=(number,), daemon=True).start()


def _expect_end(number: int) -> None:
    """Sees to it that a signal ends the process, even if its exception was swallowed.

    If the program has begun to defer signals meanwhile, it has work to lose. Then the
    signal is noted, so that the work ends as after any other signal.
    """
    deadline = time.monotonic() + _GRACE_SECONDS
    time.sleep(min(_GRACE_SECONDS, 1.0))  # Python's own handler comes first.
    while time.monotonic() < deadline and not _current[-1].is_deferring:
        time.sleep(0.05)
    if _current[-1].is_deferring:
        _current[-1].note(number)
    else:
        _leave(number)


# Whether the garbage collector runs.
_collecting = False


def _on_collection(phase: str, info: dict[str, int]) -> None:
    global _collecting
    del info
    _collecting = phase == "start"


def _is_in_collector(frame: FrameType | None) -> bool:
    """Whether the garbage collector runs, or one of its callbacks. JAX has one."""
    callbacks = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None and frame.f_code not in callbacks:
        frame = frame.f_back
    return _collecting or frame is not None


def _is_ours(handler: object) -> bool:
    return isinstance(getattr(handler, "__self__", None), Signals)


def _leave(number: int, frame: FrameType | None = None) -> None:
    """Ends the process, with the exit code by which shells know the signal."""
    del frame
    _print(f"ended by {signal.Signals(number).name}")
    os._exit(128 + number)


def _print(line: str) -> None:
    """Prints to stderr without locks, which the interrupted code may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
