import sys
from typing import Any

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dimat_jax.mixing import (
    MIXINGS,
    MixingError,
    check_mixing_matrix,
    column_stochastic,
    columns_sum_to_one,
    fastest,
    is_column_stochastic,
    is_doubly_stochastic,
    lazy,
    metropolis_hastings,
    mix,
    row_stochastic,
    rows_sum_to_one,
    spectral_gap,
    uniform,
)
from dimat_jax.topology import TOPOLOGIES, from_graph, is_connected

seeds = st.integers(0, 2**31)

# The rules whose weights are doubly stochastic on every undirected graph.
SYMMETRIC = {
    name: MIXINGS[name] for name in ("uniform", "max_degree", "metropolis_hastings")
}
all_mixings = pytest.mark.parametrize("mixing", SYMMETRIC.values(), ids=SYMMETRIC)
# Base graphs change over time.
OTHERS = {"base_k_plus_1", "exponential", "file", "hypercube"}
OTHERS |= {"one_peer_exponential", "random_peers"}
UNDIRECTED = [name for name in TOPOLOGIES if name not in OTHERS]


@st.composite
def connected_graphs(draw: Any) -> nx.Graph:
    """Draws trees, small worlds, stars with rings, and random graphs."""
    n, seed = draw(st.integers(2, 12)), draw(seeds)
    kind = draw(st.sampled_from(["tree", "small world", "wheel", "random"]))
    if kind == "tree":
        return nx.random_labeled_tree(n, seed=seed)
    if kind == "small world" and n > 4:
        return nx.connected_watts_strogatz_graph(n, 4, 0.5, seed=seed)
    if kind == "wheel":
        return nx.wheel_graph(n)
    graph = nx.gnp_random_graph(n, draw(st.floats(0, 1)), seed=seed)
    return nx.compose(graph, nx.random_labeled_tree(n, seed=seed))


def assert_fits(matrix: np.ndarray, adjacency: np.ndarray) -> None:
    """Asserts that W is doubly stochastic, positive on the edges, and 0 elsewhere."""
    assert matrix.dtype == np.float64
    np.testing.assert_allclose(matrix.sum(axis=0), 1, rtol=1e-12)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=1e-12)
    off_diagonal = ~np.eye(len(matrix), dtype=bool)
    np.testing.assert_array_equal(matrix[off_diagonal] > 0, adjacency[off_diagonal])
    assert (matrix >= 0).all()
    np.testing.assert_allclose(matrix, matrix.T)
    assert is_doubly_stochastic(matrix)


# Mixing matrices


@all_mixings
@pytest.mark.parametrize("topology", UNDIRECTED)
@pytest.mark.parametrize("n_agents", range(1, 9))
def test_every_mixing_fits_every_topology(mixing, topology, n_agents):
    adjacency = TOPOLOGIES[topology](n_agents)
    assert_fits(mixing(adjacency), adjacency)


@all_mixings
@settings(max_examples=50)
@given(graph=connected_graphs())
def test_every_mixing_fits_every_connected_graph(mixing, graph):
    adjacency = from_graph(graph)
    assert is_connected(adjacency)
    matrix = mixing(adjacency)
    assert_fits(matrix, adjacency)
    # Every agent has a weight for itself, so gossip converges on any connected graph.
    assert matrix.diagonal().min() > 0
    assert 0 < spectral_gap(matrix) <= 1


@all_mixings
@pytest.mark.parametrize("n_agents", range(1, 9))
def test_weights_are_equal_on_regular_graphs(mixing, n_agents):
    for topology in ("fully_connected", "ring", "disconnected"):
        adjacency = TOPOLOGIES[topology](n_agents)
        (degree,) = set(adjacency.sum(axis=1))
        expected = (adjacency | np.eye(n_agents, dtype=bool)) / (degree + 1)
        np.testing.assert_allclose(mixing(adjacency), expected, rtol=1e-12)


def test_the_papers_weights_are_one_nth_and_one_third():
    fully_connected = uniform(TOPOLOGIES["fully_connected"](5))
    np.testing.assert_allclose(fully_connected, np.full((5, 5), 1 / 5))
    ring = uniform(TOPOLOGIES["ring"](5))
    np.testing.assert_allclose(ring[0], [1 / 3, 1 / 3, 0, 0, 1 / 3])


def test_uniform_weights_on_a_star_are_those_of_its_centre():
    matrix = uniform(from_graph(nx.star_graph(3)))
    np.testing.assert_allclose(matrix[0], [1 / 4] * 4)
    np.testing.assert_allclose(matrix[1], [1 / 4, 3 / 4, 0, 0])


