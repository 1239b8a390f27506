import networkx as nx
import numpy as np
import pytest

from dimat_jax.topology import (
    TOPOLOGIES,
    TopologyError,
    components,
    from_graph,
    is_connected,
)

SIZES = range(1, 9)

# What each undirected topology promises for n agents: everyone's degree, connectivity.
UNDIRECTED = {
    "fully_connected": (lambda n: n - 1, lambda n: True),
    "ring": (lambda n: min(2, n - 1), lambda n: True),
    "disconnected": (lambda n: 0, lambda n: n == 1),
}

all_topologies = pytest.mark.parametrize("name", TOPOLOGIES)
all_sizes = pytest.mark.parametrize("n_agents", SIZES)


def test_what_every_topology_promises_is_known_here():
    assert UNDIRECTED.keys() == TOPOLOGIES.keys()


@all_topologies
@all_sizes
def test_an_adjacency_is_square_and_boolean_without_self_loops(name, n_agents):
    adjacency = TOPOLOGIES[name](n_agents)
    assert adjacency.shape == (n_agents, n_agents)
    assert adjacency.dtype == np.bool_
    assert not adjacency.diagonal().any()


@pytest.mark.parametrize("name", UNDIRECTED)
@all_sizes
def test_undirected_topologies_have_the_degrees_they_promise(name, n_agents):
    adjacency = TOPOLOGIES[name](n_agents)
    degree, connected = UNDIRECTED[name]
    np.testing.assert_array_equal(adjacency, adjacency.T)
    np.testing.assert_array_equal(adjacency.sum(axis=1), degree(n_agents))
    assert is_connected(adjacency) == connected(n_agents)


@pytest.mark.parametrize("n_agents", [3, 5, 8])
def test_on_a_ring_neighbours_are_next_to_each_other(n_agents):
    agent = np.arange(n_agents)
    offset = (agent[:, None] - agent) % n_agents
    np.testing.assert_array_equal(
        TOPOLOGIES["ring"](n_agents), (offset == 1) | (offset == n_agents - 1)
    )


@all_topologies
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


def test_a_directed_graph_is_connected_only_if_there_is_a_way_back():
    one_way = from_graph(nx.path_graph(4, create_using=nx.DiGraph))
    around = from_graph(nx.cycle_graph(4, create_using=nx.DiGraph))
    assert not is_connected(one_way) and is_connected(around)
    # Components do not care about direction: messages tie these agents together.
    assert components(one_way) == [[0, 1, 2, 3]]
