"""Merges networks that were trained apart: averages, corrects and evaluates them.

    perms = activation_matching(spec, activations, a, b, batches)
    aligned = permutation.apply(spec, perms, b)
    merged = merge.average([a, aligned])
    merged = merge.recalibrate(batch_statistics, merged, batches)      # BatchNorm, or
    merged = merge.repair(unit_moments, merged, [a, aligned], batches)  # without it
    curve = merge.barrier(evaluate, a, aligned)

Models are pytrees of arrays that are aligned already: `matching` finds permutations and
`permutation.apply` applies them. This file does not know how networks compute. It calls
functions that are passed to it, each for one model.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dimat_jax._batch_statistics import batch_statistics
from dimat_jax._labelled import labels_explained
from dimat_jax._mending import (
    LayerMoments,
    MergeError,
    UnitMoments,
    correct_layers,
    correction,
    over_last_axes,
    parts_of_layers,
    unit_moments,
)
from dimat_jax.errors import nearest
from dimat_jax.tree import (
    PyTree,
    as_arrays,
    exact_dtype,
    flatten,
    is_inexact,
    map_with_path,
)

__all__ = [
    "Barrier",
    "LayerMoments",
    "MergeError",
    "UnitMoments",
    "add_batch",
    "average",
    "barrier",
    "batch_statistics",
    "check_weights",
    "correction",
    "interpolate",
    "over_last_axes",
    "recalibrate",
    "repair",
    "unit_moments",
]


Weights = Sequence[float] | Callable[[str], Sequence[float] | None]
"""One weight for each model, or `weights(path)`: those of one leaf."""


def average(
    models: Sequence[PyTree],
    weights: Weights | None = None,
    *,
    mismatched: Literal["raise", "first"] = "raise",
) -> PyTree:
    """Averages aligned models, with weights.

    Args:
        models: pytrees with the same leaves. Real and complex leaves are averaged with
            float32 precision or better and keep their dtype. All other leaves are taken
            from the first model. PyTorch's tensors become arrays.
        weights: one weight for each model. They are divided by their sum. None: all
            models have the same weight. A function `weights(path)` returns the weights
            for each leaf, or None.
        mismatched: what becomes of leaves that the models do not all have in the same
            shape, as heads for different classes: "raise" an error, or take those of
            the "first" model. The result has the first model's structure.

    Raises:
        MergeError: leaves differ in path or shape, or the weights are too few, too
            many, negative, not finite, or all 0.
    """
    models = [as_arrays(model) for model in models]
    if mismatched == "raise":
        _check_alike(models)
    elif not models:
        raise MergeError("there are no models to merge")
    leaves = [flatten(model) for model in models]
    whole = None if callable(weights) else check_weights(weights, len(models))

    def shares(path: str) -> list[float]:
        if callable(weights):
            return check_weights(weights(path), len(models))
        assert whole is not None
        return whole

    def mean(path, first):
        own = [model[path] for model in leaves if path in model]
        alike = len(own) == len(models) and len(set(map(_shape, own))) == 1
        if not alike or _shape(first) is None or not is_inexact(first):
            return first
        dtype = jnp.result_type(first)
        exact = exact_dtype(dtype)
        # Models with a share of 0 are left out: 0 times infinity would be NaN.
        terms = [
            share * jnp.asarray(leaf, exact)
            for share, leaf in zip(shares(path), own, strict=True)
            if share
        ]
        return sum(terms[1:], start=terms[0]).astype(dtype)

    return map_with_path(mean, models[0])


def interpolate(a: PyTree, b: PyTree, t: float) -> PyTree:
    """Computes the point `(1 - t) a + t b` of a straight line; see `average`.

    Raises:
        MergeError: `t` is not between 0 and 1, or the models' leaves differ.
    """
    if not 0 <= t <= 1:
        raise MergeError(f"the line from a to b has 0 <= t <= 1, got t = {t}")
    return average([a, b], [1 - t, t])


def _shape(leaf: Any) -> tuple[int, ...] | None:
    """The shape of a leaf; None if it is neither an array nor a number."""
    if isinstance(leaf, int | float | complex):
        return ()
    return tuple(leaf.shape) if hasattr(leaf, "shape") else None


def _check_alike(models: Sequence[PyTree]) -> None:
    """Checks that there are models and that their leaves agree in path and shape."""
    if not models:
        raise MergeError("there are no models to merge")
    first, *others = [
        {path: _shape(leaf) for path, leaf in flatten(model).items()}
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
    """Checks the weights of models and divides them by their sum.

    Raises:
        MergeError: the weights are not as `average` needs them.
    """
    if weights is None:
        return [1 / n_models] * n_models
    if len(weights) != n_models:
        raise MergeError(f"{len(weights)} weights for {n_models} models")
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise MergeError(
            f"weights must be finite, at least 0 and not all 0, got {list(weights)}"
        )
    return [float(weight) / math.fsum(weights) for weight in weights]


# Recalibration and REPAIR =============================================================


def add_batch(
    total: PyTree, count: Array | float, statistics: PyTree, n: Array | float
) -> tuple[PyTree, Array | float]:
    """Adds a batch's statistics to a sum that is weighted by examples. Pure.

    Args:
        total: the sum over earlier batches; zeros at first.
        count: the number of examples in earlier batches.
        statistics: means over the batch's examples.
        n: the number of the batch's examples.

    Returns:
        the new total and the new count. The mean is total / count.
    """
    # The statistics of a batch without examples are NaN, so they must not be added.
    total = jax.tree.map(lambda t, s: t + jnp.where(n > 0, n * s, 0), total, statistics)
    return total, count + n


_add_batch = jax.jit(add_batch)


def _mean(measure: Callable[[PyTree], PyTree], batches: Iterable[PyTree]) -> PyTree:
    """Measures statistics on batches and averages them, weighted by examples."""
    total, count = None, 0
    for inputs in map(as_arrays, batches):
        with labels_explained(inputs, MergeError):
            statistics = measure(inputs)
        n = jax.tree.leaves(inputs)[0].shape[0]
        if total is None:
            total = jax.tree.map(jnp.zeros_like, statistics)
        total, count = _add_batch(total, count, statistics, n)
    if not count:
        raise MergeError("statistics need at least one batch of inputs")
    return jax.tree.map(lambda t: t / count, total)


def recalibrate(
    batch_statistics: Callable[[PyTree, PyTree, Array], PyTree],
    variables: PyTree,
    batches: Iterable[PyTree],
) -> PyTree:
    """Measures a model's BatchNorm statistics again, as averages over batches.

    This is needed because the statistics of an averaged network are not the averages
    of the networks' statistics (Jordan et al. 2022, arXiv 2211.08403).

    Args:
        batch_statistics: `(variables, inputs, mask) -> statistics`: the means and
            variances of one batch in train mode, as the collection "batch_stats" of
            Flax, or by the paths of their leaves. `merge.batch_statistics` makes such a
            function from any model. Each function that is passed is compiled once.
        variables: a model with running statistics.
        batches: inputs, one batch at a time.

    Returns:
        the model with new statistics.

    Raises:
        MergeError: there are no batches, or the model has no leaves with the paths of
            the statistics.
    """
    measure = jax.jit(batch_statistics)

    def of_batch(inputs):
        mask = np.ones(jax.tree.leaves(inputs)[0].shape[0], bool)
        return measure(variables, inputs, mask)

    statistics = _mean(of_batch, batches)
    new, leaves = flatten(statistics), flatten(variables)
    if not new.keys() <= leaves.keys():
        if isinstance(variables, Mapping) and "batch_stats" in variables:
            return {**variables, "batch_stats": statistics}
        unknown = next(path for path in new if path not in leaves)
        raise MergeError(
            f"batch_statistics returns {unknown!r}, which the model does not have; "
            f"{nearest(unknown, leaves)}"
        )
    return map_with_path(
        lambda path, leaf: new[path].astype(leaf.dtype) if path in new else leaf,
        variables,
    )


def repair(
    unit_moments: Callable[..., dict[str, UnitMoments]],
    merged: PyTree,
    models: Sequence[PyTree],
    batches: Iterable[PyTree],
    weights: Sequence[float] | None = None,
) -> PyTree:
    """Rescales a merged network's units: REPAIR, for networks without BatchNorm.

    The units of an averaged network vary less than those of the networks that were
    averaged, and the difference grows from layer to layer. So repair changes kernels
    and biases: each hidden unit's pre-activation gets the mean and the standard
    deviation that interpolate those of the models (Jordan et al. 2022,
    arXiv 2211.08403, section 3). A layer without a bias is only scaled, because
    nothing could shift its mean.

    Args:
        unit_moments: `unit_moments(variables, inputs, targets=None) -> moments`: the
            moments of every hidden layer on a batch. `merge.unit_moments` makes such a
            function from any model. The keys of other functions are the paths of layers
            that hold "kernel" (units last) and perhaps "bias", or leaves of which one
            axis alone has as many entries as the layer has units. With targets, which
            are moments as well, each layer is corrected before the next one reads it.
            Each function that is passed is compiled once.
        merged: the averaged network, `average(models, weights)`.
        models: the aligned networks that were averaged.
        batches: inputs, one batch at a time.
        weights: the weights of the models, as for `average`.

    Returns:
        the merged network with new kernels and biases.

    Raises:
        MergeError: there are no batches, weights do not fit, a layer's leaves do not
            tell where the units are, or the network has running statistics. For
            networks with BatchNorm there is `recalibrate`.
    """
    shares = np.asarray(check_weights(weights, len(models)), np.float32)
    if isinstance(merged, Mapping) and "batch_stats" in merged:
        raise MergeError(
            "repair is for networks without BatchNorm; recalibrate this one"
        )
    measure = jax.jit(unit_moments)

    def measure_batch(inputs):
        # Each batch has its own targets, so that a network whose units already have
        # the right moments does not change.
        moments = [measure(model, inputs) for model in models]
        return moments, measure(merged, inputs, _blend(moments, shares))

    moments, measured = _mean(measure_batch, batches)
    parts = parts_of_layers(unit_moments, merged, measured)
    return _correct(merged, measured, _blend(moments, shares), parts)


@jax.jit
def _blend(
    moments: Sequence[Mapping[str, UnitMoments]], shares: Float[Array, " models"]
) -> dict[str, UnitMoments]:
    """Interpolates the models' means and standard deviations."""

    def mean(values):
        return jnp.average(jnp.stack(values), axis=0, weights=shares)

    def blend(*layers: UnitMoments) -> UnitMoments:
        deviation = mean([jnp.sqrt(layer.variance) for layer in layers])
        return UnitMoments(mean([layer.mean for layer in layers]), deviation**2)

    return {name: blend(*(each[name] for each in moments)) for name in moments[0]}


_correct = jax.jit(correct_layers, static_argnames="parts")


# The line between two models ==========================================================


class Barrier(NamedTuple):
    """Losses and accuracies on the straight line from model a to model b.

    Attributes:
        ts: the evaluated points of the line: 0 is a, 1 is b.
        losses: the loss at each point.
        accuracies: the accuracy at each point.
        barrier: the largest difference between the loss and the straight line that
            connects the losses of a and b; at least 0.
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
    """Evaluates points of the straight line between two models.

    The loss barrier is `max_t L(t) - ((1 - t) L(0) + t L(1))` (Frankle et al. 2020,
    arXiv 1912.05671; Ainsworth et al. 2022, arXiv 2209.04836).

    Args:
        evaluate: `evaluate(model) -> (loss, accuracy)`.
        a: a model.
        b: another model. It need not be aligned with `a`.
        ts: the points to evaluate, increasing from 0 to 1. None: 11 points.
        repair: `repair(model, t) -> model`: changes every model of the line, also its
            ends, before it is evaluated. `recalibrate` is an example.

    Raises:
        MergeError: `ts` does not increase from 0 to 1, or the models' leaves differ.
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
