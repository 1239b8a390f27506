"""Sides of a benchmark take turns in processes of their own."""

import time
from typing import Any

import pytest

from dimat_jax._bench._record import table
from dimat_jax._bench._timing import Side, Timing, race, ratio, ratio_range
from dimat_jax._bench._worker import Program, Unavailable
from dimat_jax.errors import UserError
from dimat_jax.placement import PlacementError

HERE = "tests.bench.test_timing"


def nap(seconds: float, megabytes: int = 0) -> Program:
    number = 0

    def call() -> dict[str, Any]:
        nonlocal number
        number += 1
        held = bytearray(megabytes << 20)
        time.sleep(seconds)
        return {"call": number, "held": len(held)}

    return Program(call, "a bed", lambda: None)


def missing() -> Program:
    raise Unavailable("there is no bed")


def full() -> Program:
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating a bed")


def full_of_agents() -> Program:
    raise PlacementError("the layout vmap does not run on a bed: RESOURCE_EXHAUSTED: 9")


def refusing() -> Program:
    raise UserError("a bed is no table")


def failing() -> Program:
    raise ZeroDivisionError("a bug")


def ending() -> Program:
    raise SystemExit(9)


def side(function: str, **arguments: Any) -> Side:
    return Side(function, f"{HERE}:{function}", arguments)


def test_sides_take_turns_and_are_measured_apart():
    long = Side("long", f"{HERE}:nap", {"seconds": 0.1, "megabytes": 200})
    short = Side("short", f"{HERE}:nap", {"seconds": 0.01})
    timings = race([long, short], repeats=2)
    assert list(timings) == ["long", "short"]
    for timing in timings.values():
        # The first call is not among the later ones.
        assert [facts["call"] for facts in timing.facts] == [2, 3]
        assert timing.device == "a bed" and not timing.unavailable
    assert timings["long"].median >= 0.1
    assert ratio_range(timings["long"], timings["short"])[0] > 1
    more = timings["long"].peak_bytes - timings["short"].peak_bytes
    assert 150 * 2**20 < more < 250 * 2**20


@pytest.mark.every_nth(2)
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("missing", "there is no bed"),
        ("full", "out of memory"),
        ("full_of_agents", "out of memory: the layout vmap"),
        ("ending", "exit code 9"),
    ],
)
def test_a_side_that_cannot_be_measured_stops_no_other(function, reason):
    nap = side("nap", seconds=0)
    timings = race([side(function), nap], repeats=1)
    assert reason in timings[function].unavailable
    assert timings[function].record().keys() == {"unavailable"}
    assert len(timings["nap"].seconds) == 1
    assert ratio(timings[function], timings["nap"]) is None


def test_a_side_that_is_required_says_why_it_was_not_measured():
    with pytest.raises(UserError, match="^one agent: out of memory$"):
        Timing("one agent", unavailable="out of memory").required()
    timing = Timing("one agent", seconds=(1.0,))
    assert timing.required() is timing


def test_bad_input_ends_a_race_with_its_message():
    with pytest.raises(UserError, match="^a bed is no table$"):
        race([side("refusing"), side("nap", seconds=0)], repeats=1)


def test_a_bug_in_a_side_shows_its_traceback():
    with pytest.raises(RuntimeError, match="(?s)Traceback.*ZeroDivisionError: a bug"):
        race([side("failing")], repeats=1)


def test_a_ratio_compares_calls_of_the_same_turn():
    # Both sides were three times slower in the second turn.
    above = Timing("above", seconds=(2.0, 6.0, 2.2))
    below = Timing("below", seconds=(1.0, 3.0, 1.0))
    assert ratio(above, below) == 2
    assert ratio_range(above, below) == pytest.approx((2, 2, 2.2))


def test_a_table_rounds_numbers():
    text = table(["", "a", "b"], [["x", 0.123456, 12345.6], ["y", None, 3]])
    cells = [[c.strip() for c in row.split("|")[1:-1]] for row in text.splitlines()]
    assert cells[0] == ["", "a", "b"]
    assert cells[2:] == [["x", "0.123", "12,346"], ["y", "", "3"]]
