"""Correlations of two networks' units, streamed over batches of samples.

Sums of products would lose the digits that make up a correlation wherever a unit's mean
is large compared with its deviation. So the moments are kept as deviations from the
mean, in float32, and batches are added by the pairwise update of Chan, Golub & LeVeque
(1979).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dimat_jax.permutation import PermutationSpec

__all__ = [
    "Centred",
    "Moments",
    "TapMoments",
    "centre",
    "correlation",
    "empty_moments",
    "group_scores",
    "no_moments",
    "of_layers",
    "update_moments",
    "update_taps",
]

# The largest number of blocks of samples in a product of two networks' units.
BLOCKS = 32
# The least number of samples in a block.
LEAST_BLOCK = 64


class Centred(NamedTuple):
    """A batch of one network's activations, ready to be correlated with another's.

    Attributes:
        n_samples: the number of samples that count.
        mean: each unit's mean.
        squares: each unit's sum of squared deviations from its mean.
        deviations: the deviations from the mean; 0 for samples that do not count.
    """

    n_samples: Float[Array, ""]
    mean: Float[Array, " units"]
    squares: Float[Array, " units"]
    deviations: Float[Array, "samples units"]


def centre(
    units: Float[Array, "samples units"], weights: Array | None = None
) -> Centred:
    """Centres a batch.

    Args:
        units: the activations.
        weights: 1 for samples that count and 0 for others; None: all samples count.
    """
    units = units.astype(jnp.float32)
    if weights is None:
        weights = jnp.ones(len(units))
    weights = weights.astype(jnp.float32)
    count = weights.sum()
    mean = jnp.where(weights[:, None] > 0, units, 0).sum(axis=0) / jnp.maximum(count, 1)
    deviations = jnp.where(weights[:, None] > 0, units - mean[None, :], 0)
    return Centred(count, mean, (deviations**2).sum(axis=0), deviations)


class Moments(NamedTuple):
    """First and second moments of two networks' units over the samples so far.

    Attributes:
        n_samples: the number of samples.
        mean_reference: the means of the reference's units.
        mean_permutee: the means of the permutee's units.
        squares_reference: the reference's sums of squared deviations.
        squares_permutee: the permutee's sums of squared deviations.
        products: sums of products of deviations, `[reference unit, permutee unit]`.
    """

    n_samples: Float[Array, ""]
    mean_reference: Float[Array, " units"]
    mean_permutee: Float[Array, " units"]
    squares_reference: Float[Array, " units"]
    squares_permutee: Float[Array, " units"]
    products: Float[Array, "units units"]


def empty_moments(units: int) -> Moments:
    """The moments of two sets of units over no samples."""
    vector = jnp.zeros(units, jnp.float32)
    matrix = jnp.zeros((units, units), jnp.float32)
    return Moments(jnp.zeros(()), vector, vector, vector, vector, matrix)


def update_moments(moments: Moments, reference: Centred, permutee: Centred) -> Moments:
    """Adds a batch that both networks have seen."""
    before, count = moments.n_samples, moments.n_samples + reference.n_samples
    share = reference.n_samples / jnp.maximum(count, 1)
    shift_reference = reference.mean - moments.mean_reference
    shift_permutee = permutee.mean - moments.mean_permutee
    products = _products(reference.deviations, permutee.deviations)
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


def _products(
    reference: Float[Array, "samples units"], permutee: Float[Array, "samples units"]
) -> Float[Array, "units units"]:
    """Computes the sums over samples of the products of each two units.

    There are many samples and few units. Blocks of samples are multiplied on their own
    and then summed: on a CPU a block stays in the cache (measured on two cores: a
    fourth less time), and a GPU has several small products to compute at once. The
    rounding errors of shorter sums are smaller, too.
    """
    n_samples = len(reference)
    n_blocks = math.gcd(n_samples, BLOCKS) if n_samples >= BLOCKS * LEAST_BLOCK else 1
    blocks = [x.reshape(n_blocks, -1, x.shape[-1]) for x in (reference, permutee)]
    return jnp.einsum("bsu,bsv->buv", *blocks, precision=jax.lax.Precision.HIGHEST).sum(
        axis=0
    )


def correlation(moments: Moments) -> Float[Array, "units units"]:
    """Pearson's correlation of every reference unit with every permutee unit.

    A unit that never varies (a dead unit) has the correlation 0 with every other unit,
    and never NaN.
    """

    def inverse_deviation(mean, sum_of_squares):
        # A constant unit's sum of squares is not exactly 0, because of rounding. Below
        # this floor the unit counts as constant.
        floor = moments.n_samples * (1e-5 * mean) ** 2
        alive = sum_of_squares > floor
        return jnp.where(alive, jax.lax.rsqrt(jnp.where(alive, sum_of_squares, 1)), 0)

    return (
        moments.products
        * inverse_deviation(moments.mean_reference, moments.squares_reference)[:, None]
        * inverse_deviation(moments.mean_permutee, moments.squares_permutee)[None, :]
    )


# All taps of all groups ===============================================================

TapMoments = dict[str, dict[str, Any]]
"""For each group the moments of its units at each of its taps, as `Moments`.

The arrays of a stacked group have leading axes for the layers.
"""


def no_moments(
    spec: PermutationSpec, shapes: Mapping[str, tuple[int, ...]]
) -> TapMoments:
    """The moments at all taps over no samples.

    Args:
        spec: the symmetry, with its taps.
        shapes: the shape of each group's permutation.
    """

    def empty(shape: tuple[int, ...]) -> Moments:
        *layers, units = shape
        return jax.tree.map(
            lambda x: jnp.zeros((*layers, *x.shape), x.dtype), empty_moments(units)
        )

    return {
        group: {tap: empty(shapes[group]) for tap in spec.taps_of(group)}
        for group in spec.groups
    }


def of_layers(function: Callable[..., Any], n_layer_axes: int) -> Callable[..., Any]:
    """Makes a function of one layer a function of stacked layers."""
    for _ in range(n_layer_axes):
        function = jax.vmap(function)
    return function


def update_taps(moments: TapMoments, reference: Any, permutee: Any) -> TapMoments:
    """Adds a batch that both networks have seen.

    Args:
        moments: the moments so far.
        reference: for each group and tap what the reference shows, `Centred`.
        permutee: for each group and tap what the permutee shows, `Centred`.
    """

    def update(moments: Any, reference: Any, permutee: Any) -> Any:
        of_all = of_layers(update_moments, moments.products.ndim - 2)
        return of_all(moments, reference, permutee)

    return jax.tree.map(
        update,
        moments,
        reference,
        permutee,
        is_leaf=lambda x: isinstance(x, Moments),
    )


def group_scores(
    moments: TapMoments,
) -> dict[str, Float[Array, "*layers units units"]]:
    """For each group its units' correlations, averaged over its taps: within [-1, 1].

    A residual stream is one group with a tap behind every block.
    """

    def scores(tap: Any) -> Array:
        return of_layers(correlation, tap.products.ndim - 2)(tap)

    return {
        group: jnp.stack([scores(tap) for tap in taps.values()]).mean(axis=0)
        for group, taps in moments.items()
    }
