import json

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat_jax.ledger import Ledger, Messages
from dimat_jax.network import Network
from dimat_jax.topology import TOPOLOGIES, from_graph

PARAMS = {
    "kernel": jax.ShapeDtypeStruct((10, 5), jnp.float32),
    "bias": jax.ShapeDtypeStruct((5,), jnp.bfloat16),
}
STATISTICS = {"mean": jax.ShapeDtypeStruct((5,), jnp.float32)}
PARAMS_BYTES, STATISTICS_BYTES = 10 * 5 * 4 + 5 * 2, 5 * 4
MODEL = {"params": PARAMS, "batch_stats": STATISTICS}
MODEL_BYTES = PARAMS_BYTES + STATISTICS_BYTES

EVERY_STEP, EVERY_ROUND = Messages(step=MODEL), Messages(round=MODEL)


def of_size(size: int) -> dict:
    """Makes a message of a number of bytes."""
    return {"params": jax.ShapeDtypeStruct((size,), jnp.uint8)}


def network(active_edges, present=None) -> Network:
    """Makes a network, by default with all agents present. A ledger does not read W."""
    all_agents = np.ones(len(active_edges), bool)
    present = all_agents if present is None else present
    return Network(np.eye(len(active_edges)), active_edges, present)


def record_round(
    ledger, messages, active_edges, *, present=None, edges=None, matching=None
):
    """Books a round, by default without absent agents and without further edges."""
    edges = active_edges if edges is None else edges
    ledger.record_round(messages, network(active_edges, present), edges, matching)


def record_steps(ledger, messages, active_edges, times=1):
    """Books steps that all have the same network."""
    ledger.record_steps(messages, [network(active_edges)] * times)


def assert_adds_up(ledger):
    by_link = sum(map(sum, ledger.by_link.tolist()))
    assert by_link == sum(ledger.bytes_sent_by_agent)
    assert by_link + ledger.server_bytes == ledger.bytes_sent
    assert ledger.bytes_sent == sum(ledger.by_kind.values())


# Rounds and bytes


@pytest.mark.parametrize("n_agents", [2, 3, 5, 8])
@pytest.mark.parametrize("topology", ["fully_connected", "ring"])
def test_an_exchange_is_one_round_with_each_neighbour(topology, n_agents):
    neighbours = n_agents - 1 if topology == "fully_connected" else min(2, n_agents - 1)
    adjacency = TOPOLOGIES[topology](n_agents)
    steps, rounds = Ledger(n_agents), Ledger(n_agents)
    record_steps(steps, EVERY_STEP, adjacency)
    record_round(rounds, EVERY_ROUND, adjacency)
    assert steps == rounds
    assert steps.comm_rounds == neighbours
    assert steps.bytes_sent == n_agents * neighbours * MODEL_BYTES
    np.testing.assert_array_equal(steps.by_link, MODEL_BYTES * adjacency)


def test_the_papers_rounds_are_counted():
    # Agents merge every 2 of 200 epochs. That makes 0.5 (n - 1) rounds an epoch if they
    # are fully connected, and 0.5 x 2 on the ring.
    for topology, rounds_per_epoch in (("fully_connected", 2.0), ("ring", 1.0)):
        ledger = Ledger(5)
        for _ in range(100):
            record_round(ledger, EVERY_ROUND, TOPOLOGIES[topology](5))
        assert ledger.comm_rounds == rounds_per_epoch * 200
    # Agents gossip with every mini-batch.
    ledger = Ledger(5)
    record_steps(ledger, EVERY_STEP, TOPOLOGIES["ring"](5), times=500)
    assert ledger.comm_rounds == 500 * 2
    assert ledger.bytes_sent == 500 * 10 * MODEL_BYTES


def test_an_answer_is_a_round_of_its_own():
    """A question and its answer are two latencies, however their bytes are booked."""
    plain, asking = Ledger(5), Ledger(5)
    ring = TOPOLOGIES["ring"](5)
    record_steps(plain, EVERY_STEP, ring, times=3)
    record_steps(asking, EVERY_STEP._replace(turns=2), ring, times=3)
    assert (plain.comm_rounds, asking.comm_rounds) == (3 * 2, 3 * 2 * 2)
    assert asking.by_kind == plain.by_kind
    np.testing.assert_array_equal(asking.by_link, plain.by_link)


def test_on_an_irregular_graph_rounds_are_the_mean_over_agents():
    ledger = Ledger(4)
    record_steps(ledger, EVERY_STEP, from_graph(nx.star_graph(3)))
    assert ledger.comm_rounds == (3 + 1 + 1 + 1) / 4
    assert ledger.bytes_sent == 6 * MODEL_BYTES


