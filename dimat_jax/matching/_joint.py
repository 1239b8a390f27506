"""Cycle-consistent matching: permutations that agree with each other on any path.

Matched pair by pair, three networks may contradict each other: j's unit onto i's, k's
onto j's, and yet another of k's onto i's. Here every network i has one permutation Q_i
into a frame that all share, and P_ij = Q_i^-1 Q_j aligns j with i: round any cycle the
product is the identity. That is permutation synchronisation (Pachauri, Kondor & Singh
2013); merging networks this way is in the spirit of C2M3 (Crisostomi et al. 2024, arXiv
2405.17897). It takes N assignments instead of one for each pair.

What is maximised is the sum over pairs of <C_ij, P_ij>, C_ij the pair's scores, network
by network: with all others fixed, the best Q_i is one assignment.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import Any

import jax.numpy as jnp
import networkx as nx
import numpy as np
from jaxtyping import Array, Float, Int, Int32, Key

from dimat_jax.matching._activation import Activations, match_activations
from dimat_jax.matching._assignment import solve_assignment
from dimat_jax.matching._descent import PairPerms, Pairs, Solver, worth
from dimat_jax.matching._weight import match_weights
from dimat_jax.matching._weight_scores import Include, not_running_statistics
from dimat_jax.permutation import Perms, PermutationSpec, identity
from dimat_jax.tree import PyTree

__all__ = [
    "all_pairs_together",
    "joint_activation_matching",
    "joint_weight_matching",
    "synchronise",
]


def joint_activation_matching(
    spec: PermutationSpec,
    activations: Callable[[PyTree, Any], Activations],
    models: Sequence[PyTree],
    batches: Iterable[Any],
    *,
    stay: float = 0.0,
) -> list[Perms]:
    """Finds permutations that bring networks into the first one's frame, all at once.

    As `activation_matching` of every two of them, but so that they agree.

    Args:
        spec, activations, batches, stay: as for `activation_matching`.
        models: the networks' variables.

    Returns:
        perms for each network: the identity for the first, and such that
        `permutation.apply(spec, perms[i], models[i])` are all aligned.

    Raises:
        PermutationSpecError, ValueError: as `activation_matching`, and for no networks.
    """
    return _into_first_frame(
        spec,
        models,
        lambda pairs, solver: match_activations(
            spec, activations, models, pairs, solver, batches, stay=stay
        ),
    )


def joint_weight_matching(
    spec: PermutationSpec,
    models: Sequence[PyTree],
    *,
    key: Key[Array, ""],
    restarts: int = 1,
    stay: float = 0.0,
    include: Include = not_running_statistics,
) -> list[Perms]:
    """Finds permutations that bring networks into the first one's frame, all at once.

    As `weight_matching` of every two of them, but so that they agree.

    Args:
        spec, key, restarts, stay, include: as for `weight_matching`.
        models: the networks' variables.

    Returns:
        as `joint_activation_matching`.

    Raises:
        PermutationSpecError, ValueError: as `weight_matching`, and for no networks.
    """
    return _into_first_frame(
        spec,
        models,
        lambda pairs, solver: match_weights(
            spec,
            models,
            pairs,
            solver,
            [f"network {i}" for i in range(len(models))],
            key=key,
            restarts=restarts,
            stay=stay,
            include=include,
        ),
    )


def _into_first_frame(
    spec: PermutationSpec,
    models: Sequence[PyTree],
    match: Callable[[Pairs, Solver], PairPerms],
) -> list[Perms]:
    if not models:
        raise ValueError("joint matching needs at least one network")
    first = identity(spec, models[0])
    if len(models) == 1:
        return [first]
    # The pairs with the first network come first.
    ends = np.array(list(combinations(range(len(models)), 2)), np.int32)
    pairs = Pairs(ends[:, 0], ends[:, 1], len(ends))
    perms = match(pairs, all_pairs_together(ends))
    return [first] + [
        {group: jnp.asarray(perm[i]) for group, perm in perms.items()}
        for i in range(len(models) - 1)
    ]


def all_pairs_together(pairs: Int[np.ndarray, "pairs 2"]) -> Solver:
    """Cycle-consistent permutations; connected pairs stand or fall together."""
    blocks = np.zeros(len(pairs), np.int64)
    for number, own in enumerate(_components(pairs)):
        blocks[own] = number
    return Solver(lambda scores, perms: synchronise(scores, pairs, perms), blocks)


def synchronise(
    scores: Float[np.ndarray, "pairs units units"],
    pairs: Int[np.ndarray, "pairs 2"],
    perms: Int32[np.ndarray, "pairs units"],
) -> Int32[np.ndarray, "pairs units"]:
    """Permutations that agree with each other, of large total score.

    Climbs from the better of two starts: the permutations so far, and networks brought
    into a common frame one after the other, each by its pairs with those before it.

    Args:
        scores: of each pair.
        pairs: of networks: (reference, permutee).
        perms: of each pair, so far; they agree.

    Returns:
        for each pair `perm`, with a total score of no less than that of `perms`.
    """
    scores = np.asarray(scores)
    result = np.array(perms)
    for own in _components(pairs):
        component = _Component(scores, pairs, own)
        starts = [component.frames(perms), component.one_by_one()]
        worths = [worth(scores[own], component.perms(x)).sum() for x in starts]
        climbed = component.climb(starts[int(np.argmax(worths))])
        result[own] = component.perms(climbed)
    return result


def _components(pairs: Int[np.ndarray, "pairs 2"]) -> list[np.ndarray]:
    """For each connected component its pairs, by index."""
    graph = nx.Graph()
    graph.add_edges_from(pairs.tolist())
    return [
        np.flatnonzero(np.isin(pairs[:, 0], list(networks)))
        for networks in nx.connected_components(graph)
    ]


_Frames = dict[int, np.ndarray]
"""For each network int32[units]: `Q[c]` is its unit at place c of the common frame."""


class _Component:
    """Networks that are connected by pairs.

    Args:
        scores, pairs: as for `synchronise`.
        own: the indices of this component's pairs.
    """

    def __init__(self, scores: np.ndarray, pairs: np.ndarray, own: np.ndarray):
        self._scores = scores
        self._ends = {int(p): (int(pairs[p, 0]), int(pairs[p, 1])) for p in own}
        self._pairs_of: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for pair, (reference, permutee) in self._ends.items():
            self._pairs_of[reference].append((pair, permutee))
            self._pairs_of[permutee].append((pair, reference))
        graph, root = nx.Graph(), min(self._pairs_of)
        graph.add_edges_from(self._ends.values())
        self._tree = list(nx.bfs_edges(graph, root, sort_neighbors=sorted))
        self._order = [root, *(child for _, child in self._tree)]

    def frames(self, perms: np.ndarray) -> _Frames:
        """The frames that permutations of pairs amount to; the root's is its own."""
        frames = {self._order[0]: np.arange(perms.shape[1], dtype=np.int32)}
        for parent, child in self._tree:
            pair = next(
                pair for pair, other in self._pairs_of[child] if other == parent
            )
            inverted = self._ends[pair][0] == child
            perm = _inverse(perms[pair]) if inverted else perms[pair]
            frames[child] = perm[frames[parent]]
        return frames

    def perms(self, frames: _Frames) -> np.ndarray:
        """P_ij = Q_i^-1 Q_j for each pair."""
        return np.stack(
            [frames[j][_inverse(frames[i])] for i, j in self._ends.values()]
        )

    def one_by_one(self) -> _Frames:
        """Brings each network into the frame by its pairs with those before it."""
        frames = {self._order[0]: np.arange(self._scores.shape[-1], dtype=np.int32)}
        for network in self._order[1:]:
            frames[network] = solve_assignment(self._places(network, frames))
        return frames

    def climb(self, frames: _Frames) -> _Frames:
        """Assigns one network after the other anew, until none gains anything."""
        frames = dict(frames)
        # Sums of many float32 scores in two orders differ by more than nothing.
        least = (
            1e-9
            * self._scores.shape[-1]
            * max(np.abs(self._scores[pair]).max() for pair in self._ends)
        )
        waiting = list(self._order)
        while waiting:
            network = waiting.pop(0)
            places = self._places(network, frames)
            moved = solve_assignment(places)
            if worth(places, moved) - worth(places, frames[network]) > least:
                frames[network] = moved
                others = {other for _, other in self._pairs_of[network]}
                waiting += sorted(others - set(waiting))
        return frames

    def _places(self, network: int, frames: _Frames) -> np.ndarray:
        """What each unit of a network is worth at each place: float64 [place, unit]."""
        places = np.zeros(self._scores.shape[1:])
        for pair, other in self._pairs_of[network]:
            if other in frames:
                scores = self._scores[pair]
                is_reference = self._ends[pair][0] == network
                places += (scores.T if is_reference else scores)[frames[other]]
        return places


def _inverse(perm: np.ndarray) -> np.ndarray:
    return np.argsort(perm).astype(np.int32)
