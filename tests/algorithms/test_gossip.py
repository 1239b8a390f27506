"""Tests laws of gossip beside the comparison of both implementations.

That every algorithm is its paper's, on every graph and with every fault, is tested in
tests/algorithms/test_second_implementation.py.
"""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat_jax.algorithms.cga import project
from tests.algorithms.cases import (
    CASES,
    STEPS,
    Case,
    Layout,
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
)
from tests.reference import agents
from tests.reference.gossip import AdaptThenCombine, Dsgt, Qgm
from tests.reference.messages import projected as solved

N_STEPS, ALPHA = 3 * STEPS, 0.1


def test_choco_without_compression_is_adapt_then_combine():
    case = case_of("choco", compressor="none", gamma=1.0)
    W = [links("ring").mixing_matrix[0]] * N_STEPS
    expected = agents.path(AdaptThenCombine(START), gradient, W, ALPHA)
    path = trajectory(case, links("ring"), N_STEPS, ALPHA)
    np.testing.assert_allclose(path, expected, rtol=0, atol=1e-5)
    assert np.abs(path[-1] - path[0]).max() > 0.1


def clipped(agent, x):
    """The gradient of an agent, of length 1 at most."""
    exact = gradient(agent, x)
    return exact / max(1, np.linalg.norm(exact))


@pytest.mark.parametrize(
    ("case", "agents_at"),
    [
        (CASES["dsgt"], Dsgt),
        (case_of("qgm", momentum=0.8), lambda x: Qgm(x, beta=0.8)),
    ],
)
def test_gradients_are_clipped_before_an_algorithm_uses_them(case, agents_at):
    """Clipping what the optimizer gets would clip trackers and momenta instead."""
    network, placement = links("ring"), placed(Layout())
    task = CONVEX._replace(clip_norm=1.0)
    algorithm = make(case, "convex", placement, ALPHA, task=task)
    step, batch = jax.jit(algorithm.step), whole_batch(placement)
    state = algorithm.init(placement.put(convex_variables(START)))
    W = [network.mixing_matrix[0]] * 5
    expected = agents.path(agents_at(START), clipped, W, ALPHA)
    for number, x in enumerate(expected[1:]):
        key, now = jax.random.key(number), network.at_step(number, 1, N_AGENTS)
        state, _ = step(state, batch, now, key)
        np.testing.assert_allclose(
            algorithm.variables(state)["params"]["x"], x, rtol=0, atol=1e-5
        )
    norms = [np.linalg.norm(gradient(i, START[i])) for i in range(N_AGENTS)]
    assert max(norms) > 2


def test_averaging_with_random_peers_is_epidemic_learning():
    """de Vos et al. 2023: a receiver averages its own model and all that arrive."""
    network = links("random_peers", "row_stochastic", peers=2, seed=3)
    sent = network.adjacency[:3] | np.eye(N_AGENTS, dtype=bool)
    assert (sent.sum(axis=1) == 3).all() and len(set(sent.sum(axis=2).ravel())) > 2
    x, expected = START.astype(np.float64), []
    for arrives in sent:
        W = arrives / arrives.sum(axis=1, keepdims=True)
        x = W @ x
        for _ in range(STEPS):
            x = x - ALPHA * np.stack([gradient(i, x[i]) for i in range(N_AGENTS)])
            expected.append(x)
    path = trajectory(Case("wa", "sgd"), network, N_STEPS, ALPHA)
    np.testing.assert_allclose(path[1:], expected, rtol=0, atol=1e-5)


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
@settings(max_examples=60)
def test_the_projection_is_an_independent_solvers(n_others, size, scale, alike, seed):
    rng = np.random.default_rng(seed)
    # The number of gradients is always the same, because every number needs its own
    # program. The additional gradients are no constraints.
    gradients = rng.standard_normal((4, size)) + alike * rng.standard_normal(size)
    gradients = (10.0**scale * gradients).astype(np.float32)
    active = np.arange(3) < n_others
    found = projected(gradients, active)
    counted = gradients[: n_others + 1].astype(np.float64)
    expected = solved(counted[0], list(counted[1:]))
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
