"""When agents merge: every few rounds, or every few steps of a round."""

from collections.abc import Iterator
from typing import NamedTuple

from dimat_jax.options import Option

__all__ = ["EVERY", "UNIT", "Part", "begins_with_merge", "parts_of_round"]

EVERY = Option(
    "merge.every",
    1,
    "The time from one merge to the next, in the unit that merge.unit names.",
    at_least=1,
    unit="rounds or steps",
)
UNIT = Option(
    "merge.unit",
    "rounds",
    "The unit of merge.every. By rounds, agents merge at the beginning of the first "
    "round and of every merge.every-th one after it. By steps, they merge at the "
    "beginning of every round, and in it after every merge.every local steps.",
    choices=("rounds", "steps"),
)


class Part(NamedTuple):
    """A part of a round: a communication, and the local steps up to the next one.

    Attributes:
        round: the round, from 1.
        begins_round: whether this is the first part of the round.
        merge: the number of the merge in the run, from 1; None if no merge is due.
        steps: the local steps. Steps count from 0 over all rounds.
    """

    round: int
    begins_round: bool
    merge: int | None
    steps: range


def begins_with_merge(every: int, unit: str, round_number: int) -> bool:
    """Whether agents merge at the beginning of a round; see `parts_of_round`."""
    return unit == "steps" or (round_number - 1) % every == 0


def parts_of_round(
    every: int, unit: str, round_number: int, steps: range
) -> Iterator[Part]:
    """Yields the parts of a round, in order. There is at least one.

    Args:
        every: the time from one merge to the next.
        unit: the unit of this time, "rounds" or "steps".
        round_number: the round, from 1.
        steps: the local steps of the round; all rounds have equally many.
    """
    if unit == "rounds":
        is_due = begins_with_merge(every, unit, round_number)
        merge = (round_number - 1) // every + 1 if is_due else None
        yield Part(round_number, True, merge, steps)
        return
    starts = range(0, max(len(steps), 1), every)
    merges_before = (round_number - 1) * len(starts)
    for number, start in enumerate(starts, merges_before + 1):
        yield Part(round_number, start == 0, number, steps[start : start + every])
