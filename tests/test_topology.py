import json

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat_jax.mixing import (
    MixingError,
    finite_time,
    is_doubly_stochastic,
    spectral_gap,
)
from dimat_jax.options import OptionError
from dimat_jax.topology import (
    TOPOLOGIES,
    TopologyError,
    components,
    from_graph,
    is_connected,
    is_undirected,
    schedule,
    union,
)

SIZES = range(1, 9)

# The sorted degrees of each undirected topology with n agents.
DEGREES = {
    "fully_connected": lambda n: [n - 1] * n,
    "ring": lambda n: [min(2, n - 1)] * n,
    "path": lambda n: [1, 1] + [2] * (n - 2) if n > 1 else [0],
    "star": lambda n: [1] * (n - 1) + [n - 1],
    "binary_tree": lambda n: sorted(
        (i > 0) + (2 * i + 1 < n) + (2 * i + 2 < n) for i in range(n)
    ),
    "bipartite": lambda n: (
        sorted([2] * (n - 2) + [n - 2] * 2) if n > 2 else [n - 1] * n
    ),
    "torus": lambda n: [{4: 2, 6: 3, 8: 3}.get(n, min(2, n - 1))] * n,
    "hypercube": lambda n: [n.bit_length() - 1] * n,
    "random_regular": lambda n: [min(3 + n % 2, n - 1)] * n,
    "disconnected": lambda n: [0] * n,
}
DIRECTED = {"exponential", "one_peer_exponential", "random_peers"}
CHANGING = {"one_peer_exponential", "random_peers", "base_k_plus_1"}
BUILT = [name for name in TOPOLOGIES if name != "file"]

every_topology = pytest.mark.parametrize("name", BUILT)
every_size = pytest.mark.parametrize("n_agents", SIZES)


def build(name, n_agents):
    if name == "hypercube" and n_agents not in (1, 2, 4, 8):
        pytest.skip("a hypercube has 1, 2, 4, 8, ... agents")
    return TOPOLOGIES[name](n_agents)


def test_what_every_topology_promises_is_known_here():
    others = {"erdos_renyi", "file", *CHANGING}
    assert {*DEGREES, *DIRECTED, *others} == TOPOLOGIES.keys()


@every_topology
@every_size
def test_an_adjacency_is_square_and_boolean_without_self_loops(name, n_agents):
    stack = schedule(build(name, n_agents))
    assert stack.shape[1:] == (n_agents, n_agents)
    assert stack.dtype == np.bool_
    assert not np.diagonal(stack, axis1=1, axis2=2).any()


@every_topology
@every_size
def test_every_topology_but_one_is_connected(name, n_agents):
    adjacency = build(name, n_agents)
    assert is_connected(adjacency) == (name != "disconnected" or n_agents == 1)
    assert is_undirected(adjacency) or name in DIRECTED


@pytest.mark.parametrize("name", DEGREES)
@every_size
def test_undirected_topologies_have_the_degrees_they_promise(name, n_agents):
    adjacency = build(name, n_agents)
    np.testing.assert_array_equal(adjacency, adjacency.T)
    assert sorted(adjacency.sum(axis=1)) == DEGREES[name](n_agents)


def test_a_bipartite_graph_has_two_hubs_who_do_not_talk_to_each_other():
    adjacency = TOPOLOGIES["bipartite"](6)
    assert adjacency[:2, 2:].all() and not adjacency[:2, :2].any()
    assert not adjacency[2:, 2:].any()


def test_in_a_hypercube_neighbours_differ_in_one_bit():
    adjacency = TOPOLOGIES["hypercube"](8)
    for i, j in np.argwhere(adjacency):
        assert int(i ^ j).bit_count() == 1
    with pytest.raises(TopologyError, match="1, 2, 4, 8, ... agents, but there are 6"):
        TOPOLOGIES["hypercube"](6)


@pytest.mark.parametrize("n_agents", [2, 5, 8, 16])
def test_one_peer_exponential_graphs_send_to_one_agent_at_a_time(n_agents):
    stack = TOPOLOGIES["one_peer_exponential"](n_agents)
    agents = np.arange(n_agents)
    for k, adjacency in enumerate(stack):
        receivers = np.argmax(adjacency, axis=0)  # of each sender
        np.testing.assert_array_equal(receivers, (agents + 2**k) % n_agents)
        np.testing.assert_array_equal(adjacency.sum(axis=1), 1)
    np.testing.assert_array_equal(union(stack), TOPOLOGIES["exponential"](n_agents))


