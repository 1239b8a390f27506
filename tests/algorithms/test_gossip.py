"""Gossip algorithms against their papers: recursions, and what theory promises.

Least squares, each agent with examples of its own, the same at every step: strongly
convex, with a known optimum, and with gradients that do not vanish there.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dimat_jax.algorithms import MergeData, Task
from dimat_jax.algorithms.cdsgd import cdsgd
from dimat_jax.algorithms.cga import cga, project
from dimat_jax.algorithms.choco import choco
from dimat_jax.algorithms.d2 import check_links, d2
from dimat_jax.algorithms.dsgt import dsgt
from dimat_jax.algorithms.fedavg import fedavg
from dimat_jax.algorithms.qgm import qgm
from dimat_jax.algorithms.sgp import sgp
from dimat_jax.compression import int8, none, sign, top_k
from dimat_jax.data.pipeline import Batch
from dimat_jax.mixing import MIXINGS, column_stochastic, lazy, row_stochastic, uniform
from dimat_jax.network import Faults, Links, NetworkError
from dimat_jax.optimizers import OPTIMIZERS
from dimat_jax.permutation import PermutationSpec
from dimat_jax.placement import place
from dimat_jax.topology import TOPOLOGIES
from dimat_jax.tree import nbytes
from tests.reference import gossip_loops as reference

N_AGENTS, DIM, EXAMPLES = 5, 3, 6
ALPHA = 0.1

_rng = np.random.default_rng(0)
# Agents whose inputs differ in scale, and whose labels come from different models.
INPUTS = _rng.standard_normal((N_AGENTS, EXAMPLES, DIM)) * np.linspace(
    0.5, 1.5, N_AGENTS
).reshape(-1, 1, 1)
LABELS = np.einsum(
    "aed,ad->ae", INPUTS, _rng.standard_normal((N_AGENTS, DIM)) + 1
) + 0.1 * _rng.standard_normal((N_AGENTS, EXAMPLES))
START = _rng.standard_normal((N_AGENTS, DIM))


def gradient(agent, x):
    return INPUTS[agent].T @ (INPUTS[agent] @ x - LABELS[agent]) / EXAMPLES


HESSIANS = np.stack([a.T @ a / EXAMPLES for a in INPUTS])
OPTIMUM = np.linalg.solve(
    HESSIANS.sum(axis=0),
    sum(a.T @ b / EXAMPLES for a, b in zip(INPUTS, LABELS, strict=True)),
)


def least_squares(variables, batch, key):
    del key
    error = batch.inputs @ variables["params"]["x"] - batch.labels
    weights = batch.mask / jnp.maximum(batch.mask.sum(), 1)
    value = 0.5 * (weights * error**2).sum()
    return value, ({}, {"loss": value, "accuracy": value})


TASK = Task(loss=least_squares, spec=PermutationSpec({"params/x": (None,)}))
PLACEMENT = place(N_AGENTS, jax.devices()[:1], "vmap")


def optimizer(name="sgd", rate: Any = ALPHA, momentum=0.9):
    return OPTIMIZERS[name](rate, momentum=momentum, weight_decay=0.0)


def run(algorithm, links: Links, n_steps: int, start=START) -> list[np.ndarray]:
    """All agents' x after every step, x(0) first."""
    batch = Batch(
        *PLACEMENT.put(
            (
                INPUTS.astype(np.float32),
                LABELS.astype(np.float32),
                np.ones((N_AGENTS, EXAMPLES), bool),
            )
        )
    )
    step = jax.jit(algorithm.step)
    state = algorithm.init(PLACEMENT.put({"params": {"x": start.astype(np.float32)}}))
    path = [state]
    for number in range(n_steps):
        network = links.at_step(number, 1, PLACEMENT.slots)
        state, _ = step(state, batch, network, jax.random.key(number))
        path.append(state)
    return [np.asarray(algorithm.variables(s)["params"]["x"]) for s in path]


def links(topology="ring", mixing="uniform", faults=Faults()) -> Links:  # noqa: B008
    return Links(TOPOLOGIES[topology](N_AGENTS), MIXINGS[mixing], faults)


def matrices(network: Links, n_steps: int) -> list[np.ndarray]:
    period = len(network.mixing_matrix)
    return [network.mixing_matrix[t % period] for t in range(n_steps)]


N_STEPS = 12


def assert_same(path, expected):
    for x, wanted in zip(path, expected, strict=True):
        np.testing.assert_allclose(x, wanted, rtol=0, atol=1e-5)


# Equal to the papers' recursions ======================================================

