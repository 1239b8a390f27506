"""A multilayer perceptron with ReLUs."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dimat_jax.models.classifier import tap
from dimat_jax.permutation import PermutationSpec
from dimat_jax.permutation.layers import dense

__all__ = ["MLP", "mlp", "permutation_spec"]


class MLP(nn.Module):
    """Dense layers with ReLUs between them, on flattened inputs.

    Attributes:
        hidden: the number of units of each hidden layer.
        n_classes: the number of logits.
        dtype: what it computes in; parameters are float32.
    """

    hidden: tuple[int, ...]
    n_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch ..."],
        *,
        train: bool,
        mask: Bool[Array, " batch"] | None = None,
    ) -> Float[Array, "batch classes"]:
        """`train` and `mask` make no difference: no layer looks across the batch."""
        del train, mask
        x = x.reshape(len(x), -1)
        for i, units in enumerate(self.hidden):
            x = nn.relu(nn.Dense(units, dtype=self.dtype, name=f"hidden{i}")(x))
            tap(self, f"relu{i}", x)
        return nn.Dense(self.n_classes, dtype=self.dtype, name="head")(x).astype(
            jnp.float32
        )


def mlp(
    *, n_classes: int, width: int = 1, hidden: tuple[int, ...] = (128, 128), dtype=None
) -> MLP:
    """`hidden` layers, each `width` times as wide."""
    return MLP(tuple(width * h for h in hidden), n_classes, dtype or jnp.float32)


def permutation_spec(model: MLP) -> PermutationSpec:
    """One group for each hidden layer."""
    layers = [f"hidden{i}" for i in range(len(model.hidden))]
    axes = {}
    for inputs, layer in zip([None, *layers], layers, strict=False):
        axes |= dense(layer, inputs, layer)
    axes |= dense("head", layers[-1] if layers else None, None)
    taps = {f"relu{i}": layer for i, layer in enumerate(layers)}
    return PermutationSpec(axes, taps)
