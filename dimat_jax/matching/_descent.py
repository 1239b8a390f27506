"""Matching group by group: the one driver behind every way of matching.

How well two networks fit is a function of the permutations of all their groups. With
all groups but one held fixed it is, in that group's permutation, a linear assignment
problem. So coordinates are groups, and a step is an exact assignment: one is enough
where groups do not depend on each other (activations), and steps are repeated until
none gains anything where they do (weights; Ainsworth et al. 2023, arXiv 2209.04836).

Many pairs of networks are matched at once. What a permutation is worth comes from a
`Scorer`; which permutations are allowed, any for each pair or only such as agree with
each other, is a `Solver`'s concern.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, Int32

from dimat_jax.matching._assignment import prefer_staying, solve_assignment

__all__ = [
    "Known",
    "PairPerms",
    "Pairs",
    "Scorer",
    "Solver",
    "better",
    "descend",
    "every_pair_alone",
    "identities",
    "improve",
    "total_worth",
    "worth",
]

PairPerms = dict[str, Int32[np.ndarray, "pairs units"]]
"""For each group and pair the permutation that aligns the permutee."""


class Pairs(NamedTuple):
    """Pairs of stacked networks, by index; they may be filled up to some length.

    Attributes:
        references: int32[length].
        permutees: int32[length].
        real: how many of them, from the start, count.
    """

    references: np.ndarray
    permutees: np.ndarray
    real: int


class Known(NamedTuple):
    """What can be relied on before all groups have been matched.

    Attributes:
        groups: that have been matched.
        slack: how many axes of other groups a leaf may have and count all the same.
    """

    groups: frozenset[str]
    slack: int = 0


@runtime_checkable
class Scorer(Protocol):
    """What permutations are worth, for some pairs of networks.

    Attributes:
        n_pairs: how many pairs.
    """

    n_pairs: int

    @property
    def sizes(self) -> Mapping[str, int]:
        """Each group's number of units."""
        ...

    def scores(
        self, group: str, perms: PairPerms, known: Known | None = None
    ) -> Float[np.ndarray, "pairs units units"]:
        """What matching each two units of a group is worth, the other groups fixed.

        Args:
            group: whose units.
            perms: of all groups.
            known: what to rely on; None: on all of `perms`.
        """
        ...

    def scale(
        self, group: str, known: Known | None = None
    ) -> Float[np.ndarray, " pairs"]:
        """What the scores are to be divided by for means over units within [-1, 1]."""
        ...

    def neighbours(self, group: str) -> Collection[str]:
        """The groups whose scores depend on this group's permutation.

        With the group itself among them, scores are a linear approximation.
        """
        ...

    def similarity(self, perms: PairPerms) -> Float[np.ndarray, " pairs"]:
        """How well the permuted networks fit, within [-1, 1]."""
        ...


class Solver(NamedTuple):
    """Finds one group's permutations for all pairs.

    Attributes:
        solve: `solve(scores, perms) -> perms`, from the scores `[pairs, units, units]`
            and the permutations `[pairs, units]` so far; at least as good as they are.
        blocks: int[pairs]: pairs of the same number stand or fall together.
    """

    solve: Callable[[np.ndarray, np.ndarray], np.ndarray]
    blocks: Int[np.ndarray, " pairs"]


def every_pair_alone(n_pairs: int) -> Solver:
    """Each pair's best assignment, whatever the others'."""
    return Solver(lambda scores, perms: solve_assignment(scores), np.arange(n_pairs))


def identities(scorer: Scorer) -> PairPerms:
    """The permutations that leave every unit where it is."""
    return {
        group: np.tile(np.arange(size, dtype=np.int32), (scorer.n_pairs, 1))
        for group, size in scorer.sizes.items()
    }


def worth(
    scores: Float[np.ndarray, "*batch units units"],
    perms: Int[np.ndarray, "*batch units"],
) -> Float[np.ndarray, "*batch"]:
    """The sum of the scores that a permutation picks, in float64."""
    picked = np.take_along_axis(scores, perms[..., None], axis=-1)[..., 0]
    return picked.sum(axis=-1, dtype=np.float64)


def total_worth(
    scorer: Scorer, perms: PairPerms, stay: float
) -> Float[np.ndarray, " pairs"]:
    """What never decreases: the similarity, and `stay` for each unit that stays."""
    staying = sum(
        stay * scorer.scale(group) * (perm == np.arange(perm.shape[-1])).sum(axis=-1)
        for group, perm in perms.items()
    )
    return scorer.similarity(perms) + staying


def improve(
    scorer: Scorer,
    solver: Solver,
    group: str,
    perms: PairPerms,
    *,
    stay: float,
    tolerance: float = 0.0,
    known: Known | None = None,
) -> PairPerms:
    """Matches one group anew, where that gains more than the tolerance.

    Args:
        scorer: what permutations are worth.
        solver: which are allowed.
        group: to be matched.
        perms: of all groups, so far.
        stay: what a unit's mean score must gain for it to move.
        tolerance: what a group's mean score must gain for anything to move.
        known: as in `Scorer.scores`.

    Returns:
        the permutations of all groups; `perms` itself if nothing gained.
    """
    scale = scorer.scale(group, known)
    scores = scorer.scores(group, perms, known)
    scores = prefer_staying(scores, stay, scale)
    old = perms[group]
    new = {**perms, group: solver.solve(scores, old)}
    if known is None and group in scorer.neighbours(group):
        gain = total_worth(scorer, new, stay) - total_worth(scorer, perms, stay)
    else:
        gain = worth(scores, new[group]) - worth(scores, old)
    gains = _over_blocks(solver, gain) > _over_blocks(
        solver, tolerance * scale * scorer.sizes[group]
    )
    return _choose(gains, new, perms) if gains.any() else perms


def descend(
    scorer: Scorer,
    solver: Solver,
    perms: PairPerms,
    *,
    stay: float,
    tolerance: float = 0.0,
    rng: np.random.Generator | None = None,
) -> PairPerms:
    """Improves group after group until no group gains anything.

    Arguments as of `improve`; `rng` draws the order of the groups, if given. What is
    worth something between groups has to have a tolerance: rounding is no gain.
    """
    waiting = list(scorer.sizes)
    while waiting:
        if rng is not None:
            rng.shuffle(waiting)
        changed: set[str] = set()
        for group in waiting:
            improved = improve(
                scorer, solver, group, perms, stay=stay, tolerance=tolerance
            )
            # What it depends on is as it is now; no other change concerns a group.
            changed.discard(group)
            if improved is not perms:
                changed.update(scorer.neighbours(group))
            perms = improved
        waiting = [group for group in scorer.sizes if group in changed]
    return perms


def better(
    scorer: Scorer, solver: Solver, one: PairPerms, other: PairPerms, stay: float
) -> PairPerms:
    """For each block of pairs whichever is worth more; `one` if they are equal."""
    gain = total_worth(scorer, other, stay) - total_worth(scorer, one, stay)
    return _choose(_over_blocks(solver, gain) > 0, other, one)


def _over_blocks(solver: Solver, values: np.ndarray) -> np.ndarray:
    """For each pair the sum over its block."""
    return np.bincount(solver.blocks, values)[solver.blocks]


def _choose(which: np.ndarray, one: Mapping[str, Any], other: Mapping[str, Any]):
    return {group: np.where(which[:, None], one[group], other[group]) for group in one}
