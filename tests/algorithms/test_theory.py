"""Tests what theory promises for each algorithm on a strongly convex problem.

The problem is least squares, and the agents' data differ. With a constant step, plain
gossip ends at a fixed point at which the agents' gradients and the mixing are in
balance. This point is known exactly; its distance from the optimum is of the order of
the step. With a decaying step gossip ends at the optimum. Algorithms that correct for
heterogeneous data end at the optimum with a constant step too.
"""

from collections.abc import Callable

import networkx as nx
import numpy as np
import pytest

from dimat_jax.mixing import column_stochastic, finite_time, row_stochastic
from dimat_jax.network import Absence, Faults, Links
from dimat_jax.topology import base_k_plus_1, from_graph
from tests.algorithms.cases import CASES, STEPS, Case, case_of, links, trajectory
from tests.algorithms.problems import (
    DIM,
    HESSIANS,
    N_AGENTS,
    OPTIMUM,
    START,
    TARGETS,
    gradient,
    optimum,
)
from tests.reference.agents import Alone, path
from tests.reference.messages import projected

RING, DIRECTED = links("ring"), links("exponential")
GRAPHS = {"ring": RING, "exponential": DIRECTED}


N_STEPS = 3000


DECAYING = 0.2, 0.05


def error(x: np.ndarray) -> float:
    """Computes the distance of the worst agent from the optimum of all data."""
    return float(np.linalg.norm(x - OPTIMUM, axis=1).max())


def consensus_distance(x: np.ndarray) -> float:
    """Computes the distance of the worst agent from the mean."""
    return float(np.linalg.norm(x - x.mean(axis=0), axis=1).max())


def gradients(x: np.ndarray) -> np.ndarray:
    return np.stack([gradient(i, x_i) for i, x_i in enumerate(x)])


# Where a constant step ends ===========================================================


