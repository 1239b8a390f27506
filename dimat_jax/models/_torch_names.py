"""PyTorch's names and layouts for the leaves of the bundled architectures.

For each architecture, one table pairs the layers of this library with PyTorch's names
for them. The Flax modules themselves tell which leaves there are and how large they
are. The key, the shape and the layout of each leaf in PyTorch follow from both.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dimat_jax.errors import nearest
from dimat_jax.models import MODELS, classifier, permutation_spec
from dimat_jax.models._state_dict import TorchImportError
from dimat_jax.models.resnet import ResNet
from dimat_jax.models.vgg import VGG
from dimat_jax.permutation import Product
from dimat_jax.tree import flatten

__all__ = [
    "ARCHITECTURES",
    "Leaf",
    "Settings",
    "architecture",
    "keys_of",
    "leaves_of",
    "settings_of",
]

Settings = tuple[tuple[str, str], ...]
"""One combination of an architecture's settings: its items, which are hashable."""

Layers = dict[str, tuple[str, ...]]
"""For each layer of a module, the names that PyTorch code has for it."""


class Architecture(NamedTuple):
    """How PyTorch code names the parts of an architecture.

    Attributes:
        layers: a function from a module to the PyTorch names of its layers. `to_torch`
            writes the first name of each. The result may have layers that the module
            does not have.
        settings: the arguments of `MODELS[name]` that weights tell, with their possible
            values. The most likely value comes first.
        refused: keys of variants that this library does not have, each with the reason.
    """

    layers: Callable[[nn.Module], Layers]
    settings: Mapping[str, tuple[str, ...]]
    refused: Mapping[str, str] = {}


def _resnet_layers(
    model: nn.Module, *, shortcut: tuple[str, ...], head: tuple[str, ...]
) -> Layers:
    assert isinstance(model, ResNet)
    layers: Layers = {"conv0": ("conv1",), "norm0": ("bn1",), "head": head}
    for stage, n_blocks in enumerate(model.blocks):
        for block in range(n_blocks):
            flax_block = f"stage{stage}_block{block}"
            torch_block = f"layer{stage + 1}.{block}"
            for i in (1, 2, 3):
                layers[f"{flax_block}/conv{i}"] = (f"{torch_block}.conv{i}",)
                layers[f"{flax_block}/norm{i}"] = (f"{torch_block}.bn{i}",)
            for i, part in enumerate(("conv", "norm")):
                layers[f"{flax_block}/shortcut_{part}"] = tuple(
                    f"{torch_block}.{spelling}.{i}" for spelling in shortcut
                )
    return layers


def _vgg_layers(model: nn.Module) -> Layers:
    assert isinstance(model, VGG)
    layers: Layers = {"head": ("classifier", "classifier.0", "classifier.1")}
    # `number` is torchvision's number of a layer, which counts ReLUs and pools too.
    conv, number = 0, 0
    for stage in model.stages:
        for _ in stage:
            layers[f"conv{conv}"] = (f"features.{number}",)
            layers[f"norm{conv}"] = (f"features.{number + 1}",)
            conv, number = conv + 1, number + (2 if model.norm == "none" else 3)
        number += 1
    return layers


_CIFAR_RESNET = Architecture(
    functools.partial(
        _resnet_layers, shortcut=("shortcut", "downsample"), head=("linear", "fc")
    ),
    settings={"shortcut": ("conv3x3", "conv1x1")},
)
_TORCHVISION_RESNET = Architecture(
    functools.partial(
        _resnet_layers, shortcut=("downsample", "shortcut"), head=("fc", "linear")
    ),
    settings={"stem": ("imagenet", "cifar")},
)
_VGG = Architecture(
    _vgg_layers,
    settings={"norm": ("batch", "none")},
    refused={
        f"classifier.{layer}.weight": "torchvision's classifier of three dense layers "
        "(classifier.0, .3 and .6) does not fit; the VGGs here have one dense layer "
        "behind the features"
        for layer in (3, 6)
    },
)

ARCHITECTURES: dict[str, Architecture] = {
    **dict.fromkeys(("resnet20", "resnet32", "resnet44", "resnet56"), _CIFAR_RESNET),
    **dict.fromkeys(
        ("resnet18", "resnet34", "resnet50", "resnet101"), _TORCHVISION_RESNET
    ),
    **dict.fromkeys(("vgg11", "vgg13", "vgg16", "vgg19"), _VGG),
}

