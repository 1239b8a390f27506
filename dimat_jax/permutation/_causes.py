"""Reasons why units are fixed, in words for people.

A rule of an operation gives its reason as a string: the operation's name, or some words
about it. All other reasons are a `Cause`.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

__all__ = ["Cause", "Reason", "describe"]


class Cause(NamedTuple):
    """A reason that is not the rule of an operation.

    Attributes:
        kind: an input, an output or a captured array holds the units; an operation
            without a rule touched them ("unknown"); or no output depends on them.
        what: which input, output, array or operation it is.
        number: the number of the output, or of the operation's occurrence.
        of_result: for an unknown operation, whether the units are those of its results.
    """

    kind: Literal["input", "output", "captured", "unknown", "unused"]
    what: str = ""
    number: int = 0
    of_result: bool = False


Reason = str | Cause


def describe(reasons: Iterable[Reason], at_most: int = 4) -> str:
    """Lists reasons in words, for example "the input 'x' axis 0"."""
    texts = sorted({_text(reason) for reason in reasons})
    more = [f"and {len(texts) - at_most} more"] if len(texts) > at_most else []
    return ", ".join([*texts[:at_most], *more])


def _text(reason: Reason) -> str:
    if reason == "iota":
        return "a constant that counts places (the operation 'iota')"
    if isinstance(reason, str):
        return reason if " " in reason else f"the operation {reason!r}"
    match reason.kind:
        case "captured":
            return f"the captured array {reason.what}"
        case "unknown":
            return f"the operation {reason.what!r}, which derive does not know"
        case "unused":
            return "no output depends on it"
        case _:
            return f"the {reason.kind} {reason.what}"