def test_a_directed_edge_carries_one_message():
    cycle = from_graph(nx.cycle_graph(4, create_using=nx.DiGraph))
    ledger = Ledger(4)
    record_steps(ledger, EVERY_STEP, cycle)
    assert ledger.comm_rounds == 1
    assert ledger.bytes_sent == 4 * MODEL_BYTES
    # Agent 1 receives from agent 0, and sends nothing back.
    assert (ledger.by_link[1, 0], ledger.by_link[0, 1]) == (MODEL_BYTES, 0)
    assert ledger.bytes_sent_by_agent == [MODEL_BYTES] * 4


def test_bytes_are_booked_by_kind():
    ledger = Ledger(3)
    messages = Messages(step={"params": PARAMS}, round=MODEL)
    record_steps(ledger, messages, TOPOLOGIES["ring"](3), times=4)
    record_round(ledger, messages, TOPOLOGIES["ring"](3))
    assert ledger.by_kind == {
        "params": 5 * 6 * PARAMS_BYTES,
        "batch_stats": 6 * STATISTICS_BYTES,
    }
    assert_adds_up(ledger)


def test_other_messages_are_measured_anew():
    ledger, ring = Ledger(3), TOPOLOGIES["ring"](3)
    for size in (7, 100, 7):
        record_steps(ledger, Messages(step=of_size(size)), ring)
    assert ledger.bytes_sent == 6 * (7 + 100 + 7)


def test_bytes_are_exact_python_ints_beyond_any_fixed_width():
    large = {"w": jax.ShapeDtypeStruct((2**40, 2**20), jnp.float32)}
    messages = Messages(step=large, round=large, server=large, whole=large)
    ledger, adjacency = Ledger(5), TOPOLOGIES["fully_connected"](5)
    for _ in range(3):
        record_steps(ledger, messages, adjacency, times=7)
    record_round(ledger, messages, adjacency)
    assert type(ledger.bytes_sent) is int
    assert ledger.bytes_sent == (3 * 7 * 20 + 20 + 2 * 5) * 2**62
    assert all(type(link) is int for link in ledger.by_link.flat)
    assert ledger.by_link[0, 1] == 22 * 2**62
    assert ledger.bytes_sent_by_agent == [4 * 22 * 2**62] * 5
    assert_adds_up(ledger)


@pytest.mark.parametrize(
    "messages", [Messages(), Messages(step={"params": {}}, round={"params": None})]
)
def test_nothing_is_booked_where_nothing_is_sent(messages):
    ledger, adjacency = Ledger(5), TOPOLOGIES["fully_connected"](5)
    record_steps(ledger, messages, adjacency, times=10)
    record_round(ledger, messages, adjacency)
    assert ledger == Ledger(5)


def test_steps_are_booked_alike_one_by_one_and_together():
    """Steps are booked by their edges, even if they share no network object."""
    ring, pair = TOPOLOGIES["ring"](4), from_graph(nx.path_graph(4))
    networks = [network(edges) for edges in (ring, pair, ring)]
    networks += [networks[0], networks[1], networks[0]]
    together, one_by_one = Ledger(4), Ledger(4)
    together.record_steps(EVERY_STEP, networks)
    for step in networks:
        one_by_one.record_steps(EVERY_STEP, [step])
    assert together == one_by_one
    assert together.exchanges == 4 * 8 + 2 * 6
    assert list(together.by_kind) == list(one_by_one.by_kind)


def test_nothing_is_booked_where_nobody_listens():
    ledger = Ledger(5)
    record_steps(ledger, EVERY_STEP, TOPOLOGIES["disconnected"](5))
    record_steps(ledger, EVERY_STEP, TOPOLOGIES["ring"](5), times=0)
    record_round(ledger, EVERY_ROUND, TOPOLOGIES["disconnected"](5))
    assert (ledger.bytes_sent, ledger.comm_rounds) == (0, 0)
    alone = Ledger(1)
    record_steps(alone, EVERY_STEP, TOPOLOGIES["fully_connected"](1))
    assert (alone.bytes_sent, alone.comm_rounds) == (0, 0)