# The PyTorch name of each parameter and statistic of a layer.
_PARAMETERS = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def architecture(name: str) -> Architecture:
    """The PyTorch names of an architecture.

    Raises:
        TorchImportError: there are none for this architecture.
    """
    if name not in ARCHITECTURES:
        raise TorchImportError(
            f"there are no PyTorch names for {name!r}; {nearest(name, ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def settings_of(name: str) -> list[Settings]:
    """All combinations of an architecture's settings, the most likely one first."""
    settings = architecture(name).settings
    return [
        tuple(zip(settings, values, strict=True))
        for values in itertools.product(*settings.values())
    ]


@functools.cache
def keys_of(name: str, settings: Settings) -> Mapping[str, tuple[str, ...]]:
    """For each leaf's path, the spellings of its key in PyTorch's state dict."""
    model = MODELS[name](n_classes=1, **dict(settings))
    layers = ARCHITECTURES[name].layers(model)
    table = {}
    for path in permutation_spec(model).axes:
        _, *layer, parameter = path.split("/")
        spellings = layers["/".join(layer)]
        table[path] = tuple(f"{s}.{_PARAMETERS[parameter]}" for s in spellings)
    return table


# Shapes and layouts ===================================================================

# For each number of axes, the axes of this library in PyTorch's order. Here the kernel
# of a convolution is [height, width, in, out], that of a dense layer [pixels of the
# feature map, channels, out].
_ORDERS = {1: (0,), 3: (2, 1, 0), 4: (3, 2, 0, 1)}


class Leaf(NamedTuple):
    """One array, with its layouts in this library and in PyTorch.

    Attributes:
        path: its path in this library's variables.
        keys: the spellings of its key in PyTorch.
        shape: its shape in this library.
        factors: its shape with the input axis of dense kernels split in two: the pixels
            of a feature map and its channels.
    """

    path: str
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    factors: tuple[int, ...]

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Its shape in PyTorch."""
        factors = self._torch_factors
        if len(self.shape) == len(factors):
            return factors
        return (factors[0], self.shape[0])

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Converts the array from this library's layout to PyTorch's."""
        array = array.reshape(self.factors).transpose(self._order)
        return np.ascontiguousarray(array.reshape(self.torch_shape))

    def from_torch(self, array: np.ndarray) -> np.ndarray:
        """Converts the array from PyTorch's layout to this library's."""
        array = array.reshape(self._torch_factors).transpose(np.argsort(self._order))
        return np.ascontiguousarray(array.reshape(self.shape))

    @property
    def _order(self) -> tuple[int, ...]:
        return _ORDERS[len(self.factors)]

    @property
    def _torch_factors(self) -> tuple[int, ...]:
        return tuple(self.factors[axis] for axis in self._order)


@functools.lru_cache(64)
def leaves_of(
    name: str,
    settings: Settings,
    n_classes: int = 1,
    width: float = 1.0,
    image_channels: int = 3,
    pixels: int = 1,
) -> Mapping[str, Leaf]:
    """Every leaf of a module, by path.

    Args:
        name: a key of `ARCHITECTURES`.
        settings: one combination of that architecture's settings.
        n_classes: the number of logits.
        width: the width of `MODELS[name]`.
        image_channels: the number of channels of the images, 3 for RGB.
        pixels: the number of pixels of the feature map that the head reads. It does not
            matter for a head that reads a mean over the pixels.
    """
    model = MODELS[name](n_classes=n_classes, width=width, **dict(settings))
    # All architectures reduce 32 x 32 pixels to one, so this image gives a feature map
    # of 1 x `pixels`.
    image = jax.ShapeDtypeStruct((1, 32, 32 * pixels, image_channels), jnp.float32)
    variables = jax.eval_shape(
        lambda image: classifier.init(model, jax.random.key(0), image), image
    )
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(variables).items()}
    keys = keys_of(name, settings)
    leaves = {}
    for path, axes in permutation_spec(model).axes.items():
        shape = factors = shapes[path]
        if len(shape) == 2:
            n_pixels = pixels if isinstance(axes[0], Product) else 1
            factors = (n_pixels, shape[0] // n_pixels, shape[1])
        leaves[path] = Leaf(path, keys[path], shape, factors)
    return leaves
