"""Errors that end a program with a message instead of a traceback."""

import difflib
import signal
from collections.abc import Iterable

__all__ = [
    "Interrupted",
    "NonFiniteError",
    "SweepError",
    "UserError",
    "first_line",
    "nearest",
    "out_of_memory",
]


class UserError(ValueError):
    """An input is wrong. The message tells what, where, and what is allowed instead."""


class NonFiniteError(ArithmeticError):
    """A loss is NaN or infinite, so the run cannot go on."""


class Interrupted(KeyboardInterrupt):
    """A signal has ended the work.

    Args:
        number: The signal's number.
        message: What has become of the work.
        agreed: Whether all processes of the run end here.
    """

    def __init__(
        self, number: int = signal.SIGINT, message: str = "", agreed: bool = False
    ):
        super().__init__(message)
        self.number = number
        self.agreed = agreed

    @property
    def exit_code(self) -> int:
        """The exit code by which shells know that a signal has ended a program."""
        return 128 + self.number


class SweepError(RuntimeError):
    """Some runs of a sweep have failed. The message names them and the reasons."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type if there is none."""
    message = str(error).strip()
    return message.splitlines()[0] if message else type(error).__name__


# What the messages contain by which libraries say that a device's memory is full.
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "out of memory")


def out_of_memory(error: BaseException) -> str | None:
    """Says in one line that memory ran out.

    A UserError that explains the error of a device, as `PlacementError` does, counts as
    well. So ask this before you ask for the class of an error.

    Args:
        error: any error.

    Returns:
        the line; None for an error that has another reason.
    """
    text = str(error).strip()
    if not isinstance(error, MemoryError) and not any(
        part in text for part in _OUT_OF_MEMORY
    ):
        return None
    return f"out of memory: {first_line(error)}"


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Lists the allowed names, and those most similar to a name that is not allowed."""
    allowed = sorted(allowed)
    close = difflib.get_close_matches(str(name), allowed, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"allowed: {', '.join(allowed)}{hint}"
