"""Matching group by group: the search that every way of matching uses.

How well two networks fit is a function of the permutations of all their groups. While
the permutations of all other groups are held fixed, finding one group's permutation is
a linear assignment problem. So the coordinates of the search are the groups, and one
step solves one group's assignment exactly. One step for each group is enough where the
groups do not depend on each other (activations). Where they do (weights), steps are
repeated until none of them gains anything (Ainsworth et al. 2023, arXiv 2209.04836).

Many pairs of networks are matched at once. A `Scorer` says how good permutations are. A
`Solver` says which permutations are allowed and how strongly units prefer to stay where
they are. Together they are a `Problem`.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, Int32

from dimat_jax.matching._assignment import STAY, prefer_staying, solve_assignment

__all__ = [
    "MatchedGroups",
    "PairPerms",
    "Pairs",
    "Problem",
    "Scorer",
    "Solver",
    "better",
    "coordinate_descent",
    "every_pair_alone",
    "identities",
    "improve_group",
    "objective",
    "pair_score",
    "total_score",
    "two_networks",
]

PairPerms = dict[str, Int32[np.ndarray, "pairs *_layers _units"]]
"""For each group and each pair, the permutation that aligns the permutee."""


class Pairs(NamedTuple):
    """Pairs of networks. Entries at the end may only fill up the arrays.

    Attributes:
        references: the index of each pair's reference, int32.
        permutees: the index of each pair's permutee, int32.
        real: the number of entries, from the start, that are pairs to match.
    """

    references: Int32[np.ndarray, " length"]
    permutees: Int32[np.ndarray, " length"]
    real: int


def two_networks() -> Pairs:
    """The single pair of two networks: the first is the reference."""
    return Pairs(np.zeros(1, np.int32), np.ones(1, np.int32), 1)


class MatchedGroups(NamedTuple):
    """The groups whose permutations can be relied on during a first pass.

    Attributes:
        groups: the names of the groups that have been matched.
        slack: the number of axes of unmatched groups that a counting leaf may have.
    """

    groups: frozenset[str]
    slack: int = 0


@runtime_checkable
class Scorer(Protocol):
    """How good permutations are, for some pairs of networks.

    Attributes:
        n_pairs: the number of pairs.
        n_batches: the number of batches of examples on which the scores rest; 0 if they
            rest on weights alone.
    """

    n_pairs: int
    n_batches: int

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each group's permutation; see `permutation.group_shapes`."""
        ...

    def scores(
        self, group: str, perms: PairPerms, matched: MatchedGroups | None = None
    ) -> Float[np.ndarray, "pairs *layers units units"]:
        """The score of matching each two units of a group, the other groups fixed.

        Each layer of a stacked group has scores of its own.

        Args:
            group: the group whose units are scored.
            perms: the permutations of all groups.
            matched: the groups whose permutations count; None: all groups.
        """
        ...

    def scale(
        self, group: str, matched: MatchedGroups | None = None
    ) -> Float[np.ndarray, " pairs"]:
        """The size of a group's scores: divided by it, their mean is in [-1, 1]."""
        ...

    def neighbours(self, group: str) -> Collection[str]:
        """The groups whose scores depend on this group's permutation.

        If the group itself is among them, its scores are a linear approximation.
        """
        ...

    def total(self, perms: PairPerms) -> Float[np.ndarray, " pairs"]:
        """The sum that all groups' scores are parts of.

        When one group's permutation changes, the total changes by exactly as much as
        the sum of the scores that the permutation picks, unless the group's scores are
        a linear approximation.
        """
        ...

    def similarity(self, perms: PairPerms) -> Float[np.ndarray, " pairs"]:
        """How well the permuted networks fit, within [-1, 1]: a number to report."""
        ...


@dataclasses.dataclass(frozen=True)
class Solver:
    """Which permutations of pairs are allowed, and which are preferred.

    Attributes:
        solve: `solve(scores, perms) -> perms` finds one group's permutations from the
            scores `[pairs, *layers, units, units]` and the permutations
            `[pairs, *layers, units]` so far. The result is at least as good as those.
        blocks: a number for each pair; pairs with the same number must agree with each
            other, so their permutations are accepted or rejected together.
        stay: how much a unit's mean score must gain for it to move.

    Raises:
        OptionError: `stay` is negative or not finite.
    """

    solve: Callable[[np.ndarray, np.ndarray], np.ndarray]
    blocks: Int[np.ndarray, " pairs"]
    stay: float = STAY.default

    def __post_init__(self):
        STAY.check(self.stay)


def every_pair_alone(n_pairs: int, stay: float = STAY.default) -> Solver:
    """Any permutation is allowed for each pair: it gets its best assignment."""
    return Solver(
        lambda scores, perms: solve_assignment(scores), np.arange(n_pairs), stay
    )


S = TypeVar("S", bound=Scorer, covariant=True)


@dataclasses.dataclass(frozen=True)
class Problem(Generic[S]):
    """One matching problem.

    Attributes:
        scorer: how good permutations are.
        solver: which permutations are allowed and preferred.
    """

    scorer: S
    solver: Solver


