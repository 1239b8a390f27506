"""Convolutional networks."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from tests.permutation.architectures._model import (
    Architecture,
    equinox,
    linen,
    nnx_model,
    normal,
)

__all__ = ["ARCHITECTURES"]

IMAGES = normal(24, 6, 6, 3)
CLASSES = 3


def batch_norm(x):
    return nn.BatchNorm(use_running_average=True)(x)


class LeNet(nn.Module):
    """LeCun et al. 1998: two convolutions, each pooled, and two hidden layers."""

    @nn.compact
    def __call__(self, x):
        for channels in (4, 5):
            x = nn.tanh(nn.Conv(channels, (3, 3))(x))
            x = nn.avg_pool(x, (2, 2), (2, 2), padding="SAME")
        x = x.reshape(len(x), -1)
        for units in (7, 6):
            x = nn.tanh(nn.Dense(units)(x))
        return nn.Dense(CLASSES)(x)


class AlexNet(eqx.Module):
    """Krizhevsky et al. 2012, with channels first, for one image."""

    layers: list

    def __init__(self, key):
        k = jax.random.split(key, 5)
        self.layers = [
            eqx.nn.Conv2d(3, 5, 3, stride=2, padding=1, key=k[0]),
            jax.nn.relu,
            eqx.nn.MaxPool2d(2, 1),
            eqx.nn.Conv2d(5, 6, 3, padding=1, key=k[1]),
            jax.nn.relu,
            eqx.nn.Conv2d(6, 4, 3, padding=1, key=k[2]),
            jax.nn.relu,
            jnp.ravel,
            eqx.nn.Dropout(0.5, inference=True),
            eqx.nn.Linear(4 * 2 * 2, 8, key=k[3]),
            jax.nn.relu,
            eqx.nn.Linear(8, CLASSES, key=k[4]),
        ]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class ResNet(nn.Module):
    """He et al. 2016: two stages of one block each, the second with a projection."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(batch_norm(nn.Conv(4, (3, 3), use_bias=False)(x)))
        for channels, stride in ((4, 1), (6, 2)):
            y = nn.Conv(channels, (3, 3), stride, use_bias=False)(x)
            y = nn.relu(batch_norm(y))
            y = batch_norm(nn.Conv(channels, (3, 3), use_bias=False)(y))
            if stride > 1:
                x = batch_norm(nn.Conv(channels, (1, 1), stride, use_bias=False)(x))
            x = nn.relu(x + y)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class PreActivationBlock(nnx.Module):
    def __init__(self, channels, rngs):
        self.norm1 = nnx.BatchNorm(channels, rngs=rngs)
        self.conv1 = nnx.Conv(channels, 7, (3, 3), rngs=rngs)
        self.norm2 = nnx.BatchNorm(7, rngs=rngs)
        self.conv2 = nnx.Conv(7, channels, (3, 3), rngs=rngs)

    def __call__(self, x):
        y = self.conv1(nnx.relu(self.norm1(x)))
        return x + self.conv2(nnx.relu(self.norm2(y)))


class PreActivationResNet(nnx.Module):
    """He et al. 2016b: norms and activations before the convolutions."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 5, (3, 3), rngs=rngs)
        self.blocks = nnx.List([PreActivationBlock(5, rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.head = nnx.Linear(5, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(nnx.relu(self.norm(x)).mean((1, 2)))


class ResNeXt(nn.Module):
    """Xie et al. 2017: a bottleneck whose 3x3 convolution has 2 groups of 3."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(5, (3, 3))(x))
        y = nn.relu(batch_norm(nn.Conv(6, (1, 1))(x)))
        y = nn.Conv(8, (3, 3), feature_group_count=2)(y)
        y = nn.Conv(5, (1, 1))(nn.relu(batch_norm(y)))
        return nn.Dense(CLASSES)(nn.relu(x + y).mean((1, 2)))


