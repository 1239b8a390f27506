"""What the network is like, from round to round and from step to step."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dimat_jax.errors import UserError
from dimat_jax.mixing import (
    MixingMatrix,
    is_column_stochastic,
    is_doubly_stochastic,
)
from dimat_jax.topology import Adjacency, Schedule, is_undirected, schedule

__all__ = [
    "Absence",
    "Faults",
    "Links",
    "Network",
    "NetworkError",
    "static",
]


class Network(NamedTuple):
    """A round's network. Arrays, so that changing them never retraces a program.

    Attributes:
        W: the mixing matrix, float32; row i holds what agent i makes of the others.
        active_edges: `[i, j]` whether j's message reaches i this round.
        present: which agents take part. The slots that only fill up devices never do.
    """

    W: Float[Array, "agents agents"]
    active_edges: Bool[Array, "agents agents"]
    present: Bool[Array, " agents"]


def static(mixing_matrix: MixingMatrix, adjacency: Adjacency, slots: int) -> Network:
    """The same network every round, filled up to `slots` with agents who are absent."""
    return _filled_up(
        mixing_matrix, adjacency, np.ones(len(adjacency), bool), slots=slots
    )


def _filled_up(W, active_edges, present, *, slots: int) -> Network:
    n_agents = len(present)
    full_W = np.eye(slots, dtype=np.float32)
    full_W[:n_agents, :n_agents] = W
    full_edges = np.zeros((slots, slots), bool)
    full_edges[:n_agents, :n_agents] = active_edges
    full_present = np.zeros(slots, bool)
    full_present[:n_agents] = present
    return Network(*map(jnp.asarray, (full_W, full_edges, full_present)))


class NetworkError(UserError):
    """Faults that a network's mixing weights cannot stand; the message says why."""


class Absence(NamedTuple):
    """An agent is away for some rounds (which count from 1), and comes back.

    Attributes:
        agent: who.
        start: its first round away; 1 for one that joins late.
        stop: the round it is back for; None: never.
    """

    agent: int
    start: int
    stop: int | None = None


@dataclasses.dataclass(frozen=True)
class Faults:
    """How a network misbehaves. Everything is drawn anew, but is fixed by the seed.

    Attributes:
        dropout: with this probability an agent is away for a round.
        edge_loss: with this probability a link fails in an exchange. In an undirected
            network it fails in both directions, in a directed one in its own.
        absences: who is away when, beyond that.
        seed: of the draws.
    """

    dropout: float = 0.0
    edge_loss: float = 0.0
    absences: tuple[Absence, ...] = ()
    seed: int = 0

    def __post_init__(self):
        for name in ("dropout", "edge_loss"):
            probability = getattr(self, name)
            if not 0 <= probability < 1:
                raise NetworkError(
                    f"{name} is a probability, from 0 to below 1; got {probability}"
                )
        for agent, start, stop in self.absences:
            if agent < 0 or start < 1 or (stop is not None and stop <= start):
                raise NetworkError(
                    "an absence is (agent, first round away, round it is back for), "
                    f"rounds counting from 1; got {(agent, start, stop)}"
                )

    @property
    def any(self) -> bool:
        """Whether there are any."""
        return bool(self.dropout or self.edge_loss or self.absences)


class Links:
    """The network over time: who is there, which links work, and what W is then.

    In an undirected network the mixing rule is applied to the graph of those who are
    there, and a link that fails gives its weight back to both ends: rows go on to sum
    to 1, and so do columns where they did. In a directed network whatever is not
    delivered stays with its sender: columns go on to sum to 1, rows do not.

    Args:
        adjacency: `[agents, agents]`, or `[period, agents, agents]`.
        mixing: a rule, e.g. of `MIXINGS`.
        faults: how the network misbehaves.

    Raises:
        NetworkError: faults in a directed network whose columns do not sum to 1, or an
            absence of an agent that there is not.
    """

    def __init__(
        self,
        adjacency: Adjacency | Schedule,
        mixing: Callable[[Adjacency | Schedule], MixingMatrix],
        faults: Faults = Faults(),  # noqa: B008
    ):
        self.adjacency = schedule(adjacency)
        self.faults = faults
        self.mixing_matrix = schedule(mixing(self.adjacency))
        self._mixing = mixing
        self._undirected = is_undirected(self.adjacency)
        n_agents = self.adjacency.shape[-1]
        for absence in faults.absences:
            if absence.agent >= n_agents:
                raise NetworkError(
                    f"agent {absence.agent} is to be absent, but there are only "
                    f"agents 0 to {n_agents - 1}"
                )
        if (
            faults.any
            and not self._undirected
            and not is_column_stochastic(self.mixing_matrix)
        ):
            raise NetworkError(
                "where agents drop out of a directed network, or its links fail, a "
                "sender keeps what was not delivered; so the columns of W have to sum "
                "to 1 (column_stochastic weights, and push-sum)"
            )

    @property
    def changes(self) -> bool:
        """Whether one round's network may differ from another's."""
        return self.faults.any or len(self.adjacency) > 1

    @property
    def doubly_stochastic(self) -> bool:
        """Whether rows and columns of W sum to 1, all the time."""
        stays = self._undirected or not self.faults.any
        return stays and is_doubly_stochastic(self.mixing_matrix)

    def present(self, round_number: int) -> Bool[np.ndarray, " agents"]:
        """Who is there in a round. Rounds count from 1."""
        n_agents = self.adjacency.shape[-1]
        rng = np.random.default_rng([self.faults.seed, _PRESENCE, round_number])
        present = rng.random(n_agents) >= self.faults.dropout
        for agent, start, stop in self.faults.absences:
            if start <= round_number < (stop or np.inf):
                present[agent] = False
        return present

    def at_round(self, round_number: int, slots: int) -> Network:
        """The network that a round's communication has. Rounds count from 1."""
        return self._network(round_number - 1, round_number, _ROUND, slots)

    def at_step(self, step: int, round_number: int, slots: int) -> Network:
        """The network that a local step of a round has. Steps count from 0."""
        return self._network(step, round_number, _STEP, slots)

    def _network(
        self, time: int, round_number: int, purpose: int, slots: int
    ) -> Network:
        phase, present = time % len(self.adjacency), self.present(round_number)
        adjacency, W = self.adjacency[phase], self.mixing_matrix[phase]
        lost = adjacency & ~(present & present[:, None])
        if self._undirected and lost.any():
            W = self._weights((adjacency & ~lost).tobytes())
        if self.faults.edge_loss:
            rng = np.random.default_rng([self.faults.seed, purpose, time])
            failed = rng.random(adjacency.shape) < self.faults.edge_loss
            if self._undirected:
                failed = np.triu(failed) | np.triu(failed).T
            lost |= adjacency & failed
        undelivered = np.where(lost, W, 0.0)
        back = undelivered.sum(axis=1 if self._undirected else 0)
        W = W - undelivered + np.diag(back)
        return _filled_up(W, adjacency & ~lost, present, slots=slots)

    # Some rules are programs of their own; the same few are away again and again.
    @functools.lru_cache(maxsize=1024)  # noqa: B019
    def _weights(self, adjacency: bytes) -> MixingMatrix:
        shape = self.adjacency.shape[1:]
        return self._mixing(np.frombuffer(adjacency, bool).reshape(shape))


# Draws for different purposes do not depend on each other.
_PRESENCE, _ROUND, _STEP = range(3)