def fixed_point(update: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Finds the fixed point of an affine map of all agents' x `[agents, dim]`."""
    zero = np.zeros((N_AGENTS, DIM))
    shift = update(zero)
    linear = np.stack(
        [
            (update(unit.reshape(zero.shape)) - shift).ravel()
            for unit in np.eye(zero.size)
        ],
        axis=1,
    )
    solution = np.linalg.solve(np.eye(zero.size) - linear, shift.ravel())
    return solution.reshape(zero.shape)


def combine_then_adapt(W, alpha):
    return lambda x: W @ x - alpha * gradients(x)


def adapt_then_combine(W, alpha):
    return lambda x: W @ (x - alpha * gradients(x))


def rounds(W, alpha):
    """Returns the agents' x at the end of a round that begins with averaging."""

    def whole_round(x):
        alone = Alone(W @ x)
        return path(alone, gradient, [np.eye(len(x))] * STEPS, alpha)[-1]

    return whole_round


def slower(W, gamma):
    return (1 - gamma) * np.eye(N_AGENTS) + gamma * W


AVERAGE = np.full((N_AGENTS, N_AGENTS), 1 / N_AGENTS)
# Each entry is an algorithm, the factor of its learning rate (with a momentum of 0.9 a
# heavy ball multiplies a step by ten), and the update whose fixed point it reaches.
BIASED: dict[str, tuple[Case, float, Callable]] = {
    "cdsgd": (CASES["cdsgd"], 1.0, combine_then_adapt),
    "cdmsgd": (CASES["cdmsgd"], 0.1, lambda W, a: combine_then_adapt(W, 10 * a)),
    "adapt then combine": (
        CASES["cdsgd, adapt then combine"],
        1.0,
        adapt_then_combine,
    ),
    "sgp": (CASES["sgp"], 1.0, adapt_then_combine),
    "qgm": (CASES["qgm"], 1.0, adapt_then_combine),
    "choco, int8": (CASES["choco"], 1.0, adapt_then_combine),
    "choco, top_k": (
        case_of("choco", compressor="top_k", gamma=0.3),
        1.0,
        lambda W, a: adapt_then_combine(slower(W, 0.3), a),
    ),
    "fedavg": (CASES["fedavg"], 1.0, lambda W, a: rounds(AVERAGE, a)),
    "wa": (Case("wa", "sgd"), 1.0, rounds),
    # Compressed merging sends later what it loses, so it ends where exact merging does.
    "wa, top_k": (Case("wa", "sgd", "top_k"), 1.0, rounds),
    "wa, sign": (Case("wa", "sgd", "sign"), 1.0, rounds),
}
ON_GRAPHS = pytest.mark.parametrize(
    ("name", "graph"),
    [
        (name, graph)
        for name in BIASED
        for graph in GRAPHS
        if BIASED[name][0].accepts(GRAPHS[graph])
    ],
)


@pytest.mark.every_nth(6)
@ON_GRAPHS
def test_a_constant_step_ends_in_its_fixed_point_off_by_the_order_of_the_step(
    name, graph
):
    case, share, update = BIASED[name]
    ends = []
    for rate, n_steps in ((0.1, 800), (0.02, 3000)):
        expected = fixed_point(update(GRAPHS[graph].mixing_matrix[0], share * rate))
        x = trajectory(case, GRAPHS[graph], n_steps, share * rate)[-1]
        np.testing.assert_allclose(x, expected, rtol=0, atol=1e-5)
        ends.append(x)
    # Both distances are of the order of alpha (Yuan, Ling & Yin 2016, theorem 4).
    for distance in (error, consensus_distance):
        assert 0.05 < distance(ends[0]) < 1.3
        assert 0.1 < distance(ends[1]) / distance(ends[0]) < 0.35


@pytest.mark.every_nth(6)
@ON_GRAPHS
def test_a_decaying_step_ends_at_the_optimum(name, graph):
    case, share, update = BIASED[name]
    rate, decay = share * DECAYING[0], DECAYING[1]
    path = trajectory(case, GRAPHS[graph], N_STEPS, rate, decay)
    # The agents follow the fixed point of the present step, which nears the optimum.
    rate /= 1 + decay * N_STEPS
    last = fixed_point(update(GRAPHS[graph].mixing_matrix[0], rate))
    for distance in (error, consensus_distance):
        assert distance(path[-1]) < 1.3 * distance(last)
        assert distance(path[-1]) < 0.03 < 1 < distance(path[0])


# Heterogeneity ========================================================================


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("dsgt", RING),
        ("dsgt", DIRECTED),
        ("dsgt", links("one_peer_exponential")),
        ("dsgt", links("ring", "lazy")),
        ("d2", RING),
        ("d2", links("ring", "lazy")),
        ("d2", links("star", "lazy")),
    ],
)
def test_gradient_tracking_and_d2_reach_the_optimum_with_a_constant_step(name, network):
    assert CASES[name].accepts(network)
    biased = trajectory(CASES["cdsgd"], network, 800, 0.1)[-1]
    assert error(biased) > 0.05 and consensus_distance(biased) > 0.05
    x = trajectory(CASES[name], network, 800, 0.1)[-1]
    assert error(x) < 1e-5 and consensus_distance(x) < 1e-5


def test_control_variates_reach_the_optimum_with_a_constant_step():
    network = links("disconnected")
    biased = trajectory(CASES["fedavg"], network, 800, 0.1)[-1]
    assert error(biased) > 0.05 and consensus_distance(biased) > 0.05
    x = trajectory(CASES["scaffold"], network, 800, 0.1)[-1]
    assert error(x) < 1e-5 and consensus_distance(x) < 1e-5


@pytest.mark.parametrize("graph", ["path", "star", "binary_tree"])
def test_relayed_models_reach_the_optimum_with_a_constant_step(graph):
    x = trajectory(CASES["relaysgd"], links(graph), 800, 0.1)[-1]
    assert error(x) < 1e-5 and consensus_distance(x) < 1e-5


def test_without_gradients_agents_that_relay_the_same_model_keep_it():
    """This holds at every step, however few models have arrived."""
    start = np.tile(START[0], (N_AGENTS, 1))
    path = trajectory(CASES["relaysgd"], links("path"), 8, 0.0, start=start)
    np.testing.assert_allclose(path, np.broadcast_to(start, path.shape), rtol=1e-6)


