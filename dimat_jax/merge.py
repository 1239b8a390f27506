"""Merging networks that were trained apart: average them, mend the result, judge it.

    perms = activation_matching(spec, activations, a, b, batches)
    aligned = permutation.apply(spec, perms, b)
    merged = merge.average([a, aligned])
    merged = merge.recalibrate(batch_statistics, merged, batches)      # BatchNorm, or
    merged = merge.repair(unit_moments, merged, [a, aligned], batches)  # without it
    curve = merge.barrier(evaluate, a, aligned)

Models are pytrees of arrays whose units are in one frame already (`matching` finds the
permutations, `permutation.apply` aligns). Nothing here knows how a network computes:
that is in the functions that are passed, each for one model.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dimat_jax.errors import UserError
from dimat_jax.tree import PyTree, exact_dtype, flatten, is_inexact, map_with_path

__all__ = [
    "Barrier",
    "MergeError",
    "UnitMoments",
    "add_batch",
    "average",
    "barrier",
    "check_weights",
    "correction",
    "interpolate",
    "recalibrate",
    "repair",
]


class MergeError(UserError):
    """Models that cannot be merged, or not so; the message says which, and why."""


def average(models: Sequence[PyTree], weights: Sequence[float] | None = None) -> PyTree:
    """The weighted mean of aligned models.

    Args:
        models: pytrees with the same leaves. Real and complex leaves are averaged in
            float32, or in their own dtype where that is finer or complex, and keep
            their dtype; other leaves are the first model's.
        weights: one for each model, relative to each other: they are divided by their
            sum. None: all alike.

    Raises:
        MergeError: leaves that differ in path or shape, or weights that are too few,
            too many, negative, not finite, or all 0.
    """
    _check_alike(models)
    shares = check_weights(weights, len(models))

    def mean(*leaves):
        if not is_inexact(leaves[0]):
            return leaves[0]
        dtype = jnp.result_type(leaves[0])
        exact = exact_dtype(dtype)
        # Not 0 * leaf: what has no share may be infinite.
        terms = [
            share * jnp.asarray(leaf, exact)
            for share, leaf in zip(shares, leaves, strict=True)
            if share
        ]
        return sum(terms[1:], start=terms[0]).astype(dtype)

    return jax.tree.map(mean, *models)


def interpolate(a: PyTree, b: PyTree, t: float) -> PyTree:
    """The point `(1 - t) a + t b` of the straight line, 0 <= t <= 1; see `average`."""
    if not 0 <= t <= 1:
        raise MergeError(f"the line from a to b has 0 <= t <= 1, got t = {t}")
    return average([a, b], [1 - t, t])


def _check_alike(models: Sequence[PyTree]) -> None:
    if not models:
        raise MergeError("there are no models to merge")
    first, *others = [
        {path: jnp.shape(leaf) for path, leaf in flatten(model).items()}
        for model in models
    ]
    for i, shapes in enumerate(others, start=1):
        for path in [*first, *shapes]:
            if path not in shapes or path not in first:
                has, lacks = (0, i) if path in first else (i, 0)
                raise MergeError(
                    f"model {has} has a leaf {path!r}, which model {lacks} lacks"
                )
            if shapes[path] != first[path]:
                raise MergeError(
                    f"{path!r} is of shape {first[path]} in model 0, but of shape "
                    f"{shapes[path]} in model {i}"
                )


def check_weights(weights: Sequence[float] | None, n_models: int) -> list[float]:
    """The models' shares, which sum to 1; see `average`."""
    if weights is None:
        return [1 / n_models] * n_models
    if len(weights) != n_models:
        raise MergeError(f"{len(weights)} weights for {n_models} models")
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise MergeError(
            f"weights must be finite, at least 0 and not all 0, got {list(weights)}"
        )
    return [float(weight) / math.fsum(weights) for weight in weights]


# Statistics, measured anew ============================================================