@pytest.mark.parametrize("n_agents", [2, 4, 8, 16])
def test_one_period_of_a_one_peer_exponential_graph_averages_powers_of_two(n_agents):
    product = np.eye(n_agents)
    for adjacency in TOPOLOGIES["one_peer_exponential"](n_agents):
        product = (adjacency + np.eye(n_agents)) / 2 @ product
    np.testing.assert_allclose(product, 1 / n_agents)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("random_regular", {"degree": 4}),
        ("erdos_renyi", {"edge_probability": 0.4}),
        ("random_peers", {"peers": 3}),
    ],
)
def test_random_graphs_are_decided_by_their_seed(name, options):
    first, again, other = (TOPOLOGIES[name](11, seed=s, **options) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(("n_agents", "degree"), [(5, 3), (4, 4), (6, 1)])
def test_a_regular_graph_that_cannot_be_is_refused(n_agents, degree):
    with pytest.raises(TopologyError, match=f"{n_agents} agents with {degree} neigh"):
        TOPOLOGIES["random_regular"](n_agents, degree=degree)


@pytest.mark.parametrize(("n_agents", "degree"), [(6, 3), (7, 4), (3, 2), (2, 1)])
def test_a_degree_of_0_is_the_least_above_the_rings(n_agents, degree):
    adjacency = TOPOLOGIES["random_regular"](n_agents, degree=0)
    assert (adjacency.sum(axis=1) == degree).all()


def test_a_random_graph_that_is_never_connected_is_given_up():
    with pytest.raises(TopologyError, match="1000 random graphs in a row were not"):
        TOPOLOGIES["erdos_renyi"](5, edge_probability=0.0)
    message = "edge_probability is 1.5; it must be at least 0 and at most 1"
    with pytest.raises(OptionError, match=message):
        TOPOLOGIES["erdos_renyi"](5, edge_probability=1.5)


@pytest.mark.parametrize("peers", [1, 3, 20])
def test_random_peers_are_others_and_drawn_evenly_and_anew(peers):
    n_agents, period = 8, 400
    stack = TOPOLOGIES["random_peers"](n_agents, peers=peers, period=period, seed=1)
    sent = min(peers, n_agents - 1)
    np.testing.assert_array_equal(stack.sum(axis=1), sent)
    # Every pair is drawn with the same probability. The bounds are five deviations.
    share, others = sent / (n_agents - 1), ~np.eye(n_agents, dtype=bool)
    deviation = np.sqrt(share * (1 - share) / period)
    found = stack.mean(axis=0)[others]
    np.testing.assert_allclose(found, share, rtol=0, atol=5 * deviation + 1e-12)
    if peers < n_agents - 1:
        assert len({graph.tobytes() for graph in stack}) > period / 2
        # A receiver may get more messages than it sends, or none.
        assert len(set(stack.sum(axis=2).ravel())) > 3


@settings(max_examples=100)
@given(n_agents=st.integers(1, 60), peers=st.integers(1, 7))
def test_one_period_of_a_base_graph_averages_any_number_of_agents(n_agents, peers):
    """The length is at most 2 log_(k+1)(n) + 2 (Takezawa et al. 2023)."""
    stack = TOPOLOGIES["base_k_plus_1"](n_agents, peers=peers)
    assert is_undirected(stack) and stack.sum(axis=2).max() <= peers
    weights = finite_time(stack, peers=peers)
    product = np.eye(n_agents)
    for W in weights:
        assert is_doubly_stochastic(W)
        product = W @ product
    np.testing.assert_allclose(product, 1 / n_agents, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(weights, weights.swapaxes(1, 2))
    assert len(stack) <= 2 * np.log(n_agents) / np.log(peers + 1) + 2


def test_base_graphs_are_no_longer_than_they_need_to_be():
    """If n is a power of k + 1, log_(k+1)(n) exchanges are enough."""
    lengths = {(8, 1): 3, (9, 2): 2, (27, 2): 3, (25, 4): 2, (5, 1): 5, (6, 1): 4}
    for (n_agents, peers), length in lengths.items():
        assert len(TOPOLOGIES["base_k_plus_1"](n_agents, peers=peers)) == length


def test_weights_for_finite_time_consensus_need_their_graph():
    stack = TOPOLOGIES["base_k_plus_1"](6, peers=2)
    for other in (TOPOLOGIES["ring"](6), TOPOLOGIES["base_k_plus_1"](6)):
        with pytest.raises(MixingError, match=r"need base_k_plus_1 of 2 peer\(s\)"):
            finite_time(other, peers=2)
    assert spectral_gap(finite_time(stack, peers=2)) == pytest.approx(1)
    for name in ("base_k_plus_1", "random_peers"):
        with pytest.raises(OptionError, match="peers is 0; it must be at least 1"):
            TOPOLOGIES[name](6, peers=0)


@pytest.mark.parametrize("suffix", [".json", ".npy"])
def test_any_matrix_in_a_file_is_a_graph(tmp_path, suffix):
    matrix = np.array([[0.5, 0.5, 0], [0, 1, 0], [0.2, 0, 0.8]])
    file = tmp_path / f"graph{suffix}"
    if suffix == ".npy":
        np.save(file, matrix)
    else:
        file.write_text(json.dumps(matrix.tolist()))
    (adjacency,) = TOPOLOGIES["file"](3, file=file)
    receivers, senders = np.nonzero(adjacency)
    assert set(zip(receivers, senders, strict=True)) == {(0, 1), (2, 0)}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("graph.dot", "[[0]]", "expected a file of one of the kinds .json, .npy, .tx"),
        ("graph.json", "[[0, 1]", "cannot be used"),
        ("graph.json", "[[0, 1], [1]]", "cannot be used"),
        ("graph.json", "[[0, 1], [1, 0]]", r"shape \[2, 2\]; expected \[3, 3\]"),
        ("graph.json", "[[0,1,0],[1,0,NaN],[0,1,0]]", "no finite numbers"),
        ("graph.json", "[]", r"shape \[0\]; expected"),
        ("graph.npy", "[[0]]", "cannot be used"),
        ("graph.npy", "", "cannot be used"),
        (None, "", "cannot be used"),
    ],
)
def test_a_file_that_holds_no_graph_says_why(tmp_path, name, content, message):
    file = tmp_path / (name or "missing.json")
    if name:
        file.write_text(content)
    with pytest.raises(TopologyError, match=message):
        TOPOLOGIES["file"](3, file=file)


