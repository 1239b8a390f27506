"""Residual networks, as He et al. (2016) build them for CIFAR and for ImageNet.

A basic block has two 3x3 convolutions; a bottleneck has a 1x1, a 3x3 and a 1x1
convolution. Both are post-activation. If a block changes the shape, its shortcut is a
convolution with a norm; otherwise it is the identity. The CIFAR networks have three
stages and 3x3 shortcuts, like the networks of the DIMAT paper (and of ZipIt); their
shortcuts may also be those without weights of He et al. ("pad", option A). The ImageNet
networks have four stages and 1x1 shortcuts. A bottleneck's stride is on its 3x3
convolution, as in torchvision ("v1.5").
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

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
from dimat_jax.models._settings import DTYPE, NORM, NORMS, STEM, WIDTH, one_of, scaled
from dimat_jax.models.classifier import tap
from dimat_jax.options import Option
from dimat_jax.permutation import Axis, Concat, PermutationSpec
from dimat_jax.permutation._layers import conv, dense

__all__ = [
    "RECORDS",
    "ResNet",
    "permutation_spec",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet152",
    "wide_resnet101_2",
    "wide_resnet50_2",
]

# For each kind of block, the ratio of its outgoing channels to its inner channels.
EXPANSION = {"basic": 1, "bottleneck": 4}
STEMS = ("cifar", "imagenet")
# For each kind of shortcut, the kernel size of shortcuts that change the shape. Those
# that are padded with zeros have no kernel.
SHORTCUTS = {"conv3x3": 3, "conv1x1": 1, "pad": 0}

_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class ResNet(nn.Module):
    """A stem, stages of residual blocks, and one dense head.

    Attributes:
        blocks: the number of blocks in each stage.
        channels: the number of channels in each stage, for bottlenecks the number of
            inner channels. Every stage but the first halves height and width.
        n_classes: the number of logits.
        block: the kind of block, "basic" or "bottleneck".
        stem: "cifar", a 3x3 convolution, or "imagenet", which quarters height and width
            by a 7x7 convolution and a max-pool.
        shortcut: the kind of shortcut in blocks that change the shape: "conv3x3",
            "conv1x1", or "pad" (every second pixel, and channels of zeros on both
            sides of the others). "pad" needs batch norm or layer norm.
        inner: the number of inner channels of bottlenecks, in multiples of `channels`.
        norm: the kind of norm, "batch", "layer" or "group"; see `models._norm`.
        bn_momentum: the share of the running statistics that remains at each step.
        dtype: the dtype of activations. Parameters and statistics are float32.
    """

    blocks: tuple[int, ...]
    channels: tuple[int, ...]
    n_classes: int
    block: str = "basic"
    stem: str = "cifar"
    shortcut: str = "conv3x3"
    inner: int = 1
    norm: str = "batch"
    bn_momentum: float = 0.9
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        one_of("block", self.block, EXPANSION)
        one_of("stem", self.stem, STEMS)
        one_of("shortcut", self.shortcut, SHORTCUTS)
        # Without a norm, activations would double from block to block.
        norms = [kind for kind in NORMS if kind != "none"]
        if self.shortcut == "pad":
            # The channels that come in and the zeros beside them are no norm groups.
            norms.remove("group")
        one_of("norm", self.norm, norms)
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
        conv = partial(_conv, dtype=self.dtype)
        norm = partial(
            normalise,
            self.norm,
            train=train,
            mask=mask,
            momentum=self.bn_momentum,
            dtype=self.dtype,
        )
        kernel, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        x = x.astype(self.dtype)
        x = conv(_Conv(self.channels[0], kernel, stride), name="conv0")(x)
        x = nn.relu(norm(x, name="norm0"))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        tap(self, "stem", x)
        for plan in _plan(self):
            x = _Block(plan, conv, norm, name=plan.name)(x)
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.n_classes, dtype=self.dtype, name="head")(x).astype(
            jnp.float32
        )


class _Conv(NamedTuple):
    """The sizes of a convolution: output channels, kernel side and stride."""

    channels: int
    kernel: int
    stride: int = 1


class _Pad(NamedTuple):
    """Numbers of channels of zeros before and behind those that come in; the stride."""

    low: int
    high: int
    stride: int


class _BlockPlan(NamedTuple):
    """The layers of one residual block.

    Attributes:
        name: the name of the block's module.
        convs: the convolutions, one after the other.
        inner: names for the activations between the convolutions. Groups and taps have
            these names.
        shortcut: the convolution or the padding of the shortcut, or None for the
            identity.
        stream: the groups of the channels that leave the block, with their sizes. There
            are several only behind shortcuts without weights.
    """

    name: str
    convs: tuple[_Conv, ...]
    inner: tuple[str, ...]
    shortcut: _Conv | _Pad | None
    stream: tuple[tuple[str, int], ...]


def _plan(model: ResNet) -> Iterator[_BlockPlan]:
    """Yields the plans of all blocks, in order."""
    incoming, n_streams = model.channels[0], 1
    stream = (("stream0", incoming),)
    for stage, channels in enumerate(model.channels):
        outgoing = EXPANSION[model.block] * channels
        for block in range(model.blocks[stage]):
            stride = 2 if stage > 0 and block == 0 else 1
            if model.block == "bottleneck":
                inside = model.inner * channels
                convs = (
                    _Conv(inside, 1),
                    _Conv(inside, 3, stride),
                    _Conv(outgoing, 1),
                )
                inner = ("inner1", "inner2")
            else:
                convs = (_Conv(channels, 3, stride), _Conv(outgoing, 3))
                inner = ("inner",)
            shortcut = None
            if stride > 1 or incoming != outgoing:
                name, n_streams = f"stream{n_streams}", n_streams + 1
                shortcut = _Conv(outgoing, SHORTCUTS[model.shortcut], stride)
                parts = ((name, outgoing),)
                if model.shortcut == "pad":
                    low = (outgoing - incoming) // 2
                    shortcut = _Pad(low, outgoing - incoming - low, stride)
                    new = (f"{name}/low", shortcut.low), (f"{name}/high", shortcut.high)
                    parts = (new[0], *stream, new[1])
                stream = tuple(part for part in parts if part[1])
            name = f"stage{stage}_block{block}"
            yield _BlockPlan(name, convs, inner, shortcut, stream)
            incoming = outgoing


class _Block(nn.Module):
    """A residual block.

    Attributes:
        plan: the layers of the block.
        conv: makes a convolution of the given sizes.
        norm: normalises activations.
    """

    plan: _BlockPlan
    conv: Callable[..., nn.Conv]
    norm: Callable[..., Array]

    @nn.compact
    def __call__(self, x):
        y = x
        for i, layer in enumerate(self.plan.convs, start=1):
            y = self.conv(layer, name=f"conv{i}")(y)
            y = self.norm(y, name=f"norm{i}")
            if i < len(self.plan.convs):
                y = nn.relu(y)
                tap(self, self.plan.inner[i - 1], y)
        shortcut = self.plan.shortcut
        if isinstance(shortcut, _Pad):
            x = x[:, :: shortcut.stride, :: shortcut.stride]
            x = jnp.pad(x, ((0, 0),) * 3 + ((shortcut.low, shortcut.high),))
        elif shortcut is not None:
            x = self.conv(shortcut, name="shortcut_conv")(x)
            x = self.norm(x, name="shortcut_norm")
        y = nn.relu(x + y)
        for name, start, size in _taps(self.plan):
            tap(self, name, y[..., start : start + size])
        return y


def _taps(plan: _BlockPlan) -> Iterator[tuple[str, int, int]]:
    """Yields the taps of a block's stream: names, first channels, and sizes."""
    start = 0
    for group, size in plan.stream:
        # Each part of a stream has a tap of its own, which is named after its group.
        yield "stream" if len(plan.stream) == 1 else group, start, size
        start += size