def test_metropolis_hastings_weighs_an_edge_by_its_larger_degree():
    # The agents of a path 0 - 1 - 2 - 3 have the degrees 1, 2, 2, 1.
    third = 1 / 3
    expected = [
        [2 * third, third, 0, 0],
        [third, third, third, 0],
        [0, third, third, third],
        [0, 0, third, 2 * third],
    ]
    matrix = metropolis_hastings(from_graph(nx.path_graph(4)))
    np.testing.assert_allclose(matrix, expected)
    # If degrees differ, an edge between agents of small degrees has more than the
    # uniform weight.
    lollipop = from_graph(nx.lollipop_graph(4, 3))
    assert (metropolis_hastings(lollipop)[-1, -2], uniform(lollipop)[-1, -2]) == (
        pytest.approx(1 / 3),
        pytest.approx(1 / 5),
    )


def test_a_directed_graph_is_refused_with_the_edge():
    adjacency = TOPOLOGIES["ring"](4)
    adjacency[1, 2] = False
    for rule in ("metropolis_hastings", "fastest"):
        with pytest.raises(
            MixingError, match="undirected graph, but agent 2 receives fro"
        ):
            MIXINGS[rule](adjacency)
    with pytest.raises(MixingError, match="agent 1 receives from 1 and sends to 2"):
        uniform(adjacency)


@pytest.mark.parametrize("n_agents", range(1, 9))
def test_uniform_weights_fit_directed_graphs_that_are_balanced(n_agents):
    for topology in ("exponential", "one_peer_exponential"):
        matrix = uniform(TOPOLOGIES[topology](n_agents))
        assert is_doubly_stochastic(matrix)


def test_lazy_weights_are_half_oneself():
    ring = TOPOLOGIES["ring"](4)
    np.testing.assert_allclose(lazy(ring), (np.eye(4) + uniform(ring)) / 2)
    # D2 needs this. A ring of four without laziness has an eigenvalue of exactly -1/3.
    assert np.linalg.eigvalsh(uniform(ring)).min() == pytest.approx(-1 / 3)
    assert np.linalg.eigvalsh(lazy(ring)).min() > 0


@settings(max_examples=50)
@given(n=st.integers(1, 8), density=st.floats(0, 1), seed=seeds)
def test_any_directed_graph_has_column_and_row_stochastic_weights(n, density, seed):
    adjacency = np.random.default_rng(seed).random((n, n)) < density
    np.fill_diagonal(adjacency, False)
    columns, rows = column_stochastic(adjacency), row_stochastic(adjacency)
    np.testing.assert_allclose(columns.sum(axis=0), 1)
    np.testing.assert_allclose(rows.sum(axis=1), 1)
    own = np.eye(n, dtype=bool)
    for matrix in (columns, rows):
        np.testing.assert_array_equal(matrix > 0, adjacency | own)
    # All agents have the same share.
    np.testing.assert_allclose(columns, row_stochastic(adjacency.T).T)
    assert is_column_stochastic(columns) and is_column_stochastic(rows.T)


def test_fastest_weights_are_symmetric_and_beat_the_others():
    for topology in ("path", "star", "ring", "bipartite"):
        adjacency = TOPOLOGIES[topology](6)
        matrix = fastest(adjacency)
        np.testing.assert_array_equal(matrix, matrix.T)
        np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=1e-12)
        assert not matrix[~adjacency & ~np.eye(6, dtype=bool)].any()
        others = max(spectral_gap(rule(adjacency)) for rule in SYMMETRIC.values())
        assert spectral_gap(matrix) > others + 1e-3
    # On an edge-transitive graph the best weight of every edge is 2 / (mu_2 + mu_N),
    # where mu are the Laplacian's eigenvalues (Xiao & Boyd 2004, section 4.1).
    star = TOPOLOGIES["star"](5)
    expected = np.where(star, 2 / (1 + 5), 0.0)
    np.testing.assert_allclose(fastest(star)[star], expected[star], atol=1e-5)


def test_fastest_weights_of_separate_components_are_those_of_each():
    path, star = TOPOLOGIES["path"](4), TOPOLOGIES["star"](5)
    apart = np.zeros((10, 10), bool)
    apart[:4, :4], apart[4:9, 4:9] = path, star
    matrix = fastest(apart)
    np.testing.assert_allclose(matrix[:4, :4], fastest(path), atol=1e-12)
    np.testing.assert_allclose(matrix[4:9, 4:9], fastest(star), atol=1e-12)
    assert matrix[9, 9] == 1


