import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat_jax.errors import UserError
from dimat_jax.mixing import (
    MIXINGS,
    MixingError,
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
)
from dimat_jax.topology import TOPOLOGIES, from_graph

# A static network


def test_without_slots_to_fill_the_network_is_what_it_is_made_of():
    adjacency = TOPOLOGIES["ring"](5)
    network = Links(adjacency, uniform).at_round(1, slots=5)
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
    network = Links(adjacency, uniform).at_round(1, slots)
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
        return network.W.sum(), network.active_edges.sum(), network.present.sum()

    for topology in ("ring", "fully_connected", "disconnected"):
        adjacency = TOPOLOGIES[topology](4)
        total(Links(adjacency, uniform).at_round(1, slots=4))
    adjacency = TOPOLOGIES["ring"](3)
    total(Links(adjacency, uniform).at_round(1, slots=4))
    assert len(traces) == 1


# A network over time


def test_without_faults_every_round_and_step_has_the_same_network():
    adjacency = TOPOLOGIES["ring"](5)
    links = Links(adjacency, uniform)
    assert not links.changes
    first = links.at_round(1, 6)
    np.testing.assert_array_equal(
        first.W[:5, :5], uniform(adjacency).astype(np.float32)
    )
    for network in (links.at_round(3, 6), links.at_step(17, 3, 6)):
        assert network is first


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
    # The same agents are absent from the round's local steps.
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
    # The failures of a round and of the step with the same number are independent.
    links = Links(adjacency, uniform, Faults(edge_loss=0.5))
    at_round, at_step = links.at_round(1, 10), links.at_step(0, 1, 10)
    assert (at_round.active_edges != at_step.active_edges).any()


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and below 1"),
        ({"edge_loss": -0.1}, "edge_loss is -0.1; it must be at least 0 and below 1"),
        ({"edge_loss": float("nan")}, "edge_loss is nan; it must be at least 0"),
        ({"absences": (Absence(0, 0),)}, "rounds count from 1; got"),
        ({"absences": (Absence(0, 3, 3),)}, "round in which it is back"),
        (
            {"absences": (Absence(7, 1),)},
            "an absence names agent 7, but there are only",
        ),
    ],
)
def test_faults_that_make_no_sense_say_why(faults, message):
    with pytest.raises(UserError, match=message):
        Links(TOPOLOGIES["ring"](5), uniform, Faults(**faults))


def test_faults_in_a_directed_network_need_push_sum():
    one_way = from_graph(nx.DiGraph([(0, 1), (1, 2), (2, 0), (0, 2)]))
    with pytest.raises(NetworkError, match="the columns of W have to sum to 1"):
        Links(one_way, row_stochastic, Faults(edge_loss=0.1))
    assert Links(one_way, row_stochastic).changes is False


def test_what_is_the_same_is_one_network():
    still = Links(TOPOLOGIES["ring"](5), uniform)
    first = still.at_round(1, 6)
    assert still.at_round(9, 6) is first and still.at_step(17, 3, 6) is first
    assert still.at_round(1, 5) is not first
    changing = Links(TOPOLOGIES["one_peer_exponential"](6), uniform)
    at_times = [changing.at_step(time, 1, 6) for time in range(6)]
    assert all(at_times[time] is at_times[time + 3] for time in range(3))
    assert len({id(network) for network in at_times}) == 3
    away = Links(TOPOLOGIES["ring"](5), uniform, Faults(absences=(Absence(2, 3, 5),)))
    rounds = [away.at_round(number, 5) for number in range(1, 7)]
    assert rounds[0] is rounds[1] is rounds[4] is rounds[5] is away.at_step(0, 1, 5)
    assert rounds[2] is rounds[3] is away.at_step(99, 4, 5)
    assert rounds[2] is not rounds[0]


def test_all_edges_that_there_ever_are_are_known():
    links = Links(TOPOLOGIES["one_peer_exponential"](6), uniform)
    np.testing.assert_array_equal(links.edges, TOPOLOGIES["exponential"](6))
    ring = TOPOLOGIES["ring"](5)
    np.testing.assert_array_equal(Links(ring, uniform).edges, ring)