@pytest.mark.parametrize("name", ["dsgt", "d2"])
def test_gradient_tracking_and_d2_forget_rounding(name):
    # If rounding in float32 moved the mean with every step, the error would be 0.1.
    assert error(trajectory(CASES[name], RING, 30_000, 0.01)[-1]) < 1e-4
    assert error(trajectory(CASES[name], RING, 9000, *DECAYING)[-1]) < 1e-4


def test_gradient_tracking_reaches_the_optimum_over_lossy_links():
    network = links("ring", "uniform", Faults(edge_loss=0.3))
    assert CASES["dsgt"].accepts(network)
    assert error(trajectory(CASES["cdsgd"], network, 2000, 0.05)[-1]) > 0.1
    assert error(trajectory(CASES["dsgt"], network, 2000, 0.05)[-1]) < 1e-4


@pytest.mark.every_nth(2)
@pytest.mark.parametrize("name", ["cdsgd", "dsgt", "sgp", "wa", "fedavg"])
def test_among_those_who_are_there_all_are_heard_in_the_long_run(name):
    network = links("ring", "uniform", Faults(0.3, 0.3, (Absence(2, 1, 50),)))
    case = CASES[name]._replace(optimizer="sgd")
    path = trajectory(case, network, N_STEPS, *DECAYING)
    # Absent agents have not received the latest messages, so they may lag behind.
    present = network.present(N_STEPS // STEPS)
    assert error(path[-1][present]) < 0.1


def test_gossip_over_a_base_graph_agrees_exactly_after_one_period():
    graph = base_k_plus_1(N_AGENTS)
    network = Links(graph, finite_time(graph, peers=1))
    assert CASES["cdsgd"].accepts(network)
    path = trajectory(CASES["cdsgd"], network, 2 * STEPS, 0.0)
    assert consensus_distance(path[len(graph) - 1]) > 0.1
    mean = np.tile(START.mean(axis=0), (N_AGENTS, 1))
    np.testing.assert_allclose(path[len(graph)], mean, rtol=0, atol=1e-6)


# Push-sum =============================================================================


def irregular_digraph() -> np.ndarray:
    """A strongly connected graph: no agent has as many receivers as senders."""
    cycle = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 0)]
    return from_graph(nx.DiGraph([*cycle, (0, 2), (0, 3)]))


PUSHED = Links(irregular_digraph(), column_stochastic)
PULLED = Links(irregular_digraph(), row_stochastic)


def test_push_sum_averages_where_gossip_is_biased():
    # There are no gradients, because the question is on what value the agents agree.
    pushed = trajectory(CASES["sgp"], PUSHED, 200, 0.0)[-1]
    gossiped = trajectory(CASES["cdsgd"], PULLED, 200, 0.0)[-1]
    mean = START.mean(axis=0)
    assert consensus_distance(pushed) < 1e-4 and consensus_distance(gossiped) < 1e-4
    np.testing.assert_allclose(pushed[0], mean, atol=1e-4)
    assert np.abs(gossiped[0] - mean).max() > 0.05
    assert not CASES["cdsgd"].accepts(PULLED) and not CASES["cdsgd"].accepts(PUSHED)


def perron(W: np.ndarray) -> np.ndarray:
    """Computes the left eigenvector of the eigenvalue 1, scaled to the sum 1."""
    values, vectors = np.linalg.eig(W.T)
    vector = np.real(vectors[:, np.argmin(np.abs(values - 1))])
    return vector / vector.sum()


def test_push_sum_finds_the_optimum_where_gossip_finds_another():
    pushed = trajectory(CASES["sgp"], PUSHED, N_STEPS, *DECAYING)[-1]
    assert error(pushed) < 0.02
    gossiped = trajectory(CASES["cdsgd"], PULLED, N_STEPS, *DECAYING)[-1]
    # It is the optimum of the losses weighted by each agent's influence on the others.
    weights = perron(PULLED.mixing_matrix[0])
    np.testing.assert_allclose(
        gossiped, np.tile(optimum(weights[:, None]), (N_AGENTS, 1)), atol=0.02
    )
    assert error(gossiped) > 0.1


