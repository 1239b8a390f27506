"""Normalisation layers, and the permutation symmetry of each kind.

Batch norm and layer norm commute with every permutation of the channels. Group norm
commutes only with permutations that keep its groups together. These permute the norm
groups as blocks, and the channels within alike in all norm groups.
"""

import math

import flax.linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool

from dimat_jax.permutation import Axis, Product
from dimat_jax.permutation._layers import batch_norm, group_norm, layer_norm
from dimat_jax.permutation._spec import Axes

__all__ = [
    "EPSILON",
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
            if mask is not None:
                mask = mask.reshape(-1, *(1,) * (x.ndim - 1))
            layer = nn.BatchNorm(
                use_running_average=not train,
                momentum=momentum,
                epsilon=EPSILON,
                dtype=dtype,
                name=name,
            )
            return layer(x, mask=mask)
        case "layer":
            return nn.LayerNorm(epsilon=EPSILON, dtype=dtype, name=name)(x)
        case "group":
            layer = nn.GroupNorm(
                n_norm_groups(x.shape[-1]), epsilon=EPSILON, dtype=dtype, name=name
            )
            return layer(x)
        case _:
            return x


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


def tap_axes(rank: int, units: str | Product) -> str | Axes:
    """The axes of a tap of `rank` dimensions whose last dimension is `units`."""
    return units if isinstance(units, str) else (*(None,) * (rank - 1), units)


def _factors(group: str) -> tuple[str, str]:
    return f"{group}/groups", f"{group}/within"
