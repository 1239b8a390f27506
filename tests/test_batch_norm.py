"""One policy measures BatchNorm statistics anew, whatever the algorithm is."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from configs import quickstart
from dimat_jax import train
from dimat_jax._metrics import read_evaluations
from dimat_jax.config import Config, drop_unread
from dimat_jax.experiment import Experiment
from dimat_jax.tree import flatten

POLICIES = [
    ("none", "communication"),
    *(
        (d, w)
        for d in ("own", "proxy", "global")
        for w in ("communication", "evaluation")
    ),
]


def small(algorithm: str, data: str, when: str, **changes: Any) -> Config:
    """Makes a run of a few seconds: four agents with equal shards, and BatchNorm."""
    config = quickstart.get_config(algorithm)
    fields = {
        "agents": 4,
        "rounds": 2,
        "local_epochs": 1,
        "topology": "fully_connected",
        "data.train_size": 160,
        "data.test_size": 50,
        "batch_size": 20,
        "model.norm": "batch",
        "model.width": 0.25,
        "pretrain.epochs": 0,
        "optimizer.name": "sgd",
        "optimizer.learning_rate": 0.1,
        "merge.opt_state": "keep",
        "batch_norm.data": data,
        "batch_norm.samples": 30,
        "batch_norm.batch_size": 20,
        "batch_norm.when": when,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    config.update_from_flattened_dict(fields)
    return drop_unread(config)


def run(config: Config, folder: Path) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Runs a config. Returns its rows, and the agents' variables by path."""
    train.run(config, folder, lambda line: None)
    _, variables = train.load_agents(folder)
    return read_evaluations(folder), flatten(variables)


@pytest.mark.every_nth(8)
@pytest.mark.parametrize(("data", "when"), POLICIES)
def test_fedavg_is_weight_averaging_on_a_fully_connected_graph(tmp_path, data, when):
    """All agents are present, and have equally many examples."""
    server, server_agents = run(small("fedavg", data, when), tmp_path / "server")
    graph, graph_agents = run(small("wa", data, when), tmp_path / "graph")
    assert server_agents.keys() == graph_agents.keys()
    for path, leaf in server_agents.items():
        np.testing.assert_allclose(
            leaf, graph_agents[path], rtol=1e-5, atol=1e-5, err_msg=path
        )
    for row, other in zip(server, graph, strict=True):
        np.testing.assert_allclose(row["test_loss"], other["test_loss"], rtol=1e-5)


@pytest.mark.parametrize("algorithm", ["local", "centralized", "cdsgd", "fedavg", "wa"])
def test_every_algorithm_goes_on_with_new_statistics_after_a_communication(
    tmp_path, algorithm
):
    config = small(algorithm, "proxy", "communication", local_epochs=0, local_steps=1)
    experiment = Experiment(config)
    state = experiment.algorithm.init(experiment.initial_variables())
    data = experiment.merge_data(1)
    state, metrics = experiment.algorithm.communicate(
        state, data, experiment.network_at_round(1), experiment.communication_key(1)
    )
    assert "recalibration" in metrics["merge_seconds"]
    assert data.recalibrate is not None
    first = experiment.placement.gather(experiment.algorithm.variables(state))
    # The statistics are the means over a batch of 20 images and one of 10.
    assert experiment.task.batch_statistics is not None
    measure, expected = jax.jit(experiment.task.batch_statistics), []
    one = jax.tree.map(lambda leaf: leaf[0], first)
    for batch in data.recalibrate:
        expected.append(measure(one, batch.inputs, batch.mask))
    for path, leaf in flatten(one["batch_stats"]).items():
        large, few = (flatten(statistics)[path] for statistics in expected)
        np.testing.assert_allclose(
            leaf, (20 * large + 10 * few) / 30, rtol=1e-4, atol=1e-5, err_msg=path
        )


@pytest.mark.every_nth(3)
@pytest.mark.parametrize("algorithm", ["local", "cdsgd", "wa"])
def test_statistics_for_an_evaluation_alone_leave_the_training_alone(
    tmp_path, algorithm
):
    plain, without = run(small(algorithm, "none", "communication"), tmp_path / "none")
    rows, agents = run(small(algorithm, "own", "evaluation"), tmp_path / "evaluation")
    for path, leaf in without.items():
        np.testing.assert_array_equal(agents[path], leaf, err_msg=path)
    for row, other in zip(rows, plain, strict=True):
        assert row["test_loss"] != other["test_loss"]
        assert row.get("train_loss") == other.get("train_loss")


@pytest.mark.slow
def test_statistics_that_stay_change_the_training(tmp_path):
    """Train mode does not read them, but the moving average starts from them."""
    _, without = run(small("local", "none", "communication"), tmp_path / "none")
    rows, agents = run(small("local", "own", "communication"), tmp_path / "own")
    changed = {path for path in agents if (agents[path] != without[path]).any()}
    assert changed == {path for path in agents if path.startswith("batch_stats/")}
    # So agents that never communicate are evaluated anew at that point of the round.
    assert rows[0]["test_loss"] != rows[1]["test_loss"]


def test_an_absent_agent_keeps_its_statistics():
    config = small("wa", "own", "communication", faults__absences="1:1-1")
    experiment = Experiment(config)
    algorithm, placement = experiment.algorithm, experiment.placement
    before = algorithm.init(experiment.initial_variables())
    after, _ = algorithm.communicate(
        before,
        experiment.merge_data(1),
        experiment.network_at_round(1),
        experiment.communication_key(1),
    )
    old, new = (
        flatten(placement.gather(algorithm.variables(s))) for s in (before, after)
    )
    for path, leaf in new.items():
        if path.startswith("batch_stats/"):
            np.testing.assert_array_equal(leaf[1], old[path][1], err_msg=path)
            assert (leaf[0] != old[path][0]).any(), path


def test_a_model_without_batch_norm_looks_at_no_images():
    config = small("wa", "none", "communication", model__norm="")
    config.batch_norm.data = "proxy"
    assert Experiment(config).merge_data(1).recalibrate is None