def test_each_fault_is_drawn_by_itself():
    def seen(**faults):
        links = Links(TOPOLOGIES["fully_connected"](6), uniform, Faults(**faults))
        networks = [links.at_round(number, 6) for number in range(1, 20)]
        return [np.stack(field) for field in list(zip(*networks, strict=True))[1:]]

    _, away = seen(dropout=0.4)
    working, _ = seen(edge_loss=0.4)
    both, present = seen(dropout=0.4, edge_loss=0.4)
    np.testing.assert_array_equal(present, away)
    there = present[:, :, None] & present[:, None, :]
    np.testing.assert_array_equal(both, working & there)
    # Single absences are added to the random ones.
    _, fewer = seen(dropout=0.4, absences=(Absence(0, 1, 11),))
    np.testing.assert_array_equal(fewer[:, 1:], away[:, 1:])
    assert not fewer[:10, 0].any()
    np.testing.assert_array_equal(fewer[10:, 0], away[10:, 0])


# The sums that are 1 under faults


FAULTS = {
    "none": Faults(),
    "dropout": Faults(dropout=0.4, seed=2),
    "absence": Faults(absences=(Absence(1, 2, 9),)),
    "edge loss": Faults(edge_loss=0.4, seed=3),
    "all": Faults(0.3, 0.3, (Absence(0, 1, 5),), seed=4),
}
ALWAYS, ALL_THERE, NO_FAULTS = list(FAULTS), ["none", "edge loss"], ["none"]
# The faults under which rows and columns sum to 1, and those under which columns do.
SUMS = {
    ("ring", "uniform"): (ALWAYS, ALWAYS),
    ("star", "uniform"): (ALWAYS, ALWAYS),
    ("star", "metropolis_hastings"): (ALWAYS, ALWAYS),
    ("torus", "lazy"): (ALWAYS, ALWAYS),
    # A regular graph is no longer regular once an agent is absent.
    ("ring", "column_stochastic"): (ALL_THERE, ALWAYS),
    ("ring", "row_stochastic"): (ALL_THERE, ALL_THERE),
    ("star", "column_stochastic"): ([], ALWAYS),
    ("star", "row_stochastic"): ([], []),
    # In a directed network a sender keeps the weight that was not delivered.
    ("exponential", "uniform"): (NO_FAULTS, ALWAYS),
    ("exponential", "column_stochastic"): (NO_FAULTS, ALWAYS),
    ("one_peer_exponential", "lazy"): (NO_FAULTS, ALWAYS),
    ("one_peer_exponential", "column_stochastic"): (NO_FAULTS, ALWAYS),
    ("disconnected", "column_stochastic"): (ALWAYS, ALWAYS),
}


@pytest.mark.parametrize("faults", FAULTS)
@pytest.mark.parametrize(("topology", "mixing"), SUMS)
def test_what_sums_to_one_is_told_and_does(topology, mixing, faults):
    links = Links(TOPOLOGIES[topology](6), MIXINGS[mixing], FAULTS[faults])
    doubly, columns = (faults in when for when in SUMS[topology, mixing])
    assert (links.doubly_stochastic, links.column_stochastic) == (doubly, columns)
    matrices = np.stack([links.at_round(number, 6).W for number in range(1, 25)])
    assert (matrices >= 0).all()
    assert is_column_stochastic(matrices) == columns
    assert is_doubly_stochastic(matrices) == doubly


@settings(max_examples=60)
@given(
    n=st.integers(1, 7),
    seed=st.integers(0, 2**31),
    case=st.sampled_from(
        ["undirected, rows", "undirected, columns", "directed, columns"]
    ),
)
def test_what_summed_to_one_goes_on_to_do_so(n, seed, case):
    adjacency = np.random.default_rng(seed).random((2, n, n)) < 0.5
    if case.startswith("undirected"):
        adjacency |= np.swapaxes(adjacency, 1, 2)
    adjacency &= ~np.eye(n, dtype=bool)
    rule, axis = (row_stochastic, 1) if "rows" in case else (column_stochastic, 0)
    links = Links(adjacency, rule, Faults(dropout=0.3, edge_loss=0.3, seed=seed))
    for step in range(6):
        W, edges, present = map(np.asarray, links.at_step(step, 1 + step, n))
        np.testing.assert_allclose(W.sum(axis=axis), 1, rtol=1e-6)
        np.testing.assert_array_equal(W > 0, edges | np.eye(n, dtype=bool))
        np.testing.assert_array_equal(W[~present], np.eye(n)[~present])
        np.testing.assert_array_equal(W[:, ~present], np.eye(n)[:, ~present])


