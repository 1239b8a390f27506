"""Scenarios in which the two implementations of an algorithm are compared.

A scenario is a network over a few rounds, and the examples of each agent at each step.
All scenarios have arrays of the same shapes, so one compiled step serves all of them.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from dimat_jax.data.pipeline import Sampler
from dimat_jax.mixing import MIXINGS
from dimat_jax.network import Absence, Faults, Links, Network
from dimat_jax.topology import TOPOLOGIES
from tests.algorithms.cases import STEPS
from tests.algorithms.problems import DIM, N_AGENTS
from tests.reference.agents import Now
from tests.reference.weights import mixing_matrix

N_ROUNDS = 3
N_STEPS = N_ROUNDS * STEPS
BATCH_SIZE = 4
# The last agent's shard has 16 images: an epoch is as long as a round.
SIZES = 3, 5, 8, 10, 16
N_EXAMPLES = sum(SIZES)
SHARDS = np.split(np.arange(N_EXAMPLES), np.cumsum(SIZES)[:-1])
CLASSES = 3
PIXELS = 4

_rng = np.random.default_rng(3)
IMAGES = _rng.standard_normal((N_EXAMPLES, PIXELS))
# For least squares: inputs of other scales and other models for each agent.
SCALES = np.repeat(np.linspace(0.5, 1.5, N_AGENTS), SIZES)[:, None]
INPUTS = IMAGES[:, :DIM] * SCALES
TARGETS = 1 + np.repeat(_rng.standard_normal(N_AGENTS), SIZES) * INPUTS.sum(axis=1)
LABELS = _rng.integers(0, CLASSES, N_EXAMPLES)


def rate(t: int) -> float:
    """The learning rate of step t; it is `learning_rate` of tests/algorithms/cases."""
    return 0.05 * 0.9 ** (t // 2)


def _several_graphs() -> np.ndarray:
    graphs = [TOPOLOGIES[name](N_AGENTS) for name in ("star", "path", "ring")]
    return np.stack(graphs)


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A network with faults, and examples.

    Attributes:
        graph: the name of a topology, or "several": three undirected ones in turn.
        mixing: the mixing rule, for algorithms that do not need one of their own.
        faults: the network's faults.
        examples: "full" batches; "ragged" ones, some of which are empty; or what a way
            to spend epochs with small shards gives: "repeat" or "idle".
    """

    graph: str = "ring"
    mixing: str = "uniform"
    faults: Faults = Faults()  # noqa: RUF009
    examples: str = "full"

    @property
    def adjacency(self) -> np.ndarray:
        if self.graph == "several":
            return _several_graphs()
        graph = TOPOLOGIES[self.graph](N_AGENTS)
        return graph if graph.ndim == 3 else graph[None]

    def links(self, rule: str) -> Links:
        """The network of the first implementation."""
        return Links(self.adjacency, MIXINGS[rule], self.faults)


# Agent 1 is away for a round, agent 4 joins late.
_AWAY = (Absence(1, 2, 3), Absence(4, 1, 2))
SCENARIOS = {
    "full batches": Scenario(),
    "ragged batches": Scenario("star", examples="ragged"),
    "small shards repeat": Scenario("path", examples="repeat"),
    "small shards idle": Scenario(examples="idle"),
    "agents drop out": Scenario(
        "fully_connected", "metropolis_hastings", Faults(0.3, 0.0, _AWAY, seed=1)
    ),
    "links fail": Scenario("star", faults=Faults(edge_loss=0.4, seed=1)),
    "the graph changes": Scenario("several", examples="ragged"),
    "the graph is directed and changes": Scenario("one_peer_exponential"),
    "a directed graph fails": Scenario(
        "one_peer_exponential", "column_stochastic", Faults(0.2, 0.3, _AWAY, seed=4)
    ),
    "everything at once": Scenario(
        "several", "metropolis_hastings", Faults(0.2, 0.3, _AWAY, seed=2), "idle"
    ),
}


@functools.cache
def batches(examples: str) -> tuple[np.ndarray, np.ndarray]:
    """Each agent's examples at each step: indices and mask `[steps, agents, batch]`."""
    way = "idle" if examples == "idle" else "repeat"
    sampler = Sampler(SHARDS, BATCH_SIZE, [0], way)
    assert sampler.steps_per_epoch == STEPS
    indices, mask = map(np.stack, zip(*map(sampler.batch, range(N_STEPS)), strict=True))
    if examples == "ragged":
        rng = np.random.default_rng(5)
        mask = rng.random(mask.shape) < 0.7
        mask[rng.random(mask.shape[:2]) < 0.2] = False
    return indices, mask


def as_seen(
    adjacency: np.ndarray, rule: str, network: Network, time: int, **examples: Any
) -> Now:
    """What the second implementation sees of a step or a communication.

    Who is absent and which links fail are drawn by the first implementation. The
    weights are computed anew.
    """
    graph = adjacency[time % len(adjacency)]
    present, arrives = np.asarray(network.present), np.asarray(network.active_edges)
    assert not (arrives & ~(graph & present[:, None] & present[None, :])).any()
    W = _checked(
        rule, *(np.asarray(x).tobytes() for x in (graph, present, arrives, network.W))
    )
    return Now(W, arrives, present, **examples)


@functools.lru_cache(1024)
def _checked(rule: str, graph: bytes, present: bytes, arrives: bytes, W: bytes):
    """Computes W, and checks that of the first implementation, once for all runs."""
    there = np.frombuffer(present, bool)
    links, delivered = (
        np.frombuffer(x, bool).reshape(len(there), -1) for x in (graph, arrives)
    )
    found = mixing_matrix(rule, links, there, delivered)
    first = np.frombuffer(W, np.float32).reshape(found.shape)
    np.testing.assert_allclose(first, found, rtol=0, atol=1e-6)
    return found