def test_fastest_weights_may_be_negative_and_still_sum_to_one():
    matrix = fastest(TOPOLOGIES["star"](5))
    assert matrix[0, 0] == pytest.approx(-1 / 3, abs=1e-4)
    assert rows_sum_to_one(matrix) and columns_sum_to_one(matrix)
    assert not is_doubly_stochastic(matrix)


def test_where_everyone_or_nobody_is_a_neighbour_fastest_weights_need_no_solver(
    monkeypatch,
):
    monkeypatch.setitem(sys.modules, "cvxpy", None)  # importing it fails
    for n_agents in (1, 2, 5, 40):
        everyone = fastest(TOPOLOGIES["fully_connected"](n_agents))
        np.testing.assert_allclose(everyone, 1 / n_agents, rtol=1e-12)
    np.testing.assert_array_equal(fastest(TOPOLOGIES["disconnected"](3)), np.eye(3))
    with pytest.raises(MixingError, match=r"pip install 'dimat_jax\[sdp\]'"):
        fastest(TOPOLOGIES["ring"](5))


@pytest.mark.parametrize("mixing", MIXINGS)
def test_a_changing_topology_has_weights_at_every_time(mixing):
    graphs = [TOPOLOGIES[name](4) for name in ("ring", "star", "fully_connected")]
    matrices = MIXINGS[mixing](np.stack(graphs))
    for matrix, graph in zip(matrices, graphs, strict=True):
        np.testing.assert_array_equal(matrix, MIXINGS[mixing](graph))


def test_a_matrix_of_ones_own_has_rows_or_columns_that_sum_to_one():
    rows = np.array([[0.5, 0.5], [0.0, 1.0]])
    for matrix in (rows, rows.T, np.stack([rows, np.eye(2)])):
        np.testing.assert_array_equal(check_mixing_matrix(matrix), matrix)
    wrong = np.array([[0.5, 0.5], [0.3, 0.6]])
    with pytest.raises(MixingError, match="row 1 sums to 0.9$"):
        check_mixing_matrix(wrong)
    with pytest.raises(MixingError, match="row 1 sums to 0.9 at time 2"):
        check_mixing_matrix(np.stack([np.eye(2), rows, wrong]))
    # At one time the rows sum to 1, at another the columns, so nothing is preserved.
    with pytest.raises(MixingError, match="row 0 sums to 0.5 at time 1"):
        check_mixing_matrix(np.stack([rows, rows.T]))


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.ones((2, 3)) / 3, r"or a stack of such; got \[2, 3\]"),
        (np.ones(1), r"got \[1\]"),
        (np.ones((0, 2, 2)), r"got \[0, 2, 2\]"),
        ([[1, 0], [np.nan, 1]], "holds finite numbers"),
    ],
)
def test_what_cannot_be_a_mixing_matrix_says_why(matrix, message):
    with pytest.raises(MixingError, match=message):
        check_mixing_matrix(matrix)


def test_a_matrix_has_weights_on_edges_alone():
    ring, stack = TOPOLOGIES["ring"](4), TOPOLOGIES["one_peer_exponential"](4)
    check_mixing_matrix(np.eye(4), ring)
    check_mixing_matrix(np.eye(4), stack)
    check_mixing_matrix(uniform(stack), stack)
    with pytest.raises(MixingError, match="of 0.25 in row 0, column 2, but agent 0 do"):
        check_mixing_matrix(np.full((4, 4), 0.25), ring)
    swapped = uniform(stack[::-1])
    with pytest.raises(MixingError, match="column 2 at time 0, but agent 0 does not r"):
        check_mixing_matrix(swapped, stack)
    for matrix, shape in ((np.eye(3), r"\[3, 3\]"), (np.stack([np.eye(4)] * 3), "3")):
        with pytest.raises(MixingError, match=f"{shape}.* does not fit a topology"):
            check_mixing_matrix(matrix, stack)


@pytest.mark.parametrize(
    "matrix",
    [
        [[0.5, 0.5], [0.4, 0.6]],  # rows only
        [[0.5, 0.4], [0.5, 0.6]],  # columns only
        [[1.5, -0.5], [-0.5, 1.5]],  # sums alone are not enough
    ],
)
def test_what_is_not_doubly_stochastic_is_told(matrix):
    assert not is_doubly_stochastic(np.array(matrix))


