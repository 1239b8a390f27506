"""CHOCO's consensus step size: pure consensus converges, or must diverge.

Without gradients the agents are to agree on the mean of where they start.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat_jax.algorithms import ALGORITHMS, Task, algorithm_record
from dimat_jax.algorithms._consensus_step import check_step, safe_step
from dimat_jax.compression import COMPRESSORS, Compressor
from dimat_jax.data.pipeline import Batch
from dimat_jax.mixing import MIXINGS
from dimat_jax.network import Faults, Links
from dimat_jax.options import OptionError
from dimat_jax.permutation import PermutationSpec
from dimat_jax.placement import place
from dimat_jax.topology import TOPOLOGIES
from tests.algorithms.cases import links

GRAPHS = {
    "ring": 8,
    "star": 6,
    "path": 6,
    "fully_connected": 5,
    "torus": 9,
    "hypercube": 8,
    "bipartite": 6,
}
RULES = ("uniform", "metropolis_hastings", "lazy")


@functools.cache
def matrix(graph: str, rule: str = "uniform") -> np.ndarray:
    return MIXINGS[rule](TOPOLOGIES[graph](GRAPHS[graph]))


def random_k(kept: float) -> Compressor:
    """A compressor of which only the share that it keeps matters."""
    return COMPRESSORS["random_k"](fraction=kept)


# Random places: second moments =======================================================


def growth(W: np.ndarray, gamma: float, kept: float) -> float:
    """By how much the second moments of deviations and errors grow with every step.

    The moments are those of the vector (x, x - x^) over the agents, for one of many
    numbers. Every agent sends the number with probability `kept`.
    """
    n = len(W)
    eye, L, lost = np.eye(n), np.eye(n) - W, 1 - kept
    step = np.block([[eye - gamma * L, gamma * L], [-gamma * L, eye + gamma * L]])
    moments, errors = np.eye(2 * n), np.arange(n, 2 * n)
    # The mean of x is preserved, and does not matter.
    moments[:n, :n] -= 1 / n
    rates = []
    for _ in range(600):
        remaining = moments.copy()
        remaining[n:] *= lost
        remaining[:, n:] *= lost
        remaining[errors, errors] = lost * moments[errors, errors]
        moments = step @ remaining @ step.T
        moments[:n] -= moments[:n].mean(axis=0)
        moments[:, :n] -= moments[:, :n].mean(axis=1, keepdims=True)
        rates.append(np.trace(moments))
        moments = (moments + moments.T) / (2 * rates[-1])
    return float(np.exp(np.log(rates[-200:]).mean()))


@given(
    graph=st.sampled_from(sorted(GRAPHS)),
    rule=st.sampled_from(RULES),
    kept=st.floats(0.02, 0.98),
)
@settings(max_examples=40)
def test_second_moments_shrink_with_the_default_step_size(graph, rule, kept):
    W = matrix(graph, rule)
    gamma = safe_step(random_k(kept), W)
    assert 0 < gamma <= 1
    assert growth(W, gamma, kept) < 1


@given(
    graph=st.sampled_from(sorted(GRAPHS)),
    rule=st.sampled_from(RULES),
    kept=st.floats(0.02, 0.9),
    factor=st.floats(1.01, 3),
)
@settings(max_examples=40)
def test_second_moments_grow_where_a_step_size_is_refused(graph, rule, kept, factor):
    W = matrix(graph, rule)
    gamma = factor * limit(W, kept)
    with pytest.raises(OptionError, match="agents on this network drift apart"):
        check_step(gamma, random_k(kept), W)
    assert growth(W, gamma, kept) > 1
    check_step(0.99 * limit(W, kept), random_k(kept), W)


def limit(W: np.ndarray, kept: float) -> float:
    return 2 * kept / (2 - kept) / (1 - np.trace(W) / len(W))


def test_on_a_graph_that_looks_the_same_everywhere_the_limit_is_sharp():
    for graph in ("fully_connected", "ring"):
        W = matrix(graph)
        assert growth(W, 0.98 * limit(W, 0.1), 0.1) < 1 < growth(W, limit(W, 0.1), 0.1)


# Every compressor =====================================================================

SIZE = 400


def no_loss(variables, batch, key):
    """A task without gradients."""
    del batch, key
    zero = 0.0 * variables["params"]["x"].sum()
    return zero, ({}, {"loss": zero, "score": zero})


NOTHING = Task(loss=no_loss, spec=PermutationSpec({"params/x": (None,)}))


def distances(
    network: Links, compressor: Compressor, steps: int, **gamma: float
) -> np.ndarray:
    """Runs pure consensus, and returns the distance from the mean after every step.

    Distances are relative to the one at the start.
    """
    n_agents = network.edges.shape[0]
    placement = place(n_agents, jax.devices()[:1])
    algorithm = ALGORITHMS["choco"](
        NOTHING,
        optax.sgd(0.1),
        placement,
        compressor=compressor,
        mixing_matrix=network.mixing_matrix,
        lossy_edges=network.edges if network.changes else None,
        **gamma,
    )
    x = np.random.default_rng(0).standard_normal((n_agents, SIZE)).astype(np.float32)
    batch = Batch(
        jnp.zeros((n_agents, 1, 1)),
        jnp.zeros((n_agents, 1), jnp.int32),
        jnp.ones((n_agents, 1), bool),
    )
    state = algorithm.init(placement.put({"params": {"x": x}}))

    @jax.jit
    def step(state, now):
        network, key = now
        state, _ = algorithm.step(state, batch, network, key)
        x = algorithm.variables(state)["params"]["x"]
        return state, jnp.linalg.norm(x - x.mean(axis=0, keepdims=True))

    networks = [network.at_step(t, 1 + t // 4, n_agents) for t in range(steps)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *networks)
    keys = jax.random.split(jax.random.key(0), steps)
    _, path = jax.lax.scan(step, state, (stacked, keys))
    return np.asarray(path) / np.linalg.norm(x - x.mean(axis=0))


SENT = {
    **{name: COMPRESSORS[name]() for name in COMPRESSORS},
    "top_k, a fiftieth": COMPRESSORS["top_k"](fraction=0.02),
    "random_k, a fiftieth": COMPRESSORS["random_k"](fraction=0.02),
    "random_k, a half": COMPRESSORS["random_k"](fraction=0.5),
}


@pytest.mark.every_nth(16)
@pytest.mark.parametrize("graph", ["ring", "star", "path", "fully_connected", "torus"])
@pytest.mark.parametrize("name", SENT)
def test_with_the_default_agents_agree_whatever_the_compressor(name, graph):
    path = distances(links(graph, n_agents=GRAPHS[graph]), SENT[name], 1000)
    assert path[-1] < (0.3 if "fiftieth" in name else 0.03)
    assert path.max() < 1.5


@pytest.mark.every_nth(2)
@pytest.mark.parametrize("name", ["int8", "sign", "top_k", "random_k"])
def test_with_the_default_agents_agree_where_agents_drop_out_and_links_fail(name):
    network = links("ring", "metropolis_hastings", Faults(0.2, 0.3), GRAPHS["ring"])
    path = distances(network, SENT[name], 2000)
    assert path[-1] < 0.2
    assert path.max() < 1.5


def test_random_places_diverged_with_the_former_default():
    network = links("ring", n_agents=GRAPHS["ring"])
    message = "gamma is 1, .* keeps 0.1 of a message, .* from 0.158 on; .* 0.0789"
    with pytest.raises(OptionError, match=message):
        distances(network, SENT["random_k"], 1, gamma=1.0)
    # Where messages may be lost, no step size is refused.
    unchecked = Links(network.edges, MIXINGS["uniform"], Faults(edge_loss=1e-9))
    assert distances(unchecked, SENT["random_k"], 80, gamma=1.0)[-1] > 1e3


@pytest.mark.parametrize("name", ["random_k", "random_k, a fiftieth"])
def test_just_above_the_limit_agents_do_not_agree(name):
    network = links("ring", n_agents=GRAPHS["ring"])
    gamma = 1.05 * limit(network.mixing_matrix[0], SENT[name].kept)
    with pytest.raises(OptionError, match="drift apart"):
        check_step(gamma, SENT[name], network.mixing_matrix)
    unchecked = Links(network.edges, MIXINGS["uniform"], Faults(edge_loss=1e-9))
    assert distances(unchecked, SENT[name], 600, gamma=gamma)[-1] > 0.5


@pytest.mark.parametrize("name", ["none", "sign", "top_k", "int8"])
def test_only_what_is_known_to_diverge_is_refused(name):
    network = links("ring", n_agents=GRAPHS["ring"])
    check_step(1.0, SENT[name], network.mixing_matrix)


@pytest.mark.parametrize("name", ["choco", "wa"])
def test_a_config_is_checked_with_its_compressor_and_network(name):
    record = algorithm_record(name, "choco")
    network = links("ring", n_agents=GRAPHS["ring"])
    record.check_network(network, gamma=1.0)  # with int8
    record.check_network(network, gamma=0.0, compressor=SENT["random_k"])
    with pytest.raises(OptionError, match="drift apart"):
        record.check_network(network, gamma=0.5, compressor=SENT["random_k"])


# What arrives =========================================================================


@pytest.mark.parametrize("name", SENT)
def test_a_compressor_keeps_what_it_says(name):
    draw = jax.random.uniform if name.startswith("top_k") else jax.random.normal
    x = draw(jax.random.key(1), (100_000,))
    lost = jnp.linalg.norm(x - SENT[name].compress(x, jax.random.key(2))) ** 2
    share = float(lost / jnp.linalg.norm(x) ** 2)
    assert share == pytest.approx(1 - SENT[name].kept, abs=0.01)
    if SENT[name].kept > 0.99:
        assert share <= 2 * (1 - SENT[name].kept)
    assert SENT[name].random_places == name.startswith("random_k")
