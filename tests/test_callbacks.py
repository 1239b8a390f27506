"""Callbacks get every row of a run, and may end it."""

import sys
from types import SimpleNamespace

import pandas as pd
import pytest

from dimat_jax import train
from dimat_jax._metrics import read_evaluations, read_rows
from dimat_jax.callbacks import (
    CALLBACKS,
    CallbackError,
    Callbacks,
    Run,
    Stop,
    check_callbacks,
    early_stopping,
    numbers,
)
from dimat_jax.config import fields_of
from tests.sweeping.small import small


def row(number: int, phase: str = "trained", **fields) -> dict:
    return {"round": number, "step": 10 * number, "phase": phase, **fields}


@pytest.fixture
def run(tmp_path) -> Run:
    (tmp_path / "config.json").write_text("{}")
    return Run(tmp_path, {"seed": 0}, [])


def test_csv_has_the_numbers_of_all_rows(run):
    earlier = [row(0, "pretrained", accuracy=0.1, by_agent=[0.1, 0.2])]
    callback = CALLBACKS["csv"](run._replace(rows=earlier))
    callback(row(1, "merged", accuracy=0.5))
    callback(row(1, "trained", accuracy=0.6, loss=2))
    table = pd.read_csv(run.workdir / "metrics.csv")
    assert list(table.columns) == ["phase", "round", "step", "accuracy", "loss"]
    assert table.accuracy.tolist() == [0.1, 0.5, 0.6]
    assert table.phase.tolist() == ["pretrained", "merged", "trained"]


def test_wandb_gets_numbers_by_phase_and_one_run_for_all_parts(run, monkeypatch):
    """With a stand-in that has the functions of wandb which are called."""
    begun, logged, ended = [], [], []
    session = SimpleNamespace(
        log=lambda numbers, step: logged.append((numbers, step)),
        finish=lambda: ended.append(True),
    )

    def init(**options):
        begun.append(options)
        return session

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for _ in range(2):
        callbacks = Callbacks({"wandb": CALLBACKS["wandb"](run, mode="offline")})
        callbacks(row(2, "merged", accuracy=0.5, name="x"))
        callbacks.end({"round": 2})
        assert callbacks.error is None
    numbers = {"merged/round": 2, "merged/step": 20, "merged/accuracy": 0.5}
    assert logged == [(numbers, 20)] * 2 and len(ended) == 2
    assert begun[0] == begun[1]
    assert begun[0]["resume"] == "allow" and begun[0]["mode"] == "offline"
    assert begun[0]["config"] == {"seed": 0} and begun[0]["project"] == "dimat_jax"


@pytest.mark.parametrize("better, sign", [("larger", 1), ("smaller", -1)])
def test_early_stopping_ends_after_evaluations_without_improvement(run, better, sign):
    options = {"field": "x", "better": better, "patience": 2}
    values = [0.1, 0.4, 0.3, 0.5, 0.5, 0.2]
    rows = [row(i, x=sign * value) for i, value in enumerate(values)]
    watch = early_stopping(run, **options)
    for each in rows[:5]:
        watch(row(each["round"], "merged", x=sign * 9.0))
        watch(each)
    # A run that goes on remembers what it has seen.
    again = early_stopping(run._replace(rows=rows[:5]), **options)
    for callback in (watch, again):
        with pytest.raises(Stop, match="x has not improved in the last 2 evaluations"):
            callback(rows[5])


@pytest.mark.parametrize(
    ("field", "falls"),
    [
        ("validation_loss_mean", True),
        ("test_loss_average_model", True),
        ("consensus_distance_aligned", True),
        ("test_disagreement", True),
        ("test_accuracy_average_model", False),
        ("", False),
    ],
)
def test_early_stopping_knows_which_values_are_better(run, field, falls):
    watch = early_stopping(run, field=field, patience=2)
    name = field or "validation_accuracy_mean"
    for number in range(6):  # These values become better and better.
        watch({**row(number), name: (-1.0 if falls else 1.0) * number})
    with pytest.raises(Stop, match=f"{name} has not improved"):
        for number in range(2):
            watch({**row(number), name: 9.0 if falls else -9.0})


def test_early_stopping_looks_at_the_agents_that_a_server_has_drawn(run):
    watch = early_stopping(run, patience=2)
    with pytest.raises(Stop, match="validation_accuracy_mean has not improved"):
        for number in range(3):
            all_agents, drawn = 0.1 * number, 0.5
            watch(
                row(
                    number,
                    validation_accuracy_mean=all_agents,
                    validation_accuracy_of_sampled=drawn,
                )
            )


def test_every_measure_of_a_row_can_be_watched_and_no_other_name(tmp_path):
    config = small(rounds=1)
    config.data.validation = 0.2
    train.run(config, tmp_path)
    measured = [
        name
        for name in numbers(read_rows(tmp_path)[-1])
        if name not in ("round", "step") and not name.endswith("_total")
    ]
    assert len(measured) > 10

    def fields(name):
        config.update_from_flattened_dict(
            {"callbacks": "early_stopping", "early_stopping.field": name}
        )
        return fields_of(config)

    for name in measured:
        check_callbacks(fields(name))
    with pytest.raises(CallbackError, match="'accuracy', which no row has; allowed: t"):
        check_callbacks(fields("accuracy"))


def test_a_failure_is_noted_once_and_hinders_no_other_callback():
    seen = []

    def fail(row):
        raise OSError("the line is dead")

    callbacks = Callbacks({"fail": fail, "see": seen.append})
    for number in range(2):
        callbacks(row(number))
    assert len(seen) == 2 and not callbacks.reason
    assert str(callbacks.error) == "the callback 'fail' has failed: the line is dead"


def test_a_run_whose_callback_fails_is_saved_and_goes_on(tmp_path):
    config, seen = small(rounds=3), []

    def fail(row):
        if row["phase"] == "trained":
            raise OSError("the line is dead")

    with pytest.raises(CallbackError, match="the line is dead; the run is saved"):
        train.run(config, tmp_path / "run", callbacks=[fail, seen.append])
    assert seen == read_rows(tmp_path / "run")
    evaluations = read_evaluations(tmp_path / "run")
    phases = [each["phase"] for each in evaluations]
    assert phases == ["pretrained", "merged", "trained"]

    def stop(row):
        if row["round"] == 2:
            raise Stop("enough")

    summary = train.run(config, tmp_path / "run", callbacks=[stop])
    assert summary["stopped"] == {"reason": f"{stop!r}: enough", "round": 2}
    assert summary["round"] == 2
    assert len(read_evaluations(tmp_path / "run")) == 5