def test_sums_are_told_apart_for_every_time_of_a_stack():
    rows = np.array([[0.5, 0.5], [0.0, 1.0]])
    negative = np.array([[1.5, -0.5], [-0.5, 1.5]])
    assert rows_sum_to_one(rows) and not columns_sum_to_one(rows)
    assert columns_sum_to_one(rows.T) and not rows_sum_to_one(rows.T)
    assert rows_sum_to_one(np.stack([rows, negative]))
    assert not columns_sum_to_one(np.stack([negative, rows]))


# The spectral gap


@pytest.mark.parametrize("n_agents", [2, 3, 5, 8])
def test_the_gap_is_one_if_fully_connected_and_zero_if_disconnected(n_agents):
    fully_connected = uniform(TOPOLOGIES["fully_connected"](n_agents))
    assert spectral_gap(fully_connected) == pytest.approx(1, abs=1e-9)
    assert spectral_gap(uniform(TOPOLOGIES["disconnected"](n_agents))) == 0


@pytest.mark.parametrize("n_agents", [2, 4, 8])
def test_the_gap_of_a_changing_topology_is_that_of_a_whole_period(n_agents):
    stack = TOPOLOGIES["one_peer_exponential"](n_agents)
    assert spectral_gap(uniform(stack)) == pytest.approx(1, abs=1e-9)
    ring = uniform(TOPOLOGIES["ring"](5))
    assert 1 - spectral_gap(np.stack([ring, ring])) == pytest.approx(
        (1 - spectral_gap(ring)) ** 2
    )


def test_the_gap_per_step_has_the_effect_of_a_period_step_for_step():
    ring = uniform(TOPOLOGIES["ring"](5))
    for period in (1, 2, 3):
        stack = np.stack([ring] * period)
        assert spectral_gap(stack, per_step=True) == pytest.approx(spectral_gap(ring))
    # Two pairs of agents average. Later the pairs lose half of what still parts them.
    nothing = np.eye(4)
    within = (nothing + nothing[[1, 0, 3, 2]]) / 2
    between = (3 * nothing + nothing[[2, 3, 0, 1]]) / 4
    stack = np.stack([within, nothing, between, nothing])
    assert spectral_gap(stack) == pytest.approx(0.5)
    assert spectral_gap(stack, per_step=True) == pytest.approx(1 - 0.5**0.25)
    assert spectral_gap(np.ones((1, 1)), per_step=True) == 1


def test_the_gap_of_two_separate_rings_is_zero():
    graph = nx.disjoint_union(nx.cycle_graph(3), nx.cycle_graph(4))
    assert spectral_gap(uniform(from_graph(graph))) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("n_agents", [4, 5, 8, 20])
def test_the_gap_of_a_ring_has_its_closed_form(n_agents):
    expected = 1 - abs(1 / 3 + 2 / 3 * np.cos(2 * np.pi / n_agents))
    ring = uniform(TOPOLOGIES["ring"](n_agents))
    assert spectral_gap(ring) == pytest.approx(expected, abs=1e-9)
    assert spectral_gap(ring.astype(np.float32)) == pytest.approx(expected, abs=1e-6)


def test_the_gap_counts_eigenvalues_by_modulus():
    # Two agents that swap have the eigenvalues 1 and -1, and never reach consensus.
    assert spectral_gap(np.array([[0.0, 1.0], [1.0, 0.0]])) == 0
    # The eigenvalues of a directed cycle are the roots of unity.
    assert spectral_gap(np.roll(np.eye(5), 1, axis=0)) == pytest.approx(0, abs=1e-9)


def test_a_single_agent_is_at_consensus():
    assert spectral_gap(np.ones((1, 1))) == 1


# Mixing


def stacked_tree(n_agents: int, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "kernel": rng.normal(size=(n_agents, 3, 2)).astype(np.float32),
        "layers": [rng.normal(size=(n_agents, 4)).astype(np.float32)],
        "scalar": rng.normal(size=n_agents).astype(np.float32),
    }


@settings(max_examples=20)
@given(n_agents=st.sampled_from([1, 3, 5]), seed=seeds)
def test_mix_is_the_weighted_sum_over_agents(n_agents, seed):
    matrix = np.random.default_rng(seed).normal(size=(n_agents, n_agents))
    stacked = stacked_tree(n_agents, seed)

    def check(mixed, leaf):
        expected = np.einsum("ij,j...->i...", matrix, leaf.astype(np.float64))
        np.testing.assert_allclose(mixed, expected, rtol=1e-4, atol=1e-5)

    jax.tree.map(check, jax.jit(mix)(matrix, stacked), stacked)


