"""Tuning a field on validation images: who wins, and what the report says."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dimat_jax import train
from dimat_jax._metrics import read_rows
from dimat_jax._tuning import tune
from dimat_jax.config import default_config, drop_unread
from dimat_jax.errors import UserError
from dimat_jax.sweeps import grid
from tests.sweeping.small import small

RATE = "optimizer.learning_rate"


def write_run(folder: Path, score: float | None, **fields: Any) -> None:
    """Writes what a run leaves behind; without a score it did not finish."""
    config = default_config()
    given = {"data.validation": 0.2, "algorithm": "cdsgd"}
    given |= {name.replace("__", "."): value for name, value in fields.items()}
    config.update_from_flattened_dict(given)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(drop_unread(config).to_json())
    accuracy = 0.0 if score is None else score
    rows = [
        {
            "phase": phase,
            "round": 1,
            "communicated": phase == "merged",
            "validation_accuracy_mean": accuracy + shift,
            # What was measured on test images would choose the other way round.
            "test_accuracy_mean": 1 - accuracy,
        }
        for phase, shift in (("pretrained", 0.5), ("merged", 0.0), ("trained", -0.1))
    ]
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "metrics.jsonl").write_text("".join(lines))
    if score is not None:
        (folder / "summary.json").write_text("{}")


def write_sweep(
    folder: Path, scores: Mapping[float, Sequence[float | None]], **fields: Any
) -> None:
    """Writes the runs of some values of the learning rate, one for each seed."""
    for rate, by_seed in scores.items():
        for seed, score in enumerate(by_seed):
            name = "-".join(map(str, [*fields.values(), rate, seed]))
            write_run(
                folder / name, score, optimizer__learning_rate=rate, seed=seed, **fields
            )


def test_the_best_mean_over_seeds_wins_by_validation_images(tmp_path):
    write_sweep(tmp_path, {0.01: [0.5, 0.7], 0.1: [0.9, 0.5], 0.3: [0.55, 0.6]})
    tuning = tune([tmp_path], RATE)
    (line,) = tuning.lines
    assert (line.line, line.best, line.inside) == ("cdsgd", 0.1, True)
    assert line.scores == pytest.approx({0.01: 0.6, 0.1: 0.7, 0.3: 0.575})
    assert line.deviations[0.1] == pytest.approx(0.4 / math.sqrt(2))
    report = tuning.report()
    for said in (
        "`optimizer.learning_rate` was tuned on `validation_accuracy_mean`",
        "no agent trains on (data.validation=0.2)",
        "right after the last communication",
        "1 cell(s)",
        "seed(s) 0, 1",
        "No test image was looked at",
        "**70.0 ± 28.3**",
    ):
        assert said in report


def test_one_value_is_chosen_for_all_cells_of_a_line(tmp_path):
    ring = {0.1: [0.9], 0.3: [0.6]}
    star = {0.1: [0.2], 0.3: [0.8]}
    write_sweep(tmp_path, ring, topology="ring")
    write_sweep(tmp_path, star, topology="star")
    write_sweep(tmp_path, {0.1: [0.4], 0.3: [0.3]}, algorithm="local")
    write_sweep(tmp_path, {0.1: [0.4], 0.3: [0.5]}, algorithm="wa", merge__inner="d2")
    write_sweep(tmp_path, {0.1: [0.6], 0.3: [0.5]}, algorithm="wa")
    tuning = tune([tmp_path], RATE)
    assert tuning.n_cells == 2
    assert {line.line: line.best for line in tuning.lines} == {
        "cdsgd": 0.3,
        "local": 0.1,
        "wa, inner d2, optimizer.name sgd": 0.3,
        "wa, inner local, optimizer.name adam": 0.1,
    }
    assert all(not line.inside for line in tuning.lines)
    assert tuning.report().count("** *") == 4


def test_the_moment_can_be_chosen(tmp_path):
    write_sweep(tmp_path, {0.1: [0.5], 0.3: [0.4]})
    (line,) = tune([tmp_path], RATE, at="end").lines
    assert line.scores == pytest.approx({0.1: 0.4, 0.3: 0.3})


def test_a_value_with_a_run_that_failed_is_never_chosen(tmp_path):
    write_sweep(tmp_path, {0.1: [0.3, 0.3], 0.3: [0.99, None]})
    tuning = tune([tmp_path], RATE)
    assert tuning.lines[0].best == 0.1
    assert "failed" in tuning.report()
    json.dumps(tuning.record())


@pytest.mark.parametrize(
    ("sweep", "fields", "message"),
    [
        ({0.1: [0.3], 0.3: [0.5]}, {"data__validation": 0.0}, "not tuned on test"),
        ({0.1: [0.3, 0.4], 0.3: [0.5]}, {}, "0.3 was run in 1 of 2 cells and seeds"),
        ({0.1: [0.3]}, {}, "no different values of optimizer.learning_rate"),
        ({0.1: [None], 0.3: [None]}, {}, "at least one run did not finish"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, sweep, fields, message):
    write_sweep(tmp_path, sweep, **fields)
    with pytest.raises(UserError, match=message):
        tune([tmp_path], RATE)


def test_lines_that_do_not_read_the_field_are_left_out_by_name(tmp_path):
    for stay, score in ((0.5, 0.3), (0.7, 0.4), (0.9, 0.2)):
        write_run(tmp_path / f"{stay}", score, algorithm="dimat", merge__stay=stay)
    write_run(tmp_path / "other", 0.9)
    tuning = tune([tmp_path], "merge.stay")
    assert [(line.line, line.best) for line in tuning.lines] == [("dimat", 0.7)]
    assert tuning.left_out == tuning.record()["left_out"] == ["cdsgd"]
    assert "Runs that do not read `merge.stay` are left out: cdsgd." in tuning.report()
    # A field that one line alone reads, with one value, has no different values.
    for stay in (0.5, 0.9):
        shutil.rmtree(tmp_path / f"{stay}")
    with pytest.raises(UserError, match="no different values of merge.stay"):
        tune([tmp_path], "merge.stay")


def test_numbers_and_texts_may_be_values_of_one_field(tmp_path):
    given = {100: 0.5, 20: 0.3, "enough": 0.4}
    for samples, score in given.items():
        fields = {"algorithm": "dimat", "merge__match_samples": samples}
        write_run(tmp_path / f"{samples}", score, **fields)
    tuning = tune([tmp_path], "merge.match_samples")
    assert list(tuning.lines[0].scores) == [20, 100, "enough"]
    assert tuning.lines[0].best == 100 and not tuning.lines[0].inside
    assert "20 | " in tuning.report().replace("  ", " ")
    json.dumps(tuning.record())


def test_a_copy_of_a_run_is_refused_and_a_folder_named_twice_is_one(tmp_path):
    write_sweep(tmp_path / "a", {0.1: [0.9], 0.3: [0.6]})
    assert tune([tmp_path, tmp_path / "a"], RATE) == tune([tmp_path], RATE)
    shutil.copytree(tmp_path / "a" / "0.1-0", tmp_path / "copy")
    with pytest.raises(UserError, match=r"copy .*same config with the same seed"):
        tune([tmp_path], RATE)


def test_without_runs_there_is_one_message(tmp_path):
    with pytest.raises(UserError, match="no run in or below"):
        tune([tmp_path], RATE)


@pytest.mark.slow
def test_real_runs_are_tuned(tmp_path):
    choices = {RATE: (0.3, 1e-6)}
    config = small("cdsgd", rounds=1, data__validation=0.25, pretrain__epochs=0)
    for name, run in grid(choices, {"cdsgd": config}).items():
        train.run(run, tmp_path / name, lambda line: None)
    (line,) = tune([tmp_path], RATE, at="end").lines
    assert line.best == 0.3
    last = read_rows(tmp_path / "0.3-cdsgd")[-1]
    assert line.scores[0.3] == last["validation_accuracy_mean"]
    assert len(last["validation_accuracy"]) == 3
    assert last["validation_accuracy"] != last["test_accuracy"]