def test_slots_that_fill_up_devices_send_nothing():
    adjacency, everyone = TOPOLOGIES["ring"](3), np.ones((8, 8), bool)
    padded = np.pad(adjacency, (0, 5))
    messages = Messages(step=MODEL, round=MODEL, server=MODEL, whole=MODEL)
    ledger, filled_up = Ledger(3), Ledger(3)
    record_steps(ledger, messages, adjacency)
    record_steps(filled_up, messages, padded)
    matching = np.full((8, 8), 5)
    record_round(ledger, messages, adjacency, matching=matching[:3, :3])
    record_round(
        filled_up,
        messages,
        padded,
        present=everyone[0],
        edges=adjacency,
        matching=matching,
    )
    assert ledger == filled_up


# A server, and matching data


def test_those_who_are_present_exchange_with_a_server_in_both_directions():
    ledger = Ledger(4)
    present = np.array([True, False, True, True])
    messages = Messages(server={"params": PARAMS})
    record_round(ledger, messages, TOPOLOGIES["ring"](4), present=present)
    assert ledger.bytes_sent == ledger.server_bytes == 2 * 3 * PARAMS_BYTES
    assert ledger.by_kind == {"params": 2 * 3 * PARAMS_BYTES}
    assert not np.any(ledger.by_link)
    assert ledger.comm_rounds == 3 / 4


def test_matching_data_are_bytes_but_no_rounds():
    adjacency = TOPOLOGIES["ring"](4)
    matching = np.zeros((4, 4), np.int64)
    matching[1, 0], matching[0, 3] = 1000, 2**40
    ledger = Ledger(4)
    record_round(ledger, EVERY_ROUND, adjacency, matching=matching)
    record_round(ledger, EVERY_ROUND, adjacency)
    assert ledger.by_kind["matching"] == 1000 + 2**40
    assert ledger.comm_rounds == 2 * 2
    np.testing.assert_array_equal(
        ledger.by_link, 2 * MODEL_BYTES * adjacency + matching
    )
    assert_adds_up(ledger)


# What is missed, and caught up on

COMPRESSED = Messages(round=of_size(10), whole=of_size(35))
PAIR = TOPOLOGIES["ring"](2)
NO_EDGES = np.zeros((2, 2), bool)


def met() -> Ledger:
    """Makes a ledger of two agents that have already exchanged messages."""
    ledger = Ledger(2)
    record_round(ledger, COMPRESSED, PAIR)
    ledger.by_link = np.zeros((2, 2), np.int64)
    ledger.by_kind = {}
    return ledger


def test_at_the_first_meeting_everything_is_sent_and_then_differences():
    ledger = Ledger(2)
    record_round(ledger, COMPRESSED, NO_EDGES, edges=PAIR)
    assert ledger.bytes_sent == 0
    for total in (35, 45, 55):
        record_round(ledger, COMPRESSED, PAIR)
        assert ledger.by_link.tolist() == [[0, total], [total, 0]]
    assert ledger.by_kind == {"params": 2 * 30, "missed": 2 * 25}


@pytest.mark.parametrize(
    ("missed", "caught_up"), [(0, 10), (1, 20), (2, 30), (3, 35), (50, 35)]
)
def test_what_was_missed_is_caught_up_on_but_never_more_than_everything(
    missed, caught_up
):
    ledger = met()
    for _ in range(missed):
        record_round(ledger, COMPRESSED, NO_EDGES, edges=PAIR)
    assert ledger.bytes_sent == 0
    record_round(ledger, COMPRESSED, PAIR)
    assert ledger.by_link.tolist() == [[0, caught_up], [caught_up, 0]]
    assert ledger.by_kind.get("missed", 0) == 2 * (caught_up - 10)
    # The content that was missed is sent only once.
    record_round(ledger, COMPRESSED, PAIR)
    assert ledger.by_link.tolist() == [[0, caught_up + 10], [caught_up + 10, 0]]


def test_an_agent_that_is_away_has_no_news_but_misses_that_of_others():
    ledger, away = met(), np.array([True, False])
    record_round(ledger, COMPRESSED, NO_EDGES, edges=PAIR, present=away)
    assert ledger.missed is not None
    assert ledger.missed.tolist() == [[-1, 0], [1, -1]]
    record_round(ledger, COMPRESSED, PAIR)
    assert ledger.by_link.tolist() == [[0, 10], [20, 0]]


def test_each_direction_is_missed_by_itself():
    ledger, one_way = met(), np.array([[False, True], [False, False]])
    record_round(ledger, COMPRESSED, one_way, edges=PAIR)
    assert ledger.missed is not None
    assert ledger.missed.tolist() == [[-1, 0], [1, -1]]
    assert ledger.by_link.tolist() == [[0, 10], [0, 0]]