@pytest.mark.parametrize("graph", ["exponential", "one_peer_exponential"])
def test_push_sum_survives_losses_on_directed_graphs(graph):
    faults = Faults(dropout=0.2, edge_loss=0.3)
    network = links(graph, "column_stochastic", faults)
    assert error(trajectory(CASES["sgp"], network, N_STEPS, *DECAYING)[-1]) < 0.1


# Compression ==========================================================================


def test_choco_preserves_the_mean_on_lossy_links():
    network = links("ring", "uniform", Faults(edge_loss=0.4))
    case = BIASED["choco, top_k"][0]
    x = trajectory(case, network, 600, 0.0)[-1]
    np.testing.assert_allclose(x.mean(axis=0), START.mean(axis=0), atol=1e-5)
    assert consensus_distance(x) < 1e-2


@pytest.mark.parametrize("compressor", ["sign", "top_k"])
def test_choco_finds_the_optimum_also_where_links_fail(compressor):
    network = links("ring", "uniform", Faults(edge_loss=0.3))
    case = case_of("choco", compressor=compressor, gamma=0.3)
    assert error(trajectory(case, network, N_STEPS, *DECAYING)[-1]) < 0.04


# Adaptive steps =======================================================================


@pytest.mark.parametrize("graph", GRAPHS)
def test_dadam_agrees_on_the_optimum_of_losses_scaled_by_each_agents_moments(graph):
    """Each agent scales its gradient by itself, so the scaled gradients sum to 0.

    (Chen et al. 2021, arXiv 2109.03194, theorem 2: it may not converge to the optimum.)
    """
    path = trajectory(CASES["cdadam"], GRAPHS[graph], N_STEPS, *DECAYING).astype(float)
    v = v_hat = np.zeros((N_AGENTS, DIM))
    for x in path:
        v = 0.999 * v + 0.001 * gradients(x) ** 2
        v_hat = np.maximum(v_hat, v)
    expected = optimum(1 / np.sqrt(v_hat))
    assert consensus_distance(path[-1]) < 0.01
    np.testing.assert_allclose(
        path[-1], np.tile(expected, (N_AGENTS, 1)), rtol=0, atol=0.03
    )
    assert error(path[-1]) > 0.3


# Cross-gradients ======================================================================


def objection(x: np.ndarray) -> float:
    """Computes the length of the shortest projected gradient of agents at x.

    It is 0 if no direction improves x for all agents. Then x is Pareto-stationary; the
    optimum is one of many such points.
    """
    at_x = [gradient(j, x) for j in range(N_AGENTS)]
    directions = [projected(own, [g for g in at_x if g is not own]) for own in at_x]
    return float(np.linalg.norm(directions, axis=1).min())


@pytest.mark.every_nth(2)
@pytest.mark.parametrize("name", ["cga", "compcga"])
def test_cga_ends_where_no_step_is_good_for_everybody(name):
    # CGA's theory bounds the distance of the projected direction from the mean
    # gradient. But CGA already stops at a weaker condition: no direction descends on
    # the data of all agents.
    start = START + 4  # from where everybody wants to go back
    path = trajectory(CASES[name], RING, N_STEPS, 0.02, 0.05, start)
    before, after = objection(path[0].mean(axis=0)), objection(path[-1].mean(axis=0))
    assert after < 0.02 < 0.3 < before
    assert consensus_distance(path[-1]) < 0.05
    assert error(path[-1]) < 0.5 * error(path[0])


def test_training_alone_ends_at_everybodys_own_optimum():
    # As a control, agents without communication do not reach it.
    x = trajectory(Case("local", "sgd"), RING, 8000, 0.1)[-1]
    own = np.stack(
        [np.linalg.solve(H, b) for H, b in zip(HESSIANS, TARGETS, strict=True)]
    )
    np.testing.assert_allclose(x, own, atol=1e-3)
    assert error(x) > 2
