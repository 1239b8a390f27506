"""Matching units by how their activations correlate.

Co-moments are streamed over batches in float32 by the pairwise update of Chan, Golub &
LeVeque (1979): sums of products would lose the digits that a correlation is made of
where a unit's mean is large against its deviation.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from dimat_jax.matching.assignment import (
    check_stay,
    prefer_staying,
    solve_assignment,
)
from dimat_jax.permutation import Perms, PermutationSpec, PermutationSpecError
from dimat_jax.tree import PyTree

__all__ = [
    "Activations",
    "Centred",
    "Moments",
    "activation_matching",
    "centre",
    "correlation",
    "empty_moments",
    "group_scores",
    "group_taps",
    "solve_groups",
    "units_last",
    "update_moments",
]

Activations = Mapping[str, Array]
"""What a tap shows, by the tap's name: one array for a batch of inputs."""


class Centred(NamedTuple):
    """A batch of one network's activations, ready to be correlated with another's.

    Attributes:
        n_samples: how many count.
        mean: of each unit.
        squares: the sum of each unit's squared deviations.
        deviations: from the mean; 0 for samples that do not count.
    """

    n_samples: Float[Array, ""]
    mean: Float[Array, " units"]
    squares: Float[Array, " units"]
    deviations: Float[Array, "samples units"]


def centre(
    units: Float[Array, "samples units"], weights: Array | None = None
) -> Centred:
    """Centres a batch. `weights` is 1 for samples that count, else 0; None: all do."""
    units = units.astype(jnp.float32)
    if weights is None:
        weights = jnp.ones(len(units))
    weights = weights.astype(jnp.float32)
    count = weights.sum()
    mean = jnp.where(weights[:, None] > 0, units, 0).sum(axis=0) / jnp.maximum(count, 1)
    deviations = jnp.where(weights[:, None] > 0, units - mean, 0)
    return Centred(count, mean, (deviations**2).sum(axis=0), deviations)


class Moments(NamedTuple):
    """First and second moments of two sets of units over the samples seen so far.

    Attributes:
        n_samples: how many.
        mean_reference, mean_permutee: means.
        squares_reference, squares_permutee: sums of squared deviations.
        products: sums of products of deviations, `[reference unit, permutee unit]`.
    """

    n_samples: Float[Array, ""]
    mean_reference: Float[Array, " units"]
    mean_permutee: Float[Array, " units"]
    squares_reference: Float[Array, " units"]
    squares_permutee: Float[Array, " units"]
    products: Float[Array, "units units"]


def empty_moments(units: int) -> Moments:
    """The moments of no samples at all."""
    vector = jnp.zeros(units, jnp.float32)
    matrix = jnp.zeros((units, units), jnp.float32)
    return Moments(jnp.zeros(()), vector, vector, vector, vector, matrix)


def update_moments(moments: Moments, reference: Centred, permutee: Centred) -> Moments:
    """Adds a batch that both networks have seen."""
    before, count = moments.n_samples, moments.n_samples + reference.n_samples
    share = reference.n_samples / jnp.maximum(count, 1)
    shift_reference = reference.mean - moments.mean_reference
    shift_permutee = permutee.mean - moments.mean_permutee
    products = jnp.matmul(
        reference.deviations.T,
        permutee.deviations,
        precision=jax.lax.Precision.HIGHEST,
    )
    weight = before * share
    return Moments(
        count,
        moments.mean_reference + share * shift_reference,
        moments.mean_permutee + share * shift_permutee,
        moments.squares_reference + reference.squares + weight * shift_reference**2,
        moments.squares_permutee + permutee.squares + weight * shift_permutee**2,
        moments.products
        + products
        + weight * jnp.outer(shift_reference, shift_permutee),
    )


def correlation(moments: Moments) -> Float[Array, "units units"]:
    """Pearson's correlation of every reference unit with every permutee unit.

    Units that never vary (dead ones) correlate with nothing: 0, and never NaN.
    """

    def inverse_deviation(mean, sum_of_squares):
        # What rounding leaves of a constant unit's variance is not a signal.
        floor = moments.n_samples * (1e-5 * mean) ** 2
        alive = sum_of_squares > floor
        return jnp.where(alive, jax.lax.rsqrt(jnp.where(alive, sum_of_squares, 1)), 0)

    return (
        moments.products
        * inverse_deviation(moments.mean_reference, moments.squares_reference)[:, None]
        * inverse_deviation(moments.mean_permutee, moments.squares_permutee)
    )


