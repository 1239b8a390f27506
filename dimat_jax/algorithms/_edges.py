"""Matching along the edges of a graph, all agents at once.

Edges are worked off in waves of as many edges as there are agents. So a wave is
stacked, sharded and balanced like the agents themselves, whatever the graph is: a ring
takes two waves, a fully connected graph N - 1, a star two. Where matching j with i also
tells how to match i with j (by the inverse permutation), half of the edges are enough.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import networkx as nx
import numpy as np
from jaxtyping import Array, Int, Key

from dimat_jax._stopwatch import Stopwatch
from dimat_jax.algorithms.base import MergeData
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
from dimat_jax.topology import Adjacency, components
from dimat_jax.tree import PyTree

__all__ = [
    "EdgePerms",
    "Edges",
    "MatchedEdges",
    "Matcher",
    "every_edge",
    "match_edges",
    "no_edges",
    "spanning_forest",
    "stack_wave",
    "waves",
]

Edges = Int[np.ndarray, "_edges 2"]
"""Pairs (receiver, sender): the sender is to be aligned with the receiver."""

EdgePerms = dict[tuple[int, int], dict[str, np.ndarray]]
"""For every edge (receiver, sender), what aligns the sender with the receiver."""


# Which edges ==========================================================================


def every_edge(active_edges: Adjacency) -> Edges:
    """All edges of a graph."""
    return np.argwhere(active_edges)


def no_edges(active_edges: Adjacency) -> Edges:
    """No edge at all."""
    del active_edges
    return np.zeros((0, 2), np.int64)


def spanning_forest(active_edges: Adjacency) -> Edges:
    """Edges (parent, child) away from each component's lowest agent, breadth first."""
    graph = nx.from_numpy_array(active_edges | active_edges.T)
    edges = [
        edge
        for component in components(active_edges)
        for edge in nx.bfs_edges(graph, component[0], sort_neighbors=sorted)
    ]
    return np.array(edges, np.int64).reshape(-1, 2)


def waves(edges: Edges, slots: int) -> list[Pairs]:
    """Groups edges into waves of `slots`, filled up with self-loops of agent 0."""
    # Edges are sorted by offset first. If agents fill the slots, every wave of a ring
    # or a fully connected graph then holds each receiver exactly once, in order.
    offsets = (edges[:, 1] - edges[:, 0]) % slots
    edges = edges[np.lexsort((edges[:, 0], offsets))]
    result = []
    for start in range(0, len(edges), slots):
        wave = edges[start : start + slots]
        filled = np.zeros((slots, 2), np.int32)
        filled[: len(wave)] = wave
        result.append(Pairs(filled[:, 0], filled[:, 1], len(wave)))
    return result


def stack_wave(perms: EdgePerms, wave: Pairs) -> PairPerms:
    """The permutations of a wave's edges; identities where the wave is filled up."""
    some = next(iter(perms.values()))
    identity = {group: np.arange(len(perm)) for group, perm in some.items()}
    edges = zip(wave.references.tolist(), wave.permutees.tolist(), strict=True)
    rows = [perms.get(edge, identity) for edge in edges]
    return {
        group: np.stack([row[group] for row in rows]).astype(np.int32)
        for group in identity
    }


# Matching along them ==================================================================


@runtime_checkable
class Matcher(Protocol):
    """Matches stacked agents along edges."""

    def both_ways(self, data: MergeData) -> bool:
        """Whether aligning j with i tells how to align i with j: by the inverse."""
        ...

    def scorer(
        self,
        variables: PyTree,
        edge_waves: Sequence[Pairs],
        data: MergeData,
        stopwatch: Stopwatch,
    ) -> Scorer:
        """How good permutations along edges are.

        Args:
            variables: the agents' variables, stacked.
            edge_waves: the edges; at least one.
            data: the examples to look at.
            stopwatch: books what is computed on the devices, by phase.
        """
        ...

    def search(self, problem: Problem, key: Key[Array, ""], /) -> PairPerms:
        """Finds good permutations, in the order of the waves' edges.

        Args:
            problem: its scorer is what `scorer` returned.
            key: consumed.
        """
        ...

    def score_bytes(self, sizes: Sequence[int]) -> int:
        """The bytes of one pair's scores; 0 if they follow from the weights alone.

        Args:
            sizes: each group's number of units.
        """
        ...


class MatchedEdges(NamedTuple):
    """What matching along edges found.

    Attributes:
        perms: the permutations of each edge, in the order of the edges.
        similarity: how well agents fit once they are aligned, within [-1, 1]: the mean
            over the pairs that were matched. None if there are no edges.
    """

    perms: EdgePerms
    similarity: float | None


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
    """Matches agents along edges; of two opposite edges one if it tells the other.

    Args:
        matcher: how agents are matched; it may be None if there are no edges.
        variables: the agents' variables, stacked.
        edges: the edges to match.
        data: the examples to look at.
        placement: where the agents live.
        joint: whether permutations must agree: be the identity along any cycle.
        stay: how much a unit must gain to move.
        key: consumed.
        stopwatch: books the phase "assignment", and what the matcher books.

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
    with stopwatch("assignment"):
        scorer = matcher.scorer(variables, edge_waves, data, stopwatch)
        perms = matcher.search(Problem(scorer, solver), key)
        similarity = float(scorer.similarity(perms).mean())
    found = _by_edge(pairs, perms)
    if both_ways:
        inverted = {
            group: np.argsort(perm, axis=1).astype(np.int32)
            for group, perm in perms.items()
        }
        found |= _by_edge(pairs[:, ::-1], inverted)
    return MatchedEdges({(i, j): found[i, j] for i, j in edges.tolist()}, similarity)


def _by_edge(pairs: Edges, perms: PairPerms) -> EdgePerms:
    return {
        (i, j): {group: perm[e] for group, perm in perms.items()}
        for e, (i, j) in enumerate(pairs.tolist())
    }


def _one_way(edges: Edges, slots: int) -> Edges:
    """Of two opposite edges the one that makes `waves` most balanced."""
    receivers, senders = edges.T
    there, back = (senders - receivers) % slots, (receivers - senders) % slots
    second = (there > back) | ((there == back) & (receivers > senders))
    opposite = set(map(tuple, edges[:, ::-1].tolist()))
    paired = np.array([edge in opposite for edge in map(tuple, edges.tolist())], bool)
    return edges[~(second & paired)]