def identities(scorer: Scorer) -> PairPerms:
    """The permutations that leave every unit where it is."""
    return {
        group: np.tile(np.arange(units, dtype=np.int32), (scorer.n_pairs, *layers, 1))
        for group, (*layers, units) in scorer.shapes.items()
    }


def total_score(
    scores: Float[np.ndarray, "*batch units units"],
    perms: Int[np.ndarray, "*batch units"],
) -> Float[np.ndarray, "*batch"]:
    """The sum of the scores that a permutation picks, in float64."""
    picked = np.take_along_axis(scores, perms[..., None], axis=-1)[..., 0]
    return np.asarray(picked.sum(axis=-1, dtype=np.float64))


def pair_score(
    scores: Float[np.ndarray, "pairs *layers units units"],
    perms: Int[np.ndarray, "pairs *layers units"],
) -> Float[np.ndarray, " pairs"]:
    """The sum of the scores that permutations pick, over all layers of a group."""
    return _over_layers(total_score(scores, perms))


def _over_layers(values: np.ndarray) -> np.ndarray:
    """The sum for each pair."""
    return values.sum(axis=tuple(range(1, values.ndim)))


def objective(problem: Problem, perms: PairPerms) -> Float[np.ndarray, " pairs"]:
    """What coordinate descent never decreases.

    It is the scorer's total, and in addition `stay`, in units of the group's scale, for
    every unit that stays where it is.
    """
    scorer, solver = problem.scorer, problem.solver
    staying = sum(
        solver.stay
        * scorer.scale(group)
        * _over_layers(perm == np.arange(perm.shape[-1]))
        for group, perm in perms.items()
    )
    return scorer.total(perms) + staying


def improve_group(
    problem: Problem,
    group: str,
    perms: PairPerms,
    *,
    tolerance: float = 0.0,
    matched: MatchedGroups | None = None,
) -> PairPerms:
    """Solves one group's assignment, and keeps the result where it gains enough.

    Args:
        problem: what to solve.
        group: the group to be matched.
        perms: the permutations of all groups so far.
        tolerance: how much the group's mean score must gain for a pair's permutation
            to be replaced.
        matched: the groups whose permutations count, as in `Scorer.scores`.

    Returns:
        the permutations of all groups; `perms` itself if no pair gained.
    """
    scorer, solver = problem.scorer, problem.solver
    scale = scorer.scale(group, matched)
    scores = scorer.scores(group, perms, matched)
    of_layers = scale.reshape(-1, *[1] * (scores.ndim - 3))
    of_layers = np.broadcast_to(of_layers, scores.shape[:-2])
    scores = prefer_staying(scores, solver.stay, of_layers)
    old = perms[group]
    new = {**perms, group: solver.solve(scores, old)}
    if matched is None and group in scorer.neighbours(group):
        gain = objective(problem, new) - objective(problem, perms)
    else:
        gain = pair_score(scores, new[group]) - pair_score(scores, old)
    gains = _over_blocks(solver, gain) > _over_blocks(
        solver, tolerance * scale * math.prod(scorer.shapes[group])
    )
    return _choose(gains, new, perms) if gains.any() else perms


def coordinate_descent(
    problem: Problem,
    perms: PairPerms,
    *,
    tolerance: float = 0.0,
    rng: np.random.Generator | None = None,
) -> PairPerms:
    """Improves one group after the other until no group gains anything.

    Args:
        problem: what to solve.
        perms: the permutations to start from.
        tolerance: as of `improve_group`. Where groups depend on each other it must be
            above 0, so that rounding errors do not count as gains.
        rng: draws the order of the groups; None: the scorer's order.
    """
    scorer = problem.scorer
    waiting = list(scorer.shapes)
    while waiting:
        if rng is not None:
            rng.shuffle(waiting)
        changed: set[str] = set()
        for group in waiting:
            improved = improve_group(problem, group, perms, tolerance=tolerance)
            # A group's scores depend only on its neighbouring groups, so a group is
            # solved again only after one of these has changed.
            changed.discard(group)
            if improved is not perms:
                changed.update(scorer.neighbours(group))
            perms = improved
        waiting = [group for group in scorer.shapes if group in changed]
    return perms


def better(problem: Problem, one: PairPerms, other: PairPerms) -> PairPerms:
    """For each block of pairs those with the larger objective; `one` if equal."""
    gain = objective(problem, other) - objective(problem, one)
    return _choose(_over_blocks(problem.solver, gain) > 0, other, one)


def _over_blocks(solver: Solver, values: np.ndarray) -> np.ndarray:
    """For each pair the sum over its block."""
    return np.bincount(solver.blocks, values)[solver.blocks]


def _choose(which: np.ndarray, one: Mapping[str, Any], other: Mapping[str, Any]):
    """Takes `one` for the pairs where `which` is true, and `other` elsewhere."""

    def choose(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.where(which.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return {group: choose(one[group], other[group]) for group in one}
