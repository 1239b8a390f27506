"""What theory promises of each algorithm on a strongly convex problem, and no more.

Least squares whose agents disagree: with a constant step, gossip ends where the pull of
an agent's own data and that of its neighbours are in balance, a fixed point that is
known exactly, off the optimum by the order of the step; with a decaying step it ends at
the optimum; and what corrects for heterogeneity ends there with any step.
"""

from collections.abc import Callable

import networkx as nx
import numpy as np
import pytest

from dimat_jax.mixing import column_stochastic, row_stochastic
from dimat_jax.network import Absence, Faults, Links
from dimat_jax.topology import from_graph
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
from tests.reference import gossip_loops as reference

RING, DIRECTED = links("ring"), links("exponential")
GRAPHS = {"ring": RING, "exponential": DIRECTED}


N_STEPS = 3000


DECAYING = 0.2, 0.05


def error(x: np.ndarray) -> float:
    """How far the worst agent is from the optimum of all data."""
    return float(np.linalg.norm(x - OPTIMUM, axis=1).max())


def consensus_distance(x: np.ndarray) -> float:
    """How far the worst agent is from the mean."""
    return float(np.linalg.norm(x - x.mean(axis=0), axis=1).max())


def gradients(x: np.ndarray) -> np.ndarray:
    return np.stack([gradient(i, x_i) for i, x_i in enumerate(x)])


# Where a constant step ends ===========================================================


def fixed_point(update: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Where an affine map of all agents' x `[agents, dim]` stays."""
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
    """The end of a round that begins with averaging."""
    return lambda x: reference.weight_averaging(gradient, [W], x, alpha, STEPS)[-1]


def slower(W, gamma):
    return (1 - gamma) * np.eye(N_AGENTS) + gamma * W


AVERAGE = np.full((N_AGENTS, N_AGENTS), 1 / N_AGENTS)
# An algorithm, the share of the learning rate that it takes (heavy-ball momentum of 0.9
# makes ten steps of one), and whose fixed point is its own.
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
    # What compressed merging loses is made up for: it ends where exact merging does.
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
    # Yuan, Ling & Yin 2016, theorem 4: of the order of alpha, both of them.
    for distance in (error, consensus_distance):
        assert 0.05 < distance(ends[0]) < 1.3
        assert 0.1 < distance(ends[1]) / distance(ends[0]) < 0.35


@ON_GRAPHS
def test_a_decaying_step_ends_at_the_optimum(name, graph):
    case, share, update = BIASED[name]
    rate, decay = share * DECAYING[0], DECAYING[1]
    path = trajectory(case, GRAPHS[graph], N_STEPS, rate, decay)
    # It keeps up with the fixed point of the step that it takes, which gets there.
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


@pytest.mark.parametrize("name", ["dsgt", "d2"])
def test_gradient_tracking_and_d2_forget_rounding(name):
    # A mean that float32 moves with every step would have become an error of 0.1.
    assert error(trajectory(CASES[name], RING, 30_000, 0.01)[-1]) < 1e-4
    assert error(trajectory(CASES[name], RING, 9000, *DECAYING)[-1]) < 1e-4


def test_gradient_tracking_reaches_the_optimum_over_lossy_links():
    network = links("ring", "uniform", Faults(edge_loss=0.3))
    assert CASES["dsgt"].accepts(network)
    assert error(trajectory(CASES["cdsgd"], network, 2000, 0.05)[-1]) > 0.1
    assert error(trajectory(CASES["dsgt"], network, 2000, 0.05)[-1]) < 1e-4


@pytest.mark.parametrize("name", ["cdsgd", "dsgt", "sgp", "wa", "fedavg"])
def test_among_those_who_are_there_all_are_heard_in_the_long_run(name):
    network = links("ring", "uniform", Faults(0.3, 0.3, (Absence(2, 1, 50),)))
    case = CASES[name]._replace(optimizer="sgd")
    path = trajectory(case, network, N_STEPS, *DECAYING)
    # Whoever is away has yet to hear of the others.
    there = network.present(N_STEPS // STEPS)
    assert error(path[-1][there]) < 0.1


# Push-sum =============================================================================


def irregular_digraph() -> np.ndarray:
    """Strongly connected; nobody has as many receivers as senders."""
    cycle = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 0)]
    return from_graph(nx.DiGraph([*cycle, (0, 2), (0, 3)]))


PUSHED = Links(irregular_digraph(), column_stochastic)
PULLED = Links(irregular_digraph(), row_stochastic)


def test_push_sum_averages_where_gossip_is_biased():
    # No gradients: the question is what the agents agree upon.
    pushed = trajectory(CASES["sgp"], PUSHED, 200, 0.0)[-1]
    gossiped = trajectory(CASES["cdsgd"], PULLED, 200, 0.0)[-1]
    mean = START.mean(axis=0)
    assert consensus_distance(pushed) < 1e-4 and consensus_distance(gossiped) < 1e-4
    np.testing.assert_allclose(pushed[0], mean, atol=1e-4)
    assert np.abs(gossiped[0] - mean).max() > 0.05
    assert not CASES["cdsgd"].accepts(PULLED) and not CASES["cdsgd"].accepts(PUSHED)


def perron(W: np.ndarray) -> np.ndarray:
    """The left eigenvector of the eigenvalue 1, which sums to 1."""
    values, vectors = np.linalg.eig(W.T)
    vector = np.real(vectors[:, np.argmin(np.abs(values - 1))])
    return vector / vector.sum()


def test_push_sum_finds_the_optimum_where_gossip_finds_another():
    pushed = trajectory(CASES["sgp"], PUSHED, N_STEPS, *DECAYING)[-1]
    assert error(pushed) < 0.02
    gossiped = trajectory(CASES["cdsgd"], PULLED, N_STEPS, *DECAYING)[-1]
    # That of the losses weighted by how much each agent is heard.
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
    """Its scaling is each agent's own, so it balances others than the gradients.

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
    """How long the shortest step is that agents at x project theirs to.

    0: none improves x for everybody (x is Pareto-stationary; the optimum is one of many
    such).
    """
    at_x = [gradient(j, x) for j in range(N_AGENTS)]
    directions = [
        reference.projected(own, [g for g in at_x if g is not own]) for own in at_x
    ]
    return float(np.linalg.norm(directions, axis=1).min())


@pytest.mark.parametrize("name", ["cga", "compcga"])
def test_cga_ends_where_no_step_is_good_for_everybody(name):
    # Its theory bounds how far the projected direction is from the mean gradient; what
    # it stops for is weaker: that no direction descends on everybody's data.
    start = START + 4  # from where everybody wants to go back
    path = trajectory(CASES[name], RING, N_STEPS, 0.02, 0.05, start)
    before, after = objection(path[0].mean(axis=0)), objection(path[-1].mean(axis=0))
    assert after < 0.02 < 0.3 < before
    assert consensus_distance(path[-1]) < 0.05
    assert error(path[-1]) < 0.5 * error(path[0])


def test_training_alone_ends_at_everybodys_own_optimum():
    # The control: without communication nobody gets there.
    x = trajectory(Case("local", "sgd"), RING, 8000, 0.1)[-1]
    own = np.stack(
        [np.linalg.solve(H, b) for H, b in zip(HESSIANS, TARGETS, strict=True)]
    )
    np.testing.assert_allclose(x, own, atol=1e-3)
    assert error(x) > 2
