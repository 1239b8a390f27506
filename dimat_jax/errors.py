"""Errors that end a program with a message instead of a traceback."""

import difflib
from collections.abc import Iterable

__all__ = ["NonFiniteError", "SweepError", "UserError", "first_line", "nearest"]


class UserError(ValueError):
    """An input is wrong. The message tells what, where, and what is allowed instead."""


class NonFiniteError(ArithmeticError):
    """A loss is NaN or infinite, so the run cannot go on."""


class SweepError(RuntimeError):
    """Some runs of a sweep have failed. The message names them and the reasons."""


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or its type if there is none."""
    message = str(error).strip()
    return message.splitlines()[0] if message else type(error).__name__


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Lists the allowed names, and those most similar to a name that is not allowed."""
    allowed = sorted(allowed)
    close = difflib.get_close_matches(str(name), allowed, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"allowed: {', '.join(allowed)}{hint}"
