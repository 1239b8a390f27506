"""Normalisation layers, and the permutation symmetry of each kind.

Batch norm and layer norm commute with every permutation of the channels. Group norm
commutes only with permutations that keep its groups together. These permute the norm
groups as blocks, and the channels within alike in all norm groups.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from dimat_jax.merge import over_last_axes
from dimat_jax.permutation import Axis, Product
from dimat_jax.permutation._layers import batch_norm, group_norm, layer_norm
from dimat_jax.permutation._spec import Axes

__all__ = [
    "EPSILON",
    "BatchNorm",
    "channel_axis",
    "channel_sizes",
    "n_norm_groups",
    "norm_axes",
    "normalise",
    "tap_axes",
]

# All kinds of norms add this constant to the variance, as PyTorch does.
EPSILON = 1e-5


def normalise(
    kind: str,
    x: Array,
    *,
    train: bool,
    mask: Bool[Array, " batch"] | None,
    momentum: float,
    dtype: DTypeLike,
    name: str,
) -> Array:
    """Normalises `[batch, ..., channels]` with a layer of the calling module.

    Args:
        kind: "batch"; "layer", which normalises over the channels at each position;
            "group", which normalises over the positions and within `n_norm_groups`
            groups of channels; or "none".
        x: the activations.
        train: whether batch norm uses the statistics of the batch.
        mask: the examples that count for the statistics of the batch; None: all.
        momentum: the share of batch norm's running statistics that remains at a step.
        dtype: the dtype of the result. Parameters and statistics are float32.
        name: the name of the layer.
    """
    match kind:
        case "batch":
            layer = BatchNorm(momentum, dtype, name=name)
            return layer(x, train=train, mask=mask)
        case "layer":
            return nn.LayerNorm(epsilon=EPSILON, dtype=dtype, name=name)(x)
        case "group":
            layer = nn.GroupNorm(
                n_norm_groups(x.shape[-1]), epsilon=EPSILON, dtype=dtype, name=name
            )
            return layer(x)
        case _:
            return x


class BatchNorm(nn.Module):
    """Batch norm over all axes but the last, with the variables of `nn.BatchNorm`.

    It computes what Flax's layer does, with fewer passes over the activations. A mask
    concerns whole examples, so each example is summed first and then masked. The
    normalised activations are one product and one sum, `x * factor + offset`.
    Measured (jax 0.10.2, 2 cores, ResNet-20, batch 100): a training step takes 0.89 of
    the time that it takes with Flax's layer.

    Attributes:
        momentum: the share of the running statistics that remains at a step.
        dtype: the dtype of the result. Parameters and statistics are float32.
    """

    momentum: float
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch *positions channels"],
        *,
        train: bool,
        mask: Bool[Array, " batch"] | None,
    ) -> Float[Array, "batch *positions channels"]:
        """Normalises by the batch's statistics if it trains, else by the running ones.

        Masked examples do not count for the statistics, but they are normalised too.
        """
        shape = x.shape[-1:]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        x = x.astype(jnp.float32)
        if train:
            mean, var = _moments(x, mask)
            if not self.is_initializing():
                for running, new in ((running_mean, mean), (running_var, var)):
                    kept = self.momentum * running.value
                    running.value = kept + (1 - self.momentum) * new
        else:
            mean, var = running_mean.value, running_var.value
        factor = scale * jax.lax.rsqrt(var + EPSILON)
        factor, offset = (
            over_last_axes(y, x.ndim) for y in (factor, bias - mean * factor)
        )
        return (x * factor + offset).astype(self.dtype)


def _moments(
    x: Float[Array, "batch *positions channels"], mask: Bool[Array, " batch"] | None
) -> tuple[Float[Array, " channels"], Float[Array, " channels"]]:
    """Returns the means and the variances over the unmasked examples."""
    positions = tuple(range(1, x.ndim - 1))
    means, squares = x.mean(positions), (x * x).mean(positions)
    if mask is None:
        mask = jnp.ones(len(x), bool)
    count = jnp.maximum(mask.sum(), 1).astype(x.dtype)
    mean, square = (
        jnp.where(mask[:, None], each, 0).sum(0) / count for each in (means, squares)
    )
    # Rounding may make the difference negative.
    return mean, jnp.maximum(square - mean * mean, 0)


def n_norm_groups(channels: int) -> int:
    """The number of groups of group norm: at most 8, of at least two channels each.

    It is the greatest common divisor of `channels` and 8, so that the groups are equal
    for every number of channels. A group of a single channel would lose the channel's
    magnitude.
    """
    groups = math.gcd(channels, 8)
    return groups if groups < channels else max(channels // 2, 1)


def norm_axes(kind: str, path: str, units: Axis) -> dict[str, Axes]:
    """The axes of the layer that `normalise` adds."""
    match kind:
        case "batch":
            return batch_norm(path, units)
        case "layer":
            return layer_norm(path, units)
        case "group":
            return group_norm(path, units)
        case _:
            return {}


def channel_axis(kind: str, group: str) -> str | Product:
    """The axis of normalised channels: `group`, or two groups for group norm."""
    return Product(*_factors(group)) if kind == "group" else group


def channel_sizes(kind: str, group: str, channels: int) -> dict[str, int]:
    """The sizes of the groups of a `channel_axis`, if they cannot be inferred."""
    if kind != "group":
        return {}
    blocks = n_norm_groups(channels)
    return dict(zip(_factors(group), (blocks, channels // blocks), strict=True))


def tap_axes(rank: int, units: Axis) -> str | Axes:
    """The axes of a tap of `rank` dimensions whose last dimension is `units`."""
    return units if isinstance(units, str) else (*(None,) * (rank - 1), units)


def _factors(group: str) -> tuple[str, str]:
    return f"{group}/groups", f"{group}/within"
