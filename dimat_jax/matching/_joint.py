"""Cycle-consistent matching: permutations that agree with each other on any path.

If three networks are matched pair by pair, the results can contradict each other: a
unit of k goes to a unit of j, which goes to a unit of i; but when k is matched with i
directly, another unit of k goes to this unit of i. Here every network i has one
permutation Q_i into a frame that all networks share, and P_ij = Q_i^-1 Q_j aligns j
with i. Along any cycle the product of these is the identity. This is permutation
synchronisation (Pachauri, Kondor & Singh 2013); merging networks in this way is in the
spirit of C2M3 (Crisostomi et al. 2024, arXiv 2405.17897). It takes N assignments
instead of one for each pair.

The search maximises the sum over pairs of <C_ij, P_ij>, where C_ij are the pair's
scores. It treats one network after the other: while all others are fixed, the best Q_i
is one assignment.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import Any

import jax.numpy as jnp
import networkx as nx
import numpy as np
from jaxtyping import Array, Float, Int, Int32, Key

from dimat_jax.matching._activation import Activations, match_activations
from dimat_jax.matching._assignment import STAY, solve_assignment
from dimat_jax.matching._descent import PairPerms, Pairs, Solver, total_score
from dimat_jax.matching._errors import MatchingError
from dimat_jax.matching._weight import RESTARTS, match_weights
from dimat_jax.matching._weight_scores import Include
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
    stay: float = STAY.default,
    as_needed: bool = False,
) -> list[Perms]:
    """Finds permutations that bring networks into the first one's frame, all at once.

    Every two networks are matched as by `activation_matching`, under the condition that
    all permutations agree with each other.

    Args:
        spec: the symmetry, with a tap for each group.
        activations: `activations(variables, inputs) -> {tap: array}`.
        models: the variables of each network.
        batches: inputs, one batch at a time.
        stay: a unit moves only if its correlation gains more than this.
        as_needed: whether to read only as many batches as it takes, as for
            `activation_matching`.

    Returns:
        perms for each network: the identity for the first, and such that
        `permutation.apply(spec, perms[i], models[i])` are all aligned.

    Raises:
        PermutationSpecError: as of `activation_matching`.
        MatchingError: as of `activation_matching`, and if there are no networks.
    """
    return _into_first_frame(
        spec,
        models,
        stay,
        lambda pairs, solver: match_activations(
            spec, activations, models, pairs, solver, batches, as_needed=as_needed
        ),
    )


def joint_weight_matching(
    spec: PermutationSpec,
    models: Sequence[PyTree],
    *,
    key: Key[Array, ""],
    restarts: int = RESTARTS.default,
    stay: float = STAY.default,
    include: Include | None = None,
) -> list[Perms]:
    """Finds permutations that bring networks into the first one's frame, all at once.

    Every two networks are matched as by `weight_matching`, under the condition that all
    permutations agree with each other.

    Args:
        spec: the symmetry; taps are not needed.
        models: the variables of each network.
        key: draws the order of the groups; consumed.
        restarts: the number of orders to try; the best permutations win.
        stay: a unit moves only if its mean score gains more than this.
        include: which leaves count, by path; see `weight_matching`.

    Returns:
        as `joint_activation_matching`.

    Raises:
        PermutationSpecError: as of `weight_matching`.
        MatchingError: as of `weight_matching`, and if there are no networks.
    """
    return _into_first_frame(
        spec,
        models,
        stay,
        lambda pairs, solver: match_weights(
            spec,
            models,
            pairs,
            solver,
            [f"network {i}" for i in range(len(models))],
            key=key,
            restarts=restarts,
            include=include or spec.is_weight,
        ),
    )


def _into_first_frame(
    spec: PermutationSpec,
    models: Sequence[PyTree],
    stay: float,
    match: Callable[[Pairs, Solver], PairPerms],
) -> list[Perms]:
    """Matches all pairs jointly, and returns those with the first network.

    `match(pairs, solver)` finds the permutations of the pairs that the solver allows.
    """
    if not models:
        raise MatchingError("joint matching needs at least one network")
    first = identity(spec, models[0])
    if len(models) == 1:
        return [first]
    # The pairs with the first network come first.
    ends = np.array(list(combinations(range(len(models)), 2)), np.int32)
    pairs = Pairs(ends[:, 0], ends[:, 1], len(ends))
    perms = match(pairs, all_pairs_together(ends, stay))
    return [first] + [
        {group: jnp.asarray(perm[i]) for group, perm in perms.items()}
        for i in range(len(models) - 1)
    ]


def all_pairs_together(
    pairs: Int[np.ndarray, "pairs 2"], stay: float = STAY.default
) -> Solver:
    """Only permutations that agree along every cycle are allowed.

    Pairs that are connected with each other are one block.
    """
    blocks = np.zeros(len(pairs), np.int64)
    for number, own in enumerate(_components(pairs)):
        blocks[own] = number

    def solve(scores: np.ndarray, perms: np.ndarray) -> np.ndarray:
        solved = np.empty_like(perms)
        for layer in np.ndindex(perms.shape[1:-1]):
            own = (slice(None), *layer)
            solved[own] = synchronise(scores[own], pairs, perms[own])
        return solved

    return Solver(solve, blocks, stay)


def synchronise(
    scores: Float[np.ndarray, "pairs units units"],
    pairs: Int[np.ndarray, "pairs 2"],
    perms: Int32[np.ndarray, "pairs units"],
) -> Int32[np.ndarray, "pairs units"]:
    """Finds permutations that agree with each other and have a large total score.

    The search starts from the better of two starting points: the permutations so far,
    and networks that are brought into a common frame one after the other, each by its
    pairs with the networks before it.

    Args:
        scores: the scores of each pair.
        pairs: the networks of each pair: (reference, permutee).
        perms: the permutations of each pair so far, which agree with each other.

    Returns:
        for each pair a permutation; their total score is at least that of `perms`.
    """
    scores = np.asarray(scores)
    result = np.array(perms)
    for own in _components(pairs):
        component = _Component(scores, pairs, own)
        starts = [component.frames(perms), component.one_by_one()]
        totals = [total_score(scores[own], component.perms(x)).sum() for x in starts]
        improved = component.improve(starts[int(np.argmax(totals))])
        result[own] = component.perms(improved)
    return result


def _components(pairs: Int[np.ndarray, "pairs 2"]) -> list[np.ndarray]:
    """For each connected component its pairs, by index."""
    graph = nx.Graph()
    graph.add_edges_from(pairs.tolist())
    number_of = {
        network: number
        for number, networks in enumerate(nx.connected_components(graph))
        for network in networks
    }
    own: dict[int, list[int]] = defaultdict(list)
    for pair, network in enumerate(pairs[:, 0].tolist()):
        own[number_of[network]].append(pair)
    return [np.array(own[number]) for number in sorted(own)]


_Frames = dict[int, np.ndarray]
"""Each network's Q, int32[units]: its unit `Q[c]` is at place c of the common frame."""


