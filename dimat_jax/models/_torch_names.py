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
from dimat_jax.models._torch_files import TorchImportError
from dimat_jax.models.resnet import ResNet
from dimat_jax.models.vgg import VGG
from dimat_jax.permutation import Product
from dimat_jax.tree import flatten

__all__ = [
    "ARCHITECTURES",
    "Leaf",
    "Names",
    "Settings",
    "Shape",
    "architecture",
    "keys_of",
    "leaf",
    "leaves_of",
    "settings_of",
]

Settings = tuple[tuple[str, str], ...]
"""One combination of an architecture's settings: its items, which are hashable."""

Names = tuple[tuple[str, str], ...]
"""A user's names of layers: pairs of one of our names and the user's, hashable."""

Shape = tuple[int, ...]

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
        unlike: a function from the shapes of arrays, by key, to the reason why they
            are those of a variant that this library does not have; "" if they are not.
    """

    layers: Callable[[nn.Module], Layers]
    settings: Mapping[str, tuple[str, ...]]
    unlike: Callable[[Mapping[str, Shape]], str]


def _in_sequence(*names: str) -> tuple[str, ...]:
    """The names of a head, which may also be in a sequence, behind a dropout e.g."""
    return names + tuple(f"{name}.{number}" for name in names for number in range(3))


def _several_heads(shapes: Mapping[str, Shape]) -> str:
    for name in ("fc", "linear", "classifier"):
        layers = [n for n in range(9) if len(shapes.get(f"{name}.{n}.weight", ())) == 2]
        if len(layers) > 1:
            numbers = ", ".join(f"{name}.{n}" for n in layers)
            return (
                f"a classifier of several dense layers ({numbers}) does not fit; this "
                "architecture has one dense layer behind the features. Write the model "
                "as a Flax module and give from_torch a table of its names"
            )
    return ""


def _unlike_resnet(shapes: Mapping[str, Shape]) -> str:
    first = shapes.get("layer1.0.conv2.weight", ())
    if len(first) == 4 and "layer1.0.conv3.weight" in shapes:
        outputs, inputs = first[:2]
        before = shapes.get("layer1.0.conv1.weight", (0,))[0]
        if inputs and inputs < outputs == before:
            return (
                f"layer1.0.conv2.weight {first} is a grouped convolution, as ResNeXt "
                "and RegNet have them, and the ResNets here have none. Write the model "
                "as a Flax module and give from_torch a table of its names"
            )
    return _several_heads(shapes)


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
    layers: Layers = {"head": _in_sequence("classifier", "fc", "linear")}
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
        _resnet_layers,
        shortcut=("shortcut", "downsample"),
        head=_in_sequence("linear", "fc", "classifier"),
    ),
    {"shortcut": ("conv3x3", "conv1x1", "pad")},
    _unlike_resnet,
)
_TORCHVISION_RESNET = Architecture(
    functools.partial(
        _resnet_layers,
        shortcut=("downsample", "shortcut"),
        head=_in_sequence("fc", "linear", "classifier"),
    ),
    {"stem": ("imagenet", "cifar")},
    _unlike_resnet,
)
_VGG = Architecture(_vgg_layers, {"norm": ("batch", "none")}, _several_heads)

_CIFAR = ("resnet20", "resnet32", "resnet44", "resnet56")
_IMAGENET = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
_WIDE = ("wide_resnet50_2", "wide_resnet101_2")
_VGGS = ("vgg11", "vgg13", "vgg16", "vgg19")
ARCHITECTURES: dict[str, Architecture] = {
    **dict.fromkeys(_CIFAR, _CIFAR_RESNET),
    **dict.fromkeys((*_IMAGENET, *_WIDE), _TORCHVISION_RESNET),
    **dict.fromkeys(_VGGS, _VGG),
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
def keys_of(
    name: str, settings: Settings, names: Names = ()
) -> Mapping[str, tuple[str, ...]]:
    """For each leaf's path, the spellings of its key in PyTorch's state dict.

    Raises:
        TorchImportError: `names` has a name that no layer has.
    """
    model = MODELS[name](n_classes=1, **dict(settings))
    layers = ARCHITECTURES[name].layers(model)
    given, used, table = dict(names), set(), {}
    for path in permutation_spec(model).axes:
        _, *parts, parameter = path.split("/")
        layer = "/".join(parts)
        spellings = layers[layer]
        if own := [known for known in (layer, *spellings) if known in given]:
            used |= set(own)
            spellings = tuple(given[known] for known in own)
        table[path] = tuple(f"{s}.{_PARAMETERS[parameter]}" for s in spellings)
    if unknown := sorted(given.keys() - used):
        known = [spelling for names_ in layers.values() for spelling in names_]
        raise TorchImportError(
            f"names: {name} has no layer {unknown[0]!r}; {nearest(unknown[0], known)}"
        )
    return table


# Shapes and layouts ===================================================================

# For each number of axes, the axes of a kernel of this library in PyTorch's order. Here
# the kernel of a convolution is [height, width, in, out], that of a dense layer [pixels
# of the feature map, channels, out].
_ORDERS = {3: (2, 1, 0), 4: (3, 2, 0, 1), 5: (4, 3, 0, 1, 2)}


class Leaf(NamedTuple):
    """One array, with its layouts in this library and in PyTorch.

    Attributes:
        path: its path in this library's variables.
        keys: the spellings of its key in PyTorch.
        shape: its shape in this library.
        factors: its shape with the input axis of dense kernels split in two: the pixels
            of a feature map and its channels.
        is_kernel: whether PyTorch orders its axes differently.
    """

    path: str
    keys: tuple[str, ...]
    shape: Shape
    factors: Shape
    is_kernel: bool

    @property
    def torch_shape(self) -> Shape:
        """Its shape in PyTorch."""
        factors = self._torch_factors
        if len(self.shape) == len(factors):
            return factors
        return (factors[0], self.shape[0])

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Converts the array from this library's layout to PyTorch's."""
        array = array.reshape(self.factors).transpose(self._order)
        return np.ascontiguousarray(array).reshape(self.torch_shape)

    def from_torch(self, array: np.ndarray) -> np.ndarray:
        """Converts the array from PyTorch's layout to this library's."""
        array = array.reshape(self._torch_factors).transpose(np.argsort(self._order))
        return np.ascontiguousarray(array).reshape(self.shape)

    @property
    def _order(self) -> tuple[int, ...]:
        n_axes = len(self.factors)
        return _ORDERS[n_axes] if self.is_kernel else tuple(range(n_axes))

    @property
    def _torch_factors(self) -> Shape:
        return tuple(self.factors[axis] for axis in self._order)


