"""Normalisation layers, and what each kind does to the symmetry.

Batch norm and layer norm commute with every permutation of the channels. Group norm
only does with those that keep its groups together: they permute the norm groups as
blocks and, alike in all of them, the channels within.
"""

import math
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Bool

from dimat_jax.permutation import Axis, Product
from dimat_jax.permutation._layers import batch_norm, group_norm, layer_norm
from dimat_jax.permutation._spec import Axes

__all__ = [
    "EPSILON",
    "NORMS",
    "channel_axis",
    "channel_sizes",
    "n_norm_groups",
    "norm_axes",
    "normalise",
    "tap_axes",
]

NORMS = ("batch", "layer", "group", "none")

# PyTorch's, for all kinds.
EPSILON = 1e-5


def normalise(
    kind: str,
    x: Array,
    *,
    train: bool,
    mask: Bool[Array, " batch"] | None,
    momentum: float,
    dtype: Any,
    name: str,
) -> Any:
    """Normalises `[batch, ..., channels]` by a layer of the module that calls this.

    Args:
        kind: "batch"; "layer", over the channels at each position; "group", over the
            positions and `n_norm_groups` groups of channels; "none".
        x: activations.
        train: whether batch norm uses the batch's own statistics.
        mask: the examples that these are of; None: all.
        momentum: what batch norm's running statistics keep of themselves.
        dtype: of the result; parameters and statistics are float32.
        name: the layer's.
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
    """How many groups group norm makes: at most 8, of at least two channels each.

    The greatest common divisor with 8, so that every number of channels can be divided;
    a group of one channel would forget how strong the channel is.
    """
    groups = math.gcd(channels, 8)
    return groups if groups < channels else max(channels // 2, 1)


def norm_axes(kind: str, path: str, units: Axis) -> dict[str, Axes]:
    """The axes of the layer that `normalise` makes."""
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
    """The axis of normalised channels: `group`, or the two that group norm needs."""
    return Product(*_factors(group)) if kind == "group" else group


def channel_sizes(kind: str, group: str, channels: int) -> dict[str, int]:
    """The sizes of a `channel_axis`'s groups, where no axis tells them by itself."""
    if kind != "group":
        return {}
    blocks = n_norm_groups(channels)
    return dict(zip(_factors(group), (blocks, channels // blocks), strict=True))


def tap_axes(rank: int, units: str | Product) -> str | Axes:
    """The axes of a tap whose last dimension, of `rank`, is `units`."""
    return units if isinstance(units, str) else (*(None,) * (rank - 1), units)


def _factors(group: str) -> tuple[str, str]:
    return f"{group}/groups", f"{group}/within"
