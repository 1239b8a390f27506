"""Tests that merged optimizer states fit the steps that each agent has taken."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat_jax.algorithms import Algorithm, MergeData
from dimat_jax.algorithms._merging import merging
from dimat_jax.algorithms.local import local, local_part, with_opt_state
from dimat_jax.optimizers import (
    OPTIMIZERS,
    SCHEDULES,
    UnbiasedMoments,
    with_bias,
    without_bias,
)
from tests.algorithms.cases import Layout, links, placed
from tests.algorithms.problems import (
    CONVEX,
    DIM,
    N_AGENTS,
    PROBLEMS,
    START,
    convex_variables,
    shared_images,
)

RATE = 0.1
MOST = 300
FEW = [1, 5, 20, 60, 200]
COUNTING = ["adam", "adamw"]
GRADIENT = {"x": jnp.array([0.3, -2.0, 1e-3])}

counts = st.lists(st.integers(0, MOST), min_size=N_AGENTS, max_size=N_AGENTS)
weights = st.lists(
    st.lists(st.floats(0, 1), min_size=N_AGENTS, max_size=N_AGENTS),
    min_size=N_AGENTS,
    max_size=N_AGENTS,
)


class Subject(NamedTuple):
    """An optimizer whose states are merged.

    Attributes:
        algorithm: weight averaging that merges optimizer states.
        stepped: `stepped(gradients, counts)` returns stacked optimizer states of agents
            that have taken these numbers of steps along a constant gradient each.
        update: `update(gradients, opt_states)` returns the agents' next steps.
    """

    algorithm: Algorithm
    stepped: Any
    update: Any


@functools.cache
def subject(name: str, scheduled: bool = False) -> Subject:
    schedule: Any = RATE
    if scheduled:
        schedule = SCHEDULES["exponential"](RATE, steps_per_epoch=1, total_steps=1)
    tx, placement = OPTIMIZERS[name](schedule), placed(Layout())
    algorithm = merging(
        local(CONVEX, tx, placement), CONVEX, placement, match=None, opt_state="merge"
    )
    params = {"x": jnp.zeros(DIM)}

    @jax.jit
    @jax.vmap
    def stepped(gradient, count):
        def step(state, number):
            _, new = tx.update(gradient, state, params)
            taken = number < count
            return jax.tree.map(lambda n, o: jnp.where(taken, n, o), new, state), None

        return jax.lax.scan(step, tx.init(params), jnp.arange(MOST))[0]

    update = jax.jit(jax.vmap(lambda g, state: tx.update(g, state, params)[0]))
    return Subject(algorithm, stepped, update)


def merged(found: Subject, opt_state: Any, W: np.ndarray) -> Any:
    """Merges stacked optimizer states with the weights W `[agents, agents]`."""
    placement = placed(Layout())
    variables = placement.put(convex_variables(START))
    state = with_opt_state(found.algorithm.init(variables), opt_state)
    network = links("fully_connected").at_round(1, placement.slots)
    network = network._replace(W=np.asarray(W, np.float32))
    key = jax.random.key(0)
    state, _ = found.algorithm.communicate(state, MergeData(), network, key)
    return local_part(state).opt_state


def stochastic(rows: list[list[float]]) -> np.ndarray:
    """Weights that sum to 1 in every row, and are not 0 on the diagonal."""
    W = np.array(rows) + 0.1 * np.eye(N_AGENTS)
    return W / W.sum(axis=1, keepdims=True)


def for_all(gradient: Any) -> Any:
    return jax.tree.map(lambda g: jnp.tile(g, (N_AGENTS, 1)), gradient)


def steps_of(found: Subject, opt_state: Any) -> np.ndarray:
    return np.asarray(found.update(for_all(GRADIENT), opt_state)["x"])


@pytest.mark.parametrize("name", COUNTING)
def test_with_unequal_counts_the_next_step_is_one_learning_rate(name):
    found, gradient = subject(name), for_all(GRADIENT)
    opt_state = found.stepped(gradient, jnp.array(FEW))
    state = merged(found, opt_state, np.full((N_AGENTS, N_AGENTS), 1 / N_AGENTS))
    expected = -RATE * np.sign(gradient["x"])
    np.testing.assert_allclose(steps_of(found, state), expected, rtol=1e-4)


@pytest.mark.parametrize("name", COUNTING)
@settings(max_examples=40)
@given(counts=counts, rows=weights)
def test_whatever_the_counts_and_weights_the_next_step_is_one_learning_rate(
    name, counts, rows
):
    found, gradient = subject(name), for_all(GRADIENT)
    opt_state = found.stepped(gradient, jnp.array(counts))
    state = merged(found, opt_state, stochastic(rows))
    expected = -RATE * np.sign(gradient["x"])
    np.testing.assert_allclose(steps_of(found, state), expected, rtol=1e-4)
    assert adam_of(state).count.tolist() == counts


def adam_of(state: Any) -> Any:
    def is_adam(node):
        return isinstance(node, optax.ScaleByAdamState)

    (found,) = filter(is_adam, jax.tree.leaves(state, is_leaf=is_adam))
    return found


@settings(max_examples=40)
@given(counts=counts, rows=weights, seed=st.integers(0, 2**31))
def test_unbiased_moments_are_averaged_over_those_who_have_some(counts, rows, seed):
    found, W = subject("adam"), stochastic(rows)
    gradients = np.random.default_rng(seed).standard_normal((N_AGENTS, DIM))
    gradients = gradients.astype(np.float32)
    opt_state = found.stepped({"x": gradients}, jnp.array(counts))
    adam = adam_of(merged(found, opt_state, W))
    # Along a constant gradient the unbiased moments are the gradient and its square.
    known = np.array(counts) > 0
    total = (W * known).sum(axis=1, keepdims=True)
    mean, square = (
        np.divide((W * known) @ x, total, where=total > 0, out=np.zeros_like(x))
        for x in (gradients.astype(np.float64), gradients.astype(np.float64) ** 2)
    )
    ages = np.array(counts)[:, None]
    np.testing.assert_allclose(adam.mu["x"], (1 - 0.9**ages) * mean, atol=1e-5)
    np.testing.assert_allclose(
        adam.nu["x"], (1 - 0.999**ages) * square, rtol=1e-3, atol=1e-8
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(max_examples=10)
@given(count=st.integers(0, MOST), rows=weights, seed=st.integers(0, 2**31))
def test_with_equal_counts_every_state_is_a_plain_average(name, count, rows, seed):
    found, W = subject(name), stochastic(rows)
    gradients = np.random.default_rng(seed).standard_normal((N_AGENTS, DIM))
    stacked = {"x": jnp.asarray(gradients, jnp.float32)}
    opt_state = found.stepped(stacked, jnp.full(N_AGENTS, count))
    state = merged(found, opt_state, W)
    for new, old in zip(
        jax.tree.leaves(state), jax.tree.leaves(opt_state), strict=True
    ):
        if jnp.issubdtype(old.dtype, jnp.floating):
            scale = np.abs(old).max()
            np.testing.assert_allclose(new, W @ old, rtol=1e-4, atol=1e-6 * scale)
        else:
            np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_these_have_counts_that_their_steps_depend_on(name):
    leaves = jax.tree.leaves(subject(name).stepped(for_all(GRADIENT), jnp.array(FEW)))
    has_count = any(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in leaves)
    assert has_count == (name in COUNTING)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_agent_keeps_its_own_clock(name):
    found = subject(name, scheduled=True)
    opt_state = found.stepped(for_all(GRADIENT), jnp.array(FEW))
    state = merged(found, opt_state, np.full((N_AGENTS, N_AGENTS), 1 / N_AGENTS))

    def is_clock(node):
        return isinstance(node, optax.ScaleByScheduleState)

    clocks = filter(is_clock, jax.tree.leaves(state, is_leaf=is_clock))
    assert [clock.count.tolist() for clock in clocks] == [FEW]


def test_bias_comes_back_as_it_was():
    state = subject("adam").stepped(for_all(GRADIENT), jnp.array([0, 1, 2, 50, 300]))
    adam, *_ = without_bias(state)
    assert isinstance(adam, UnbiasedMoments)
    assert adam.known.tolist() == [0, 1, 1, 1, 1]
    for new, old in zip(
        jax.tree.leaves(with_bias(without_bias(state))),
        jax.tree.leaves(state),
        strict=True,
    ):
        np.testing.assert_allclose(new, old, rtol=1e-6)


@pytest.mark.parametrize("frame", ["own", "reference", "joint"])
def test_moments_are_merged_without_bias_in_every_frame(frame):
    """Agents with the same weights in different orders have taken FEW steps each."""
    problem, placement = PROBLEMS["mlp"], placed(Layout())
    tx = OPTIMIZERS["adam"](RATE)
    algorithm = merging(
        local(problem.task, tx, placement),
        problem.task,
        placement,
        match="weights",
        frame=frame,
        opt_state="merge",
    )
    one = jax.tree.map(
        lambda x: np.tile(x, (N_AGENTS, *[1] * (x.ndim - 1))), problem.variables(1)
    )
    state = algorithm.init(placement.put(one))
    opt_state: Any = local_part(state).opt_state
    adam, *rest = opt_state
    ages = np.array(FEW, np.int32)

    def after(factor, x):
        return jnp.asarray(factor.reshape(-1, *[1] * (x.ndim - 1)) * x, jnp.float32)

    params = one["params"]
    adam = adam._replace(
        count=jnp.asarray(ages),
        mu=jax.tree.map(lambda x: after(1 - 0.9**ages, x), params),
        nu=jax.tree.map(lambda x: after(1 - 0.999**ages, x**2), params),
    )
    state = with_opt_state(state, placement.put(jax.device_get((adam, *rest))))
    network = links("ring").at_round(1, placement.slots)
    data = MergeData(match=shared_images())
    state, _ = algorithm.communicate(state, data, network, jax.random.key(0))
    found = adam_of(local_part(state).opt_state)
    assert found.count.tolist() == FEW
    jax.tree.map(
        lambda new, old: np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-7),
        (found.mu, found.nu),
        (adam.mu, adam.nu),
    )
