"""Errors that end a program with a message instead of a traceback."""

import contextlib
import difflib
import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any

__all__ = [
    "Interrupted",
    "NonFiniteError",
    "SweepError",
    "UserError",
    "concerning",
    "first_line",
    "in_one_line",
    "nearest",
    "out_of_memory",
    "reading",
    "writing",
]

# A message that is made from another error's text has at most this many characters.
_MOST_CHARACTERS = 400


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


def in_one_line(error: BaseException) -> str:
    """Says in one line what an error says.

    The error's type is left out where the text alone is clear.
    """
    text = " ".join(str(error).split())
    if len(text) > _MOST_CHARACTERS:
        text = f"{text[:_MOST_CHARACTERS]} ..."
    if text and isinstance(error, (OSError, ValueError)):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextlib.contextmanager
def reading(what: Any, kind: type[UserError] = UserError) -> Iterator[None]:
    """Reads what a user has made: a file, a folder, the code of a config.

    Such things can raise any error, also while a library reads them. Here it becomes an
    error that names the thing. Only what a user has made is read in such a block, so
    that no mistake of this library is taken for one of the user.

    Args:
        what: The thing, as the message names it.
        kind: The class of the error.

    Raises:
        UserError: The block has raised an error. Its own `UserError`s stay as they are.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise kind(f"{what} cannot be used: {in_one_line(error)}") from error


@contextlib.contextmanager
def concerning(what: Any, kind: type[UserError] | None = None) -> Iterator[None]:
    """Adds what it concerns to the message of a `UserError`: a run, or a file.

    Args:
        what: What the error concerns.
        kind: The class that the error gets; None if it keeps its own.
    """
    try:
        yield
    except UserError as error:
        raise (kind or type(error))(f"{what}: {error}") from error


@contextlib.contextmanager
def writing(path: Any) -> Iterator[None]:
    """Adds the name of a file to what the system says about it.

    The system does not name the file if it refuses to write into one that is open.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


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
    # Names are similar whatever the case of their letters, and so are their parts.
    plain = {each.lower(): each for each in allowed}
    given = str(name).lower()
    close = difflib.get_close_matches(given, plain, n=3, cutoff=0.6)
    if not close and len(given) > 2:
        close = [each for each in plain if each.startswith(given)][:3]
    hint = " or ".join(repr(plain[each]) for each in close)
    meant = f"; did you mean {hint}?" if close else ""
    return f"allowed: {', '.join(allowed)}{meant}"