GRAPHS = ["ring", "star", "fully_connected", "one_peer_exponential"]
every_graph = pytest.mark.parametrize("graph", GRAPHS)


@every_graph
def test_cdsgd_is_its_papers(graph):
    network = links(graph)
    W = matrices(network, N_STEPS)
    path = run(cdsgd(TASK, optimizer(), PLACEMENT), network, N_STEPS)
    assert_same(path, reference.cdsgd(gradient, W, START, ALPHA))
    other = cdsgd(TASK, optimizer(), PLACEMENT, order="adapt_then_combine")
    path = run(other, network, N_STEPS)
    assert_same(path, reference.adapt_then_combine(gradient, W, START, ALPHA))


@every_graph
def test_cdmsgd_is_its_papers_also_as_the_rate_decays(graph):
    network = links(graph)
    rates = [ALPHA * 0.8**t for t in range(N_STEPS)]
    tx = optimizer("heavy_ball", lambda t: ALPHA * 0.8**t)
    path = run(cdsgd(TASK, tx, PLACEMENT), network, N_STEPS)
    W = matrices(network, N_STEPS)
    assert_same(path, reference.cdmsgd(gradient, W, START, rates, 0.9))


def test_cdadam_is_its_papers():
    network = links()
    path = run(cdsgd(TASK, optimizer("dadam"), PLACEMENT), network, N_STEPS)
    W = matrices(network, N_STEPS)
    assert_same(path, reference.cdadam(gradient, W, START, ALPHA))


