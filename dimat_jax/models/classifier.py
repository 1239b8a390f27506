"""The computations of one agent with its model, as pure functions of its variables.

Only this file knows how models are called: bundled modules here, and those of users
through the form that `_own.OwnModel` gives them. All other code uses
`forward(variables, inputs)` and similar functions, which are written for one agent.
`Placement.per_agent` lifts them to many agents.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Key

from dimat_jax.data.pipeline import Batch
from dimat_jax.merge import UnitMoments, correction, over_last_axes
from dimat_jax.models._own import OwnModel
from dimat_jax.permutation import PermutationSpec
from dimat_jax.permutation._spec import axis_groups
from dimat_jax.tasks import CLASSIFICATION, TaskRecord
from dimat_jax.tree import PyTree, flatten

__all__ = [
    "activations",
    "batch_statistics",
    "both_modes",
    "for_inputs",
    "forward",
    "has_statistics",
    "init",
    "loss",
    "tap",
    "unit_moments",
]


def tap(module: nn.Module, name: str, units: Array) -> None:
    """Records `units` as the module's activations under `name`; see `activations`."""
    # The functions make sow keep the latest value alone instead of a tuple of all.
    module.sow("intermediates", name, units, lambda _, new: new, lambda: units)


Model = nn.Module | OwnModel
"""A bundled module, or the model of a user."""


def for_inputs(
    model: Model,
    input_shape: tuple[int, ...],
    input_dtype: str = "float32",
    *,
    permutes: bool = True,
) -> Model:
    """Tells the model of a user what its inputs are. Bundled modules need not know.

    Args:
        model: the model.
        input_shape: the shape of one input.
        input_dtype: the dtype of the inputs: "float32", or "int32" for tokens.
        permutes: whether the model's permutation symmetry is wanted; see `OwnModel`.
    """
    if not isinstance(model, OwnModel):
        return model
    return dataclasses.replace(
        model, input_shape=input_shape, input_dtype=input_dtype, permutes=permutes
    )


def init(model: Model, key: Key[Array, ""], inputs: ArrayLike) -> PyTree:
    """Makes new variables: {"params": ..., "batch_stats": ...}.

    "batch_stats" is missing if the module has no running statistics.

    Args:
        model: the model.
        key: the key for the initial weights. It is consumed.
        inputs: a batch of one example. Only its shape matters.
    """
    if isinstance(model, OwnModel):
        return model.init(key, inputs)
    variables = model.init(key, jnp.asarray(inputs), train=False)
    return {name: tree for name, tree in variables.items() if name != "intermediates"}


def forward(
    model: Model,
) -> Callable[[PyTree, Array], Float[Array, "batch classes"]]:
    """Returns `forward(variables, inputs) -> logits` in eval mode."""
    if isinstance(model, OwnModel):
        return model.forward

    def compute_logits(variables, inputs) -> Any:
        return model.apply(variables, inputs, train=False)

    return compute_logits


def both_modes(model: Model) -> Callable[[PyTree, Array], dict[str, Array]]:
    """Returns a function that computes logits in eval and train mode, in float32.

    `permutation.verify` checks a symmetry with it: `outputs(variables, inputs) ->
    {"eval": logits, "train": logits}`.
    """
    if isinstance(model, OwnModel):
        return model.both_modes()
    model = model.clone(dtype=jnp.float32)

    def compute_outputs(variables, inputs):
        train_logits, _ = model.apply(
            variables, inputs, train=True, mutable=["batch_stats"]
        )
        return {"eval": forward(model)(variables, inputs), "train": train_logits}

    return compute_outputs


def activations(model: Model) -> Callable[[PyTree, Array], dict[str, Array]]:
    """Returns `activations(variables, inputs) -> {tap: array}` in eval mode."""
    if isinstance(model, OwnModel):
        return model.symmetry[1]

    def collect_activations(variables, inputs):
        _, state = model.apply(
            variables, inputs, train=False, mutable=["intermediates"]
        )
        return flatten(state.get("intermediates", {}))

    return collect_activations


