"""The rows of whole runs hold what is measured, on any devices and after a restart."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import quickstart
from dimat_jax import train
from dimat_jax._average import Average
from dimat_jax._measuring import row_fields
from dimat_jax._metrics import read_evaluations
from dimat_jax.config import Config, drop_unread
from dimat_jax.evaluate import Evaluation

TIMES = ("seconds_total", "merge_seconds")


def small(algorithm: str = "dimat", **changes: Any) -> Config:
    """Makes a run of a few seconds whose agents keep frames of their own."""
    config = quickstart.get_config(algorithm)
    fields = {
        "agents": 3,
        "rounds": 2,
        "local_epochs": 1,
        "batch_size": 20,
        "data.train_size": 120,
        "data.test_size": 50,
        "eval.batch_size": 20,
        "model.norm": "batch",
        "model.width": 0.25,
        "pretrain.epochs": 2,
        "pretrain.batch_size": 20,
        "pretrain.checkpoint_every": 1,
        # Adam's first steps would magnify the rounding of BatchNorm.
        "pretrain.optimizer.name": "sgd",
        "pretrain.optimizer.learning_rate": 0.1,
        "optimizer.name": "sgd",
        "optimizer.learning_rate": 0.1,
        "merge.frame": "own",
        "merge.opt_state": "keep",
        "merge.match_samples": 60,
        "batch_norm.data": "own",
        "batch_norm.samples": 30,
        "batch_norm.batch_size": 20,
        "batch_norm.when": "evaluation",
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    config.update_from_flattened_dict(fields)
    return drop_unread(config)


def run(config: Config, folder: Path, log: Any = lambda line: None) -> list[dict]:
    train.run(config, folder, log)
    rows = read_evaluations(folder)
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[dict]:
    """The rows of a run that was never interrupted."""
    return run(small(), tmp_path_factory.mktemp("runs") / "whole")


def test_rows_hold_what_is_measured_of_agents_and_of_their_average(whole):
    for row in whole:
        assert np.shape(row["test_accuracy_by_class"]) == (3, 10)
        assert len(row["test_accuracy_local"]) == 3
        assert row["test_accuracy_local_mean"] == pytest.approx(
            np.mean(row["test_accuracy_local"])
        )
        assert 0 <= row["test_disagreement"] <= 1
        assert 0 <= row["test_accuracy_average_model"] <= 1
        assert row["test_loss_average_model"] > 0
        # Agents of different initial weights are closer once they are aligned.
        assert row["consensus_distance_aligned"] < row["consensus_distance"]
        assert "frames" not in row


def test_local_accuracy_is_of_the_classes_of_a_shard(tmp_path):
    rows = run(small("local", data__partition="by_class", rounds=1), tmp_path)
    counts = np.array(json.loads((tmp_path / "partition.json").read_text())["counts"])
    for row in rows:
        by_class = np.array(row["test_accuracy_by_class"])
        expected = [
            np.average(accuracies, weights=own)
            for accuracies, own in zip(by_class, counts, strict=True)
        ]
        np.testing.assert_allclose(row["test_accuracy_local"], expected)
        # There are five test images of each class, so their mean is the accuracy.
        np.testing.assert_allclose(by_class.mean(axis=1), row["test_accuracy"])
    assert rows[-1]["test_accuracy_local_mean"] > rows[-1]["test_accuracy_mean"] + 0.2


def test_at_consensus_the_average_is_every_agent(tmp_path):
    fields = {"topology": "fully_connected", "batch_norm.data": "proxy"}
    config = small("wa", merge__inner="local", batch_norm__when="communication")
    config.update_from_flattened_dict(fields)
    for row in run(drop_unread(config), tmp_path):
        merged = row["phase"] == "merged"
        assert (row["test_disagreement"] == 0) == merged
        assert (row["consensus_distance"] < 1e-5) == merged
        assert row["consensus_distance_aligned"] == pytest.approx(
            row["consensus_distance"], rel=1e-5, abs=1e-6
        )
        if merged:
            accuracy, loss = row["test_accuracy"], row["test_loss"]
            assert [row["test_accuracy_average_model"]] * 3 == pytest.approx(accuracy)
            assert [row["test_loss_average_model"]] * 3 == pytest.approx(loss, rel=1e-5)


class _Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["dimat", "local"])
@pytest.mark.parametrize("evaluations", [1, 4])
def test_a_run_that_resumes_measures_the_same(tmp_path, whole, algorithm, evaluations):
    """Agents that do not communicate keep their evaluation over the communication."""
    lines: list[str] = []

    def die(line: str) -> None:
        lines.append(line)
        if len(lines) == 2 + evaluations:  # the first line is about the layout
            raise _Killed

    if algorithm == "local":
        whole = run(small("local"), tmp_path / "whole")
    with pytest.raises(_Killed):
        run(small(algorithm), tmp_path / "killed", die)
    assert run(small(algorithm), tmp_path / "killed") == whole


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 3])
def test_the_number_of_devices_changes_no_measure(tmp_path, whole, devices):
    rows = run(small(placement__cpu_devices=devices), tmp_path)
    for row, expected in zip(rows, whole, strict=True):
        for name in ("test_loss", "test_loss_average_model", "consensus_distance"):
            np.testing.assert_allclose(
                row[name], expected[name], rtol=1e-3, err_msg=name
            )
        for name in (
            "consensus_distance_aligned",
            "test_accuracy_average_model",
            "test_disagreement",
            "test_accuracy_by_class",
        ):
            np.testing.assert_allclose(
                row[name], expected[name], rtol=1e-3, atol=0.021, err_msg=name
            )


def test_rows_leave_out_classes_if_there_are_too_many_of_them(monkeypatch):
    ones = np.ones(2)
    evaluation = Evaluation(ones, ones, np.ones((2, 3)), 0.0, 0.0)
    counts = np.ones((2, 3), int)
    fields = row_fields("validation", evaluation, Average(1.0, 1.0, 0.0), counts)
    assert np.shape(fields["validation_accuracy_by_class"]) == (2, 3)
    monkeypatch.setattr("dimat_jax._measuring._MOST_BY_CLASS", 5)
    fields = row_fields("validation", evaluation, Average(1.0, 1.0, 0.0), counts)
    assert "validation_accuracy_by_class" not in fields
    assert fields["validation_accuracy_local_mean"] == 1
