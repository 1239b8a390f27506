"""What the network is like, from round to round and from step to step."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float

from dimat_jax.errors import UserError
from dimat_jax.mixing import (
    MixingMatrix,
    check_mixing_matrix,
    columns_sum_to_one,
    rows_sum_to_one,
)
from dimat_jax.options import SEED, Option
from dimat_jax.topology import Adjacency, Schedule, is_undirected, schedule, union

__all__ = [
    "Absence",
    "Faults",
    "Links",
    "Network",
    "NetworkError",
    "FAULTS",
    "faults",
    "parse_absences",
]

DROPOUT = Option(
    "faults.dropout",
    0.0,
    "The probability that an agent is away for a round, from the first round on.",
    at_least=0,
    below=1,
)
EDGE_LOSS = Option(
    "faults.edge_loss",
    0.0,
    "The probability that a link fails in an exchange, from the first round on.",
    at_least=0,
    below=1,
)
ABSENCES = Option(
    "faults.absences",
    "",
    'The rounds in which single agents are away. "3:1-4, 0:6-" means that agent 3 is '
    "away in rounds 1 to 4, and agent 0 from round 6 on.",
    empty="nobody is away",
)
FAULTS = (DROPOUT, EDGE_LOSS, ABSENCES, SEED)
"""The options of `faults`."""


class Network(NamedTuple):
    """A round's network. Arrays, so that changing them never retraces a program.

    NumPy's where it is made; a jitted step may be given it on the devices.

    Attributes:
        W: the mixing matrix, float32; row i holds what agent i makes of the others.
        active_edges: `[i, j]` whether j's message reaches i this round.
        present: which agents take part. The slots that only fill up devices never do.
    """

    W: Float[Array | np.ndarray, "agents agents"]
    active_edges: Bool[Array | np.ndarray, "agents agents"]
    present: Bool[Array | np.ndarray, " agents"]


def _filled_up(W, active_edges, present, *, slots: int) -> Network:
    """A network that is filled up to `slots` with agents that are absent."""
    n_agents = len(present)
    full_W = np.eye(slots, dtype=np.float32)
    full_W[:n_agents, :n_agents] = W
    full_edges = np.zeros((slots, slots), bool)
    full_edges[:n_agents, :n_agents] = active_edges
    full_present = np.zeros(slots, bool)
    full_present[:n_agents] = present
    return Network(full_W, full_edges, full_present)


class NetworkError(UserError):
    """A network that its use, or its faults, do not allow; the message says why."""


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

    dropout: float = DROPOUT.default
    edge_loss: float = EDGE_LOSS.default
    absences: tuple[Absence, ...] = ()
    seed: int = SEED.default

    def __post_init__(self):
        DROPOUT.check(self.dropout)
        EDGE_LOSS.check(self.edge_loss)
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


def parse_absences(text: str) -> tuple[Absence, ...]:
    """Reads "agent:first-last, ...": the rounds, from 1, in which agents are away.

    Raises:
        NetworkError: the text has another form.
    """
    found = []
    for part in filter(None, map(str.strip, text.split(","))):
        match = re.fullmatch(r"(\d+):(\d+)-(\d*)", part)
        if not match:
            raise NetworkError(
                f"absences is {text!r}; expected agent:first-last or agent:first-, "
                'e.g. "3:1-4, 0:6-"'
            )
        agent, first, last = match.groups()
        found.append(Absence(int(agent), int(first), int(last) + 1 if last else None))
    return tuple(found)


def faults(*, dropout: float, edge_loss: float, absences: str, seed: int) -> Faults:
    """The faults that a config describes.

    Raises:
        OptionError: a probability out of range.
        NetworkError: absences that cannot be.
    """
    return Faults(dropout, edge_loss, parse_absences(absences), seed)


class Links:
    """The network over time: who is there, which links work, and what W is then.

    Where an agent is away in an undirected network, a mixing rule is applied to the
    graph of those who are there. Whatever else is not delivered (a link fails, W is a
    ready matrix, the network is directed) is made up for on the diagonal, so that what
    summed to 1 goes on to do so: the weight stays with the sender where columns sum to
    1, and goes to the receiver where only rows do. On an undirected network with
    symmetric weights both are the same: both ends of the link get it back.

    Args:
        adjacency: `[agents, agents]`, or `[period, agents, agents]`.
        mixing: a rule, e.g. of `MIXINGS`, or a matrix: `[agents, agents]` or a stack of
            the adjacency's period.
        faults: how the network misbehaves.

    Attributes:
        adjacency: `[period, agents, agents]`.
        mixing_matrix: `[period, agents, agents]`, if everyone is there and no link
            fails.
        faults: as given.

    Raises:
        MixingError: the rule does not fit the graph, or the matrix does not.
        NetworkError: faults in a directed network whose columns do not sum to 1, or an
            absence of an agent that there is not.
    """

    def __init__(
        self,
        adjacency: Adjacency | Schedule,
        mixing: Callable[[Adjacency | Schedule], MixingMatrix] | MixingMatrix,
        faults: Faults = Faults(),  # noqa: B008
    ):
        self.adjacency = schedule(np.asarray(adjacency, bool))
        self.faults = faults
        self._rule = mixing if callable(mixing) else None
        matrix = mixing(self.adjacency) if callable(mixing) else mixing
        self.mixing_matrix = np.broadcast_to(
            check_mixing_matrix(matrix, self.adjacency), self.adjacency.shape
        )
        self._undirected = is_undirected(self.adjacency)
        # Some rules are programs of their own; the same few are away again and again.
        self._weights = functools.lru_cache(1024)(self._weights_of)
        # Local steps are many, and their networks few unless links fail.
        self._network = functools.lru_cache(64)(self._network_of)
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
            and not columns_sum_to_one(self.mixing_matrix)
        ):
            raise NetworkError(
                "where agents drop out of a directed network, or its links fail, a "
                "sender keeps what was not delivered; so the columns of W have to sum "
                "to 1 (column_stochastic weights, and push-sum)"
            )

    @functools.cached_property
    def edges(self) -> Adjacency:
        """All edges that there ever are."""
        return union(self.adjacency)

    @property
    def changes(self) -> bool:
        """Whether one round's network may differ from another's."""
        return self.faults.any or len(self.adjacency) > 1

    @functools.cached_property
    def doubly_stochastic(self) -> bool:
        """Whether rows and columns of W sum to 1, whatever fails.

        Weights may be negative: those of `fastest` are, on some graphs.
        """
        if self.faults.any and not (self._undirected and self._symmetric):
            return False
        return self.column_stochastic and all(map(rows_sum_to_one, self._matrices))

    @functools.cached_property
    def column_stochastic(self) -> bool:
        """Whether columns of W sum to 1, whatever fails. Weights may be negative."""
        return all(map(columns_sum_to_one, self._matrices))

    @property
    def _symmetric(self) -> bool:
        return all(np.allclose(W, W.T, rtol=0, atol=1e-6) for W in self._matrices)

    @functools.cached_property
    def _matrices(self) -> list[MixingMatrix]:
        """W at every time, and where somebody is away."""
        matrices = list(self.mixing_matrix)
        some_away = bool(self.faults.dropout or self.faults.absences)
        if self._reapplies and some_away and self.edges.any():
            # A rule's sums may be 1 on regular graphs alone, which those who are left
            # do not form. On the least irregular graph it shows.
            irregular = np.zeros_like(self.edges)
            for agent in range(min(2, len(irregular) - 1)):
                irregular[agent, agent + 1] = irregular[agent + 1, agent] = True
            matrices.append(self._weights(irregular.tobytes()))
        return matrices

    @property
    def _reapplies(self) -> bool:
        """Whether the mixing rule is applied anew to those who are there."""
        return self._undirected and self._rule is not None

    def present(self, round_number: int) -> Bool[np.ndarray, " agents"]:
        """Who is there in a round. Rounds count from 1; before it everyone is."""
        present = np.ones(self.adjacency.shape[-1], bool)
        if self.faults.dropout and round_number > 0:
            rng = np.random.default_rng([self.faults.seed, _PRESENCE, round_number])
            present = rng.random(len(present)) >= self.faults.dropout
        for agent, start, stop in self.faults.absences:
            if start <= round_number < (stop or np.inf):
                present[agent] = False
        return present

    def at_round(self, round_number: int, slots: int) -> Network:
        """The network that a round's communication has. Rounds count from 1.

        Networks that are the same are one object, as far as they are remembered: where
        links do not fail, one for all steps between two changes.
        """
        return self._at(round_number - 1, round_number, _ROUND, slots)

    def at_step(self, step: int, round_number: int, slots: int) -> Network:
        """The network that a local step of a round has, as `at_round`.

        Steps count from 0, and go on counting from round to round.
        """
        return self._at(step, round_number, _STEP, slots)

    def _at(self, time: int, round_number: int, purpose: int, slots: int) -> Network:
        adjacency = self.adjacency[phase := time % len(self.adjacency)]
        failed = np.zeros_like(adjacency)
        if self.faults.edge_loss:
            rng = np.random.default_rng([self.faults.seed, purpose, time])
            failed = adjacency & (rng.random(adjacency.shape) < self.faults.edge_loss)
            if self._undirected:
                failed = np.triu(failed) | np.triu(failed).T
        present = self.present(round_number)
        return self._network(phase, present.tobytes(), failed.tobytes(), slots)

    def _network_of(
        self, phase: int, present: bytes, failed: bytes, slots: int
    ) -> Network:
        adjacency, W = self.adjacency[phase], self.mixing_matrix[phase]
        there = np.frombuffer(present, bool)
        reachable = adjacency & there & there[:, None]
        if self._reapplies and (reachable != adjacency).any():
            W = self._weights(reachable.tobytes())
        active = reachable & ~np.frombuffer(failed, bool).reshape(adjacency.shape)
        undelivered = np.where(adjacency & ~active, W, 0.0)
        back = undelivered.sum(axis=0 if columns_sum_to_one(W) else 1)
        return _filled_up(W - undelivered + np.diag(back), active, there, slots=slots)

    def _weights_of(self, adjacency: bytes) -> MixingMatrix:
        assert self._rule is not None
        shape = self.adjacency.shape[1:]
        return self._rule(np.frombuffer(adjacency, bool).reshape(shape))


# Draws for different purposes do not depend on each other.
_PRESENCE, _ROUND, _STEP = range(3)