def test_push_sum_goes_on_over_one_peer_at_a_time_whatever_fails():
    stack = TOPOLOGIES["one_peer_exponential"](8)
    faults = Faults(dropout=0.3, edge_loss=0.3, absences=(Absence(5, 3, 20),), seed=1)
    links = Links(stack, column_stochastic, faults)
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=8), np.ones(8)
    mean, spread = x.mean(), x.std()
    for step in range(400):
        W, edges, _ = links.at_step(step, 1 + step // 5, 8)
        assert not (np.asarray(edges) & ~stack[step % 3]).any()
        x, w = np.asarray(W, np.float64) @ x, np.asarray(W, np.float64) @ w
    assert w.std() > 0.1
    np.testing.assert_allclose(x / w, mean, atol=1e-4 * spread)


def test_a_rule_that_makes_no_mixing_matrix_is_refused():
    ring = TOPOLOGIES["ring"](4)
    with pytest.raises(MixingError, match="rows or columns .* row 0 sums to 2"):
        Links(ring, lambda adjacency: adjacency.astype(np.float64))


# Ready matrices

# A matrix whose rows and columns sum to 1. Some weights are negative, as fastest-mixing
# weights are on some graphs.
NEGATIVE = np.array([[-0.25, 0.5, 0.75], [0.5, 0.5, 0.0], [0.75, 0.0, 0.25]])


def path_around_agent_0():
    return (NEGATIVE != 0) & ~np.eye(3, dtype=bool)


def test_a_ready_matrix_is_taken_as_it_is():
    adjacency = TOPOLOGIES["ring"](5)
    by_rule, ready = Links(adjacency, uniform), Links(adjacency, uniform(adjacency))
    for one, other in zip(by_rule.at_round(2, 7), ready.at_round(2, 7), strict=True):
        np.testing.assert_array_equal(one, other)
    assert ready.doubly_stochastic


def test_negative_weights_may_sum_to_one_as_well():
    for faults in (Faults(), Faults(edge_loss=0.5), Faults(dropout=0.5)):
        links = Links(path_around_agent_0(), NEGATIVE, faults)
        assert links.doubly_stochastic and links.column_stochastic
        for number in range(1, 15):
            W = np.asarray(links.at_round(number, 3).W)
            np.testing.assert_allclose(W.sum(axis=0), 1, rtol=1e-6)
            np.testing.assert_array_equal(W, W.T)


def test_a_ready_matrix_gives_the_weights_of_the_absent_back():
    faults = Faults(absences=(Absence(2, start=2),))
    W = Links(path_around_agent_0(), NEGATIVE, faults).at_round(2, 3).W
    np.testing.assert_allclose(W, [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]])
    # Agent 0 sends to agents 1 and 2, and these send to each other.
    adjacency = np.array([[0, 0, 0], [1, 0, 1], [1, 1, 0]], bool)
    directed = np.array([[0.2, 0.0, 0.0], [0.5, 0.6, 0.3], [0.3, 0.4, 0.7]])
    W = Links(adjacency, directed, faults).at_round(2, 3).W
    np.testing.assert_allclose(W, [[0.5, 0, 0], [0.5, 1, 0], [0, 0, 1]])


def test_a_stack_of_matrices_goes_along_with_its_topology():
    stack = TOPOLOGIES["one_peer_exponential"](4)
    matrices = uniform(stack)
    links = Links(stack, matrices)
    for time in range(4):
        np.testing.assert_allclose(links.at_step(time, 1, 4).W, matrices[time % 2])
    # A matrix for all times may only have weights on edges that exist at all times.
    always = np.stack([TOPOLOGIES["ring"](4), TOPOLOGIES["fully_connected"](4)])
    links = Links(always, uniform(always[0]))
    np.testing.assert_array_equal(links.at_step(0, 1, 4).W, links.at_step(1, 1, 4).W)
    with pytest.raises(MixingError, match=r"\[3, 4, 4\] does not fit a topology of"):
        Links(stack, uniform(np.stack([stack[0]] * 3)))


def test_a_matrix_that_is_none_of_the_graphs_is_refused_with_the_entry():
    ring = TOPOLOGIES["ring"](5)
    with pytest.raises(MixingError, match="weight of 0.2 in row 0, column 2, but age"):
        Links(ring, np.full((5, 5), 0.2))
    stack = TOPOLOGIES["one_peer_exponential"](4)
    with pytest.raises(MixingError, match="row 0, column 3 at time 1, but agent 0 do"):
        Links(stack, uniform(stack[0]))
    one_way, rows = np.array([[0, 0], [1, 0]], bool), np.array([[1, 0], [0.5, 0.5]])
    Links(one_way, rows)
    with pytest.raises(NetworkError, match="the columns of W have to sum to 1"):
        Links(one_way, rows, Faults(dropout=0.1))