def add_batch(
    total: PyTree, count: Any, statistics: PyTree, n: Any
) -> tuple[PyTree, Any]:
    """Adds a batch's statistics to a sum that is weighted by examples. Pure.

    Args:
        total: the sum so far; zeros at first.
        count: the examples so far.
        statistics: means over the batch's examples.
        n: how many these are.

    Returns:
        the new total and count; total / count is the mean.
    """
    # A batch without examples has no statistics (NaN), and adds none.
    total = jax.tree.map(lambda t, s: t + jnp.where(n > 0, n * s, 0), total, statistics)
    return total, count + n


_add_batch = jax.jit(add_batch)


def _mean(measure: Callable[[Any], PyTree], batches: Iterable[Any]) -> PyTree:
    """The mean over batches of what is measured on each, weighted by examples."""
    total, count = None, 0
    for inputs in batches:
        statistics, n = measure(inputs), jax.tree.leaves(inputs)[0].shape[0]
        if total is None:
            total = jax.tree.map(jnp.zeros_like, statistics)
        total, count = _add_batch(total, count, statistics, n)
    if not count:
        raise MergeError("statistics need at least one batch of inputs")
    return jax.tree.map(lambda t: t / count, total)


def recalibrate(
    batch_statistics: Callable[[PyTree, Any, Array], PyTree],
    variables: Mapping[str, PyTree],
    batches: Iterable[Any],
) -> dict[str, PyTree]:
    """Measures BatchNorm statistics anew: batch means and variances, averaged.

    Averaged weights do not have the averages of the statistics (Jordan et al. 2022).

    Args:
        batch_statistics: `(variables, inputs, mask) -> batch_stats` of that batch
            alone, in train mode. Compiled once for each function that is passed.
        variables: a model, with "batch_stats".
        batches: inputs, one batch at a time.

    Returns:
        the model with new "batch_stats".

    Raises:
        MergeError: no batches.
    """
    measure = jax.jit(batch_statistics)
    statistics = _mean(
        lambda inputs: measure(variables, inputs, np.ones(len(inputs), bool)), batches
    )
    return {**variables, "batch_stats": statistics}


class UnitMoments(NamedTuple):
    """The pre-activations of a layer's units, over examples and positions."""

    mean: Float[Array, "*units"]
    variance: Float[Array, "*units"]


def correction(
    measured: UnitMoments, target: UnitMoments
) -> tuple[Float[Array, "*units"], Float[Array, "*units"]]:
    """`(scale, shift)` that give units, as measured, the moments of the target.

    Units that do not vary are shifted only: no scale would make them vary.
    """
    # What rounding leaves of a constant unit's variance is not a signal.
    floor = 1e-10 * (measured.mean**2 + target.mean**2 + target.variance)
    alive = measured.variance > floor
    ratio = target.variance / jnp.where(alive, measured.variance, 1)
    scale = jnp.where(alive, jnp.sqrt(ratio), 1)
    return scale, target.mean - scale * measured.mean


def repair(
    unit_moments: Callable[..., dict[str, UnitMoments]],
    merged: PyTree,
    models: Sequence[PyTree],
    batches: Iterable[Any],
    weights: Sequence[float] | None = None,
) -> PyTree:
    """Rescales a merged network's units: REPAIR, for networks without BatchNorm.

    The units of an averaged network vary less than those of the networks that it is
    made of, and less from layer to layer. So every hidden unit's pre-activation gets
    the mean and the standard deviation that interpolate those of the models (Jordan et
    al. 2022, arXiv 2211.08403, section 3), by a new kernel and bias. A layer without a
    bias is scaled only: its mean has nothing to be moved by.

    Args:
        unit_moments: `unit_moments(variables, inputs, targets=None)`: the moments of
            every hidden layer on a batch, by the path of the layer that holds "kernel"
            (units last) and "bias". With targets (as it returns), each layer is
            corrected at once, and later ones see corrected inputs. Compiled once for
            each function that is passed.
        merged: `average(models, weights)`.
        models: what it is made of, aligned.
        batches: inputs, one batch at a time.
        weights: as of `average`.

    Returns:
        the merged network with new kernels and biases.

    Raises:
        MergeError: no batches, weights that do not fit, or running statistics: those
            of BatchNorm are to be measured anew (`recalibrate`).
    """
    shares = np.asarray(check_weights(weights, len(models)), np.float32)
    if isinstance(merged, Mapping) and "batch_stats" in merged:
        raise MergeError(
            "repair is for networks without BatchNorm; recalibrate this one"
        )
    measure = jax.jit(unit_moments)

    def of_batch(inputs):
        # Each batch has targets of its own, so that nothing changes where there is
        # nothing to mend.
        seen = [measure(model, inputs) for model in models]
        return seen, measure(merged, inputs, _blend(seen, shares))

    seen, measured = _mean(of_batch, batches)
    return _correct(merged, measured, _blend(seen, shares))