@settings(max_examples=20)
@given(data=st.data(), seed=seeds)
def test_doubly_stochastic_mixing_preserves_the_mean(data, seed):
    n_agents = 5
    # By Birkhoff's theorem every doubly stochastic matrix is of this form.
    weights = np.array(data.draw(st.lists(st.floats(0.01, 1), min_size=1, max_size=6)))
    rng = np.random.default_rng(seed)
    permutations = [np.eye(n_agents)[rng.permutation(n_agents)] for _ in weights]
    matrix = np.tensordot(weights / weights.sum(), np.stack(permutations), axes=1)
    assert is_doubly_stochastic(matrix)
    stacked = stacked_tree(n_agents, seed)

    def check(mixed, leaf):
        mixed = np.asarray(mixed)
        np.testing.assert_allclose(mixed.mean(0), leaf.mean(0), atol=1e-6)
        # No agent leaves the range of the values before.
        assert np.all(mixed <= leaf.max(0) + 1e-6)
        assert np.all(mixed >= leaf.min(0) - 1e-6)

    jax.tree.map(check, jax.jit(mix)(matrix, stacked), stacked)


def test_fully_connected_agents_reach_consensus_at_once():
    matrix = jnp.asarray(uniform(TOPOLOGIES["fully_connected"](5)))
    stacked = stacked_tree(5, seed=0)

    def check(mixed, leaf):
        mean = np.broadcast_to(leaf.astype(np.float64).mean(axis=0), leaf.shape)
        np.testing.assert_allclose(mixed, mean, atol=1e-6)

    jax.tree.map(check, mix(matrix, stacked), stacked)


@all_mixings
def test_gossip_comes_closer_to_consensus_by_the_second_eigenvalue(mixing):
    matrix = mixing(from_graph(nx.lollipop_graph(4, 3)))
    x = np.random.default_rng(0).normal(size=(7, 100)).astype(np.float32)
    y = x - x.mean(axis=0)
    distances = []
    for _ in range(50):
        y = np.asarray(mix(jnp.asarray(matrix), y))
        distances.append(np.linalg.norm(y))
    assert distances[-1] / distances[-2] == pytest.approx(
        1 - spectral_gap(matrix), rel=0.01
    )


@pytest.mark.parametrize(
    "leaf",
    [
        np.arange(3, dtype=np.int32),
        np.array([[True], [False], [True]]),
        np.arange(3, dtype=np.uint8),
        jax.random.split(jax.random.key(0), 3),
    ],
    ids=["int32", "bool", "uint8", "key"],
)
def test_leaves_that_are_no_real_numbers_are_not_mixed(leaf):
    mixed = mix(jnp.full((3, 3), 1 / 3), {"counter": leaf})["counter"]
    assert mixed.dtype == leaf.dtype
    assert (mixed == leaf).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_mixing_keeps_the_dtype_and_rounds_but_once(dtype):
    rng = np.random.default_rng(0)
    leaf = jnp.asarray(rng.normal(size=(5, 300)), dtype)
    matrix = uniform(TOPOLOGIES["ring"](5))
    mixed = mix(jnp.asarray(matrix, jnp.bfloat16), leaf)
    assert mixed.dtype == dtype
    exact = np.asarray(jnp.asarray(matrix, jnp.bfloat16), np.float64) @ np.asarray(
        leaf, np.float64
    )
    # The bound is half a unit in the last place, and a little for float32's rounding.
    unit = np.abs(exact) * float(jnp.finfo(dtype).eps) / 2
    assert np.all(np.abs(np.asarray(mixed, np.float64) - exact) <= unit + 5e-7)


def test_mixing_with_the_identity_changes_nothing():
    stacked = stacked_tree(4, seed=1)
    jax.tree.map(np.testing.assert_array_equal, mix(jnp.eye(4), stacked), stacked)


complex_numbers = st.complex_numbers(
    max_magnitude=1e3, allow_nan=False, allow_infinity=False, width=64
)


@settings(max_examples=30)
@given(x=arrays(np.complex64, (3, 2), elements=complex_numbers), seed=seeds)
def test_complex_leaves_are_mixed_with_both_their_parts(x, seed):
    matrix = np.random.default_rng(seed).uniform(-1, 1, (3, 3)).astype(np.float32)
    mixed = mix(jnp.asarray(matrix), jnp.asarray(x))
    assert mixed.dtype == np.complex64
    expected = matrix.astype(np.float64) @ x.astype(np.complex128)
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-3)
    both = mix(jnp.asarray(matrix), {"re": jnp.real(x), "im": jnp.imag(x)})
    np.testing.assert_allclose(np.real(mixed), both["re"], atol=1e-3)
    np.testing.assert_allclose(np.imag(mixed), both["im"], atol=1e-3)
