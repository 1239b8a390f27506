"""Commands of `dimat` in forked children: real processes that start in a moment.

A new Python process needs seconds for its imports. This one has imported everything,
but has started neither JAX's devices nor a thread. So a fork of it is like a program
that has just read its modules: it has signals, files, limits and an end of its own.
"""

import contextlib
import gc
import importlib
import os
import resource
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from dimat_jax import cli, train
from dimat_jax.cli import _train

__all__ = ["ACCEPTED", "Child", "Ended", "Limits", "call", "run", "warm_up"]

ACCEPTED = 77
"""The exit code of a child whose input was accepted, and that was to do no work."""

# Modules that commands import only when they need them.
_LATER = (
    *(f"dimat_jax.cli._{name}" for name in cli.COMMANDS),
    "dimat_jax._sweeping._local",
    "orbax.checkpoint",
    "pandas",
    "sklearn.datasets",
    "tensorboardX.summary",
)


class Ended(NamedTuple):
    """What has become of a child.

    Attributes:
        code: The exit code; minus the signal's number after a signal that ended it.
        text: What it has printed, on both streams.
        seconds: How long it has worked. On a busy machine it has lived for longer, and
            that is not its fault.
    """

    code: int
    text: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """The lines that say what is wrong."""
        return [line for line in self.text.splitlines() if line.startswith("error: ")]


class Limits(NamedTuple):
    """What a child may not do.

    Attributes:
        file_size: The largest file in bytes; 0 if there is no limit.
        only_checks: Whether the child ends with `ACCEPTED` instead of training.
        reports: Whether a run writes its report at the end, which takes a second.
    """

    file_size: int = 0
    only_checks: bool = False
    reports: bool = False


class Child:
    """A forked process that calls a function.

    Args:
        function: The function.
        folder: The child's current folder.
    """

    def __init__(self, function: Callable[[], object], folder: Path):
        sys.stdout.flush()
        sys.stderr.flush()
        # A pipe takes lines also where files may not grow.
        self._reader, writer = os.pipe()
        self._text = b""
        self.ended: Ended | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._reader)
            _be_a_program(function, folder, writer)
        os.close(writer)
        os.set_blocking(self._reader, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._reader, selectors.EVENT_READ)

    @property
    def text(self) -> str:
        """What the child has printed so far."""
        return self._text.decode(errors="replace")

    def send(self, number: int) -> None:
        """Sends a signal, if the child still lives."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def poll(self, seconds: float = 0.0) -> Ended | None:
        """Reads what the child prints for some time; returns its end, if any."""
        deadline = time.monotonic() + seconds
        while self.ended is None:
            self._read(min(0.02, max(0.0, deadline - time.monotonic())))
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self._read(0.0)
                self._selector.close()
                os.close(self._reader)
                code = os.waitstatus_to_exitcode(status)
                worked = usage.ru_utime + usage.ru_stime
                self.ended = Ended(code, self.text, worked)
            elif time.monotonic() >= deadline:
                break
        return self.ended

    def wait(self, seconds: float = 300.0) -> Ended:
        """Waits for the child's end. One that takes longer is killed: it hangs."""
        if (ended := self.poll(seconds)) is not None:
            return ended
        os.kill(self.pid, signal.SIGKILL)
        ended = self.poll(60.0)
        assert ended is not None
        text = f"{ended.text}\nit had not ended after {seconds:.0f} seconds"
        return Ended(-signal.SIGKILL, text, ended.seconds)

    def _read(self, seconds: float) -> None:
        self._selector.select(seconds)
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self._reader, 65536):
                self._text += part
            time.sleep(seconds)  # The child has closed the pipe, but has not ended.


def run(arguments: Sequence[object], folder: Path, limits: Limits = Limits()) -> Child:  # noqa: B008
    """Starts a command of `dimat` in a child.

    Args:
        arguments: The command and its flags.
        folder: The child's current folder.
        limits: What the child may not do.
    """
    texts = [str(argument) for argument in arguments]
    return Child(lambda: _command(texts, limits), folder)


def call(function: Callable[[], object], folder: Path, seconds: float = 120.0) -> Ended:
    """Calls a function in a child, where it may start JAX, and waits for its end."""
    return Child(function, folder).wait(seconds)


def warm_up() -> None:
    """Imports what the children need, so that none of them has to."""
    for name in _LATER:
        importlib.import_module(name)
    # What is imported stays, so no child has to look through it, or to copy it.
    gc.collect()
    gc.freeze()


def _command(arguments: list[str], limits: Limits) -> None:
    if limits.only_checks:
        train._train = lambda *_: os._exit(ACCEPTED)
    if not limits.reports:
        _train._report_on = lambda workdir: None
    if limits.file_size:
        size = limits.file_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    cli.main(arguments)


def _be_a_program(function: Callable[[], object], folder: Path, writer: int) -> None:
    """Calls a function as a program would, and ends the process."""
    code = 0
    try:
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        # The soak may run in the background, where shells ignore these signals.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.chdir(folder)
        function()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