@jax.jit
def _blend(
    moments: Sequence[Mapping[str, UnitMoments]], shares: Float[Array, " models"]
) -> dict[str, UnitMoments]:
    """Interpolates means and standard deviations."""

    def mean(values):
        return jnp.average(jnp.stack(values), axis=0, weights=shares)

    def blend(*layers: UnitMoments) -> UnitMoments:
        deviation = mean([jnp.sqrt(layer.variance) for layer in layers])
        return UnitMoments(mean([layer.mean for layer in layers]), deviation**2)

    return {name: blend(*(each[name] for each in moments)) for name in moments[0]}


@jax.jit
def _correct(
    variables: PyTree,
    measured: Mapping[str, UnitMoments],
    targets: Mapping[str, UnitMoments],
) -> PyTree:
    """Puts the corrections of all layers into their kernels and biases."""
    corrections = {
        layer: correction(moments, targets[layer])
        for layer, moments in measured.items()
    }

    def correct(path, leaf):
        layer, _, name = path.rpartition("/")
        if layer not in corrections or name not in ("kernel", "bias"):
            return leaf
        scale, shift = corrections[layer]
        exact = leaf * scale + (shift if name == "bias" else 0)
        return exact.astype(leaf.dtype)

    return map_with_path(correct, variables)


# The line between two models ==========================================================


class Barrier(NamedTuple):
    """The straight line from a to b.

    Attributes:
        ts: where it was evaluated: 0 is a, 1 is b.
        losses: there.
        accuracies: there.
        barrier: by how much the loss exceeds, at most, the straight line between the
            losses of a and b; 0 if it nowhere does.
    """

    ts: Float[np.ndarray, " points"]
    losses: Float[np.ndarray, " points"]
    accuracies: Float[np.ndarray, " points"]
    barrier: float


def barrier(
    evaluate: Callable[[PyTree], tuple[float, float]],
    a: PyTree,
    b: PyTree,
    ts: Sequence[float] | np.ndarray | None = None,
    *,
    repair: Callable[[PyTree, float], PyTree] | None = None,
) -> Barrier:
    """Evaluates the straight line between two models.

    The loss barrier is `max_t L(t) - ((1 - t) L(0) + t L(1))` (Frankle et al. 2020,
    arXiv 1912.05671; Ainsworth et al. 2022, arXiv 2209.04836).

    Args:
        evaluate: `evaluate(model) -> (loss, accuracy)`.
        a: a model.
        b: another, aligned with `a` or not.
        ts: where to look, increasing from 0 to 1. None: 11 points.
        repair: `repair(model, t) -> model`: mends every point of the line, its ends
            included, before it is evaluated; e.g. `recalibrate`.

    Raises:
        MergeError: `ts` is not like that, or models that differ in their leaves.
    """
    ts = np.linspace(0, 1, 11) if ts is None else np.asarray(ts, np.float64)
    if len(ts) < 2 or ts[0] != 0 or ts[-1] != 1 or not (np.diff(ts) > 0).all():
        raise MergeError(f"ts must increase from 0 to 1, got {ts.tolist()}")
    points = []
    for t in ts.tolist():
        model = interpolate(a, b, t)
        points.append(evaluate(repair(model, t) if repair else model))
    losses, accuracies = np.asarray(points, np.float64).T
    chord = (1 - ts) * losses[0] + ts * losses[-1]
    return Barrier(ts, losses, accuracies, float((losses - chord).max()))
