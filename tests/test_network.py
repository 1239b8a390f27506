import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest

from dimat_jax.mixing import (
    MIXINGS,
    column_stochastic,
    is_column_stochastic,
    is_doubly_stochastic,
    metropolis_hastings,
    row_stochastic,
    uniform,
)
from dimat_jax.network import (
    Absence,
    Faults,
    Links,
    NetworkError,
    static,
)
from dimat_jax.topology import TOPOLOGIES, from_graph

# A static network


def test_without_slots_to_fill_the_network_is_what_it_is_made_of():
    adjacency = TOPOLOGIES["ring"](5)
    network = static(uniform(adjacency), adjacency, slots=5)
    assert network.W.dtype == jnp.float32
    np.testing.assert_allclose(network.W, uniform(adjacency), rtol=1e-7)
    np.testing.assert_array_equal(network.active_edges, adjacency)
    assert network.active_edges.dtype == network.present.dtype == jnp.bool_
    assert network.present.all()


@pytest.mark.parametrize("topology", ["fully_connected", "ring", "star", "exponential"])
@pytest.mark.parametrize("n_agents", [1, 3, 5])
def test_slots_that_fill_up_devices_are_absent_and_keep_to_themselves(
    topology, n_agents
):
    slots = n_agents + 3
    adjacency = TOPOLOGIES[topology](n_agents)
    network = static(uniform(adjacency), adjacency, slots)
    np.testing.assert_array_equal(network.present, [True] * n_agents + [False] * 3)
    assert network.W.shape == network.active_edges.shape == (slots, slots)
    np.testing.assert_array_equal(network.W[n_agents:], np.eye(slots)[n_agents:])
    assert not network.W[:n_agents, n_agents:].any()
    assert not network.active_edges[n_agents:].any()
    assert not network.active_edges[:, n_agents:].any()
    np.testing.assert_allclose(
        network.W[:n_agents, :n_agents], uniform(adjacency), rtol=1e-7
    )


def test_another_network_of_the_same_size_retraces_nothing():
    traces = []

    @jax.jit
    def total(network):
        traces.append(network)
        return network.W.sum() + network.active_edges.sum() + network.present.sum()

    for topology in ("ring", "fully_connected", "disconnected"):
        adjacency = TOPOLOGIES[topology](4)
        total(static(uniform(adjacency), adjacency, slots=4))
    adjacency = TOPOLOGIES["ring"](3)
    total(static(uniform(adjacency), adjacency, slots=4))
    assert len(traces) == 1


# A network over time


