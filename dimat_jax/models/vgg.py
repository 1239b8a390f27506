"""VGG networks (Simonyan & Zisserman, 2015) with one dense head.

The 3x3 convolutions with norms form stages, and each stage ends with a 2x2 max-pool.
The head reads the last feature map flattened, so its size depends on the size of the
images: images of 32 x 32 give one pixel of 512 channels, those of 64 x 64 give four. A
feature map with a side of one pixel is not pooled any further.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from dimat_jax.models._norm import (
    channel_axis,
    channel_sizes,
    norm_axes,
    normalise,
    tap_axes,
)
from dimat_jax.models._record import ModelRecord
from dimat_jax.models._settings import DTYPE, NORM, NORMS, WIDTH, one_of, scaled
from dimat_jax.models.classifier import tap
from dimat_jax.permutation import PermutationSpec
from dimat_jax.permutation._layers import conv, dense, flattened

__all__ = [
    "RECORDS",
    "VGG",
    "permutation_spec",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
]

_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class VGG(nn.Module):
    """Stages of convolutions, and one dense head.

    Attributes:
        stages: for each stage, the numbers of channels of its convolutions.
        n_classes: the number of logits.
        norm: the kind of norm, "batch", "layer", "group" or "none"; see `models._norm`.
        bn_momentum: the share of the running statistics that remains at each step.
        dtype: the dtype of activations. Parameters and statistics are float32.
    """

    stages: tuple[tuple[int, ...], ...]
    n_classes: int
    norm: str = "batch"
    bn_momentum: float = 0.9
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        one_of("norm", self.norm, NORMS)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        *,
        train: bool,
        mask: Bool[Array, " batch"] | None = None,
    ) -> Float[Array, "batch classes"]:
        """Computes logits. Masked examples do not count for batch statistics."""
        x = x.astype(self.dtype)
        for i, channels, ends_stage in _layers(self):
            x = nn.Conv(
                channels,
                (3, 3),
                padding=((1, 1), (1, 1)),
                kernel_init=_conv_init,
                dtype=self.dtype,
                name=f"conv{i}",
            )(x)
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
            if ends_stage and min(x.shape[1:3]) > 1:
                x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        return nn.Dense(self.n_classes, dtype=self.dtype, name="head")(x).astype(
            jnp.float32
        )


def _layers(model: VGG) -> Iterator[tuple[int, int, bool]]:
    """Yields each convolution's number, its channels, and whether a pool follows it."""
    i = 0
    for stage in model.stages:
        for layer, channels in enumerate(stage, start=1):
            yield i, channels, layer == len(stage)
            i += 1


def _vgg(
    layers: tuple[int, ...],
    *,
    n_classes: int,
    width: float = WIDTH.default,
    norm: str = "batch",
    dtype: Any = None,
) -> VGG:
    channels = scaled(width, 64, 128, 256, 512, 512)
    stages = tuple((c,) * n for c, n in zip(channels, layers, strict=True))
    return VGG(stages, n_classes, norm=norm, dtype=dtype or jnp.float32)


vgg11 = partial(_vgg, (1, 1, 2, 2, 2))
vgg13 = partial(_vgg, (2, 2, 2, 2, 2))
vgg16 = partial(_vgg, (2, 2, 3, 3, 3))
vgg19 = partial(_vgg, (2, 2, 4, 4, 4))


def permutation_spec(model: VGG) -> PermutationSpec:
    """Declares a group for each convolution.

    The inputs of the head are permuted alike at every pixel. With group norm, there are
    two groups for each convolution: `conv<i>/groups` permutes the norm groups as
    blocks, and `conv<i>/within` the channels within them.
    """
    axes, taps, sizes = {}, {}, {}
    inputs = None
    for i, channels, _ in _layers(model):
        units = channel_axis(model.norm, f"conv{i}")
        axes |= conv(f"conv{i}", inputs, units, bias=True)
        axes |= norm_axes(model.norm, f"norm{i}", units)
        taps[f"relu{i}"] = tap_axes(4, units)
        sizes |= channel_sizes(model.norm, f"conv{i}", channels)
        inputs = units
    axes |= dense("head", inputs and flattened(inputs), None)
    return PermutationSpec(axes, taps, sizes)


_record = partial(ModelRecord, module=VGG, spec=permutation_spec)

RECORDS = tuple(
    _record(name, build, (WIDTH, NORM, DTYPE), summary=summary)
    for name, build, summary in (
        ("vgg11", vgg11, "VGG with 8 convolutions, normalisation and one dense head."),
        ("vgg13", vgg13, "VGG with 10 convolutions, normalisation and one dense head."),
        ("vgg16", vgg16, "VGG with 13 convolutions, normalisation and one dense head."),
        ("vgg19", vgg19, "VGG with 16 convolutions, normalisation and one dense head."),
    )
)