def test_on_a_changing_topology_news_waits_for_its_edge():
    stack = TOPOLOGIES["one_peer_exponential"](4)
    edges, messages = stack.any(axis=0), Messages(round=of_size(10), whole=of_size(100))
    ledger = Ledger(4)
    for number in range(6):
        record_round(ledger, messages, stack[number % 2], edges=edges)
    # Over each edge three messages arrive: the first is whole, and the others hold the
    # content of two rounds.
    np.testing.assert_array_equal(ledger.by_link, (100 + 20 + 20) * edges)
    assert ledger.comm_rounds == 6


def test_messages_that_stand_for_themselves_are_not_caught_up_on():
    ledger = Ledger(2)
    record_round(ledger, EVERY_ROUND, NO_EDGES, edges=PAIR)
    record_round(ledger, EVERY_ROUND, PAIR)
    assert ledger.by_kind.keys() == MODEL.keys()
    assert ledger.bytes_sent == 2 * MODEL_BYTES


def test_compressing_to_more_than_there_was_does_not_pay():
    ledger, messages = Ledger(2), Messages(round=of_size(10), whole=of_size(8))
    for edges in (PAIR, NO_EDGES, PAIR):
        record_round(ledger, messages, edges, edges=PAIR)
    assert ledger.by_kind == {"params": 4 * 10}


# As a whole


@st.composite
def ledgers(draw) -> Ledger:
    """Makes a ledger after all kinds of rounds in a directed network."""
    n_agents, seed = draw(st.integers(1, 5)), draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    size = draw(st.sampled_from([1, 1000, 2**61]))
    messages = Messages(
        step=of_size(size + 1),
        round={"statistics": STATISTICS, **of_size(size + 2)},
        server=of_size(size + 3),
        whole=of_size(draw(st.integers(0, 4)) * size),
    )
    edges = (rng.random((n_agents, n_agents)) < 0.6) & ~np.eye(n_agents, dtype=bool)
    ledger = Ledger(n_agents)
    for _ in range(draw(st.integers(0, 4))):
        present = rng.random(n_agents) < 0.7
        lost = rng.random(edges.shape) < 0.3
        active = edges & present & present[:, None] & ~lost
        matching = rng.integers(0, 2**62, edges.shape) * active
        ledger.record_round(messages, network(active, present), edges, matching)
        record_steps(ledger, messages, active, times=int(rng.integers(3)))
    return ledger


@settings(max_examples=50)
@given(ledger=ledgers())
def test_kinds_links_and_the_server_add_up(ledger):
    assert_adds_up(ledger)
    assert not ledger.by_link.diagonal().any()


@settings(max_examples=50)
@given(ledger=ledgers())
def test_a_ledger_survives_json_and_goes_on_as_if_nothing_had_happened(ledger):
    record = json.loads(json.dumps(ledger.record()))
    restored = Ledger.of(record)
    assert restored == ledger
    everyone = ~np.eye(ledger.n_agents, dtype=bool)
    for going_on in (ledger, restored):
        record_round(going_on, COMPRESSED, everyone)
    assert restored == ledger
    # A second ledger from the same record is independent of the first.
    assert record == Ledger.of(record).record()


@settings(max_examples=50)
@given(ledger=ledgers())
def test_the_record_of_an_older_version_goes_on_too(ledger):
    """Older versions wrote lists of numbers, with None before the first message."""
    missed = np.full(ledger.by_link.shape, -1)
    missed = missed if ledger.missed is None else ledger.missed
    older = {
        **ledger.record(),
        "by_link": ledger.by_link.tolist(),
        "missed": [[None if n < 0 else n for n in row] for row in missed.tolist()],
    }
    restored = Ledger.of(json.loads(json.dumps(older)))
    everyone = ~np.eye(ledger.n_agents, dtype=bool)
    for going_on in (ledger, restored):
        record_round(going_on, COMPRESSED, everyone)
    assert restored == ledger


def test_the_record_of_many_agents_is_small():
    ledger = Ledger(500)
    record_round(ledger, COMPRESSED, TOPOLOGIES["fully_connected"](500))
    assert len(json.dumps(ledger.record())) < 100_000
    assert Ledger.of(ledger.record()) == ledger


def test_images_are_on_no_link_and_no_round():
    ledger = Ledger(3)
    ledger.record_images(0)
    assert ledger == Ledger(3)
    ledger.record_images(500)
    record_round(ledger, EVERY_ROUND, TOPOLOGIES["ring"](3))
    assert ledger.by_kind["images"] == ledger.server_bytes == 500
    assert ledger.comm_rounds == 2
    assert_adds_up(ledger)
    assert Ledger.of(json.loads(json.dumps(ledger.record()))) == ledger
