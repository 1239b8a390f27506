"""A multilayer perceptron with ReLUs."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dimat_jax.models._norm import norm_axes, normalise
from dimat_jax.models._record import ModelRecord
from dimat_jax.models._settings import DTYPE, NORM, WIDTH, one_of, scaled
from dimat_jax.models.classifier import tap
from dimat_jax.permutation import PermutationSpec
from dimat_jax.permutation._layers import dense

__all__ = ["MLP", "RECORDS", "mlp", "permutation_spec"]


class MLP(nn.Module):
    """Dense layers with ReLUs between them. Inputs are flattened.

    Attributes:
        hidden: the number of units of each hidden layer.
        n_classes: the number of logits.
        norm: the kind of norm between a hidden layer and its ReLU: "none", "batch" or
            "layer".
        bn_momentum: the share of the running statistics that remains at each step.
        dtype: the dtype of activations. Parameters and statistics are float32.
    """

    hidden: tuple[int, ...]
    n_classes: int
    norm: str = "none"
    bn_momentum: float = 0.9
    dtype: Any = jnp.float32

    def __post_init__(self):
        one_of("norm", self.norm, ("none", "batch", "layer"))
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch ..."],
        *,
        train: bool,
        mask: Bool[Array, " batch"] | None = None,
    ) -> Float[Array, "batch classes"]:
        """Computes logits. Masked examples do not count for batch statistics."""
        x = x.reshape(len(x), -1)
        for i, units in enumerate(self.hidden):
            x = nn.Dense(units, dtype=self.dtype, name=f"hidden{i}")(x)
            x = normalise(
                self.norm,
                x,
                train=train,
                mask=mask,
                momentum=self.bn_momentum,
                dtype=self.dtype,
                name=f"norm{i}",
            )
            x = nn.relu(x)
            tap(self, f"relu{i}", x)
        return nn.Dense(self.n_classes, dtype=self.dtype, name="head")(x).astype(
            jnp.float32
        )


def mlp(
    *,
    n_classes: int,
    width: float = WIDTH.default,
    hidden: tuple[int, ...] = (128, 128),
    norm: str = "none",
    dtype: Any = None,
) -> MLP:
    """Builds an MLP whose hidden layers have `width` times `hidden` units."""
    return MLP(scaled(width, *hidden), n_classes, norm=norm, dtype=dtype or jnp.float32)


def permutation_spec(model: MLP) -> PermutationSpec:
    """Declares one group for each hidden layer."""
    layers = [f"hidden{i}" for i in range(len(model.hidden))]
    axes = {}
    for i, (inputs, layer) in enumerate(zip([None, *layers], layers, strict=False)):
        axes |= dense(layer, inputs, layer)
        axes |= norm_axes(model.norm, f"norm{i}", layer)
    axes |= dense("head", layers[-1] if layers else None, None)
    taps = {f"relu{i}": layer for i, layer in enumerate(layers)}
    return PermutationSpec(axes, taps)


_record = partial(ModelRecord, module=MLP, spec=permutation_spec)

RECORDS = (_record("mlp", mlp, (WIDTH, NORM, DTYPE)),)
