"""Matching units by their weights.

Two networks fit well if their weights point in the same direction: the similarity is
<reference, P permutee> / (|reference| |permutee|), summed over all leaves. No data are
needed. One group after the other is assigned while the others are fixed, until none
gains anything (Ainsworth et al. 2023, "Git Re-Basin", arXiv 2209.04836, section 3.2).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dimat_jax.matching._assignment import STAY
from dimat_jax.matching._descent import (
    MatchedGroups,
    PairPerms,
    Pairs,
    Problem,
    Solver,
    better,
    coordinate_descent,
    every_pair_alone,
    identities,
    improve_group,
    two_networks,
)
from dimat_jax.matching._errors import MatchingError
from dimat_jax.matching._weight_scores import (
    Include,
    WeightScorer,
    dot,
    included,
)
from dimat_jax.options import Option
from dimat_jax.permutation import Perms, PermutationSpec, group_shapes, validate
from dimat_jax.tree import PyTree, as_arrays, stack

__all__ = [
    "RESTARTS",
    "first_pass",
    "match_by_weights",
    "match_weights",
    "weight_matching",
    "weight_similarity",
]

RESTARTS = Option(
    "merge.restarts",
    1,
    "How many times weights are matched, each time with the groups in another random "
    "order. The permutations with the largest similarity are kept.",
    at_least=1,
)

# A group's mean score may change by about this much through rounding alone.
_TOLERANCE = 1e-6

_stack = jax.jit(stack)


def weight_matching(
    spec: PermutationSpec,
    reference: PyTree,
    permutee: PyTree,
    *,
    key: Key[Array, ""],
    restarts: int = RESTARTS.default,
    stay: float = STAY.default,
    include: Include | None = None,
) -> Perms:
    """Finds the permutations of a network's units that bring its weights nearest.

    This is coordinate descent over groups. It starts from the better of two starting
    points: the identity, and a first pass in which every group is matched only by the
    leaves whose other groups have been matched already. `weight_similarity` is what is
    maximised.

    Args:
        spec: the symmetry; taps are not needed.
        reference: the variables of the network that stays as it is.
        permutee: the variables of the network to be permuted.
        key: draws the order of the groups; consumed.
        restarts: the number of orders to try; the best permutations win.
        stay: a unit moves only if its score, scaled so that the mean over a group's
            units lies in [-1, 1], gains more than this.
        include: which leaves count, by path; leaves that are not floating never do. By
            default all but the spec's running statistics do, since these follow from
            weights and data.

    Returns:
        perms, such that `permutation.apply(spec, perms, permutee)` is aligned with
        `reference`.

    Raises:
        PermutationSpecError: a spec that does not fit the networks.
        MatchingError: networks whose shapes differ, weights that are not finite,
            `restarts` < 1, or `stay` < 0.
    """
    perms = match_weights(
        spec,
        [reference, permutee],
        two_networks(),
        every_pair_alone(1, stay),
        ["the reference", "the permutee"],
        key=key,
        restarts=restarts,
        include=include or spec.is_weight,
    )
    return {group: jnp.asarray(perm[0]) for group, perm in perms.items()}


def weight_similarity(
    reference: PyTree, permutee: PyTree, *, include: Include = lambda path: True
) -> Float[Array, ""]:
    """The cosine of the angle between two networks' weights, over all leaves.

    Args:
        reference: any pytree of arrays.
        permutee: the other network, shaped like `reference`. It is compared as it is;
            apply its permutations first to compare aligned networks.
        include: which leaves count, by path; leaves that are not floating never do.
            `weight_matching` counts those for which `spec.is_weight` holds.

    Returns:
        within [-1, 1]; 0 if a network has no weights but zeros.
    """
    one, other = (included(as_arrays(tree), include) for tree in (reference, permutee))

    def inner(a, b):
        return sum((dot(a[path], b[path]) for path in a), jnp.zeros(()))

    norms = jnp.sqrt(inner(one, one)) * jnp.sqrt(inner(other, other))
    # Rounding can lead slightly out of the bounds.
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
    include: Include,
) -> PairPerms:
    """Matches pairs of some networks by their weights.

    Args:
        spec: the symmetry.
        models: the variables of each network.
        pairs: which networks to match with which.
        solver: which permutations are allowed and preferred.
        names: what to call each network in error messages.
        key: draws the order of the groups; consumed.
        restarts: the number of orders to try.
        include: which leaves count, by path.

    Raises:
        PermutationSpecError: a spec that does not fit the networks.
        MatchingError: networks whose shapes differ, or weights that are not finite.
        OptionError: `restarts` < 1.
    """
    for model in models:
        validate(spec, model)
    leaves = [included(as_arrays(model), include) for model in models]
    for name, others in zip(names[1:], leaves[1:], strict=True):
        for path, leaf in leaves[0].items():
            if path in others and jnp.shape(others[path]) != jnp.shape(leaf):
                raise MatchingError(
                    f"{path!r} has shape {jnp.shape(leaf)} in {names[0]}, but "
                    f"{jnp.shape(others[path])} in {name}"
                )
            if path not in others:
                raise MatchingError(
                    f"{path!r} is floating in {names[0]}, not in {name}"
                )
    scorer = WeightScorer(
        spec, group_shapes(spec, models[0]), _stack(leaves), [pairs], names=names
    )
    return match_by_weights(Problem(scorer, solver), key, restarts)


def match_by_weights(
    problem: Problem[WeightScorer],
    key: Key[Array, ""],
    restarts: int = RESTARTS.default,
) -> PairPerms:
    """Runs coordinate descent over groups from several starting points.

    Args:
        problem: what to solve.
        key: draws the order of the groups; consumed.
        restarts: the number of orders to try; the best permutations win.

    Raises:
        OptionError: `restarts` < 1.
    """
    RESTARTS.check(restarts)
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,), jnp.uint32)))
    found = identity = identities(problem.scorer)
    for _ in range(restarts):
        start = better(problem, identity, first_pass(problem, rng))
        perms = coordinate_descent(problem, start, tolerance=_TOLERANCE, rng=rng)
        found = better(problem, found, perms)
    return found


def first_pass(problem: Problem[WeightScorer], rng: np.random.Generator) -> PairPerms:
    """Matches every group once, by the leaves without unmatched groups.

    A leaf that an unmatched group permutes says little about any other group, so it is
    left out. The order of the groups is random; a group about which the counting leaves
    say much is likely to come early. Sometimes no leaf counts for any waiting group:
    the norm groups of a layer and the channels within them permute the same leaves,
    and so do attention heads and the units in them. Then leaves count as if the units
    of their unmatched groups could be permuted separately at each place.
    """
    scorer = problem.scorer
    perms = identities(scorer)
    groups: frozenset[str] = frozenset()
    waiting = [group for group in scorer.sizes if scorer.evidence(group) > 0]
    slack = 0
    while waiting:
        matched = MatchedGroups(groups, slack)
        evidence = np.array([scorer.evidence(group, matched) for group in waiting])
        if not evidence.any():
            slack += 1
            continue
        group = waiting.pop(rng.choice(len(waiting), p=evidence / evidence.sum()))
        perms = improve_group(problem, group, perms, matched=matched)
        groups, slack = groups | {group}, 0
    return perms
