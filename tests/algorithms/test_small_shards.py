"""Tests which objective agents with shards of different sizes minimise.

Every agent's loss is the mean of (x - label)^2 / 2 over its images. All losses have the
same curvature. So the mean of the agents' x goes to the mean of what the agents want if
every agent counts the same, and to the mean of all labels if every image does.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dimat_jax.algorithms import ALGORITHMS, MergeData
from dimat_jax.data._small_shards import WAYS
from dimat_jax.data.pipeline import Batch, Sampler
from dimat_jax.network import Links
from tests.algorithms.cases import (
    KEY,
    QUICKLY,
    Case,
    Layout,
    case_of,
    links,
    make,
    placed,
)
from tests.algorithms.problems import CONVEX, convex_variables
from tests.reference.agents import path
from tests.reference.gossip import Cdadam
from tests.reference.messages import Cga

BATCH_SIZES = 10, 30, 100


class Shards(NamedTuple):
    """Agents with their images. An image is what it wants x to be.

    Attributes:
        labels: the labels of each agent's images.
        graph: the topology of the agents.
        tolerance: how far from the optimum an algorithm may end. If the labels of an
            agent differ, its gradients are noisy.
    """

    labels: tuple[np.ndarray, ...]
    graph: str
    tolerance: float

    @property
    def sizes(self) -> np.ndarray:
        return np.array([len(own) for own in self.labels])

    def optimum(self, weights: np.ndarray) -> float:
        """The minimum of the agents' losses with some weights."""
        return float(np.average([own.mean() for own in self.labels], weights=weights))

    def links(self, case: Case) -> Links:
        # A path has an eigenvalue that is too small for D2.
        weights = "lazy" if case.per_step == "d2" else "uniform"
        return links(self.graph, weights, n_agents=len(self.labels))


def _scattered(n: int, mean: float) -> np.ndarray:
    """Draws labels whose mean is given."""
    labels = 0.3 * np.random.default_rng(n).standard_normal(n)
    return labels - labels.mean() + mean


TWO = Shards((np.ones(10), np.zeros(90)), "fully_connected", 1e-3)
THREE = Shards(
    (_scattered(4, 1.0), _scattered(21, 0.0), _scattered(75, -2.0)), "path", 0.03
)
SHARDS = {"two": TWO, "three on a path": THREE}
# Merging algorithms train by Adam if no optimizer is named.
CASES = {
    name: Case(name, "sgd" if record.merges or name in ("local", "centralized") else "")
    for name, record in ALGORITHMS.items()
}
CASES["choco"] = case_of("choco", compressor="int8")
# A heavy ball repeats a step ten times in the end.
SLOWER = {"cdmsgd", "cga", "compcga"}