def group_taps(spec: PermutationSpec) -> dict[str, dict[str, int]]:
    """For each group its taps, each with the dimension that its units lie on.

    Raises:
        PermutationSpecError: a group without a tap cannot be matched.
    """
    taps = {group: spec.taps_of(group) for group in spec.groups}
    for group, found in taps.items():
        if not found:
            raise PermutationSpecError(
                f"group {group!r} has no tap, so its activations cannot be matched"
            )
    return taps


def group_scores(
    spec: PermutationSpec, moments: Mapping[str, Moments]
) -> dict[str, Float[Array, "units units"]]:
    """For each group, the correlations averaged over all its taps: within [-1, 1].

    A residual stream is one group with a tap behind every block.

    Raises:
        PermutationSpecError: a group without a tap.
    """
    return {
        group: jnp.stack([correlation(moments[tap]) for tap in taps]).mean(axis=0)
        for group, taps in group_taps(spec).items()
    }


def units_last(
    spec: PermutationSpec, activations: Activations
) -> dict[str, Float[Array, "samples units"]]:
    """Flattens what each tap shows to samples by units.

    Every position of a feature map is a sample.

    Raises:
        PermutationSpecError: the activations lack a tap that the spec names.
    """
    flat = {}
    for group, taps in group_taps(spec).items():
        for tap, dimension in taps.items():
            if tap not in activations:
                raise PermutationSpecError(
                    f"group {group!r} is to be watched at tap {tap!r}, which the "
                    f"activations lack; they have {sorted(activations)}"
                )
            units = jnp.moveaxis(activations[tap], dimension, -1)
            flat[tap] = units.reshape(-1, units.shape[-1])
    return flat


def solve_groups(
    scores: Mapping[str, Any], stay: float = 0.0
) -> dict[str, Int32[np.ndarray, "*batch units"]]:
    """Solves one assignment for each group. Scores are `[*batch, units, units]`."""
    return {
        group: solve_assignment(prefer_staying(matrix, stay))
        for group, matrix in scores.items()
    }


def activation_matching(
    spec: PermutationSpec,
    activations: Callable[[PyTree, Any], Activations],
    reference: PyTree,
    permutee: PyTree,
    batches: Iterable[Any],
    *,
    stay: float = 0.0,
) -> Perms:
    """Finds the permutations of a network's units that best fit another's.

    Units are matched by Pearson's correlation of their activations on the same inputs,
    averaged over a group's taps (DIMAT, arXiv 2404.08079, section 3; Li et al. 2015).

    Args:
        spec: the symmetry, with a tap for each group.
        activations: `activations(variables, inputs) -> {tap: array}`.
        reference: the variables of the network that stays as it is.
        permutee: the variables of the network to be permuted.
        batches: inputs, one batch at a time.
        stay: a unit moves only if its correlation gains more than this.

    Returns:
        perms, such that `permutation.apply(spec, perms, permutee)` is aligned with
        `reference`.

    Raises:
        PermutationSpecError: a group without a tap, or a tap without activations.
        ValueError: no batches, activations that are not finite, or `stay` < 0.
    """

    group_taps(spec)
    check_stay(stay)

    @jax.jit
    def watch(variables, inputs):
        flat = units_last(spec, activations(variables, inputs))
        return {tap: centre(units) for tap, units in flat.items()}

    @jax.jit
    def update(moments, seen, permuted):
        return {
            tap: update_moments(moments[tap], seen[tap], permuted[tap]) for tap in seen
        }

    moments = None
    for inputs in batches:
        seen, permuted = watch(reference, inputs), watch(permutee, inputs)
        if moments is None:
            moments = {tap: empty_moments(len(seen[tap].mean)) for tap in seen}
        moments = update(moments, seen, permuted)
    if moments is None:
        raise ValueError("activation matching needs at least one batch of inputs")
    perms = solve_groups(group_scores(spec, moments), stay)
    return {group: jnp.asarray(perm) for group, perm in perms.items()}
