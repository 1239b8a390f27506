"""What ends a program with a message instead of a traceback."""

import difflib
from collections.abc import Iterable

__all__ = ["NonFiniteError", "UserError", "nearest"]


class UserError(ValueError):
    """Bad input. The message says what was wrong, where, and what is allowed."""


class NonFiniteError(ArithmeticError):
    """A loss that is NaN or infinite; the run cannot go on."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """What to say of a name that is not among the allowed ones."""
    allowed = sorted(allowed)
    close = difflib.get_close_matches(str(name), allowed, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"allowed: {', '.join(allowed)}{hint}"
