"""Matching units by how their activations correlate.

Co-moments are streamed over batches in float32 by the pairwise update of Chan, Golub &
LeVeque (1979): sums of products would lose the digits that a correlation is made of
where a unit's mean is large against its deviation.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dimat_jax.matching._assignment import check_stay
from dimat_jax.matching._blocks import cut_blocks
from dimat_jax.matching._descent import (
    Known,
    PairPerms,
    Pairs,
    Solver,
    descend,
    every_pair_alone,
    identities,
    worth,
)
from dimat_jax.permutation import (
    Perms,
    PermutationSpec,
    PermutationSpecError,
    group_sizes,
    validate,
)
from dimat_jax.tree import PyTree, stack

__all__ = [
    "ActivationScorer",
    "Activations",
    "Centred",
    "Moments",
    "TapMoments",
    "activation_matching",
    "centre",
    "check_taps",
    "correlation",
    "empty_moments",
    "group_scores",
    "match_activations",
    "no_moments",
    "tap_units",
    "update_moments",
    "update_taps",
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


TapMoments = dict[str, dict[str, Moments]]
"""For each group the moments of its units at each of its taps."""


def no_moments(spec: PermutationSpec, sizes: Mapping[str, int]) -> TapMoments:
    """Of no samples at all. `sizes` are the groups'."""
    return {
        group: {tap: empty_moments(sizes[group]) for tap in spec.taps_of(group)}
        for group in spec.groups
    }


def update_taps(moments: TapMoments, reference: Any, permutee: Any) -> TapMoments:
    """Adds a batch, `Centred` for each group and tap, that both networks have seen."""
    return jax.tree.map(
        update_moments,
        moments,
        reference,
        permutee,
        is_leaf=lambda x: isinstance(x, Moments),
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


def check_taps(spec: PermutationSpec) -> None:
    """Raises PermutationSpecError for a group without a tap: it cannot be matched."""
    for group in spec.groups:
        if not spec.taps_of(group):
            raise PermutationSpecError(
                f"group {group!r} has no tap, so its activations cannot be matched"
            )


def group_scores(moments: TapMoments) -> dict[str, Float[Array, "units units"]]:
    """For each group, the correlations averaged over all its taps: within [-1, 1].

    A residual stream is one group with a tap behind every block.
    """
    return {
        group: jnp.stack([correlation(tap) for tap in taps.values()]).mean(axis=0)
        for group, taps in moments.items()
    }


def tap_units(
    spec: PermutationSpec, sizes: Mapping[str, int], activations: Activations
) -> dict[str, dict[str, Float[Array, "samples units"]]]:
    """For each group what each of its taps shows, flattened to samples by units.

    Every position of a feature map is a sample. Where a tap shows several groups, each
    is seen as the mean over the units of the others, which their permutations do not
    change. Samples keep their order: those of one example lie together if examples are
    the array's first axis.

    Args:
        spec: the symmetry, with its taps.
        sizes: of the groups.
        activations: for each tap an array.

    Raises:
        PermutationSpecError: the activations lack a tap, or do not have its axes.
    """
    return {
        group: {
            tap: _tap_units(spec, sizes, group, tap, activations)
            for tap in spec.taps_of(group)
        }
        for group in spec.groups
    }


def _tap_units(spec, sizes, group: str, tap: str, activations: Activations) -> Array:
    if tap not in activations:
        raise PermutationSpecError(
            f"group {group!r} is to be watched at tap {tap!r}, which the activations "
            f"lack; they have {sorted(activations)}"
        )
    array = jnp.asarray(activations[tap])
    try:
        (block,) = cut_blocks(spec.tap_axes(tap, array.ndim), array.shape, sizes)
    except PermutationSpecError as error:
        raise PermutationSpecError(
            f"tap {tap!r}, of shape {array.shape}: {error}"
        ) from None
    others = tuple(
        axis for axis, other in enumerate(block.groups) if other not in (None, group)
    )
    units = jnp.moveaxis(
        array.reshape(block.shape).mean(others, keepdims=True, dtype=jnp.float32),
        block.groups.index(group),
        -1,
    )
    return units.reshape(-1, units.shape[-1])


class ActivationScorer:
    """What permutations are worth by correlations: a `Scorer` whose groups are alone.

    Args:
        scores: for each wave of pairs and each group `[length, units, units]`.
        waves: the pairs.
        fetch: brings arrays to the host.
    """

    def __init__(
        self,
        scores: Sequence[Mapping[str, Array]],
        waves: Sequence[Pairs],
        *,
        fetch: Callable[[Array], np.ndarray] = jax.device_get,
    ):
        self.sizes = {group: score.shape[-1] for group, score in scores[0].items()}
        self.n_pairs = sum(wave.real for wave in waves)
        self._scores, self._waves, self._fetch = scores, waves, fetch

    def scores(
        self, group: str, perms: PairPerms, known: Known | None = None
    ) -> Float[np.ndarray, "pairs units units"]:
        del perms, known
        return np.concatenate(
            [
                self._fetch(scores[group])[: wave.real]
                for scores, wave in zip(self._scores, self._waves, strict=True)
            ]
        )

    def scale(
        self, group: str, known: Known | None = None
    ) -> Float[np.ndarray, " pairs"]:
        del group, known
        return np.ones(self.n_pairs)

    def neighbours(self, group: str) -> Collection[str]:
        del group
        return ()

    def similarity(self, perms: PairPerms) -> Float[np.ndarray, " pairs"]:
        """The correlation of matched units: the mean over units, then over groups."""
        means = [
            worth(self.scores(group, perms), perm) / self.sizes[group]
            for group, perm in perms.items()
        ]
        return np.mean(means, axis=0)


def match_activations(
    spec: PermutationSpec,
    activations: Callable[[PyTree, Any], Activations],
    models: Sequence[PyTree],
    pairs: Pairs,
    solver: Solver,
    batches: Iterable[Any],
    *,
    stay: float,
) -> PairPerms:
    """Activation matching of pairs of some networks.

    Raises:
        as `activation_matching`.
    """
    check_taps(spec)
    check_stay(stay)
    validate(spec, models[0])
    sizes = group_sizes(spec, models[0])
    for variables in models[1:]:
        for group, size in group_sizes(spec, variables).items():
            if size != sizes[group]:
                raise ValueError(
                    f"group {group!r} has {sizes[group]} units in one network, and "
                    f"{size} in another"
                )

    @jax.jit
    def watch(variables, inputs):
        units = tap_units(spec, sizes, activations(variables, inputs))
        return jax.tree.map(centre, units)

    update = jax.jit(update_taps)
    moments = [no_moments(spec, sizes) for _ in range(pairs.real)]
    n_batches = 0
    for inputs in batches:
        n_batches += 1
        seen = [watch(variables, inputs) for variables in models]
        moments = [
            update(of_pair, seen[reference], seen[permutee])
            for of_pair, reference, permutee in zip(moments, *pairs[:2], strict=True)
        ]
    if not n_batches:
        raise ValueError("activation matching needs at least one batch of inputs")
    if not sizes:
        return {}
    scores = jax.jit(lambda of_pairs: stack([group_scores(m) for m in of_pairs]))
    scorer = ActivationScorer([scores(moments)], [pairs])
    return descend(scorer, solver, identities(scorer), stay=stay)


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

    perms = match_activations(
        spec,
        activations,
        [reference, permutee],
        Pairs(np.array([0]), np.array([1]), 1),
        every_pair_alone(1),
        batches,
        stay=stay,
    )
    return {group: jnp.asarray(perm[0]) for group, perm in perms.items()}