def _conv(layer: _Conv, *, dtype: DTypeLike, name: str) -> nn.Conv:
    return nn.Conv(
        layer.channels,
        (layer.kernel, layer.kernel),
        strides=layer.stride,
        padding=_padding(layer.kernel),
        use_bias=False,
        kernel_init=_conv_init,
        dtype=dtype,
        name=name,
    )


def _padding(kernel: int) -> list[tuple[int, int]]:
    """Equal padding on both sides, as PyTorch has it.

    "SAME" would pad a strided convolution more on one side than on the other.
    """
    return [(kernel // 2, kernel // 2)] * 2


def _cifar(
    blocks: int,
    *,
    n_classes: int,
    width: float = WIDTH.default,
    shortcut: str = "conv3x3",
    norm: str = "batch",
    dtype: Any = None,
) -> ResNet:
    """Builds three stages of basic blocks. The paper's ResNet-20 has width 8."""
    return ResNet(
        (blocks,) * 3,
        scaled(width, 16, 32, 64),
        n_classes,
        shortcut=shortcut,
        norm=norm,
        dtype=dtype or jnp.float32,
    )


def _imagenet(
    block: str,
    blocks: tuple[int, ...],
    *,
    n_classes: int,
    width: float = WIDTH.default,
    stem: str = "imagenet",
    norm: str = "batch",
    inner: int = 1,
    dtype: Any = None,
) -> ResNet:
    """Builds four stages. `stem="cifar"` is for images of 32 or 64 pixels."""
    return ResNet(
        blocks,
        scaled(width, 64, 128, 256, 512),
        n_classes,
        block=block,
        stem=stem,
        shortcut="conv1x1",
        inner=inner,
        norm=norm,
        dtype=dtype or jnp.float32,
    )


resnet20 = partial(_cifar, 3)
resnet32 = partial(_cifar, 5)
resnet44 = partial(_cifar, 7)
resnet56 = partial(_cifar, 9)

resnet18 = partial(_imagenet, "basic", (2, 2, 2, 2))
resnet34 = partial(_imagenet, "basic", (3, 4, 6, 3))
resnet50 = partial(_imagenet, "bottleneck", (3, 4, 6, 3))
resnet101 = partial(_imagenet, "bottleneck", (3, 4, 23, 3))
resnet152 = partial(_imagenet, "bottleneck", (3, 8, 36, 3))
wide_resnet50_2 = partial(resnet50, inner=2)
wide_resnet101_2 = partial(resnet101, inner=2)


def permutation_spec(model: ResNet) -> PermutationSpec:
    """Declares a group for each residual stream, and one or two inside each block.

    A stream runs through all blocks that add to it, so their taps share its group. A
    shortcut convolution ends one stream and starts the next. A shortcut without weights
    lets the stream go on between two groups of new channels. With group norm, there are
    two groups in place of each: `<name>/groups` permutes the norm groups as blocks, and
    `<name>/within` the channels within them.
    """
    units = partial(channel_axis, model.norm)

    def axis(stream: tuple[tuple[str, int], ...]) -> Axis:
        return units(stream[0][0]) if len(stream) == 1 else Concat(*stream)

    stream = (("stream0", model.channels[0]),)
    axes = conv("conv0", None, axis(stream))
    axes |= norm_axes(model.norm, "norm0", axis(stream))
    sizes = channel_sizes(model.norm, *stream[0])
    taps = {"stem": tap_axes(4, axis(stream))}
    for plan in _plan(model):
        path, incoming, stream = plan.name, axis(stream), plan.stream
        outgoing = axis(stream)
        if isinstance(plan.shortcut, _Conv):
            axes |= conv(f"{path}/shortcut_conv", incoming, outgoing)
            axes |= norm_axes(model.norm, f"{path}/shortcut_norm", outgoing)
        inner = {f"{path}/{name}": units(f"{path}/{name}") for name in plan.inner}
        chain, names = [incoming, *inner.values(), outgoing], [*inner, stream[0][0]]
        for i, (inputs, outputs) in enumerate(pairwise(chain), start=1):
            axes |= conv(f"{path}/conv{i}", inputs, outputs)
            axes |= norm_axes(model.norm, f"{path}/norm{i}", outputs)
            channels = plan.convs[i - 1].channels
            sizes |= channel_sizes(model.norm, names[i - 1], channels)
        taps |= {name: tap_axes(4, units_) for name, units_ in inner.items()}
        groups = [group for group, _ in stream]
        for group, (name, _, _) in zip(groups, _taps(plan), strict=True):
            taps[f"{path}/{name}"] = tap_axes(4, units(group))
    axes |= dense("head", axis(stream), None)
    return PermutationSpec(axes, taps, sizes)


def _records(
    builders: dict[str, Callable[..., ResNet]], summary: str, *options: Option
) -> Iterator[ModelRecord]:
    """The records of networks that differ in their layers, which `{}` stands for."""
    for name, build in builders.items():
        layers = name.removeprefix("wide_").removeprefix("resnet").partition("_")[0]
        yield ModelRecord(
            name,
            build,
            (WIDTH, NORM, DTYPE, *options),
            summary=summary.format(layers),
            module=ResNet,
            spec=permutation_spec,
        )


_20_TO_44 = dict(resnet20=resnet20, resnet32=resnet32, resnet44=resnet44)
_CIFAR = _20_TO_44 | dict(resnet56=resnet56)
_SMALL = dict(resnet18=resnet18, resnet34=resnet34, resnet50=resnet50)
_LARGE = dict(resnet101=resnet101, resnet152=resnet152)
_WIDE = dict(wide_resnet50_2=wide_resnet50_2, wide_resnet101_2=wide_resnet101_2)
RECORDS = (
    *_records(_CIFAR, "A ResNet for CIFAR, {} layers."),
    *_records(_SMALL | _LARGE, "A ResNet for ImageNet, {} layers.", STEM),
    *_records(_WIDE, "A ResNet for ImageNet, {} layers, twice as wide inside.", STEM),
)