@pytest.mark.parametrize("n_agents", [3, 5, 8])
def test_on_a_ring_neighbours_are_next_to_each_other(n_agents):
    agent = np.arange(n_agents)
    offset = (agent[:, None] - agent) % n_agents
    np.testing.assert_array_equal(
        TOPOLOGIES["ring"](n_agents), (offset == 1) | (offset == n_agents - 1)
    )


@every_topology
@pytest.mark.parametrize("n_agents", [0, -1])
def test_there_must_be_an_agent(name, n_agents):
    with pytest.raises(TopologyError, match=f"at least 1 agent, got {n_agents}"):
        TOPOLOGIES[name](n_agents)


def test_a_directed_edge_goes_from_the_sender_to_the_receiver():
    adjacency = from_graph(nx.DiGraph([(0, 1), (1, 2), (2, 1)]))
    receivers, senders = np.nonzero(adjacency)
    assert set(zip(senders, receivers, strict=True)) == {(0, 1), (1, 2), (2, 1)}


def test_weights_do_not_matter_not_even_zero():
    graph = nx.Graph()
    graph.add_weighted_edges_from([(0, 1, 0.0), (1, 2, -1.5), (0, 2, 7)])
    np.testing.assert_array_equal(from_graph(graph), ~np.eye(3, dtype=bool))


def test_self_loops_are_dropped():
    graph = nx.Graph([(0, 0), (0, 1)])
    np.testing.assert_array_equal(from_graph(graph), [[False, True], [True, False]])


def test_agents_are_numbered_in_the_order_of_the_nodes():
    graph = nx.Graph()
    graph.add_nodes_from(["c", "a", "b"])
    graph.add_edge("c", "b")
    expected = np.zeros((3, 3), bool)
    expected[0, 2] = expected[2, 0] = True
    np.testing.assert_array_equal(from_graph(graph), expected)


def test_any_networkx_graph_becomes_its_adjacency():
    for graph in (nx.star_graph(4), nx.petersen_graph(), nx.grid_2d_graph(2, 3)):
        expected = nx.to_numpy_array(graph).astype(bool)
        np.testing.assert_array_equal(from_graph(graph), expected)


def test_components_are_sorted_and_in_the_order_of_their_least():
    graph = nx.empty_graph(7)
    graph.add_edges_from([(5, 2), (4, 0), (0, 6)])
    assert components(from_graph(graph)) == [[0, 4, 6], [1], [2, 5], [3]]


def test_components_of_a_changing_topology_are_those_of_all_its_edges():
    stack = np.zeros((2, 5, 5), bool)
    stack[0, 0, 3] = stack[1, 3, 4] = True
    assert components(stack) == [[0, 3, 4], [1], [2]]


def test_a_stack_of_no_graphs_is_refused(tmp_path):
    np.save(tmp_path / "none.npy", np.zeros((0, 3, 3)))
    with pytest.raises(
        TopologyError, match=r"shape \[0, 3, 3\]; expected \[3, 3\], or"
    ):
        TOPOLOGIES["file"](3, file=tmp_path / "none.npy")


def test_a_directed_graph_is_connected_only_if_there_is_a_way_back():
    one_way = from_graph(nx.path_graph(4, create_using=nx.DiGraph))
    around = from_graph(nx.cycle_graph(4, create_using=nx.DiGraph))
    assert not is_connected(one_way) and is_connected(around)
    # Components ignore the directions of edges: these agents are connected by messages.
    assert components(one_way) == [[0, 1, 2, 3]]