@functools.cache
def ends(name: str, agents: str, batch_size: int, small_shards: str) -> np.ndarray:
    """Runs an algorithm; returns each agent's mean x over the second half of the run.

    A round is an epoch. Where some agents idle, their x goes back and forth in an epoch
    by an amount of the order of the learning rate, so the rate is smaller there. If
    agents meet only once an epoch, it is smaller still. Agents alone have no others
    whose steps pull them back while they idle.
    """
    steps_per_epoch = -(-max(SHARDS[agents].sizes) // batch_size)
    rate, n_steps = 0.1, 400
    if small_shards == "idle" and name == "local":
        n_steps = 2000
    elif small_shards == "idle":
        rate = 0.02
        if CASES[name].communicates:
            rate = min(rate, 0.04 / steps_per_epoch)
        n_steps = int(36 / rate)
    if name in SLOWER:
        rate *= 0.1
    after = run(CASES[name], SHARDS[agents], batch_size, small_shards, rate, n_steps)
    return after[n_steps // 2 :].mean(axis=0)


def run(
    case: Case,
    found: Shards,
    batch_size: int,
    small_shards: str,
    rate: float,
    n_steps: int,
) -> np.ndarray:
    """Runs an algorithm from x = 2; returns x after every step, `[steps, agents]`."""
    choice = WAYS[small_shards]
    labels = np.concatenate(found.labels).astype(np.float32)
    rows = np.split(np.arange(len(labels)), np.cumsum(found.sizes)[:-1])
    network = found.links(case)
    if case.record.single:
        rows, network = [np.arange(len(labels))], links("disconnected", n_agents=1)
    if choice.examples_count:
        case = case._replace(examples=tuple(found.sizes.tolist()))
    placement = placed(Layout(len(rows)))
    sampler = Sampler(rows, batch_size, [0], small_shards)
    task = CONVEX._replace(loss=choice.weighed(CONVEX.loss))
    algorithm = make(case, "convex", placement, rate, task=task)

    def step(state, now):
        batch, network, key = now
        state, _ = algorithm.step(state, batch, network, key)
        return state, algorithm.variables(state)["params"]["x"][:, 0]

    epoch = jax.jit(
        lambda state, now: jax.lax.scan(step, state, now), compiler_options=QUICKLY
    )
    state = algorithm.init(
        placement.put(convex_variables(np.full((len(rows), 1), 2.0)))
    )
    passed, keys = [], jax.random.split(KEY, n_steps + 20 * sampler.steps_per_epoch)
    # If nothing happens between rounds, steps of many rounds are one program.
    size = sampler.steps_per_epoch * (1 if case.communicates else 20)
    for number, first in enumerate(range(0, n_steps, size), 1):
        now = network.at_round(number, placement.slots)
        state, _ = algorithm.communicate(state, MergeData(), now, keys[first])
        steps = range(first, first + size)
        indices, mask = map(np.stack, zip(*map(sampler.batch, steps), strict=True))
        inputs = np.ones((*mask.shape, 1), np.float32)
        batch = Batch(*map(jnp.asarray, (inputs, labels[indices], mask)))
        networks = [network.at_step(t, number, placement.slots) for t in steps]
        stacked = jax.tree.map(lambda *x: np.stack(x), *networks)
        state, x = epoch(state, (batch, stacked, keys[first : steps.stop]))
        passed.append(np.asarray(x))
    return np.concatenate(passed)[:n_steps]


every_batch_size = pytest.mark.parametrize("batch_size", BATCH_SIZES)
all_agents = pytest.mark.parametrize("agents", SHARDS)
# Agents alone do not agree, CGA stops where agents disagree, and the agents' moments
# weigh them in DAdam: see the tests below.
AGREEING = sorted(ALGORITHMS.keys() - {"local", "cga", "compcga", "cdadam"})


@pytest.mark.every_nth(13)
@every_batch_size
@all_agents
@pytest.mark.parametrize("name", AGREEING)
def test_if_small_shards_repeat_every_agent_counts_the_same(name, agents, batch_size):
    found = SHARDS[agents]
    weights = found.sizes if name == "centralized" else np.ones(len(found.sizes))
    x = ends(name, agents, batch_size, "repeat").mean()
    # The labels of a single agent always differ.
    tolerance = 0.03 if name == "centralized" else found.tolerance
    assert x == pytest.approx(found.optimum(weights), abs=tolerance)


@pytest.mark.every_nth(13)
@every_batch_size
@all_agents
@pytest.mark.parametrize("name", AGREEING)
def test_if_small_shards_idle_every_image_counts_the_same(name, agents, batch_size):
    found = SHARDS[agents]
    # FedAvg's server weighs the agents by their images once more, as its paper says.
    weights = found.sizes ** (2 if name in ("fedavg", "fedprox") else 1)
    x = ends(name, agents, batch_size, "idle").mean()
    assert x == pytest.approx(found.optimum(weights), abs=0.03)


@every_batch_size
@all_agents
@pytest.mark.parametrize("small_shards", ["repeat", "idle"])
def test_alone_every_agent_ends_where_its_own_images_want(
    agents, small_shards, batch_size
):
    found = SHARDS[agents]
    own = [np.mean(labels) for labels in found.labels]
    x = ends("local", agents, batch_size, small_shards)
    np.testing.assert_allclose(x, own, rtol=0, atol=0.03)


def gradient(agent: int, x: np.ndarray) -> np.ndarray:
    return x - TWO.labels[agent].mean()


@every_batch_size
def test_if_small_shards_repeat_adaptive_and_cross_gradients_are_their_papers(
    batch_size,
):
    """All images of an agent are alike, so every batch has the whole gradient."""
    start, n_steps = np.full((2, 1), 2.0), 100
    W = [TWO.links(CASES["cga"]).mixing_matrix[0]] * n_steps
    expected = path(Cdadam(start), gradient, W, 0.1)
    x = run(CASES["cdadam"], TWO, batch_size, "repeat", 0.1, n_steps)
    np.testing.assert_allclose(x, expected[1:, :, 0], rtol=0, atol=1e-4)
    expected = path(Cga(start), gradient, W, 0.01)
    x = run(CASES["cga"], TWO, batch_size, "repeat", 0.01, n_steps)
    np.testing.assert_allclose(x, expected[1:, :, 0], rtol=0, atol=1e-4)


@pytest.mark.every_nth(6)
@every_batch_size
@pytest.mark.parametrize("small_shards", ["repeat", "idle"])
@pytest.mark.parametrize("name", ["cga", "compcga", "cdadam"])
def test_the_others_end_between_what_the_agents_want(name, small_shards, batch_size):
    x = ends(name, "two", batch_size, small_shards)
    assert -0.01 < x.min() and x.max() < 1.01
