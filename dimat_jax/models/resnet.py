"""Residual networks as He et al. (2016) build them for CIFAR.

Post-activation basic blocks in three stages. Where a block changes shape, its shortcut
is a 3x3 convolution with BatchNorm, as in the networks that the paper trains (ZipIt's);
elsewhere it is the identity.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dimat_jax.models.classifier import tap
from dimat_jax.permutation import PermutationSpec
from dimat_jax.permutation.layers import batch_norm, conv, dense

__all__ = ["ResNet", "permutation_spec", "resnet20"]

# PyTorch's "padding=1". "SAME" would pad a strided convolution on one side only.
_PADDING = ((1, 1), (1, 1))

_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class _Block(nn.Module):
    """Two 3x3 convolutions, added to a shortcut."""

    channels: int
    stride: int
    bn_momentum: float
    dtype: Any

    @nn.compact
    def __call__(self, x, *, train: bool, mask=None):
        conv = partial(_conv, dtype=self.dtype)
        norm = partial(_norm, momentum=self.bn_momentum, train=train, dtype=self.dtype)
        y = conv(self.channels, self.stride, name="conv1")(x)
        y = nn.relu(norm(name="norm1")(y, mask=mask))
        tap(self, "inner", y)
        y = conv(self.channels, 1, name="conv2")(y)
        y = norm(name="norm2")(y, mask=mask)
        if x.shape != y.shape:
            x = conv(self.channels, self.stride, name="shortcut_conv")(x)
            x = norm(name="shortcut_norm")(x, mask=mask)
        y = nn.relu(x + y)
        tap(self, "stream", y)
        return y


class ResNet(nn.Module):
    """A CIFAR ResNet of 2 + 6 n layers.

    Attributes:
        blocks: n, the number of blocks in each stage.
        channels: of each stage; every stage but the first halves height and width.
        n_classes: the number of logits.
        bn_momentum: what the running statistics keep of themselves at each step.
        dtype: what it computes in; parameters and statistics are float32.
    """

    blocks: int
    channels: tuple[int, ...]
    n_classes: int
    bn_momentum: float = 0.9
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        *,
        train: bool,
        mask: Bool[Array, " batch"] | None = None,
    ) -> Float[Array, "batch classes"]:
        """Logits. In train mode batch statistics are those of the unmasked examples."""
        if mask is not None:
            mask = mask[:, None, None, None]
        x = x.astype(self.dtype)
        x = _conv(self.channels[0], 1, dtype=self.dtype, name="conv0")(x)
        x = _norm(
            momentum=self.bn_momentum, train=train, dtype=self.dtype, name="norm0"
        )(x, mask=mask)
        x = nn.relu(x)
        tap(self, "stem", x)
        for name, channels, stride in _block_shapes(self):
            x = _Block(channels, stride, self.bn_momentum, self.dtype, name=name)(
                x, train=train, mask=mask
            )
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.n_classes, dtype=self.dtype, name="head")(x).astype(
            jnp.float32
        )


def _conv(channels: int, stride: int, *, dtype, name: str) -> nn.Conv:
    return nn.Conv(
        channels,
        (3, 3),
        strides=stride,
        padding=_PADDING,
        use_bias=False,
        kernel_init=_conv_init,
        dtype=dtype,
        name=name,
    )


def _norm(*, momentum: float, train: bool, dtype, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=momentum,
        epsilon=1e-5,
        dtype=dtype,
        name=name,
    )


def _block_shapes(model: ResNet) -> list[tuple[str, int, int]]:
    """Every block's name, channels and stride, in order."""
    return [
        (f"stage{stage}_block{block}", channels, 2 if stage > 0 and block == 0 else 1)
        for stage, channels in enumerate(model.channels)
        for block in range(model.blocks)
    ]


def resnet20(*, n_classes: int, width: int = 1, dtype=None) -> ResNet:
    """ResNet-20, `width` times as wide as He et al.'s; the paper's has width 8."""
    channels = (16 * width, 32 * width, 64 * width)
    return ResNet(3, channels, n_classes, dtype=dtype or jnp.float32)


def permutation_spec(model: ResNet) -> PermutationSpec:
    """A group for each residual stream, and one inside each block.

    A stream runs through all blocks that add to it, so their taps share its group. A
    shortcut convolution ends one stream and starts the next.
    """
    axes = conv("conv0", None, "stream0") | batch_norm("norm0", "stream0")
    taps = {"stem": "stream0"}
    stream, n_streams, channels = "stream0", 1, model.channels[0]
    for block, block_channels, stride in _block_shapes(model):
        incoming, inner = stream, f"{block}/inner"
        if stride > 1 or block_channels != channels:
            stream, n_streams = f"stream{n_streams}", n_streams + 1
            axes |= conv(f"{block}/shortcut_conv", incoming, stream)
            axes |= batch_norm(f"{block}/shortcut_norm", stream)
        axes |= conv(f"{block}/conv1", incoming, inner)
        axes |= batch_norm(f"{block}/norm1", inner)
        axes |= conv(f"{block}/conv2", inner, stream)
        axes |= batch_norm(f"{block}/norm2", stream)
        taps |= {f"{block}/inner": inner, f"{block}/stream": stream}
        channels = block_channels
    axes |= dense("head", stream, None)
    return PermutationSpec(axes, taps)