def test_without_faults_every_round_is_the_static_network():
    adjacency = TOPOLOGIES["ring"](5)
    links = Links(adjacency, uniform)
    assert not links.changes
    expected = static(uniform(adjacency), adjacency, slots=6)
    for network in (links.at_round(3, 6), links.at_step(17, 3, 6)):
        for one, other in zip(network, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_changing_topology_is_gone_through_again_and_again():
    stack = TOPOLOGIES["one_peer_exponential"](6)
    links = Links(stack, uniform)
    assert links.changes
    for time in range(7):
        expected = stack[time % 3]
        for network in (links.at_round(time + 1, 6), links.at_step(time, 1, 6)):
            np.testing.assert_array_equal(network.active_edges, expected)
            np.testing.assert_allclose(network.W, uniform(expected), rtol=1e-6)


def test_who_is_absent_keeps_to_itself_and_the_others_go_on_without():
    absences = (Absence(1, start=1, stop=3), Absence(3, start=2))
    adjacency = TOPOLOGIES["fully_connected"](4)
    links = Links(adjacency, uniform, Faults(absences=absences))
    there = [np.flatnonzero(links.present(number)).tolist() for number in range(1, 5)]
    assert there == [[0, 2, 3], [0, 2], [0, 1, 2], [0, 1, 2]]
    network = links.at_round(2, 5)
    np.testing.assert_array_equal(network.present, [True, False, True, False, False])
    half = np.eye(5)
    half[np.ix_([0, 2], [0, 2])] = 1 / 2
    np.testing.assert_allclose(network.W, half)
    # The same agents are away for the round's local steps.
    np.testing.assert_array_equal(links.at_step(99, 2, 5).present, network.present)


@pytest.mark.parametrize("mixing", ["uniform", "metropolis_hastings", "lazy"])
@pytest.mark.parametrize("topology", ["ring", "star", "fully_connected"])
def test_weights_stay_doubly_stochastic_whatever_fails(topology, mixing):
    adjacency = TOPOLOGIES[topology](6)
    faults = Faults(dropout=0.3, edge_loss=0.3, seed=1)
    links = Links(adjacency, MIXINGS[mixing], faults)
    seen = set()
    for number in range(1, 30):
        W, edges, present = map(np.asarray, links.at_round(number, 6))
        seen.add(edges.tobytes())
        assert is_doubly_stochastic(W)
        np.testing.assert_array_equal(W, W.T)
        np.testing.assert_array_equal(W > 0, edges | np.eye(6, dtype=bool))
        assert not (edges & ~adjacency).any()
        assert not edges[~present].any() and not edges[:, ~present].any()
    assert len(seen) > 10


def test_a_lost_link_gives_its_weight_back_to_both_ends():
    adjacency = TOPOLOGIES["ring"](5)
    links = Links(adjacency, metropolis_hastings, Faults(edge_loss=0.5))
    expected = metropolis_hastings(adjacency)
    W, edges, _ = map(np.asarray, links.at_step(0, 1, 5))
    lost = adjacency & ~edges
    assert lost.any() and not lost.all()
    np.testing.assert_allclose(W[edges], expected[edges], rtol=1e-6)
    own = np.diag(expected) + np.where(lost, expected, 0).sum(axis=1)
    np.testing.assert_allclose(np.diag(W), own, rtol=1e-6)


def test_a_sender_keeps_what_was_not_delivered_along_directed_edges():
    adjacency = TOPOLOGIES["exponential"](6)
    links = Links(
        adjacency, column_stochastic, Faults(dropout=0.2, edge_loss=0.4, seed=3)
    )
    one_way = 0
    for step in range(20):
        W, edges, _ = map(np.asarray, links.at_step(step, 1 + step // 5, 6))
        assert is_column_stochastic(W)
        np.testing.assert_array_equal(W > 0, edges | np.eye(6, dtype=bool))
        one_way += (edges & ~edges.T & adjacency.T).sum()
    assert one_way > 0


def test_faults_come_as_often_as_they_should_and_as_the_seed_says():
    adjacency = TOPOLOGIES["fully_connected"](10)

    def rates(seed):
        faults = Faults(dropout=0.3, edge_loss=0.2, seed=seed)
        links = Links(adjacency, uniform, faults)
        present = np.stack([links.present(number) for number in range(1, 201)])
        lossy = Links(adjacency, uniform, Faults(edge_loss=0.2, seed=seed))
        edges = np.stack([lossy.at_step(s, 1, 10).active_edges for s in range(40)])
        return present, edges

    (present, edges), again, other = rates(0), rates(0), rates(1)
    assert 1 - present.mean() == pytest.approx(0.3, abs=0.04)
    assert edges.mean() / adjacency.mean() == pytest.approx(0.8, abs=0.04)
    np.testing.assert_array_equal(present, again[0])
    np.testing.assert_array_equal(edges, again[1])
    assert (present != other[0]).any() and (edges != other[1]).any()
    # A round's links fail apart from a step's of the same number.
    links = Links(adjacency, uniform, Faults(edge_loss=0.5))
    at_round, at_step = links.at_round(1, 10), links.at_step(0, 1, 10)
    assert (at_round.active_edges != at_step.active_edges).any()


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"dropout": 1.0}, "dropout is a probability, from 0 to below 1; got 1.0"),
        ({"edge_loss": -0.1}, "edge_loss is a probability"),
        ({"edge_loss": float("nan")}, "edge_loss is a probability"),
        ({"absences": (Absence(0, 0),)}, "rounds counting from 1; got"),
        ({"absences": (Absence(0, 3, 3),)}, "round it is back for"),
        ({"absences": (Absence(7, 1),)}, "agent 7 is to be absent, but there are only"),
    ],
)
def test_faults_that_make_no_sense_say_why(faults, message):
    with pytest.raises(NetworkError, match=message):
        Links(TOPOLOGIES["ring"](5), uniform, Faults(**faults))


def test_faults_in_a_directed_network_need_push_sum():
    one_way = from_graph(nx.DiGraph([(0, 1), (1, 2), (2, 0), (0, 2)]))
    with pytest.raises(NetworkError, match="the columns of W have to sum to 1"):
        Links(one_way, row_stochastic, Faults(edge_loss=0.1))
    assert Links(one_way, row_stochastic).changes is False


def test_what_stays_doubly_stochastic_is_told():
    ring, directed = TOPOLOGIES["ring"](5), TOPOLOGIES["exponential"](5)
    faults = Faults(edge_loss=0.1)
    assert Links(ring, uniform).doubly_stochastic
    assert Links(ring, uniform, faults).doubly_stochastic
    assert Links(directed, uniform).doubly_stochastic
    assert not Links(directed, uniform, faults).doubly_stochastic
    assert not Links(TOPOLOGIES["star"](5), row_stochastic).doubly_stochastic