class Inception(nn.Module):
    """Szegedy et al. 2015: four branches side by side."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        narrow = [nn.relu(nn.Conv(n, (1, 1))(x)) for n in (3, 5)]
        branches = [
            nn.Conv(4, (1, 1))(x),
            nn.Conv(6, (3, 3))(narrow[0]),
            nn.Conv(7, (5, 5))(narrow[1]),
            nn.Conv(8, (1, 1))(nn.max_pool(x, (3, 3), padding="SAME")),
        ]
        x = nn.relu(jnp.concatenate(branches, axis=-1))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class MobileNet(nn.Module):
    """Howard et al. 2017: depthwise convolutions, each followed by a pointwise one."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(batch_norm(nn.Conv(4, (3, 3))(x)))
        for channels in (5, 6):
            n = x.shape[-1]
            x = nn.Conv(n, (3, 3), feature_group_count=n, use_bias=False)(x)
            x = nn.relu6(batch_norm(x))
            x = nn.relu6(batch_norm(nn.Conv(channels, (1, 1))(x)))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class EfficientNet(nn.Module):
    """Tan and Le 2019: an inverted residual with squeeze and excitation."""

    @nn.compact
    def __call__(self, x):
        x = nn.swish(batch_norm(nn.Conv(5, (3, 3))(x)))
        y = nn.swish(batch_norm(nn.Conv(8, (1, 1))(x)))
        y = nn.swish(batch_norm(nn.Conv(8, (3, 3), feature_group_count=8)(y)))
        squeezed = nn.swish(nn.Dense(3)(y.mean((1, 2), keepdims=True)))
        y = y * nn.sigmoid(nn.Dense(8)(squeezed))
        x = x + batch_norm(nn.Conv(5, (1, 1))(y))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class ConvNeXt(nn.Module):
    """Liu et al. 2022: depthwise 7x7 convolutions, LayerNorm, and layer scale."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Conv(6, (2, 2), 2)(x))
        for _ in range(2):
            y = nn.Conv(6, (7, 7), feature_group_count=6)(x)
            y = nn.Dense(6)(nn.gelu(nn.Dense(9)(nn.LayerNorm()(y))))
            x = x + self.param(f"gamma{_}", nn.initializers.ones, (6,)) * y
        return nn.Dense(CLASSES)(nn.LayerNorm()(x.mean((1, 2))))


class UNet(nn.Module):
    """Ronneberger et al. 2015: the decoder reads the encoder's maps as well."""

    @nn.compact
    def __call__(self, x):
        down = nn.relu(nn.Conv(4, (3, 3))(x))
        x = nn.relu(nn.Conv(6, (3, 3))(nn.max_pool(down, (2, 2), (2, 2))))
        up = nn.ConvTranspose(5, (2, 2), (2, 2))(x)
        x = nn.relu(nn.Conv(7, (3, 3))(jnp.concatenate([down, up], axis=-1)))
        return nn.Conv(2, (1, 1))(x)


class PixelCNN(nn.Module):
    """Van den Oord et al. 2016: convolutions that see earlier pixels alone."""

    @nn.compact
    def __call__(self, x):
        past = jnp.tril(jnp.ones((3, 3)))[:, :, None, None]
        x = nn.Conv(5, (3, 3), mask=jnp.broadcast_to(past, (3, 3, 3, 5)))(x)
        for _ in range(2):
            mask = jnp.broadcast_to(past, (3, 3, 5, 5))
            x = x + nn.Conv(5, (3, 3), mask=mask)(nn.relu(x))
        return nn.Conv(3, (1, 1))(nn.relu(x))


def _channels_first() -> Any:
    return IMAGES.transpose(0, 3, 1, 2)


ARCHITECTURES: dict[str, Callable[[], Architecture]] = {
    "LeNet-5": lambda: linen(LeNet(), IMAGES, [(4,), (5,), (7,), (6,)]),
    "AlexNet, Equinox": lambda: equinox(
        AlexNet(jax.random.key(0)), _channels_first(), [(5,), (6,), (4,), (8,)]
    ),
    # Two streams, and the inner channels of two blocks.
    "ResNet": lambda: linen(ResNet(), IMAGES, [(4,), (4,), (6,), (6,)]),
    "pre-activation ResNet, NNX": lambda: nnx_model(
        PreActivationResNet, IMAGES, [(5,), (7,), (7,)]
    ),
    # The stream; the 2 groups of the grouped convolution; its 3 inputs and its 4
    # outputs within each group. The groups are permuted, so all have the same order.
    "ResNeXt": lambda: linen(ResNeXt(), IMAGES, [(5,), (2,), (3,), (4,)]),
    "Inception": lambda: linen(
        Inception(), IMAGES, [(4,), (3,), (5,), (4,), (6,), (7,), (8,)]
    ),
    # A depthwise convolution keeps the units that it reads.
    "MobileNet": lambda: linen(MobileNet(), IMAGES, [(4,), (5,), (6,)]),
    "EfficientNet": lambda: linen(EfficientNet(), IMAGES, [(5,), (8,), (3,)]),
    "ConvNeXt": lambda: linen(ConvNeXt(), IMAGES, [(6,), (9,), (9,)]),
    "U-Net": lambda: linen(UNet(), IMAGES, [(4,), (6,), (5,), (7,)]),
    # The masks hold places alone, so all of the stream's channels are alike.
    "PixelCNN": lambda: linen(PixelCNN(), IMAGES, [(5,)]),
}
