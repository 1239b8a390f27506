import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest

from dimat_jax.mixing import uniform
from dimat_jax.network import Ledger, Messages, static
from dimat_jax.topology import TOPOLOGIES, from_graph

MESSAGE = {
    "kernel": jax.ShapeDtypeStruct((10, 5), jnp.float32),
    "bias": jax.ShapeDtypeStruct((5,), jnp.bfloat16),
}
MESSAGE_BYTES = 10 * 5 * 4 + 5 * 2


# The ledger


@pytest.mark.parametrize("n_agents", [2, 3, 5, 8])
@pytest.mark.parametrize("topology", ["fully_connected", "ring"])
def test_an_exchange_is_one_round_with_each_neighbour(topology, n_agents):
    neighbours = n_agents - 1 if topology == "fully_connected" else min(2, n_agents - 1)
    ledger = Ledger()
    ledger.record(MESSAGE, TOPOLOGIES[topology](n_agents))
    assert ledger.comm_rounds == neighbours
    assert ledger.bytes_sent == n_agents * neighbours * MESSAGE_BYTES


def test_the_papers_rounds_are_counted():
    # Merging every 2 epochs: 0.5 (n - 1) rounds an epoch, fully connected, 0.5 x 2 on
    # the ring; 200 epochs.
    for topology, rounds_per_epoch in (("fully_connected", 2.0), ("ring", 1.0)):
        ledger = Ledger()
        for _ in range(100):
            ledger.record(MESSAGE, TOPOLOGIES[topology](5))
        assert ledger.comm_rounds == rounds_per_epoch * 200
    # Gossip with every mini-batch.
    ledger = Ledger()
    ledger.record(MESSAGE, TOPOLOGIES["ring"](5), times=500)
    assert ledger.comm_rounds == 500 * 2
    assert ledger.bytes_sent == 500 * 10 * MESSAGE_BYTES


def test_on_an_irregular_graph_rounds_are_the_mean_over_agents():
    ledger = Ledger()
    ledger.record(MESSAGE, from_graph(nx.star_graph(3)))
    assert ledger.comm_rounds == (3 + 1 + 1 + 1) / 4
    assert ledger.bytes_sent == 6 * MESSAGE_BYTES


def test_a_directed_edge_carries_one_message():
    ledger = Ledger()
    ledger.record(MESSAGE, from_graph(nx.cycle_graph(4, create_using=nx.DiGraph)))
    assert ledger.comm_rounds == 1
    assert ledger.bytes_sent == 4 * MESSAGE_BYTES


def test_bytes_are_exact_python_ints_beyond_any_fixed_width():
    large = {"w": jax.ShapeDtypeStruct((2**40, 2**20), jnp.float32)}
    ledger = Ledger()
    for _ in range(3):
        ledger.record(large, TOPOLOGIES["fully_connected"](5), times=7)
    ledger.record(MESSAGE, TOPOLOGIES["ring"](2))
    assert type(ledger.bytes_sent) is int
    assert ledger.bytes_sent == 3 * 7 * 20 * 2**62 + 2 * MESSAGE_BYTES


@pytest.mark.parametrize("message", [None, {}, Messages().step, Messages().round])
def test_nothing_is_booked_where_nothing_is_sent(message):
    ledger = Ledger()
    ledger.record(message, TOPOLOGIES["fully_connected"](5), times=10)
    assert ledger == Ledger(bytes_sent=0, comm_rounds=0)


def test_nothing_is_booked_where_nobody_listens():
    ledger = Ledger()
    ledger.record(MESSAGE, TOPOLOGIES["disconnected"](5))
    ledger.record(MESSAGE, TOPOLOGIES["fully_connected"](1))
    ledger.record(MESSAGE, TOPOLOGIES["ring"](5), times=0)
    assert ledger == Ledger(bytes_sent=0, comm_rounds=0)


# A static network


def test_without_slots_to_fill_the_network_is_what_it_is_made_of():
    adjacency = TOPOLOGIES["ring"](5)
    network = static(uniform(adjacency), adjacency, slots=5)
    assert network.W.dtype == jnp.float32
    np.testing.assert_allclose(network.W, uniform(adjacency), rtol=1e-7)
    np.testing.assert_array_equal(network.active_edges, adjacency)
    assert network.active_edges.dtype == network.present.dtype == jnp.bool_
    assert network.present.all()


@pytest.mark.parametrize("topology", TOPOLOGIES)
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
