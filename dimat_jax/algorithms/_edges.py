"""Matching along the edges of a graph, all agents at once.

Edges are matched in waves. A wave holds as many edges as there are agents, so it is
stacked, sharded and balanced like the agents themselves, on any graph: a ring takes two
waves, a fully connected graph N - 1, a star two. If the inverse of the permutation from
j to i is the permutation from i to j, half of the edges are enough.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Int, Key
from scipy.sparse import csr_array
from scipy.sparse.csgraph import minimum_spanning_tree

from dimat_jax._stopwatch import Stopwatch
from dimat_jax.algorithms._local_pairs import search_local_pairs
from dimat_jax.algorithms.base import MergeData
from dimat_jax.matching._activation import ActivationScorer, Found, settle
from dimat_jax.matching._assignment import STAY
from dimat_jax.matching._descent import (
    PairPerms,
    Pairs,
    Problem,
    Scorer,
    every_pair_alone,
)
from dimat_jax.matching._joint import all_pairs_together
from dimat_jax.placement import Placement
from dimat_jax.topology import Adjacency, spanning_trees
from dimat_jax.tree import PyTree

__all__ = [
    "EdgePerms",
    "Edges",
    "MatchedEdges",
    "Matcher",
    "every_edge",
    "match_edges",
    "no_edges",
    "sparse_edges",
    "spanning_forest",
    "stack_wave",
    "waves",
]

Edges = Int[np.ndarray, "_edges 2"]
"""Pairs (receiver, sender). The sender will be aligned with the receiver."""

MOST_NEIGHBOURS = 8
"""The number of neighbours with which an agent is matched, for a joint frame."""

EdgePerms = dict[tuple[int, int], dict[str, np.ndarray]]
"""For every edge (receiver, sender), the permutations that align the sender."""


# Which edges ==========================================================================


def every_edge(active_edges: Adjacency) -> Edges:
    """Returns all edges of a graph."""
    return np.argwhere(active_edges)


def no_edges(active_edges: Adjacency) -> Edges:
    """Returns no edge at all."""
    del active_edges
    return np.zeros((0, 2), np.int64)


def spanning_forest(active_edges: Adjacency) -> Edges:
    """Returns the edges (parent, child) of a tree in each component, breadth first.

    The root of a tree is the component's lowest agent.
    """
    edges = [edge for tree in spanning_trees(active_edges).values() for edge in tree]
    return np.array(edges, np.int64).reshape(-1, 2)


def sparse_edges(active_edges: Adjacency) -> Edges:
    """Returns a few edges of a graph that still connect all agents that it connects.

    The number of edges grows linearly with the number of agents. An agent keeps at most
    `MOST_NEIGHBOURS` neighbours, and all of them if no agent has more. A few further
    edges are kept if the graph falls apart without them: a hub keeps all neighbours
    that have no other. Opposite edges are kept together.
    """
    linked = active_edges | active_edges.T
    kept = _few_neighbours(linked)
    if len(spanning_trees(kept)) > len(spanning_trees(linked)):
        # The lightest spanning tree has as few edges as possible that are not kept.
        weights = csr_array(np.where(kept, 1, 2) * linked)
        joining = minimum_spanning_tree(weights).toarray() > 0
        kept |= joining | joining.T
    return np.argwhere(kept & active_edges)


def _few_neighbours(linked: Adjacency) -> Adjacency:
    """Keeps links while both of their agents have less than the most neighbours."""
    n_agents = len(linked)
    agents, kept = np.arange(n_agents), np.zeros_like(linked)
    missing = np.minimum(linked.sum(axis=1), MOST_NEIGHBOURS)
    # Some long links keep the ways between agents short. If all agents are connected,
    # every agent has links of the same lengths: a circulant graph.
    long = [round(n_agents ** (k / 4)) for k in range(4)]
    for length in [*long, *range(1, n_agents // 2 + 1)]:
        if not missing.any():
            break
        others = (agents + length) % n_agents
        possible = linked[agents, others] & ~kept[agents, others]
        possible &= (missing > 0) & (missing[others] > 0)
        for agent in np.flatnonzero(possible).tolist():
            other = int(others[agent])
            if missing[agent] and missing[other] and not kept[agent, other]:
                kept[agent, other] = kept[other, agent] = True
                missing[agent] -= 1
                missing[other] -= 1
    return kept


def waves(edges: Edges, slots: int) -> list[Pairs]:
    """Groups edges into waves of `slots` edges.

    The last wave is filled up with self-loops: the agent of each slot with itself.
    """
    # Edges are sorted by offset first. If agents fill the slots, every wave of a ring
    # or a fully connected graph then holds each receiver exactly once, in order.
    offsets = (edges[:, 1] - edges[:, 0]) % slots
    edges = edges[np.lexsort((edges[:, 0], offsets))]
    result = []
    for start in range(0, len(edges), slots):
        wave = edges[start : start + slots]
        filled = np.tile(np.arange(slots, dtype=np.int32)[:, None], (1, 2))
        filled[: len(wave)] = wave
        result.append(Pairs(filled[:, 0], filled[:, 1], len(wave)))
    return result


def stack_wave(perms: EdgePerms, wave: Pairs) -> PairPerms:
    """Stacks the permutations of a wave's edges.

    The edges that fill up the wave have identities.
    """
    some = next(iter(perms.values()))
    identity = {
        group: np.broadcast_to(np.arange(perm.shape[-1]), perm.shape)
        for group, perm in some.items()
    }
    edges = zip(wave.references.tolist(), wave.permutees.tolist(), strict=True)
    rows = [perms.get(edge, identity) for edge in edges]
    return {
        group: np.stack([row[group] for row in rows]).astype(np.int32)
        for group in identity
    }


# Matching along them ==================================================================


@runtime_checkable
class Matcher(Protocol):
    """Matches stacked agents along edges.

    Attributes:
        by_activations: whether units are matched by their activations on examples.
    """

    by_activations: bool

    def both_ways(self, data: MergeData) -> bool:
        """Whether the inverse of the permutation from j to i aligns i with j."""
        ...

    def scorers(
        self,
        variables: PyTree,
        edge_waves: Sequence[Pairs],
        data: MergeData,
        stopwatch: Stopwatch,
    ) -> Iterable[Scorer]:
        """Makes the scorers, which rate permutations along edges.

        There are several if the examples are read as needed. Each rests on more of them
        than the one before.

        Args:
            variables: the agents' variables, stacked.
            edge_waves: the edges; at least one.
            data: the examples on which units are compared.
            stopwatch: measures the computations on the devices, by phase.
        """
        ...

    def search(self, problem: Problem, key: Key[Array, ""], /) -> PairPerms:
        """Finds good permutations, in the order of the waves' edges.

        Args:
            problem: a problem whose scorer is one of those that `scorers` has made.
            key: the randomness of the search; the key is consumed.
        """
        ...


class MatchedEdges(NamedTuple):
    """The result of matching along edges.

    Attributes:
        perms: the permutations of each edge, in the order of the edges.
        similarity: how well agents fit once they are aligned, within [-1, 1]: the mean
            over the pairs that were matched. None if there are no edges.
        n_batches: the number of batches of examples on which units were compared; 0 if
            no examples were needed.
    """

    perms: EdgePerms
    similarity: float | None
    n_batches: int = 0


def match_edges(
    matcher: Matcher | None,
    variables: PyTree,
    edges: Edges,
    data: MergeData,
    *,
    placement: Placement,
    joint: bool = False,
    stay: float = STAY.default,
    key: Key[Array, ""],
    stopwatch: Stopwatch,
) -> MatchedEdges:
    """Matches agents along edges.

    If the matcher works both ways, only one of two opposite edges is matched.

    Args:
        matcher: the way of matching; it may be None if there are no edges.
        variables: the agents' variables, stacked.
        edges: the edges to match.
        data: the examples on which units are compared.
        placement: the devices on which the agents live.
        joint: whether permutations must agree, that is, whether their product along
            every cycle must be the identity.
        stay: the score that a unit must gain to move.
        key: the randomness of the search; the key is consumed.
        stopwatch: measures the phase "assignment" and the matcher's own phases.

    Raises:
        OptionError: `stay` is negative or not finite.
    """
    if matcher is None or not len(edges):
        return MatchedEdges({}, None)
    both_ways, slots = matcher.both_ways(data), placement.slots
    edge_waves = waves(_one_way(edges, slots) if both_ways else edges, slots)
    pairs = np.concatenate([np.stack(w[:2], axis=1)[: w.real] for w in edge_waves])
    solver = (
        all_pairs_together(pairs, stay) if joint else every_pair_alone(len(pairs), stay)
    )

    def search(scorer: Scorer) -> Found:
        if (
            isinstance(scorer, ActivationScorer)
            and not joint
            and jax.process_count() > 1
        ):
            return search_local_pairs(
                matcher.search, scorer, edge_waves, placement, stay=stay, key=key
            )
        perms = matcher.search(Problem(scorer, solver), key)
        return Found(perms, scorer.similarity(perms))

    with stopwatch("assignment"):
        scorers = matcher.scorers(variables, edge_waves, data, stopwatch)
        scorer, (perms, similarity) = settle(scorers, search)
    found = _by_edge(pairs, perms)
    if both_ways:
        inverted = {
            group: np.argsort(perm, axis=-1).astype(np.int32)
            for group, perm in perms.items()
        }
        found |= _by_edge(pairs[:, ::-1], inverted)
    return MatchedEdges(
        {(i, j): found[i, j] for i, j in edges.tolist()},
        float(similarity.mean()),
        scorer.n_batches,
    )


def _by_edge(pairs: Edges, perms: PairPerms) -> EdgePerms:
    return {
        (i, j): {group: perm[e] for group, perm in perms.items()}
        for e, (i, j) in enumerate(pairs.tolist())
    }


def _one_way(edges: Edges, slots: int) -> Edges:
    """Drops one of two opposite edges, so that `waves` are as balanced as possible."""
    receivers, senders = edges.T
    offset, opposite_offset = (
        (senders - receivers) % slots,
        (receivers - senders) % slots,
    )
    second = (offset > opposite_offset) | (
        (offset == opposite_offset) & (receivers > senders)
    )
    opposite = set(map(tuple, edges[:, ::-1].tolist()))
    paired = np.array([edge in opposite for edge in map(tuple, edges.tolist())], bool)
    return edges[~(second & paired)]