class _Component:
    """One set of networks that pairs connect with each other.

    Args:
        scores: the scores of all pairs.
        pairs: the networks of all pairs.
        own: the indices of the pairs that belong to this component.
    """

    def __init__(self, scores: np.ndarray, pairs: np.ndarray, own: np.ndarray):
        self._scores = scores
        self._ends = {int(p): (int(pairs[p, 0]), int(pairs[p, 1])) for p in own}
        self._pairs_of: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for pair, (reference, permutee) in self._ends.items():
            self._pairs_of[reference].append((pair, permutee))
            self._pairs_of[permutee].append((pair, reference))
        self._pair_of_link = {
            link: pair
            for pair, ends in self._ends.items()
            for link in (ends, ends[::-1])
        }
        graph, root = nx.Graph(), min(self._pairs_of)
        graph.add_edges_from(self._ends.values())
        self._tree = list(nx.bfs_edges(graph, root, sort_neighbors=sorted))
        self._order = [root, *(child for _, child in self._tree)]

    def frames(self, perms: np.ndarray) -> _Frames:
        """The frames that pairs' permutations stand for; the root keeps its order."""
        frames = {self._order[0]: np.arange(perms.shape[1], dtype=np.int32)}
        for parent, child in self._tree:
            pair = self._pair_of_link[parent, child]
            inverted = self._ends[pair][0] == child
            perm = _inverse(perms[pair]) if inverted else perms[pair]
            frames[child] = perm[frames[parent]]
        return frames

    def perms(self, frames: _Frames) -> np.ndarray:
        """P_ij = Q_i^-1 Q_j for each pair."""
        back = {network: _inverse(frame) for network, frame in frames.items()}
        return np.stack([frames[j][back[i]] for i, j in self._ends.values()])

    def one_by_one(self) -> _Frames:
        """Brings each network into the frame by its pairs with earlier networks."""
        frames = {self._order[0]: np.arange(self._scores.shape[-1], dtype=np.int32)}
        for network in self._order[1:]:
            frames[network] = solve_assignment(self._places(network, frames))
        return frames

    def improve(self, frames: _Frames) -> _Frames:
        """Solves one network's assignment after the other until none gains anything."""
        frames = dict(frames)
        # Two sums of the same float32 scores in another order differ by rounding. A
        # gain must be larger than this difference, or the search would never end.
        least = (
            1e-9
            * self._scores.shape[-1]
            * max(np.abs(self._scores[pair]).max() for pair in self._ends)
        )
        waiting, is_waiting = deque(self._order), set(self._order)
        while waiting:
            network = waiting.popleft()
            is_waiting.remove(network)
            places = self._places(network, frames)
            assigned = solve_assignment(places)
            gain = total_score(places, assigned) - total_score(places, frames[network])
            if gain > least:
                frames[network] = assigned
                others = {other for _, other in self._pairs_of[network]} - is_waiting
                waiting.extend(sorted(others))
                is_waiting |= others
        return frames

    def _places(self, network: int, frames: _Frames) -> np.ndarray:
        """The score of each unit of a network at each place: float64 [place, unit]."""
        places = np.zeros(self._scores.shape[1:])
        for pair, other in self._pairs_of[network]:
            if other in frames:
                scores = self._scores[pair]
                is_reference = self._ends[pair][0] == network
                places += (scores.T if is_reference else scores)[frames[other]]
        return places


def _inverse(perm: np.ndarray) -> np.ndarray:
    return np.argsort(perm).astype(np.int32)
