"""What one agent computes with a model, as pure functions of its variables.

These are the only places that know how the bundled modules are called. Everything else
sees `forward(variables, inputs)` and its like, for one agent; `Placement.per_agent`
lifts them to many.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Key

from dimat_jax.data.pipeline import Batch
from dimat_jax.merge import UnitMoments, correction
from dimat_jax.permutation import PermutationSpec
from dimat_jax.permutation._spec import axis_groups
from dimat_jax.tree import PyTree, flatten

__all__ = [
    "activations",
    "batch_statistics",
    "both_modes",
    "forward",
    "init",
    "loss",
    "tap",
    "unit_moments",
]


def tap(module: nn.Module, name: str, units: Array) -> None:
    """Shows `units` to whoever watches the module's activations, under `name`."""
    # The latest alone: sow would otherwise collect a tuple.
    module.sow("intermediates", name, units, lambda _, new: new, lambda: units)


def init(model: nn.Module, key: Key[Array, ""], inputs: Any) -> PyTree:
    """Fresh variables: {"params": ..., "batch_stats": ...} (the latter if it has any).

    Args:
        model: a bundled module.
        key: consumed.
        inputs: a batch of one example; only its shape matters.
    """
    variables = model.init(key, jnp.asarray(inputs), train=False)
    return {name: tree for name, tree in variables.items() if name != "intermediates"}


def forward(
    model: nn.Module,
) -> Callable[[PyTree, Array], Float[Array, "batch classes"]]:
    """`forward(variables, inputs) -> logits` in eval mode."""

    def logits(variables, inputs) -> Any:
        return model.apply(variables, inputs, train=False)

    return logits


def both_modes(model: nn.Module) -> Callable[[PyTree, Array], dict[str, Array]]:
    """Logits of eval and train mode, in float32: what `permutation.verify` needs."""
    model = model.clone(dtype=jnp.float32)

    def outputs(variables, inputs):
        train_logits, _ = model.apply(
            variables, inputs, train=True, mutable=["batch_stats"]
        )
        return {"eval": forward(model)(variables, inputs), "train": train_logits}

    return outputs


def activations(model: nn.Module) -> Callable[[PyTree, Array], dict[str, Array]]:
    """`activations(variables, inputs) -> {tap: array}` in eval mode."""

    def watch(variables, inputs):
        _, seen = model.apply(variables, inputs, train=False, mutable=["intermediates"])
        return flatten(seen.get("intermediates", {}))

    return watch


def loss(
    model: nn.Module,
) -> Callable[[PyTree, Batch, Key[Array, ""]], tuple[Array, tuple[PyTree, dict]]]:
    """Mean cross-entropy of a batch in train mode.

    Returns:
        `loss(variables, batch, key) -> (loss, (model_state, metrics))`: model_state
        holds the variables that are not trained (running statistics), updated; metrics
        are scalars. Masked examples count nowhere, batch statistics included.
    """

    def cross_entropy(variables, batch, key):
        logits, model_state = model.apply(
            variables,
            batch.inputs,
            train=True,
            mask=batch.mask,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        value = _masked_mean(losses, batch.mask)
        correct = logits.argmax(axis=-1) == batch.labels
        metrics = {
            "loss": value,
            "accuracy": _masked_mean(correct.astype(jnp.float32), batch.mask),
        }
        return value, (model_state, metrics)

    return cross_entropy


def batch_statistics(
    model: nn.Module,
) -> Callable[[PyTree, Array, Bool[Array, " batch"]], PyTree] | None:
    """`statistics(variables, inputs, mask)`: one batch's own means and variances.

    The result has the structure of `variables["batch_stats"]`. None for a model that
    normalises no batches.
    """
    if getattr(model, "norm", None) != "batch":
        return None
    # Without momentum the running statistics are those of the last batch alone.
    model = model.clone(bn_momentum=0.0)

    def statistics(variables, inputs, mask):
        _, model_state = model.apply(
            variables, inputs, train=True, mask=mask, mutable=["batch_stats"]
        )
        return model_state["batch_stats"]

    return statistics


def unit_moments(
    model: nn.Module, spec: PermutationSpec
) -> Callable[..., dict[str, UnitMoments]]:
    """`moments(variables, inputs, targets=None)`: what `merge.repair` needs.

    The hidden layers are those with a kernel whose last axis the spec permutes. With
    targets, each layer's pre-activations get the targets' moments at once, as if they
    passed a BatchNorm in train mode; only their deviations do in layers without a bias.
    """
    layers = {
        leaf.removesuffix("/kernel")
        for leaf, axes in spec.axes.items()
        if leaf.endswith("/kernel") and any(axis_groups(axes[-1]))
    }
    model = model.clone(dtype=jnp.float32)

    def moments(variables, inputs, targets=None):
        seen: dict[str, UnitMoments] = {}

        def watch(call, args, kwargs, context):
            units = call(*args, **kwargs)
            layer = "/".join(("params", *context.module.path))
            if layer not in layers:
                return units
            if layer in seen:
                raise ValueError(f"{layer!r} is called twice: two sets of moments")
            features = context.module.features  # several axes, of a DenseGeneral
            rank = 1 if isinstance(features, int) else len(features)
            samples = tuple(range(units.ndim - rank))
            seen[layer] = UnitMoments(units.mean(samples), units.var(samples))
            if targets is None:
                return units
            scale, shift = correction(seen[layer], targets[layer])
            return units * scale + (shift if context.module.use_bias else 0)

        with nn.intercept_methods(watch):
            model.apply(variables, inputs, train=False)
        return seen

    return moments


def _masked_mean(
    values: Float[Array, " batch"], mask: Bool[Array, " batch"]
) -> Float[Array, ""]:
    count = jnp.maximum(mask.sum(), 1).astype(values.dtype)
    return jnp.where(mask, values, 0).sum() / count