@pytest.mark.parametrize("graph", [*GRAPHS, "exponential"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgp_is_its_papers(graph, momentum):
    network = links(graph, "column_stochastic")
    tx = optimizer("momentum" if momentum else "sgd", 0.03, momentum)
    path = run(sgp(TASK, tx, PLACEMENT), network, N_STEPS)
    P = matrices(network, N_STEPS)
    assert_same(path, reference.sgp(gradient, P, START, 0.03, momentum))


@pytest.mark.parametrize("graph", ["ring", "star", "fully_connected"])
def test_d2_is_its_papers(graph):
    network = links(graph, "lazy")
    path = run(d2(TASK, optimizer(), PLACEMENT), network, N_STEPS)
    assert_same(path, reference.d2(gradient, matrices(network, N_STEPS), START, ALPHA))


@every_graph
def test_gradient_tracking_is_its_papers(graph):
    network = links(graph)
    path = run(dsgt(TASK, optimizer(), PLACEMENT), network, N_STEPS)
    W = matrices(network, N_STEPS)
    assert_same(path, reference.dsgt(gradient, W, START, ALPHA))


@every_graph
def test_quasi_global_momentum_is_its_papers(graph):
    network = links(graph)
    path = run(qgm(TASK, optimizer(), PLACEMENT, momentum=0.8), network, N_STEPS)
    W = matrices(network, N_STEPS)
    assert_same(path, reference.qgm(gradient, W, START, ALPHA, 0.8))


UNDIRECTED = ["ring", "star", "fully_connected"]


@pytest.mark.parametrize("graph", UNDIRECTED)
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_cga_is_its_papers(graph, beta):
    network = links(graph)
    tx = optimizer("heavy_ball" if beta else "sgd", momentum=beta)
    algorithm = cga(TASK, tx, PLACEMENT, adjacency=network.adjacency[0])
    path = run(algorithm, network, N_STEPS)
    W = matrices(network, N_STEPS)
    assert_same(path, reference.cga(gradient, W, START, ALPHA, beta))


@pytest.mark.parametrize("graph", UNDIRECTED)
def test_choco_is_its_papers(graph):
    def largest(x):
        kept = np.abs(x) >= np.sort(np.abs(x))[-1]
        return np.where(kept, x, 0)

    network = links(graph)
    algorithm = choco(
        TASK,
        optimizer(),
        PLACEMENT,
        adjacency=network.adjacency[0],
        compressor=top_k(1 / DIM),
        gamma=0.3,
    )
    path = run(algorithm, network, N_STEPS)
    W = matrices(network, N_STEPS)
    assert_same(path, reference.choco(gradient, W, START, ALPHA, 0.3, largest))


def test_choco_without_compression_and_with_a_full_step_is_adapt_then_combine():
    network = links()
    algorithm = choco(
        TASK,
        optimizer(),
        PLACEMENT,
        adjacency=network.adjacency[0],
        compressor=none(),
        gamma=1.0,
    )
    W = matrices(network, N_STEPS)
    assert_same(
        run(algorithm, network, N_STEPS),
        reference.adapt_then_combine(gradient, W, START, ALPHA),
    )


# CGA's quadratic program ==============================================================


@pytest.mark.parametrize("seed", range(20))
def test_the_projection_is_an_independent_solvers(seed):
    rng = np.random.default_rng(seed)
    n_others, size = rng.integers(1, 5), rng.integers(2, 30)
    gradients = rng.standard_normal((n_others + 1, size)) + rng.standard_normal(size)
    gradients *= 10.0 ** rng.uniform(-4, 2)
    own, others = gradients[0], gradients[1:]
    expected = reference.projected(own, list(others))
    found = project(
        {"a": jnp.asarray(own, jnp.float32)},
        [{"a": jnp.asarray(other, jnp.float32)} for other in others],
        jnp.ones(n_others, bool),
    )["a"]
    scale = np.abs(gradients).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * scale)
    # Nobody objects, ...
    assert (gradients @ found).min() > -1e-3 * scale**2
    # ... who does not count.
    unheard = project(
        {"a": jnp.asarray(own, jnp.float32)},
        [{"a": jnp.asarray(other, jnp.float32)} for other in others],
        jnp.zeros(n_others, bool),
    )["a"]
    np.testing.assert_allclose(unheard, own, rtol=1e-5)


def test_no_gradient_at_all_projects_to_none():
    zeros = {"a": jnp.zeros(4)}
    found = project(zeros, [zeros], jnp.ones(1, bool))
    np.testing.assert_array_equal(found["a"], zeros["a"])


# What theory promises =================================================================


def error(path) -> float:
    """How far the worst agent ends from the optimum of all data."""
    return float(np.linalg.norm(path[-1] - OPTIMUM, axis=1).max())


def test_cdsgd_ends_in_a_neighbourhood_that_shrinks_with_alpha():
    ends = [
        error(run(cdsgd(TASK, optimizer(rate=rate), PLACEMENT), links(), steps))
        for rate, steps in ((0.2, 300), (0.02, 3000))
    ]
    assert 0.05 < ends[0]
    # The bias is of the order of alpha (Yuan, Ling & Yin 2016, theorem 4).
    assert ends[1] < 0.2 * ends[0]


@pytest.mark.parametrize("mixing", ["uniform", "lazy"])
def test_gradient_tracking_and_d2_reach_the_optimum_itself(mixing):
    biased = error(run(cdsgd(TASK, optimizer(), PLACEMENT), links(), 800))
    assert biased > 0.02
    tracked = run(dsgt(TASK, optimizer(), PLACEMENT), links("ring", mixing), 800)
    assert error(tracked) < 1e-4
    if mixing == "lazy":
        corrected = run(d2(TASK, optimizer(), PLACEMENT), links("ring", mixing), 800)
        # D2 remembers every rounding error: the increments' mean is never forgotten.
        assert error(corrected) < 1e-3


def test_gradient_tracking_survives_lossy_links_and_absent_neighbours():
    network = links("ring", "uniform", Faults(edge_loss=0.3))
    assert error(run(dsgt(TASK, optimizer(rate=0.05), PLACEMENT), network, 2000)) < 1e-3


def irregular_digraph() -> np.ndarray:
    """Strongly connected; nobody has as many receivers as senders."""
    adjacency = np.zeros((N_AGENTS, N_AGENTS), bool)
    for sender, receiver in [(0, 1), (1, 2), (2, 3), (3, 4), (4, 0), (0, 2), (0, 3)]:
        adjacency[receiver, sender] = True
    return adjacency


def test_push_sum_averages_where_gossip_is_biased():
    # No gradients: the question is what the agents agree upon.
    graph = irregular_digraph()
    still = optimizer(rate=0.0)
    pushed = run(sgp(TASK, still, PLACEMENT), Links(graph, column_stochastic), 200)
    gossiped = run(cdsgd(TASK, still, PLACEMENT), Links(graph, row_stochastic), 200)
    for path in (pushed, gossiped):
        np.testing.assert_allclose(
            path[-1], path[-1][:1].repeat(N_AGENTS, 0), atol=1e-4
        )
    mean = START.mean(axis=0)
    np.testing.assert_allclose(pushed[-1][0], mean, atol=1e-4)
    assert np.abs(gossiped[-1][0] - mean).max() > 0.05


def test_push_sum_finds_the_optimum_where_gossip_finds_another():
    graph = irregular_digraph()
    tx = optimizer(rate=lambda t: 0.3 / (1 + 0.03 * t))
    pushed = error(run(sgp(TASK, tx, PLACEMENT), Links(graph, column_stochastic), 4000))
    gossiped = error(
        run(cdsgd(TASK, tx, PLACEMENT), Links(graph, row_stochastic), 4000)
    )
    assert pushed < 0.05 < 0.1 < gossiped


@pytest.mark.parametrize("graph", ["exponential", "one_peer_exponential"])
def test_push_sum_survives_losses_on_directed_graphs(graph):
    network = links(graph, "column_stochastic", Faults(edge_loss=0.3))
    tx = optimizer(rate=lambda t: 0.3 / (1 + 0.03 * t))
    assert error(run(sgp(TASK, tx, PLACEMENT), network, 3000)) < 0.1


def test_compressed_gossip_comes_as_near_as_plain_gossip_does():
    plain = error(run(cdsgd(TASK, optimizer(), PLACEMENT), links(), 800))
    for compressor in (top_k(1 / DIM), int8(), sign()):
        algorithm = choco(
            TASK,
            optimizer(),
            PLACEMENT,
            adjacency=TOPOLOGIES["ring"](N_AGENTS),
            compressor=compressor,
            gamma=0.3,
        )
        assert error(run(algorithm, links(), 800)) < 3 * plain


def test_choco_preserves_the_mean_on_lossy_links():
    still = optimizer(rate=0.0)
    network = links("ring", "uniform", Faults(edge_loss=0.4))
    algorithm = choco(
        TASK,
        still,
        PLACEMENT,
        adjacency=network.adjacency[0],
        compressor=top_k(1 / DIM),
        gamma=0.3,
    )
    path = run(algorithm, network, 600)
    np.testing.assert_allclose(path[-1].mean(axis=0), START.mean(axis=0), atol=1e-4)
    assert np.ptp(path[-1], axis=0).max() < 1e-2


def test_cga_takes_steps_that_no_neighbours_data_object_to():
    # Agents who disagree strongly: CDSGD's fixed point is far from everybody's good.
    network = links("fully_connected")
    adjacency = network.adjacency[0]
    x = run(cga(TASK, optimizer(), PLACEMENT, adjacency=adjacency), network, 1)
    start = START.astype(np.float32)
    moved = x[1] - uniform(adjacency) @ start
    for i in range(N_AGENTS):
        for j in range(N_AGENTS):
            assert gradient(j, start[i]) @ moved[i] < 1e-4


@pytest.mark.parametrize("compressor", [top_k(1 / DIM), sign(), int8()])
def test_compressed_cross_gradients_come_as_near_as_exact_ones(compressor):
    network = links()
    adjacency = network.adjacency[0]
    exact = cga(TASK, optimizer(), PLACEMENT, adjacency=adjacency)
    compressed = cga(
        TASK, optimizer(), PLACEMENT, adjacency=adjacency, compressor=compressor
    )
    ends = [run(algorithm, network, 300)[-1] for algorithm in (exact, compressed)]
    assert np.isfinite(ends[1]).all()
    assert np.abs(ends[1] - ends[0]).max() < 0.3 * np.abs(START - ends[0]).max()


# Invariants ===========================================================================

ALGORITHMS = {
    "cdsgd": lambda: cdsgd(TASK, optimizer(), PLACEMENT),
    "cdmsgd": lambda: cdsgd(TASK, optimizer("heavy_ball"), PLACEMENT),
    "cdadam": lambda: cdsgd(TASK, optimizer("dadam"), PLACEMENT),
    "sgp": lambda: sgp(TASK, optimizer(), PLACEMENT),
    "d2": lambda: d2(TASK, optimizer(), PLACEMENT),
    "dsgt": lambda: dsgt(TASK, optimizer(), PLACEMENT),
    "qgm": lambda: qgm(TASK, optimizer(), PLACEMENT),
    "cga": lambda: cga(TASK, optimizer(), PLACEMENT, adjacency=RING),
    "compcga": lambda: cga(
        TASK, optimizer(), PLACEMENT, adjacency=RING, compressor=sign()
    ),
    "choco": lambda: choco(
        TASK, optimizer(), PLACEMENT, adjacency=RING, compressor=top_k(0.4)
    ),
}
RING = TOPOLOGIES["ring"](N_AGENTS)
every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


@every_algorithm
def test_without_gradients_the_mean_is_preserved(name):
    algorithm = ALGORITHMS[name]()._replace()
    state = algorithm.init(PLACEMENT.put({"params": {"x": START.astype(np.float32)}}))
    nothing = Batch(
        *PLACEMENT.put(
            (
                INPUTS.astype(np.float32),
                LABELS.astype(np.float32),
                np.zeros((N_AGENTS, EXAMPLES), bool),
            )
        )
    )
    network = links("ring", "lazy")
    for number in range(5):
        at = network.at_step(number, 1, PLACEMENT.slots)
        state, _ = jax.jit(algorithm.step)(state, nothing, at, jax.random.key(0))
    x = np.asarray(algorithm.variables(state)["params"]["x"])
    np.testing.assert_allclose(x.mean(axis=0), START.mean(axis=0), atol=1e-5)
    assert x.std(axis=0).max() < 0.5 * START.std(axis=0).max()


@every_algorithm
def test_a_merge_restarts_what_it_makes_meaningless(name):
    algorithm = ALGORITHMS[name]()
    network = links("ring", "lazy")
    batch = Batch(
        *PLACEMENT.put(
            (
                INPUTS.astype(np.float32),
                LABELS.astype(np.float32),
                np.ones((N_AGENTS, EXAMPLES), bool),
            )
        )
    )
    state = algorithm.init(PLACEMENT.put({"params": {"x": START.astype(np.float32)}}))
    step = jax.jit(algorithm.step)
    at = network.at_step(0, 1, PLACEMENT.slots)
    for _ in range(3):
        state, _ = step(state, batch, at, jax.random.key(0))
    merged = {"params": {"x": jnp.asarray(START[::-1].astype(np.float32))}}
    restarted = algorithm.with_variables(state, merged)
    np.testing.assert_array_equal(
        algorithm.variables(restarted)["params"]["x"], merged["params"]["x"]
    )
    assert jax.tree.structure(restarted) == jax.tree.structure(state)
    if name not in ("cdsgd", "cdmsgd", "cdadam"):
        fresh = algorithm.init(merged)
        kept = ("local",)
        for field in restarted._fields:
            if field not in kept:
                for one, other in zip(
                    jax.tree.leaves(getattr(restarted, field)),
                    jax.tree.leaves(getattr(fresh, field)),
                    strict=True,
                ):
                    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("name", "vectors", "scalars"),
    [
        ("cdsgd", 1, 0),
        ("sgp", 1, 1),
        ("d2", 1, 0),
        ("dsgt", 2, 0),
        ("qgm", 1, 0),
        ("cga", 2, 0),
    ],
)
def test_messages_are_what_is_mixed(name, vectors, scalars):
    algorithm = ALGORITHMS[name]()
    state = algorithm.init(PLACEMENT.put({"params": {"x": START.astype(np.float32)}}))
    sent = algorithm.messages(state)
    assert nbytes(sent.step) == 4 * (vectors * DIM + scalars)
    assert not sent.round and not sent.server


