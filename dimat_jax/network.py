"""The network at every round and every local step: agents, links, and weights."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float

from dimat_jax._faults import (
    ABSENCES,
    DROPOUT,
    EDGE_LOSS,
    FAULTS,
    SAMPLED,
    Absence,
    Faults,
    NetworkError,
    faults,
    parse_absences,
)
from dimat_jax.mixing import (
    MixingMatrix,
    check_mixing_matrix,
    columns_sum_to_one,
    rows_sum_to_one,
)
from dimat_jax.topology import Adjacency, Schedule, is_undirected, schedule, union

__all__ = [
    "ABSENCES",
    "DROPOUT",
    "EDGE_LOSS",
    "FAULTS",
    "SAMPLED",
    "Absence",
    "Faults",
    "Links",
    "Network",
    "NetworkError",
    "faults",
    "networks_kept",
    "parse_absences",
]


class Network(NamedTuple):
    """The network of one round or one local step.

    Its fields are arrays, so that other values never retrace a program. They are NumPy
    arrays at first; a jitted step may take them as arrays on the devices.

    Attributes:
        W: the mixing matrix, float32. Row i holds the weights with which agent i
            averages.
        active_edges: `active_edges[i, j]` says whether j's message reaches i.
        present: whether each agent takes part. The slots that only fill up devices
            never do.
    """

    W: Float[Array | np.ndarray, "agents agents"]
    active_edges: Bool[Array | np.ndarray, "agents agents"]
    present: Bool[Array | np.ndarray, " agents"]


def networks_kept(slots: int) -> int:
    """How many networks of some slots a cache keeps: 64, or what a gibibyte holds."""
    # An entry of W has four bytes, and an active edge one.
    return max(1, min(64, 2**30 // (5 * slots**2)))


def _filled_up(W, active_edges, present, *, slots: int) -> Network:
    """Makes a network that is filled up to `slots` with absent agents."""
    n_agents = len(present)
    full_W = np.zeros((slots, slots), np.float32)
    full_W[:n_agents, :n_agents] = W
    spare = np.arange(n_agents, slots)
    full_W[spare, spare] = 1
    full_edges = np.zeros((slots, slots), bool)
    full_edges[:n_agents, :n_agents] = active_edges
    full_present = np.zeros(slots, bool)
    full_present[:n_agents] = present
    return Network(full_W, full_edges, full_present)


class Links:
    """The network over time: which agents are present, which links work, and W.

    If an agent is absent from an undirected network, the mixing rule is applied anew to
    the graph of the present agents. In all other cases (a link fails, the network is
    directed, or W is a matrix and not a rule) a weight whose message is not delivered
    moves to the diagonal, so that the sums that were 1 remain 1. If the columns of W
    sum to 1, the sender keeps the weight; if only the rows do, the receiver gets it. In
    an undirected network with symmetric weights both ways give the same W.

    Args:
        adjacency: the graph, `[agents, agents]` or `[period, agents, agents]`.
        mixing: a rule, e.g. one of `MIXINGS`, or a matrix: `[agents, agents]` or a
            stack of the adjacency's period.
        faults: the faults of the network.

    Attributes:
        adjacency: the graph, `[period, agents, agents]`.
        faults: the faults that were given.

    Raises:
        MixingError: the rule or the matrix does not fit the graph.
        NetworkError: there are faults in a directed network in which the columns of W
            do not sum to 1, an absent agent does not exist, or more agents are to be
            drawn than there are.
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
        if not callable(mixing):
            matrix = check_mixing_matrix(mixing, self.adjacency)
            self._given = np.broadcast_to(matrix, self.adjacency.shape)
        n_agents = self.adjacency.shape[-1]
        self._undirected = is_undirected(self.adjacency)
        # Some rules solve an optimization problem, and the same agents are often absent
        # together.
        kept = max(1, min(1024, 2**28 // (8 * n_agents**2)))
        self._weights = functools.lru_cache(kept)(self._weights_of)
        self._matrix = functools.lru_cache(kept)(self._matrix_of)
        # There are many local steps. Unless links fail, most have the same network.
        self._network = functools.lru_cache(networks_kept(n_agents))(self._network_of)
        # A rule that does not fit the graph raises an error here.
        list(map(self._matrix, range(len(self.adjacency))))
        for absence in faults.absences:
            if absence.agent >= n_agents:
                raise NetworkError(
                    f"an absence names agent {absence.agent}, but there are only "
                    f"agents 0 to {n_agents - 1}"
                )
        if faults.sampled > n_agents:
            raise NetworkError(
                f"{SAMPLED.path} is {faults.sampled}, but there are only {n_agents} "
                "agents to draw from"
            )
        if (
            faults.any
            and not self._undirected
            and not all(map(columns_sum_to_one, self._all_times()))
        ):
            raise NetworkError(
                "where agents drop out of a directed network, or its links fail, a "
                "sender keeps what was not delivered; so the columns of W have to sum "
                "to 1 (column_stochastic weights, and push-sum)"
            )

    @functools.cached_property
    def edges(self) -> Adjacency:
        """All edges that exist at any time."""
        return union(self.adjacency)

    @property
    def changes(self) -> bool:
        """Whether one round's network may differ from another's."""
        return self.faults.any or len(self.adjacency) > 1

    @functools.cached_property
    def doubly_stochastic(self) -> bool:
        """Whether the rows and columns of W sum to 1 at all times, also under faults.

        Weights may be negative, as some of `fastest` are on some graphs.
        """
        if self.faults.any and not (self._undirected and self._symmetric):
            return False
        return self.column_stochastic and all(map(rows_sum_to_one, self._every_kind()))

    @functools.cached_property
    def column_stochastic(self) -> bool:
        """Whether the columns of W sum to 1 at all times, also under faults.

        Weights may be negative.
        """
        return all(map(columns_sum_to_one, self._every_kind()))

    @functools.cached_property
    def mixing_matrix(self) -> MixingMatrix:
        """W for the times when all agents are present and no link fails.

        It is `[period, agents, agents]`.
        """
        matrices = list(self._all_times())
        return np.stack(matrices) if len(matrices) > 1 else matrices[0][None]

    def _all_times(self) -> Iterator[MixingMatrix]:
        """Yields W for one time after the other, since a stack may take gigabytes."""
        return map(self._matrix, range(len(self.adjacency)))

    @property
    def _symmetric(self) -> bool:
        return all((np.abs(W - W.T) <= 1e-6).all() for W in self._every_kind())

    def _every_kind(self) -> Iterator[MixingMatrix]:
        """W at every time, and an example of W while agents are absent."""
        yield from self._all_times()
        some_absent = bool(self.faults.dropout or self.faults.absences)
        if self._reapplies and some_absent and self.edges.any():
            # The sums of some rules are 1 only on regular graphs, and the graph of the
            # present agents need not be regular. A path of three agents is the smallest
            # graph that is not, so its weights show whether the rule is of this kind.
            irregular = np.zeros_like(self.edges)
            for agent in range(min(2, len(irregular) - 1)):
                irregular[agent, agent + 1] = irregular[agent + 1, agent] = True
            yield self._weights(_key(irregular))

    @property
    def _reapplies(self) -> bool:
        """Whether the mixing rule is applied anew to the present agents."""
        return self._undirected and self._rule is not None

    def present(self, round_number: int) -> Bool[np.ndarray, " agents"]:
        """Returns which agents are present in a round.

        Rounds count from 1. Before round 1 all agents are present. If agents are drawn,
        only these are present.
        """
        present = self._reachable(round_number)
        if self.faults.sampled and round_number > 0:
            rng = np.random.default_rng([self.faults.seed, _SAMPLE, round_number])
            order = rng.permutation(len(present))
            order = order[present[order]]
            present[order[self.faults.sampled :]] = False
        return present

    def senders(self, round_number: int) -> Bool[np.ndarray, " agents"]:
        """Returns which agents send their models to a server as a round begins.

        These are the present agents. If agents are drawn, they are those that took part
        in the round before. In round 1 the server gets its first model from those that
        it has just drawn.
        """
        if self.faults.sampled and round_number > 1:
            return self.present(round_number - 1)
        return self.present(round_number)

    def _reachable(self, round_number: int) -> Bool[np.ndarray, " agents"]:
        """Returns which agents are not absent in a round, drawn or not."""
        present = np.ones(self.adjacency.shape[-1], bool)
        if self.faults.dropout and round_number > 0:
            rng = np.random.default_rng([self.faults.seed, _PRESENCE, round_number])
            present = rng.random(len(present)) >= self.faults.dropout
        for agent, start, stop in self.faults.absences:
            if start <= round_number < (stop or np.inf):
                present[agent] = False
        return present

    def at_round(
        self, round_number: int, slots: int, communication: int | None = None
    ) -> Network:
        """Returns the network of a communication in a round; both count from 1.

        By default every round has one. Equal networks are the same object as long as
        the cache holds it: without faults, all steps between two changes share one.
        """
        time = (communication or round_number) - 1
        return self._at(time, round_number, _ROUND, slots)

    def at_step(self, step: int, round_number: int, slots: int) -> Network:
        """Returns the network of a local step of a round, like `at_round`.

        Steps count from 0 over all rounds.
        """
        return self._at(step, round_number, _STEP, slots)

    def _at(self, time: int, round_number: int, purpose: int, slots: int) -> Network:
        phase, failed = time % len(self.adjacency), None
        if self.faults.edge_loss:
            failed = _key(self._failed_links(phase, [self.faults.seed, purpose, time]))
        return self._network(phase, self.present(round_number).tobytes(), failed, slots)

    def _failed_links(self, phase: int, seed: list[int]) -> Adjacency:
        rng = np.random.default_rng(seed)
        failed = self.adjacency[phase].copy()
        # Row by row, since random numbers take eight times the memory of the links.
        for row in failed:
            row &= rng.random(len(row)) < self.faults.edge_loss
        return np.triu(failed) | np.triu(failed).T if self._undirected else failed

    def _network_of(
        self, phase: int, present: bytes, failed: bytes | None, slots: int
    ) -> Network:
        adjacency, W = self.adjacency[phase], self._matrix(phase)
        is_present = np.frombuffer(present, bool)
        active = adjacency & is_present & is_present[:, None]
        if self._reapplies and (active != adjacency).any():
            W = self._weights(_key(active))
        if failed is not None:
            active &= ~self._from_key(failed)
        network = _filled_up(W, active, is_present, slots=slots)
        receivers, senders = np.nonzero(adjacency & ~active)
        if len(receivers):
            keepers = senders if columns_sum_to_one(W) else receivers
            kept = np.bincount(keepers, W[receivers, senders], minlength=len(W))
            network.W[receivers, senders] = 0
            network.W[np.diag_indices(len(W))] = W.diagonal() + kept
        return network

    def _matrix_of(self, phase: int) -> MixingMatrix:
        if self._rule is None:
            return self._given[phase]
        adjacency = self.adjacency[phase]
        return check_mixing_matrix(self._rule(adjacency), adjacency)

    def _weights_of(self, adjacency: bytes) -> MixingMatrix:
        assert self._rule is not None
        return self._rule(self._from_key(adjacency))

    def _from_key(self, links: bytes) -> Adjacency:
        shape = self.adjacency.shape[1:]
        bits = np.unpackbits(np.frombuffer(links, np.uint8), count=math.prod(shape))
        return bits.view(bool).reshape(shape)


def _key(links: Adjacency) -> bytes:
    """Some links as the key of a cache: one bit each."""
    return np.packbits(links).tobytes()


# Each purpose has random numbers of its own, so that draws are independent.
_PRESENCE, _ROUND, _STEP, _SAMPLE = range(4)
