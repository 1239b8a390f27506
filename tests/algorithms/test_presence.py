"""Tests agents that leave and return: their own state, and that of the others."""

from typing import Any

import jax
import numpy as np
import pytest

from dimat_jax.algorithms import MergeData
from dimat_jax.network import Absence, Faults
from tests.algorithms.cases import (
    CASES,
    KEY,
    STEPS,
    Layout,
    built,
    links,
    trajectory,
)
from tests.algorithms.problems import (
    N_AGENTS,
    START,
    convex_variables,
    gradient,
    optimum,
    whole_batch,
    without_examples,
)


@pytest.mark.parametrize("name", ["dsgt", "cdsgd"])
def test_those_who_are_left_forget_who_left(name):
    """Otherwise the sum of the trackers would always lack the part of the agent."""
    network = links("fully_connected", faults=Faults(absences=(Absence(2, 5),)))
    x = trajectory(CASES[name], network, 2000, 0.05)[-1]
    left = np.array([0, 1, 3, 4])
    shares = np.isin(np.arange(N_AGENTS), left)[:, None].astype(float)
    distance = np.linalg.norm(x[left] - optimum(shares), axis=1).max()
    assert (distance < 1e-4) == (name == "dsgt")


def test_who_returns_to_a_server_is_counted_when_it_has_trained_from_the_average():
    away = Faults(absences=(Absence(4, 2, 4),))
    path = trajectory(CASES["fedavg"], links("disconnected", faults=away), 20, 0.1)

    def last_of_round(number):
        return path[number * STEPS]

    def trained(x):
        """Runs a round of local training for every agent."""
        for _ in range(STEPS):
            x = x - 0.1 * np.stack([gradient(i, x[i]) for i in range(N_AGENTS)])
        return x

    def averaged(x, who):
        return np.broadcast_to(x[who].mean(axis=0), x.shape)

    others, everyone = np.arange(4), np.arange(N_AGENTS)
    x = trained(averaged(START, everyone))
    np.testing.assert_allclose(last_of_round(1), x, atol=1e-5)
    for number in (2, 3):
        x = np.where(everyone[:, None] < 4, trained(averaged(x, others)), x)
        np.testing.assert_allclose(last_of_round(number), x, atol=1e-5)
    # The agent that returns receives the average, but is not a part of it.
    x = trained(averaged(x, others))
    np.testing.assert_allclose(last_of_round(4), x, atol=1e-5)
    x = trained(averaged(x, everyone))
    np.testing.assert_allclose(last_of_round(5), x, atol=1e-5)


def test_neighbours_without_examples_object_to_nothing():
    """Error feedback does not send the losses of their earlier messages either."""
    subject = built("compcga")
    batch, slots = whole_batch(subject.placement), subject.placement.slots
    network = links("ring").at_step(0, 1, slots)
    state = subject.algorithm.init(subject.placement.put(convex_variables(START)))
    for _ in range(2):
        state, _ = subject.step(state, batch, network, KEY)
    residuals = jax.tree.leaves(state.memory)
    assert any(np.abs(residual[0]).max() > 1e-3 for residual in residuals)
    alone, _ = subject.step(state, without_examples(batch, 1, 4), network, KEY)
    no_edges = links("disconnected").at_step(0, 1, slots)
    free, _ = subject.step(state, batch, no_edges, KEY)
    # The momentum is that of the agent's own gradient, without a constraint.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[0], b[0], atol=1e-6),
        alone.local.opt_state,
        free.local.opt_state,
    )
    for before, after in zip(residuals, jax.tree.leaves(alone.memory), strict=True):
        np.testing.assert_array_equal(before[0], after[0])


@pytest.mark.parametrize("name", ["fedavg", "dsgt", "wa", "wa, int8"])
@pytest.mark.parametrize("devices", [1, 2])
def test_steps_compile_once_whatever_communicating_returns(name, devices):
    """A state with another sharding would be copied, and steps would compile anew."""
    subject = built(name, layout=Layout(devices=devices))
    batch, slots = whole_batch(subject.placement), subject.placement.slots
    step: Any = jax.jit(
        subject.algorithm.step, out_shardings=subject.placement.sharding
    )
    network = links("ring", faults=Faults(dropout=0.3, seed=1))
    state = subject.algorithm.init(subject.placement.put(convex_variables(START)))
    for number in range(1, 4):
        at = network.at_round(number, slots)
        state, _ = subject.algorithm.communicate(state, MergeData(), at, KEY)
        for _ in range(2):
            state, _ = step(state, batch, network.at_step(0, number, slots), KEY)
    assert step._cache_size() == 1
