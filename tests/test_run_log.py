"""Tests the estimate of the time that is left. Whole runs test the rest."""

import pytest

from dimat_jax._run_log import TimeLeft


def test_the_estimate_is_the_mean_time_of_the_steps_since_the_first_call():
    now = [1000.0]
    left = TimeLeft(100, " of pre-training", clock=lambda: now[0])
    assert left(10) == ""
    now[0] += 20
    assert left(20) == ", about 3 min left of pre-training"
    now[0] += 40
    assert left(40) == ", about 2 min left of pre-training"
    assert left(100) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1, "1 s"), (99, "99 s"), (101, "2 min"), (5990, "100 min"), (7200, "2.0 h")],
)
def test_a_duration_has_the_unit_that_suits_it(seconds, text):
    now = [0.0]
    left = TimeLeft(3, clock=lambda: now[0])
    left(1)
    now[0] = seconds
    assert left(2) == f", about {text} left"


def test_nothing_is_estimated_without_a_step():
    now = [0.0]
    left = TimeLeft(10, clock=lambda: now[0])
    assert left(3) == left(3) == ""
    now[0] = 0.1
    assert left(5) == left(9) == ""  # Less than a second is left.
