"""Tests that config fields give the right networks, partitions and arguments."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from configs.sweeps import algorithms as every_algorithm
from configs.sweeps import compression, faults, graphs, learning_rates
from dimat_jax import train
from dimat_jax._chosen import build_optimizer
from dimat_jax._metrics import read_evaluations
from dimat_jax.algorithms import ALGORITHMS, AlgorithmRecord, Task
from dimat_jax.algorithms.local import local
from dimat_jax.config import check
from dimat_jax.data.pipeline import Batch
from dimat_jax.errors import UserError
from dimat_jax.experiment import Experiment
from dimat_jax.mixing import MixingError, lazy
from dimat_jax.network import NetworkError
from dimat_jax.topology import TOPOLOGIES, TopologyError, is_connected


def small(algorithm: str = "wa", **changes: Any):
    """Makes a smaller quickstart config. Fields are changed by dotted path."""
    config = quickstart.get_config(algorithm)
    fields = {
        "rounds": 2,
        "local_epochs": 1,
        "data.train_size": 200,
        "data.test_size": 50,
        "pretrain.epochs": 1,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    config.update_from_flattened_dict(fields)
    return config


def test_a_graph_and_its_weights_may_come_from_a_file(tmp_path):
    W = lazy(TOPOLOGIES["path"](5))
    file = tmp_path / "W.npy"
    np.save(file, W)
    both = Experiment(small(topology="file", mixing="file", graph__file=str(file)))
    np.testing.assert_array_equal(both.links.edges, TOPOLOGIES["path"](5))
    np.testing.assert_allclose(both.links.mixing_matrix[0], W)

    file = tmp_path / "W.json"
    file.write_text(json.dumps(W.tolist()))
    edges = Experiment(small(topology="file", graph__file=str(file)))
    np.testing.assert_array_equal(edges.links.edges, TOPOLOGIES["path"](5))
    assert edges.links.mixing_matrix[0, 0, 1] == pytest.approx(1 / 3)
    weights = small(topology="ring", mixing="file", graph__file=str(file))
    np.testing.assert_allclose(Experiment(weights).links.mixing_matrix[0], W)


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    file = tmp_path / "W.npy"
    np.save(file, np.eye(4))
    with pytest.raises(TopologyError, match=r"\[4, 4\]; expected \[5, 5\]"):
        Experiment(small(topology="file", graph__file=str(file)))
    np.save(file, lazy(TOPOLOGIES["ring"](5)))
    with pytest.raises(MixingError, match="agent 0 does not receive from agent 4"):
        Experiment(small(topology="path", mixing="file", graph__file=str(file)))


def test_weights_of_which_nothing_can_be_made_are_refused(tmp_path):
    file = tmp_path / "W.npy"
    W = np.eye(5)
    W[:2, :2] = [[0, 0], [1, 1]]
    np.save(file, W)
    fields = {"topology": "file", "mixing": "file", "graph__file": str(file)}
    with pytest.raises(NetworkError, match="the weights of agent 0 sum to 0"):
        Experiment(small("wa", **fields))
    W = 2 * lazy(TOPOLOGIES["star"](5)) - np.eye(5)
    W = 1.5 * W - 0.5 * np.eye(5)  # as fastest weights may be on a star
    np.save(file, W)
    with pytest.raises(NetworkError, match="opt_state='merge' needs .* without negat"):
        Experiment(small("wa", merge__opt_state="merge", **fields))
    np.save(file, np.roll(np.eye(5), 1, axis=0))
    with pytest.raises(NetworkError, match=r"W\[0, 0\] is 0"):
        Experiment(small("sgp", optimizer__name="", **fields))


@pytest.mark.parametrize("algorithm", ["local", "centralized", "fedavg"])
def test_algorithms_without_a_graph_have_no_links(algorithm):
    assert not Experiment(small(algorithm)).links.edges.any()


def test_random_graphs_follow_the_seed():
    def edges(**changes):
        return Experiment(small(agents=10, **changes)).links.edges

    regular = edges(topology="random_regular", graph__degree=4, seed=1)
    assert (regular.sum(axis=1) == 4).all()
    again = edges(topology="random_regular", graph__degree=4, seed=1)
    np.testing.assert_array_equal(regular, again)
    assert (edges(topology="random_regular", graph__degree=4) != regular).any()
    sparse = edges(topology="erdos_renyi", graph__edge_probability=0.3)
    assert is_connected(sparse) and sparse.sum() < 90


def test_pre_training_may_have_another_partition():
    config = small(
        data__partition="by_class",
        pretrain__partition="dirichlet",
        data__alpha=0.05,
        data__train_size=0,
    )
    experiment = Experiment(config)
    labels = experiment.dataset.train.labels
    assert [set(labels[s]) for s in experiment.shards] == [{c, c + 5} for c in range(5)]
    alone = [set(labels[shard]) for shard in experiment.pretrain_sampler._shards]
    assert alone != [{c, c + 5} for c in range(5)]
    sizes = sorted(len(shard) for shard in experiment.pretrain_sampler._shards)
    assert sizes[0] < sizes[-1] / 2


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"algorithm": "d2", "agents": 4}, "the least is -0.3333; mixing='lazy'"),
        ({"algorithm": "d2", "faults__dropout": 0.1}, "no dropout"),
        ({"algorithm": "cdsgd", "mixing": "row_stochastic", "topology": "star"}, "sgp"),
        ({"algorithm": "choco", "topology": "exponential"}, "undirected"),
        ({"algorithm": "cga", "topology": "one_peer_exponential"}, "undirected"),
        (
            {"algorithm": "dimat", "topology": "exponential"},
            "dimat with frame='reference' needs an undirected network",
        ),
        ({"faults__absences": "7:1-"}, "only agents 0 to 4"),
        (
            {"algorithm": "wa", "merge__inner": "d2", "faults__edge_loss": 0.1},
            "d2 needs the same network",
        ),
    ],
)
def test_a_network_that_an_algorithm_cannot_use_is_refused(fields, reason):
    with pytest.raises(NetworkError, match=reason):
        Experiment(small(**fields))


def test_who_is_away_learns_nothing_and_sends_nothing(tmp_path):
    config = small("wa", faults__absences="1:1-1, 3:2-", optimizer__name="sgd")
    train.run(config, tmp_path, lambda line: None)
    rows = read_evaluations(tmp_path)
    assert [row["present"] for row in rows] == [
        [True] * 5,
        *[[True, False, True, True, True]] * 2,
        *[[True, True, True, False, True]] * 2,
    ]
    first, second = rows[0], rows[2]
    assert second["test_loss"][1] == first["test_loss"][1]
    assert second["test_loss"][0] != first["test_loss"][0]
    assert rows[4]["test_loss"][3] == rows[3]["test_loss"][3] == rows[2]["test_loss"][3]
    # A ring without one agent is a path of four, with six messages instead of ten.
    sent = np.array(second["bytes_sent_by_link"])
    assert (sent > 0).sum() == 6 and not sent[1].any() and not sent[:, 1].any()
    partition = json.loads((tmp_path / "partition.json").read_text())
    assert np.shape(partition["counts"]) == (5, 10)
    assert np.sum(partition["counts"]) == 200
    assert partition["classes"] == list("0123456789")


@pytest.mark.every_nth(3)
@pytest.mark.parametrize(
    "sweep", [every_algorithm, compression, faults, graphs, learning_rates]
)
def test_a_sweeps_runs_can_be_run(sweep):
    for config in sweep.get_runs().values():
        check(config)


def test_the_sweep_over_all_algorithms_leaves_none_out():
    runs = every_algorithm.get_runs()
    # There is one run with all data, one for each of two partitions without a graph,
    # and one for each of the four combinations, on trees too.
    without = {"local", "fedavg", "fedprox", "scaffold"}
    graphs = {*every_algorithm.LINES, *every_algorithm.ON_TREES}
    graphs -= {"centralized", *without}
    assert len(runs) == 1 + 2 * len(without) + 4 * len(graphs)
    assert {config.algorithm for config in runs.values()} == ALGORITHMS.keys()


def test_options_that_are_out_of_range_are_bad_input():
    for changes in ({"gossip__momentum": 1.0}, {"gossip__momentum": -0.1}):
        with pytest.raises(
            UserError, match="gossip.momentum is .*; it must be at least 0 and below 1"
        ):
            Experiment(small("qgm", optimizer__name="", **changes))
    for gamma in (-0.1, 1.1):
        with pytest.raises(
            UserError, match="gossip.gamma is .*; it must be above 0 and at most 1"
        ):
            Experiment(small("choco", gossip__gamma=gamma))


def test_a_consensus_step_size_that_must_diverge_is_refused():
    fields = {"compression__name": "random_k", "compression__fraction": 0.1}
    with pytest.raises(UserError, match="agents on this network drift apart from 0.15"):
        Experiment(small("choco", gossip__gamma=0.2, **fields))
    # On a star most agents give their neighbours little weight.
    Experiment(small("choco", gossip__gamma=0.2, topology="star", **fields))
    Experiment(small("choco", **fields))


@pytest.mark.parametrize("local_steps", [0, 7])
def test_by_default_every_agent_takes_every_step_with_a_full_batch(local_steps):
    fields = {"local_steps": local_steps, "local_epochs": int(not local_steps)}
    experiment = Experiment(small(data__partition="quantity_skew", **fields))
    sizes = np.array([len(shard) for shard in experiment.shards])
    assert sizes.min() < 32 < sizes.max()
    assert experiment.local_steps == (local_steps or -(-sizes.max() // 32))
    for step in (*experiment.steps_of_round(1), *experiment.steps_of_round(2)):
        assert experiment.sampler.batch(step)[1].all()
    for step in range(experiment.pretrain_steps):
        assert experiment.pretrain_sampler.batch(step)[1].all()


@pytest.mark.slow
def test_agents_may_count_by_their_images():
    """Agents with small shards then idle, and batches count with what fills them."""
    skew = {"data__partition": "quantity_skew", "data__small_shards": "idle"}
    idle, repeat = Experiment(small("fedavg", **skew)), Experiment(small("fedavg"))
    sizes = [len(shard) for shard in idle.shards]
    assert idle._facts(sizes)["examples"] == sizes
    assert repeat._facts(sizes)["examples"] is None
    busy = np.mean([idle.sampler.batch(t)[1] for t in range(idle.local_steps)], (0, 2))
    np.testing.assert_allclose(busy * 32 * idle.local_steps, sizes)

    variables = idle._init(jax.random.key(0))
    images = jnp.asarray(idle._example_inputs(4))
    labels = jnp.asarray(idle.dataset.train.labels[:4])
    half = Batch(images, labels, jnp.arange(4) < 2)
    whole = Batch(images[:2], labels[:2], jnp.ones(2, bool))
    for experiment, share in ((idle, 0.5), (repeat, 1)):
        loss, (_, metrics) = experiment.task.loss(variables, half, jax.random.key(1))
        mean, _ = experiment.task.loss(variables, whole, jax.random.key(1))
        assert float(loss) == pytest.approx(share * float(mean), rel=1e-5)
        assert float(metrics["loss"]) == pytest.approx(float(mean), rel=1e-5)


def test_the_learning_rate_may_change_by_rounds_and_warm_up(monkeypatch):
    optimizers = []

    def noting(fields, **steps):
        optimizers.append((build_optimizer(fields, **steps), steps))
        return optimizers[-1][0]

    monkeypatch.setattr("dimat_jax.experiment.build_optimizer", noting)
    fields = {
        "optimizer__name": "sgd",
        "optimizer__learning_rate": 0.1,
        "optimizer__schedule": "exponential",
        "optimizer__decay": 0.5,
        "optimizer__unit": "rounds",
        "optimizer__warmup": 2,
        "local_epochs": 0,
        "local_steps": 3,
    }
    experiment = Experiment(small("local", **fields))
    (_, alone), (tx, steps) = optimizers
    epoch = experiment.pretrain_sampler.steps_per_epoch
    assert alone == {"steps_per_epoch": epoch, "total_steps": epoch}
    assert (steps["steps_per_round"], steps["total_steps"]) == (3, 6)
    params = {"x": jnp.zeros(1)}
    state, rates = tx.init(params), []
    for _ in range(6):
        updates, state = tx.update({"x": jnp.ones(1)}, state, params)
        rates.append(-float(jnp.ravel(jax.tree.leaves(updates)[0])[0]))
    np.testing.assert_allclose(rates, [0.05, 0.1, 0.1, 0.05, 0.05, 0.05], rtol=1e-6)


def test_each_phase_has_its_own_clipping(monkeypatch):
    tasks, build = [], AlgorithmRecord.__call__

    def noted(build):
        def noting(*args, **kwargs):
            tasks.extend(arg for arg in args if isinstance(arg, Task))
            return build(*args, **kwargs)

        return noting

    monkeypatch.setattr("dimat_jax.experiment.local", noted(local))
    monkeypatch.setattr(AlgorithmRecord, "__call__", noted(build))
    fields = {"optimizer__clip_norm": 2.0, "pretrain__optimizer__clip_norm": 3.0}
    Experiment(small("cdsgd", **fields))
    assert [task.clip_norm for task in tasks] == [3.0, 2.0]


def test_pre_training_has_no_rounds_to_count_by():
    fields: dict[str, Any] = {"pretrain__optimizer__warmup": 2}
    Experiment(small(**fields, pretrain__optimizer__warmup_unit="epochs"))
    with pytest.raises(UserError, match="warmup_unit is 'rounds'; allowed: epochs, st"):
        Experiment(small(**fields, pretrain__optimizer__warmup_unit="rounds"))