# D2's conditions ======================================================================


def test_d2_refuses_what_its_theory_does_not_cover():
    four = TOPOLOGIES["ring"](4)
    with pytest.raises(NetworkError, match=r"the least is -0.3333; mixing='lazy'"):
        check_links("d2", Links(four, uniform))
    check_links("d2", Links(four, lazy))
    with pytest.raises(NetworkError, match="the same network at every step"):
        check_links("d2", Links(four, lazy, Faults(edge_loss=0.1)))
    with pytest.raises(NetworkError, match="the same network at every step"):
        check_links("d2", Links(TOPOLOGIES["one_peer_exponential"](4), lazy))
    with pytest.raises(NetworkError, match="rows and columns sum to 1"):
        check_links("d2", Links(TOPOLOGIES["star"](4), row_stochastic))


# Federated averaging ==================================================================


def test_fedavg_is_the_mean_weighted_by_examples_whatever_the_graph():
    examples = [1, 2, 3, 4, 10]
    algorithm = fedavg(TASK, optimizer(), PLACEMENT, examples=examples)
    state = algorithm.init(PLACEMENT.put({"params": {"x": START.astype(np.float32)}}))
    absent = np.array([True, True, False, True, True])
    network = links("disconnected").at_round(1, PLACEMENT.slots)
    network = network._replace(present=jnp.asarray(absent))
    state, _ = algorithm.communicate(state, MergeData(), network, jax.random.key(0))
    x = np.asarray(algorithm.variables(state)["params"]["x"])
    weights = np.array(examples) * absent
    mean = weights @ START / weights.sum()
    np.testing.assert_allclose(x[absent], np.tile(mean, (4, 1)), atol=1e-6)
    np.testing.assert_allclose(x[2], START[2], atol=1e-7)
    sent = algorithm.messages(state)
    assert nbytes(sent.server) == 4 * DIM and not sent.step and not sent.round