def leaf(
    path: str, keys: tuple[str, ...], shape: Shape, is_kernel: bool, pixels: int = 1
) -> Leaf:
    """Makes a leaf. A dense kernel reads a feature map of `pixels` pixels."""
    factors = shape
    if is_kernel and len(shape) == 2:
        factors = (pixels, shape[0] // pixels, shape[1])
    return Leaf(path, keys, shape, factors, is_kernel)


@functools.lru_cache(64)
def leaves_of(
    name: str,
    settings: Settings,
    n_classes: int = 1,
    width: float = 1.0,
    image_channels: int = 3,
    pixels: int = 1,
    names: Names = (),
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
        names: a user's names of layers.
    """
    model = MODELS[name](n_classes=n_classes, width=width, **dict(settings))
    # All architectures reduce 32 x 32 pixels to one, so this image gives a feature map
    # of 1 x `pixels`.
    image = jax.ShapeDtypeStruct((1, 32, 32 * pixels, image_channels), jnp.float32)
    variables = jax.eval_shape(
        lambda image: classifier.init(model, jax.random.key(0), image), image
    )
    shapes = {path: tuple(array.shape) for path, array in flatten(variables).items()}
    keys = keys_of(name, settings, names)
    return {
        path: leaf(
            path,
            keys[path],
            shapes[path],
            path.endswith("/kernel"),
            pixels if isinstance(axes[0], Product) else 1,
        )
        for path, axes in permutation_spec(model).axes.items()
    }
