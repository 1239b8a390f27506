"""A forecast counts what a run will send, as the run's own ledger does."""

from typing import Any

import pytest

from dimat_jax import _forecast, train
from dimat_jax._forecast import what_is_sent
from dimat_jax.experiment import Experiment
from tests.sweeping.small import small

RUNS = {
    "questions and answers along links that fail": (
        "cga",
        {"faults__edge_loss": 0.3, "pretrain__epochs": 0},
    ),
    "permutations of a root's frame": ("dimat", {}),
    "scores and images of a joint frame": (
        "dimat",
        {
            "merge__frame": "joint",
            "merge__match_data": "proxy",
            "merge__match_samples": 50,
        },
    ),
    "weights, and agents that are absent": (
        "wm",
        {"merge__frame": "joint", "faults__dropout": 0.5, "seed": 1},
    ),
    "merges in the middle of rounds": (
        "dimat",
        {"merge__unit": "steps", "merge__every": 3, "merge__opt_state": "reset"},
    ),
    "a server that draws two of three agents": (
        "fedavg",
        {"pretrain__epochs": 0, "server__sampled": 2},
    ),
    "differences that are sent later": (
        "wa",
        {
            "compression__name": "top_k",
            "merge__opt_state": "reset",
            "faults__edge_loss": 0.5,
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_sends_what_was_forecast(tmp_path, name):
    algorithm, changes = RUNS[name]
    config = small(algorithm, **changes)
    sent = what_is_sent(Experiment(config))
    assert sent.is_exact
    rows = []
    train.run(config, tmp_path / "run", lambda line: None, callbacks=[rows.append])
    assert sent.total == sum(sent.by_kind.values()) == rows[-1]["bytes_sent_total"]
    assert sent.comm_rounds == pytest.approx(rows[-1]["comm_rounds_total"])
    first = [row for row in rows if row["round"] == 1 and row["phase"] == "trained"]
    assert sent.first_round == first[-1]["bytes_sent_total"]


# Runs, and whether all of their rounds send equally much.
STOPPED: list[tuple[str, dict[str, Any], bool]] = [
    ("cdsgd", {}, True),
    ("cdsgd", {"faults__edge_loss": 0.2}, False),
    ("wa", {"merge__every": 3}, False),
    ("wa", {"merge__every": 3, "merge__unit": "steps"}, True),
    # The first round sends the whole weights.
    ("wa", {"compression__name": "top_k", "merge__opt_state": "reset"}, False),
]


@pytest.mark.parametrize(("algorithm", "changes", "is_exact"), STOPPED)
def test_many_rounds_are_taken_to_be_like_those_that_were_counted(
    monkeypatch, algorithm, changes, is_exact
):
    few = small(algorithm, rounds=4, **changes)
    many = small(algorithm, rounds=400, **changes)
    whole = what_is_sent(Experiment(few))
    clock = iter(range(5))  # The time is over after the fourth round.
    monkeypatch.setattr(_forecast, "_MOST_SECONDS", 3.5)
    monkeypatch.setattr(_forecast.time, "monotonic", lambda: next(clock))
    scaled = what_is_sent(Experiment(many))
    assert scaled.total == 100 * whole.total > 0
    assert scaled.first_round == whole.first_round
    assert whole.is_exact
    assert scaled.is_exact == is_exact
    # A number is exact if, and only if, the counted rounds have sent equally much.
    assert is_exact == (whole.total == 4 * whole.first_round)
