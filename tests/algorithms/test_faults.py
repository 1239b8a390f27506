"""Tests whole runs on digits in which agents drop out and links fail, 30 % each."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import quickstart
from dimat_jax import train
from dimat_jax._metrics import read_evaluations, read_rows
from dimat_jax.algorithms import ALGORITHMS
from dimat_jax.config import drop_unread
from dimat_jax.network import NetworkError

N_AGENTS = 5
# The algorithms that use a graph. Without a graph there are no links that could fail.
ON_GRAPHS = {name for name in ALGORITHMS if ALGORITHMS[name].uses_graph}
FAULTS = {"faults.dropout": 0.3, "faults.edge_loss": 0.3}
# Learning rates with which a few rounds make progress, by optimizer.
RATES = {"adam": 1e-3, "dadam": 1e-3, "sgd": 0.1, "heavy_ball": 0.01}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`run(algorithm, **changes)`: runs a config once, and returns its workdir."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(algorithm: str, **changes: Any) -> Path:
        workdir = folder / f"{len(list(folder.iterdir()))}"
        train.run(faulty(algorithm, folder / "agents", **changes), workdir, quiet)
        return workdir

    return run


def quiet(line: str) -> None:
    del line


def faulty(algorithm: str, pretrained: Path, **changes: Any):
    """Makes a config of a few rounds on a ring with faults, with changed fields.

    Fields are named by their dotted paths.
    """
    config = quickstart.get_config(algorithm)
    fields = {
        "agents": N_AGENTS,
        "rounds": 4,
        "local_epochs": 0,
        "local_steps": 2,
        "batch_size": 30,
        "init": "same",
        "mixing": "metropolis_hastings",
        "data.train_size": 150,
        "data.test_size": 364,
        "model.width": 0.5,
        "optimizer.learning_rate": RATES[ALGORITHMS[algorithm].optimizer],
        "pretrain.epochs": 15,
        "pretrain.batch_size": 30,
        "pretrain.cache_dir": str(pretrained),
        "checkpoint.every": 100,
        **FAULTS,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    config.update_from_flattened_dict(fields)
    return drop_unread(config)


def without_times(rows: list[dict]) -> list[dict]:
    times = ("seconds_total", "merge_seconds")
    return [{k: v for k, v in row.items() if k not in times} for row in rows]


@pytest.mark.every_nth(9)
# Centralized training has no network, and D2 refuses a network with faults.
@pytest.mark.parametrize("algorithm", sorted(set(ALGORITHMS) - {"centralized", "d2"}))
def test_every_algorithm_finishes(run, algorithm):
    rows = read_evaluations(run(algorithm))
    assert [row["round"] for row in rows] == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    for row in rows:
        for field in ("test_loss", "test_accuracy", "consensus_distance"):
            assert np.isfinite(row[field]).all()
    before, after = rows[0], rows[-1]
    assert after["test_loss_mean"] < before["test_loss_mean"]
    # Some agents were absent, but not all; some links failed, but not all.
    present = np.array([row["present"] for row in rows[1::2]])
    assert not present.all() and present.any()
    away = ~present[0]
    first, trained = rows[0], rows[2]
    same = np.array(first["test_loss"]) == np.array(trained["test_loss"])
    assert same.tolist() == away.tolist()
    sent = np.array(after["bytes_sent_by_link"])
    assert (sent.sum() > 0) == (algorithm in ON_GRAPHS)


def test_d2_refuses_to_begin(tmp_path):
    config = faulty("d2", tmp_path / "agents")
    with pytest.raises(NetworkError, match="d2 needs the same network at every step"):
        train.run(config, tmp_path / "run", quiet)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("algorithm", ["dimat", "wm"])
def test_merging_still_beats_training_alone(run, algorithm, seed):
    """The data are split by class, so no agent alone can learn all ten digits."""
    setting = {
        "seed": seed,
        "rounds": 30,
        "data__partition": "by_class",
        "data__train_size": 500,
        "eval__every": 30,
        # An agent's own images, of two classes, say too little about the other units.
        "merge__match_data": "global",
    }
    alone, merged = (
        read_evaluations(run(name, **setting))[-1] for name in ("local", algorithm)
    )
    assert merged["present"] == alone["present"]
    assert alone["test_accuracy_mean"] < 0.22
    assert merged["test_accuracy_mean"] > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("algorithm", ["dimat", "wm"])
def test_merging_still_beats_training_alone_where_examples_are_few(
    run, algorithm, seed
):
    """Each agent has 30 IID images, and agents start from different weights."""
    setting = {
        "seed": seed,
        "init": "different",
        "rounds": 20,
        "local_steps": 5,
        "eval__every": 20,
    }
    alone, merged = (
        read_evaluations(run(name, **setting))[-1]["test_accuracy_mean"]
        for name in ("local", algorithm)
    )
    assert merged > alone + 0.03


class _Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        ("dimat", {"compression__name": "top_k", "merge__opt_state": "keep"}),
        ("wa", {"merge__inner": "dsgt", "optimizer__learning_rate": 0.1}),
        ("choco", {}),
        ("dsgt", {}),
        ("fedavg", {}),
    ],
)
def test_a_killed_run_resumes_with_the_same_results(run, tmp_path, algorithm, changes):
    finished = run(algorithm, **changes)
    config = faulty(algorithm, finished.parent / "agents", **changes)
    lines = resumed(config, tmp_path)
    assert "going on after local step" in lines[1]
    assert without_times(read_rows(tmp_path)) == without_times(read_rows(finished))


@pytest.mark.slow
def test_a_run_with_faults_resumes_on_other_devices(run, tmp_path):
    """There are two devices for five agents, so one slot only fills up a device."""
    finished = run("dsgt")
    config = faulty("dsgt", finished.parent / "agents")
    resumed(config, tmp_path, devices=2)
    ours, theirs = read_evaluations(tmp_path)[-1], read_evaluations(finished)[-1]
    np.testing.assert_allclose(ours["test_loss"], theirs["test_loss"], rtol=1e-4)


def resumed(config, workdir: Path, devices: int = 1) -> list[str]:
    """Kills a run in its third round, starts it again, and returns what it prints."""
    config.checkpoint.every = 1
    lines = []

    def die_in_the_third_round(line: str) -> None:
        if "round   3" in line:
            raise _Killed

    with pytest.raises(_Killed):
        train.run(config, workdir, die_in_the_third_round)
    config.placement.cpu_devices = devices
    train.run(config, workdir, lines.append)
    return lines
