"""Matching units by their weights.

Two networks fit as well as their weights point in one direction: the similarity is
<reference, P permutee> / (|reference| |permutee|), summed over all leaves. No data are
needed. Group after group is assigned while the others stay, until none gains anything
(Ainsworth et al. 2023, "Git Re-Basin", arXiv 2209.04836, section 3.2).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dimat_jax.matching._assignment import check_stay
from dimat_jax.matching._descent import (
    Known,
    PairPerms,
    Pairs,
    Solver,
    better,
    descend,
    every_pair_alone,
    identities,
    improve,
)
from dimat_jax.matching._weight_scores import (
    Include,
    WeightScorer,
    dot,
    included,
    not_running_statistics,
)
from dimat_jax.permutation import Perms, PermutationSpec, group_sizes, validate
from dimat_jax.tree import PyTree, stack

__all__ = [
    "check_restarts",
    "construct",
    "match_by_weights",
    "match_weights",
    "weight_matching",
    "weight_similarity",
]

# What rounding may make of a group's mean score.
_TOLERANCE = 1e-6

_stack = jax.jit(stack)


def weight_matching(
    spec: PermutationSpec,
    reference: PyTree,
    permutee: PyTree,
    *,
    key: Key[Array, ""],
    restarts: int = 1,
    stay: float = 0.0,
    include: Include = not_running_statistics,
) -> Perms:
    """Finds the permutations of a network's units that bring its weights nearest.

    Coordinate descent over groups from the better of two starts, the identity and a
    first pass in which every group is matched by those leaves alone whose other groups
    are matched already. See `weight_similarity` for what is maximised.

    Args:
        spec: the symmetry; taps are not needed.
        reference: the variables of the network that stays as it is.
        permutee: the variables of the network to be permuted.
        key: draws the order of the groups; consumed.
        restarts: how many orders to try; the best permutations win.
        stay: a unit moves only if its score, scaled so that the mean over a group's
            units lies in [-1, 1], gains more than this.
        include: which leaves count, by path; leaves that are not floating never do.

    Returns:
        perms, such that `permutation.apply(spec, perms, permutee)` is aligned with
        `reference`.

    Raises:
        PermutationSpecError: a spec that does not fit the networks.
        ValueError: networks whose shapes differ, weights that are not finite,
            `restarts` < 1, or `stay` < 0.
    """
    perms = match_weights(
        spec,
        [reference, permutee],
        Pairs(np.array([0]), np.array([1]), 1),
        every_pair_alone(1),
        ["the reference", "the permutee"],
        key=key,
        restarts=restarts,
        stay=stay,
        include=include,
    )
    return {group: jnp.asarray(perm[0]) for group, perm in perms.items()}


def weight_similarity(
    reference: PyTree, permutee: PyTree, *, include: Include = not_running_statistics
) -> Float[Array, ""]:
    """The cosine of the angle between two networks' weights, over all leaves.

    Args:
        reference: any pytree of arrays.
        permutee: as `reference`; aligned, if the two are to be compared as such.
        include: as in `weight_matching`.

    Returns:
        within [-1, 1]; 0 if a network has no weights but zeros.
    """
    one, other = (included(tree, include) for tree in (reference, permutee))

    def inner(a, b):
        return sum((dot(a[path], b[path]) for path in a), jnp.zeros(()))

    norms = jnp.sqrt(inner(one, one)) * jnp.sqrt(inner(other, other))
    # Rounding may leave the bounds.
    return jnp.clip(inner(one, other) / jnp.where(norms > 0, norms, 1), -1, 1)


def match_weights(
    spec: PermutationSpec,
    models: Sequence[PyTree],
    pairs: Pairs,
    solver: Solver,
    names: Sequence[str],
    *,
    key: Key[Array, ""],
    restarts: int,
    stay: float,
    include: Include,
) -> PairPerms:
    """Weight matching of pairs of some networks; `names` are the networks' in errors.

    Raises:
        as `weight_matching`.
    """
    check_stay(stay)
    check_restarts(restarts)
    for model in models:
        validate(spec, model)
    leaves = [included(model, include) for model in models]
    for name, others in zip(names[1:], leaves[1:], strict=True):
        for path, leaf in leaves[0].items():
            if path in others and jnp.shape(others[path]) != jnp.shape(leaf):
                raise ValueError(
                    f"{path!r} has shape {jnp.shape(leaf)} in {names[0]}, but "
                    f"{jnp.shape(others[path])} in {name}"
                )
            if path not in others:
                raise ValueError(f"{path!r} is floating in {names[0]}, not in {name}")
    scorer = WeightScorer(
        spec, group_sizes(spec, models[0]), _stack(leaves), [pairs], names=names
    )
    return match_by_weights(scorer, solver, key=key, restarts=restarts, stay=stay)


def check_restarts(restarts: int) -> None:
    """Raises ValueError for less than one start."""
    if restarts < 1:
        raise ValueError(f"restarts must be at least 1, got {restarts}")


def match_by_weights(
    scorer: WeightScorer,
    solver: Solver,
    *,
    key: Key[Array, ""],
    restarts: int = 1,
    stay: float = 0.0,
) -> PairPerms:
    """Coordinate descent over groups from several starts. The key is consumed.

    Raises:
        ValueError: `restarts` < 1.
    """
    check_restarts(restarts)
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,), jnp.uint32)))
    found = identity = identities(scorer)
    for _ in range(restarts):
        start = construct(scorer, solver, rng, stay)
        start = better(scorer, solver, identity, start, stay)
        perms = descend(scorer, solver, start, stay=stay, tolerance=_TOLERANCE, rng=rng)
        found = better(scorer, solver, found, perms, stay)
    return found


def construct(
    scorer: WeightScorer, solver: Solver, rng: np.random.Generator, stay: float
) -> PairPerms:
    """Matches group after group by what is known: leaves without unmatched groups.

    What other, unmatched groups permute tells little but noise. The order is random;
    groups of which much is known are likely to come first. Where nothing is known of
    any (the norm groups of a layer and the channels within them permute the same
    leaves, and so do heads and what is in them), leaves count as if their unmatched
    groups' units could be permuted in each place at will.
    """
    perms = identities(scorer)
    matched: frozenset[str] = frozenset()
    waiting = [group for group in scorer.sizes if scorer.evidence(group) > 0]
    slack = 0
    while waiting:
        known = Known(matched, slack)
        evidence = np.array([scorer.evidence(group, known) for group in waiting])
        if not evidence.any():
            slack += 1
            continue
        group = waiting.pop(rng.choice(len(waiting), p=evidence / evidence.sum()))
        perms = improve(scorer, solver, group, perms, stay=stay, known=known)
        matched, slack = matched | {group}, 0
    return perms