def loss(
    model: Model, task: TaskRecord = CLASSIFICATION
) -> Callable[
    [PyTree, Batch, Key[Array, ""]], tuple[Array, tuple[PyTree, dict[str, Array]]]
]:
    """Returns a function that computes a batch's mean loss in train mode.

    Args:
        model: the model.
        task: the task, which computes the losses of examples. By default they are the
            cross-entropies of classes, in nats.

    Returns:
        `loss(variables, batch, key) -> (loss, (model_state, metrics))`. `model_state`
        holds the updated variables that are not trained, as running statistics.
        `metrics` are scalars: the mean "loss" and the mean "score", which for classes
        is the accuracy (see `TaskRecord.score`). Masked examples do not count, neither
        for the loss nor for batch statistics.
    """

    def train_forward(variables, inputs, mask, key) -> Any:
        if isinstance(model, OwnModel):
            return model.train_forward(variables, inputs, mask, key)
        return model.apply(
            variables,
            inputs,
            train=True,
            mask=mask,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )

    def mean_loss(variables, batch, key):
        outputs, model_state = train_forward(variables, batch.inputs, batch.mask, key)
        value = _masked_mean(task(outputs, batch.labels), batch.mask)
        scores = task.scores(outputs, batch.labels)
        metrics = {"loss": value, "score": _masked_mean(scores, batch.mask)}
        return value, (model_state, metrics)

    return mean_loss


def has_statistics(model: Model) -> bool:
    """Whether a model has running statistics."""
    if isinstance(model, OwnModel):
        return model.has_statistics
    return getattr(model, "norm", None) == "batch"


def batch_statistics(
    model: Model,
) -> Callable[[PyTree, Array, Bool[Array, " batch"]], PyTree] | None:
    """Returns a function that measures the means and variances of one batch.

    `statistics(variables, inputs, mask)` returns a tree like `variables["batch_stats"]`
    with the statistics of the batch's unmasked examples alone. A model without
    BatchNorm has no such function: the result is None.
    """
    if isinstance(model, OwnModel):
        return model.batch_statistics()
    if not has_statistics(model):
        return None
    # With a momentum of 0 the running statistics are those of the last batch alone.
    model = model.clone(bn_momentum=0.0)

    def statistics(variables, inputs, mask):
        _, model_state = model.apply(
            variables, inputs, train=True, mask=mask, mutable=["batch_stats"]
        )
        return model_state["batch_stats"]

    return statistics


def unit_moments(
    model: Model, spec: PermutationSpec
) -> Callable[..., dict[str, UnitMoments]]:
    """Returns a function that measures the moments of hidden units for `merge.repair`.

    `moments(variables, inputs, targets=None)` returns the moments by layer. A layer is
    hidden if the spec permutes the last axis of its kernel. With targets, the
    pre-activations of each layer are rescaled to have the targets' moments before the
    next layer reads them. Layers without a bias get only the standard deviations.
    """
    if isinstance(model, OwnModel):
        is_mended_so = spec.groups and not model.has_statistics
        return model.unit_moments() if is_mended_so else _no_moments
    layers = {
        leaf.removesuffix("/kernel")
        for leaf, axes in spec.axes.items()
        if leaf.endswith("/kernel") and any(axis_groups(axes[-1]))
    }
    model = model.clone(dtype=jnp.float32)

    def moments(variables, inputs, targets=None):
        measured: dict[str, UnitMoments] = {}

        def measure_call(call, args, kwargs, context):
            units = call(*args, **kwargs)
            layer = "/".join(("params", *context.module.path))
            if layer not in layers:
                return units
            if layer in measured:
                raise ValueError(f"{layer!r} is called twice: two sets of moments")
            features = context.module.features  # a tuple if a DenseGeneral has several
            rank = 1 if isinstance(features, int) else len(features)
            samples = tuple(range(units.ndim - rank))
            measured[layer] = UnitMoments(units.mean(samples), units.var(samples))
            if targets is None:
                return units
            scale, shift = (
                over_last_axes(x, units.ndim)
                for x in correction(measured[layer], targets[layer])
            )
            return units * scale + shift if context.module.use_bias else units * scale

        with nn.intercept_methods(measure_call):
            model.apply(variables, inputs, train=False)
        return measured

    return moments


def _no_moments(variables: PyTree, inputs: Array, targets: Any = None) -> dict:
    """The moments of a model that has no hidden units, or is recalibrated instead."""
    del variables, inputs, targets
    return {}


def _masked_mean(
    values: Float[Array, " batch"], mask: Bool[Array, " batch"]
) -> Float[Array, ""]:
    count = jnp.maximum(mask.sum(), 1).astype(values.dtype)
    return jnp.where(mask, values, 0).sum() / count
