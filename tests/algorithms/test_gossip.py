"""Tests that every algorithm equals a NumPy loop with its paper's equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat_jax.algorithms import MergeData
from dimat_jax.algorithms.cga import project
from dimat_jax.algorithms.server import SERVER_OPTIMIZERS
from dimat_jax.mixing import uniform
from dimat_jax.network import Absence, Faults, Links
from tests.algorithms.cases import (
    CASES,
    STEPS,
    Case,
    Layout,
    built,
    case_of,
    links,
    make,
    placed,
    trajectory,
)
from tests.algorithms.problems import (
    CONVEX,
    N_AGENTS,
    START,
    convex_variables,
    gradient,
    whole_batch,
    without_examples,
)
from tests.reference import gossip_loops as reference

N_STEPS, ALPHA = 3 * STEPS, 0.1
BALANCED = ["ring", "star", "fully_connected", "exponential", "one_peer_exponential"]
UNDIRECTED = ["ring", "star", "fully_connected"]
LOSSY = Faults(edge_loss=0.4, seed=1)
# Agent 1 leaves for a round, agent 4 joins late.
AWAY = Faults(absences=(Absence(1, 2, 3), Absence(4, 1, 2)))


def matrices(network: Links) -> list[np.ndarray]:
    """Returns W at every step."""
    return [
        np.asarray(network.at_step(t, 1 + t // STEPS, N_AGENTS).W, np.float64)
        for t in range(N_STEPS)
    ]


def presence(network: Links) -> list[np.ndarray]:
    """Returns which agents are present at every step."""
    return [network.present(1 + t // STEPS) for t in range(N_STEPS)]


def assert_runs_as(
    expected, case: Case, network: Links, rate: float = ALPHA, decay: float = 0.0
) -> None:
    path = trajectory(case, network, N_STEPS, rate, decay)
    np.testing.assert_allclose(path, np.stack(expected), rtol=0, atol=1e-5)
    assert np.abs(path[-1] - path[0]).max() > 0.1


DECAY = 0.3
RATES = [ALPHA / (1 + DECAY * t) for t in range(N_STEPS)]


# With every step ======================================================================


@pytest.mark.parametrize("graph", BALANCED)
def test_cdsgd_is_its_papers(graph):
    W = matrices(links(graph))
    expected = reference.cdsgd(gradient, W, START, ALPHA)
    assert_runs_as(expected, CASES["cdsgd"], links(graph))
    expected = reference.adapt_then_combine(gradient, W, START, ALPHA)
    assert_runs_as(expected, CASES["cdsgd, adapt then combine"], links(graph))


@pytest.mark.parametrize("faults", [AWAY, Faults(0.3, 0.3, AWAY.absences, seed=2)])
def test_cdsgd_goes_on_among_those_who_are_there(faults):
    network = links("ring", "metropolis_hastings", faults)
    W, present = matrices(network), presence(network)
    assert not np.all(present)
    expected = reference.cdsgd(gradient, W, START, ALPHA, present)
    assert_runs_as(expected, CASES["cdsgd"], network)


@pytest.mark.parametrize("graph", BALANCED)
def test_cdmsgd_is_its_papers_also_as_the_rate_decays(graph):
    W = matrices(links(graph))
    expected = reference.cdmsgd(gradient, W, START, RATES, 0.9)
    assert_runs_as(expected, CASES["cdmsgd"], links(graph), ALPHA, DECAY)
    ahead = reference.cdmsgd_nesterov(gradient, W, START, RATES, 0.9)
    case = Case("cdmsgd", of_optimizer=(("form", "nesterov"),))
    assert_runs_as(ahead, case, links(graph), ALPHA, DECAY)
    assert np.abs(ahead[-1] - expected[-1]).max() > 0.01


@pytest.mark.parametrize("graph", BALANCED)
def test_cdadam_is_its_papers(graph):
    expected = reference.cdadam(gradient, matrices(links(graph)), START, ALPHA)
    assert_runs_as(expected, CASES["cdadam"], links(graph))


@pytest.mark.parametrize("graph", ["path", *BALANCED])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgp_is_its_papers(graph, momentum):
    network = links(graph, "column_stochastic")
    expected = reference.sgp(gradient, matrices(network), START, 0.03, momentum)
    case = Case("sgp", "momentum" if momentum else "sgd")
    assert_runs_as(expected, case, network, 0.03)


def test_sgp_is_its_papers_where_links_of_a_directed_graph_fail():
    network = links("one_peer_exponential", "column_stochastic", LOSSY)
    expected = reference.sgp(gradient, matrices(network), START, 0.03, 0.9)
    assert_runs_as(expected, Case("sgp", "momentum"), network, 0.03)


@pytest.mark.parametrize("graph", UNDIRECTED)
def test_d2_is_its_papers_also_as_the_rate_decays(graph):
    network = links(graph, "lazy")
    W = matrices(network)
    expected = reference.d2(gradient, W, START, [ALPHA] * N_STEPS)
    assert_runs_as(expected, CASES["d2"], network)
    expected = reference.d2(gradient, W, START, RATES)
    assert_runs_as(expected, CASES["d2"], network, ALPHA, DECAY)


@pytest.mark.parametrize("graph", BALANCED)
def test_gradient_tracking_is_its_papers(graph):
    expected = reference.dsgt(gradient, matrices(links(graph)), START, ALPHA)
    assert_runs_as(expected, CASES["dsgt"], links(graph))


def test_gradient_tracking_goes_on_among_those_who_are_there():
    network = links("ring", "uniform", AWAY)
    W, present = matrices(network), presence(network)
    expected = reference.dsgt(gradient, W, START, ALPHA, present)
    assert_runs_as(expected, CASES["dsgt"], network)


@pytest.mark.parametrize("graph", BALANCED)
def test_quasi_global_momentum_is_its_papers(graph):
    expected = reference.qgm(gradient, matrices(links(graph)), START, ALPHA, 0.8)
    case = case_of("qgm", momentum=0.8)
    assert_runs_as(expected, case, links(graph))


@pytest.mark.parametrize("graph", UNDIRECTED)
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_cga_is_its_papers(graph, beta):
    expected = reference.cga(gradient, matrices(links(graph)), START, 0.03, beta)
    case = Case("cga", "heavy_ball" if beta else "sgd")
    assert_runs_as(expected, case, links(graph), 0.03)


@pytest.mark.parametrize("faults", [Faults(), LOSSY])
def test_compressed_cga_is_its_papers(faults):
    def sign(x):
        return np.where(x >= 0, 1, -1) * np.abs(x).mean()

    network = links("ring", "uniform", faults)
    W = matrices(network)
    expected = reference.compcga(gradient, W, START, 0.03, 0.9, sign)
    assert_runs_as(expected, CASES["compcga"], network, 0.03)


def largest(x):
    """Keeps only the entry of largest absolute value: top-k with k = 1."""
    kept = np.abs(x) >= np.sort(np.abs(x))[-1]
    return np.where(kept, x, 0)


CHOCO = case_of("choco", compressor="top_k", gamma=0.3)


@pytest.mark.parametrize("graph", UNDIRECTED)
def test_choco_is_its_papers(graph):
    W = matrices(links(graph))
    expected = reference.choco(gradient, W, START, ALPHA, 0.3, largest)
    assert_runs_as(expected, CHOCO, links(graph))


def test_choco_remembers_for_every_edge_what_has_arrived():
    network = links("ring", "uniform", LOSSY)
    W = matrices(network)
    expected = reference.choco_by_edge(gradient, W, START, ALPHA, 0.3, largest)
    assert_runs_as(expected, CHOCO, network)


def test_choco_without_compression_is_adapt_then_combine():
    case = case_of("choco", compressor="none", gamma=1.0)
    W = matrices(links("ring"))
    expected = reference.adapt_then_combine(gradient, W, START, ALPHA)
    assert_runs_as(expected, case, links("ring"))


@pytest.mark.parametrize("graph", ["path", "star", "binary_tree"])
@pytest.mark.parametrize("faults", [Faults(), LOSSY])
def test_relaysgd_is_its_papers(graph, faults):
    network = links(graph, "uniform", faults)
    edges = [
        np.argwhere(network.at_step(t, 1, N_AGENTS).active_edges.T).tolist()
        for t in range(N_STEPS)
    ]
    assert CASES["relaysgd"].accepts(network)
    expected = reference.relaysgd(gradient, edges, START, ALPHA)
    assert_runs_as(expected, CASES["relaysgd"], network)


def test_gradient_tracking_goes_on_where_an_agent_has_no_more_examples():
    subject = built("dsgt")
    batch, slots = whole_batch(subject.placement), subject.placement.slots
    network = links("ring").at_step(0, 1, slots)
    state = subject.algorithm.init(subject.placement.put(convex_variables(START)))
    before = state
    for number in range(3):
        before = state
        if number == 2:
            batch = without_examples(batch, 1)
        state, _ = subject.step(state, batch, network, jax.random.key(0))
    # Its tracker goes on from those that it receives, without a gradient of its own.
    old, new = before.memory, state.memory
    assert not np.asarray(new["gradient"]["x"][1]).any()
    received = uniform(links("ring").edges)[1] @ np.asarray(old["tracker"]["x"])
    tracked = received - np.asarray(old["gradient"]["x"][1])
    np.testing.assert_allclose(new["tracker"]["x"][1], tracked, atol=1e-6)
    assert np.abs(tracked).max() > 0.01


def clipped(agent, x):
    """The gradient of an agent, of length 1 at most."""
    exact = gradient(agent, x)
    return exact / max(1, np.linalg.norm(exact))


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (CASES["dsgt"], lambda W: reference.dsgt(clipped, W, START, ALPHA)),
        (
            case_of("qgm", momentum=0.8),
            lambda W: reference.qgm(clipped, W, START, ALPHA, 0.8),
        ),
    ],
)
def test_gradients_are_clipped_before_an_algorithm_uses_them(case, expected):
    """Clipping what the optimizer gets would clip trackers and momenta instead."""
    network, placement = links("ring"), placed(Layout())
    task = CONVEX._replace(clip_norm=1.0)
    algorithm = make(case, "convex", placement, ALPHA, task=task)
    step, batch = jax.jit(algorithm.step), whole_batch(placement)
    state = algorithm.init(placement.put(convex_variables(START)))
    path = expected(matrices(network))
    for number, x in enumerate(path[1:6]):
        key, now = jax.random.key(number), network.at_step(number, 1, N_AGENTS)
        state, _ = step(state, batch, now, key)
        np.testing.assert_allclose(
            algorithm.variables(state)["params"]["x"], x, rtol=0, atol=1e-5
        )
    norms = [np.linalg.norm(gradient(i, START[i])) for i in range(N_AGENTS)]
    assert max(norms) > 2


# Once a round =========================================================================


# Nobody who has trained from the server's model is there in the third round.
ALONE = Faults(absences=(Absence(0, 2, 3), *(Absence(i, 3, 4) for i in range(1, 5))))
AT_SERVER = pytest.mark.parametrize("faults", [Faults(), AWAY, ALONE])


def at_server(faults: Faults) -> tuple[Links, list[np.ndarray]]:
    """Returns agents without a graph, and who is present in each round."""
    network = links("disconnected", faults=faults)
    return network, [network.present(n) for n in range(1, 1 + N_STEPS // STEPS)]


@AT_SERVER
@pytest.mark.parametrize("examples", [(), (1, 2, 3, 4, 10)])
def test_fedavg_is_its_papers_whatever_the_graph(examples, faults):
    network, present = at_server(faults)
    shares = examples or np.ones(N_AGENTS)
    expected = reference.fedavg(gradient, shares, START, ALPHA, STEPS, present)
    assert_runs_as(expected, Case("fedavg", examples=examples), network)


@AT_SERVER
def test_fedprox_is_its_papers(faults):
    network, present = at_server(faults)
    expected = reference.fedprox(gradient, START, ALPHA, 2.0, STEPS, present)
    assert_runs_as(expected, case_of("fedprox", proximal=2.0), network)


@AT_SERVER
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_scaffold_is_its_papers(eta, faults):
    network, present = at_server(faults)
    expected = reference.scaffold(gradient, START, ALPHA, eta or 1, STEPS, present)
    assert_runs_as(expected, case_of("scaffold", learning_rate=eta), network)


SERVERS = {
    "momentum": lambda: reference.server_momentum(1.0, 0.9),
    **{
        name: lambda name=name: reference.adaptive_server(name, 0.01, 0.9, 0.99, 1e-3)
        for name in ("adagrad", "adam", "yogi")
    },
}


@pytest.mark.parametrize("name", SERVERS)
def test_servers_optimizers_are_their_papers(name):
    network, present = at_server(AWAY)
    assert {"average", *SERVERS} == SERVER_OPTIMIZERS.keys()
    expected = reference.fedopt(
        gradient, None, START, ALPHA, STEPS, present, SERVERS[name]()
    )
    assert_runs_as(expected, Case("fedavg", server=name), network)
    plain = reference.fedavg(gradient, None, START, ALPHA, STEPS, present)
    assert np.abs(plain[-1] - expected[-1]).max() > 0.01


def test_fedavg_weighs_those_who_are_there():
    subject = built("fedavg")
    state = subject.algorithm.init(subject.placement.put(convex_variables(START)))
    there = np.array([True, True, False, True, True])
    network = links("disconnected").at_round(1, subject.placement.slots)
    network = network._replace(present=jnp.asarray(there))
    key = jax.random.key(0)
    state, _ = subject.algorithm.communicate(state, MergeData(), network, key)
    x = subject.variables(state)["params"]["x"]
    np.testing.assert_allclose(x[there], np.tile(START[there].mean(0), (4, 1)), 1e-5)
    np.testing.assert_array_equal(x[~there], START[~there].astype(np.float32))


@pytest.mark.parametrize("name", ["wa", "wm", "dimat"])
@pytest.mark.parametrize("graph", [*BALANCED, "path with losses"])
def test_where_nothing_permutes_merging_is_a_weighted_average(name, graph):
    network = links(graph) if graph in BALANCED else links("path", faults=LOSSY)
    rounds = range(1, 1 + N_STEPS // STEPS)
    W = [np.asarray(network.at_round(n, N_AGENTS).W, np.float64) for n in rounds]
    expected = reference.weight_averaging(gradient, W, START, ALPHA, STEPS)
    assert_runs_as(expected, Case(name, "sgd"), network)


def test_averaging_with_random_peers_is_epidemic_learning():
    """de Vos et al. 2023: a receiver averages its own model and all that arrive."""
    network = links("random_peers", "row_stochastic", peers=2, seed=3)
    sent = network.adjacency[:3] | np.eye(N_AGENTS, dtype=bool)
    assert (sent.sum(axis=1) == 3).all() and len(set(sent.sum(axis=2).ravel())) > 2
    W = list(sent / sent.sum(axis=2, keepdims=True))
    expected = reference.weight_averaging(gradient, W, START, ALPHA, STEPS)
    assert_runs_as(expected, Case("wa", "sgd"), network)


def test_merging_takes_the_mean_of_what_arrives_where_columns_sum_to_one():
    network = links("path", "column_stochastic")
    W = np.asarray(network.at_round(1, N_AGENTS).W, np.float64)
    W = W / W.sum(axis=1, keepdims=True)
    expected = reference.weight_averaging(gradient, [W] * 3, START, ALPHA, STEPS)
    assert_runs_as(expected, Case("wa", "sgd"), network)


@pytest.mark.parametrize("graph", ["ring", "exponential"])
def test_compressed_merging_averages_what_was_announced(graph):
    network = links(graph)
    W = [network.mixing_matrix[0]] * 3
    expected = reference.announced_averaging(gradient, W, START, ALPHA, STEPS, largest)
    assert_runs_as(expected, Case("wa", "sgd", "top_k"), network)


# CGA's quadratic program ==============================================================


@jax.jit
def projected(gradients, active):
    own, others = gradients[0], gradients[1:]
    return project({"a": own}, [{"a": other} for other in others], active)["a"]


@given(
    n_others=st.integers(1, 3),
    size=st.sampled_from([2, 5, 30]),
    scale=st.floats(-4, 2),
    alike=st.floats(0, 2),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_the_projection_is_an_independent_solvers(n_others, size, scale, alike, seed):
    rng = np.random.default_rng(seed)
    # The number of gradients is always the same, because every number needs its own
    # program. The additional gradients are no constraints.
    gradients = rng.standard_normal((4, size)) + alike * rng.standard_normal(size)
    gradients = (10.0**scale * gradients).astype(np.float32)
    active = np.arange(3) < n_others
    found = projected(gradients, active)
    counted = gradients[: n_others + 1].astype(np.float64)
    expected = reference.projected(counted[0], list(counted[1:]))
    largest = np.abs(gradients).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * largest)
    # No active gradient has a negative inner product with the result.
    assert (counted @ found).min() > -1e-3 * size * largest**2
    # Projection lengthens no gradient, and without a constraint it changes nothing.
    assert np.linalg.norm(found) <= (1 + 1e-5) * np.linalg.norm(counted[0])
    alone = projected(gradients, np.zeros(3, bool))
    np.testing.assert_allclose(alone, gradients[0], rtol=0, atol=1e-5 * largest)


def test_no_gradient_at_all_projects_to_none():
    zeros = np.zeros((4, 2), np.float32)
    np.testing.assert_array_equal(projected(zeros, np.ones(3, bool)), zeros[0])


def test_cga_takes_steps_that_no_neighbours_data_object_to():
    # The agents disagree strongly, and CDSGD's fixed point is far from the optimum.
    network = links("fully_connected")
    path = trajectory(Case("cga", "sgd"), network, STEPS, ALPHA)
    start = path[0].astype(np.float64)
    moved = path[1] - network.mixing_matrix[0] @ start
    for i in range(N_AGENTS):
        for j in range(N_AGENTS):
            assert gradient(j, start[i]) @ moved[i] < 1e-4
