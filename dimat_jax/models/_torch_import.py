"""Weights from PyTorch, and back.

    variables = from_torch("resnet50", "resnet50.safetensors")
    model = infer_model("resnet50", variables)
    logits = model.apply(variables, images, train=False)  # images: [batch, H, W, C]

For each architecture one table pairs this library's layers with PyTorch's names for
them; which leaves there are and how large they must be, the Flax modules themselves
tell. Both directions, and all checks, follow from it:

* ResNet-20/32/44/56: the names of DIMAT's and ZipIt's code. `conv1, bn1,
  layer{1-3}.{i}.conv{1,2}, .bn{1,2}, .shortcut.{0,1}, linear`.
* ResNet-18/34/50/101: torchvision's. `conv1, bn1, layer{1-4}.{i}.conv{1-3}, .bn{1-3},
  .downsample.{0,1}, fc`.
* VGG-11/13/16/19, with BatchNorm or without: `features.{n}`, numbered as torchvision
  does, and one dense layer, `classifier`.

`shortcut` and `downsample`, `linear` and `fc`, `classifier`, `classifier.0` and
`classifier.1` are taken for each other. The width, the number of classes, the stem and
the kernel of shortcuts follow from the weights. Kernels are transposed; a head behind a
feature map, flattened as C x H x W there and as H x W x C here, is reordered.

PyTorch itself is needed for reading `.pth` files alone.
"""

import functools
import itertools
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from dimat_jax.errors import nearest
from dimat_jax.models import MODELS, classifier, permutation_spec
from dimat_jax.models._state_dict import (
    TorchImportError,
    float32,
    listed,
    read_state_dict,
)
from dimat_jax.permutation import Product
from dimat_jax.tree import PyTree, flatten

__all__ = [
    "ARCHITECTURES",
    "TorchImportError",
    "from_torch",
    "infer_arguments",
    "infer_model",
    "to_torch",
]


def from_torch(
    name: str, state_dict: str | os.PathLike[str] | Mapping[str, Any]
) -> dict[str, Any]:
    """Variables of a bundled architecture from PyTorch's weights for it.

    Args:
        name: a key of `ARCHITECTURES`.
        state_dict: a `.safetensors` file; a file that `torch.save` has written (read
            with `weights_only=True`: nothing in it is executed); or a mapping from keys
            to NumPy arrays or PyTorch tensors. What all keys begin with ("module.") is
            taken off. Of a checkpoint with one state dict among other entries
            (`{"state_dict": ..., "epoch": ...}`) that one is taken.

    Returns:
        {"params": ..., "batch_stats": ...}, float32 whatever precision the weights had.
        BatchNorm's `num_batches_tracked` has no counterpart and is left out.

    Raises:
        TorchImportError: a file that cannot be read; keys too few or too many; another
            architecture's or width's shapes; weights that are no finite real numbers.
    """
    architecture = _architecture(name)
    source, tensors = read_state_dict(state_dict)
    source, tensors = _without_prefix(source, tensors, name)
    for key, reason in architecture.refused.items():
        if key in tensors:
            raise TorchImportError(f"{source} has {key!r}: {reason}")
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    fit = _fit(name, shapes, _TORCH)
    fit.check(source)
    variables = {
        leaf.path: jnp.asarray(leaf.from_torch(float32(source, key, tensors[key])))
        for key, leaf in fit.leaves.items()
    }
    return unflatten_dict(variables, sep="/")


def to_torch(name: str, variables: PyTree) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: a state dict of float32 arrays.

    Its keys are those of the module docstring, its arrays own their memory:
    `module.load_state_dict({k: torch.from_numpy(v) for k, v in ...items()})` takes it
    (BatchNorm's `num_batches_tracked` then starts at zero), and so does
    `safetensors.numpy.save_file`.

    Raises:
        TorchImportError: the variables are not of that architecture, or not finite.
    """
    arrays = flatten(variables)
    fit = _fit_variables(name, arrays)
    return {
        leaf.keys[0]: leaf.to_torch(float32("the variables", path, arrays[path]))
        for path, leaf in fit.leaves.items()
    }


def infer_arguments(name: str, variables: PyTree) -> dict[str, Any]:
    """The arguments with which `MODELS[name]` makes the module of these variables.

    Raises:
        TorchImportError: the variables are not of that architecture.
    """
    return _fit_variables(name, flatten(variables)).arguments


def infer_model(name: str, variables: PyTree, *, dtype: Any = None) -> nn.Module:
    """The module of these variables, which computes in `dtype` (float32 if None).

    Raises:
        TorchImportError: the variables are not of that architecture.
    """
    arguments = infer_arguments(name, variables)
    return MODELS[name](**arguments, dtype=dtype)


# Names ================================================================================

# A combination of settings, as items: hashable.
_Settings = tuple[tuple[str, str], ...]


class _Architecture(NamedTuple):
    """What PyTorch code calls the parts of an architecture.

    Attributes:
        layers: from a module to the spellings of each of its layers, the first of which
            `to_torch` writes. It may have more layers than the module.
        settings: the arguments that weights tell, with their values, the likely first.
        refused: keys of variants that cannot be had, and why.
    """

    layers: Callable[[Any], dict[str, tuple[str, ...]]]
    settings: Mapping[str, tuple[str, ...]]
    refused: Mapping[str, str] = {}


def _resnet_layers(
    model: Any, *, shortcut: tuple[str, ...], head: tuple[str, ...]
) -> dict[str, tuple[str, ...]]:
    layers: dict[str, tuple[str, ...]] = {}
    layers |= {"conv0": ("conv1",), "norm0": ("bn1",), "head": head}
    for stage, n_blocks in enumerate(model.blocks):
        for block in range(n_blocks):
            here, there = f"stage{stage}_block{block}", f"layer{stage + 1}.{block}"
            for i in (1, 2, 3):
                layers[f"{here}/conv{i}"] = (f"{there}.conv{i}",)
                layers[f"{here}/norm{i}"] = (f"{there}.bn{i}",)
            for i, part in enumerate(("conv", "norm")):
                layers[f"{here}/shortcut_{part}"] = tuple(
                    f"{there}.{spelling}.{i}" for spelling in shortcut
                )
    return layers


def _vgg_layers(model: Any) -> dict[str, tuple[str, ...]]:
    layers: dict[str, tuple[str, ...]] = {}
    layers["head"] = ("classifier", "classifier.0", "classifier.1")
    # torchvision numbers ReLUs and pools too.
    conv, number = 0, 0
    for stage in model.stages:
        for _ in stage:
            layers[f"conv{conv}"] = (f"features.{number}",)
            layers[f"norm{conv}"] = (f"features.{number + 1}",)
            conv, number = conv + 1, number + (2 if model.norm == "none" else 3)
        number += 1
    return layers


_CIFAR_RESNET = _Architecture(
    functools.partial(
        _resnet_layers, shortcut=("shortcut", "downsample"), head=("linear", "fc")
    ),
    settings={"shortcut": ("conv3x3", "conv1x1")},
)
_TORCHVISION_RESNET = _Architecture(
    functools.partial(
        _resnet_layers, shortcut=("downsample", "shortcut"), head=("fc", "linear")
    ),
    settings={"stem": ("imagenet", "cifar")},
)
_VGG = _Architecture(
    _vgg_layers,
    settings={"norm": ("batch", "none")},
    refused={
        f"classifier.{layer}.weight": "torchvision's classifier of three dense layers "
        "(classifier.0, .3 and .6) does not fit; the VGGs here have one dense layer "
        "behind the features"
        for layer in (3, 6)
    },
)

ARCHITECTURES: dict[str, _Architecture] = {
    **dict.fromkeys(("resnet20", "resnet32", "resnet44", "resnet56"), _CIFAR_RESNET),
    **dict.fromkeys(
        ("resnet18", "resnet34", "resnet50", "resnet101"), _TORCHVISION_RESNET
    ),
    **dict.fromkeys(("vgg11", "vgg13", "vgg16", "vgg19"), _VGG),
}

_PARAMETERS = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def _architecture(name: str) -> _Architecture:
    if name not in ARCHITECTURES:
        raise TorchImportError(
            f"there are no PyTorch names for {name!r}; {nearest(name, ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def _settings(name: str) -> list[_Settings]:
    """All combinations of an architecture's settings, as items."""
    settings = _architecture(name).settings
    return [
        tuple(zip(settings, values, strict=True))
        for values in itertools.product(*settings.values())
    ]


@functools.cache
def _keys(name: str, settings: _Settings) -> Mapping[str, tuple[str, ...]]:
    """The table: for each leaf's path the spellings of its key."""
    model = MODELS[name](n_classes=1, **dict(settings))
    layers = ARCHITECTURES[name].layers(model)
    table = {}
    for path in permutation_spec(model).axes:
        _, *layer, parameter = path.split("/")
        spellings = layers["/".join(layer)]
        table[path] = tuple(f"{s}.{_PARAMETERS[parameter]}" for s in spellings)
    return table


# Shapes and layouts ===================================================================

# Here a convolution's kernel is [height, width, in, out], a dense one's [pixels of the
# feature map, channels, out]. These are their axes in PyTorch's order.
_ORDERS = {1: (0,), 3: (2, 1, 0), 4: (3, 2, 0, 1)}


class _Leaf(NamedTuple):
    """One array, and how it lies here and there.

    Attributes:
        path: its path here.
        keys: PyTorch's spellings of its key.
        shape: its shape here.
        factors: the same, with the dense kernels' input axis split in two.
    """

    path: str
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    factors: tuple[int, ...]

    @property
    def torch_shape(self) -> tuple[int, ...]:
        there = self._factors_there
        return there if len(self.shape) == len(there) else (there[0], self.shape[0])

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        array = array.reshape(self.factors).transpose(self._order)
        return np.ascontiguousarray(array.reshape(self.torch_shape))

    def from_torch(self, array: np.ndarray) -> np.ndarray:
        array = array.reshape(self._factors_there).transpose(np.argsort(self._order))
        return np.ascontiguousarray(array.reshape(self.shape))

    @property
    def _order(self) -> tuple[int, ...]:
        return _ORDERS[len(self.factors)]

    @property
    def _factors_there(self) -> tuple[int, ...]:
        return tuple(self.factors[axis] for axis in self._order)


@functools.lru_cache(64)
def _leaves(
    name: str,
    settings: _Settings,
    n_classes: int = 1,
    width: float = 1.0,
    image_channels: int = 3,
    pixels: int = 1,
) -> Mapping[str, _Leaf]:
    """Every leaf of a module, by path.

    Args:
        name: a key of `ARCHITECTURES`.
        settings: that architecture's, as items.
        n_classes: the number of logits.
        width: as `MODELS[name]` has it.
        image_channels: 3, if images are coloured.
        pixels: of the feature map that the head sees, if it sees one.
    """
    model = MODELS[name](n_classes=n_classes, width=width, **dict(settings))
    # All of these leave one pixel of 32 x 32, so this makes a map of 1 x `pixels`.
    image = jax.ShapeDtypeStruct((1, 32, 32 * pixels, image_channels), jnp.float32)
    variables = jax.eval_shape(
        lambda image: classifier.init(model, jax.random.key(0), image), image
    )
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(variables).items()}
    keys = _keys(name, settings)
    leaves = {}
    for path, axes in permutation_spec(model).axes.items():
        shape = factors = shapes[path]
        if len(shape) == 2:
            n_pixels = pixels if isinstance(axes[0], Product) else 1
            factors = (n_pixels, shape[0] // n_pixels, shape[1])
        leaves[path] = _Leaf(path, keys[path], shape, factors)
    return leaves


# Fitting ==============================================================================


class _Side(NamedTuple):
    """How one of the two frameworks names leaves and orders the axes of kernels.

    Attributes:
        labels: from a leaf's path and keys to the names that it may have.
        shape: of a leaf.
        inputs: the axis of a kernel's input channels.
        outputs: the axis of its output channels.
    """

    labels: Callable[[str, tuple[str, ...]], tuple[str, ...]]
    shape: Callable[[_Leaf], tuple[int, ...]]
    inputs: int
    outputs: int


_FLAX = _Side(lambda path, keys: (path,), lambda leaf: leaf.shape, -2, -1)
_TORCH = _Side(lambda path, keys: keys, lambda leaf: leaf.torch_shape, 1, 0)


class _Fit(NamedTuple):
    """What named arrays are to an architecture.

    Attributes:
        name: a key of `ARCHITECTURES`.
        arguments: of `MODELS[name]`.
        leaves: by the names of the arrays that they are.
        faults: what is wrong with which arrays.
        resembled: other architectures, whose names these are.
    """

    name: str
    arguments: dict[str, Any]
    leaves: dict[str, _Leaf]
    faults: dict[str, list[str]]
    resembled: tuple[str, ...] = ()

    @property
    def n_faults(self) -> int:
        return sum(map(len, self.faults.values()))

    def check(self, source: str) -> None:
        """Raises a TorchImportError that names the faults, if there are any."""
        if not self.n_faults:
            return
        told = ", ".join(f"{key}={value}" for key, value in self.arguments.items())
        message = f"{source} does not fit {self.name} ({told})"
        if self.resembled:
            message += f": these are the names of {' and '.join(self.resembled)}"
        faults = [
            f"{what}: {listed(arrays)}"
            for what, arrays in self.faults.items()
            if arrays
        ]
        raise TorchImportError(f"{message}. {'; '.join(faults)}")


def _fit_variables(name: str, arrays: Mapping[str, Any]) -> _Fit:
    fit = _fit(name, {path: np.shape(array) for path, array in arrays.items()}, _FLAX)
    fit.check("the variables")
    return fit


def _fit(name: str, shapes: Mapping[str, tuple[int, ...]], side: _Side) -> _Fit:
    """Finds the settings and sizes that arrays of these shapes have, or nearly have."""
    fits = []
    for settings in _settings(name):
        fits.append(_fit_settings(name, settings, shapes, side))
        if not fits[-1].n_faults:
            return fits[-1]
    nearly = min(fits, key=lambda fit: fit.n_faults)
    if nearly.faults["missing"] or nearly.faults["unexpected"]:
        return nearly._replace(resembled=_architectures_of(shapes, side))
    return nearly


def _fit_settings(
    name: str,
    settings: _Settings,
    shapes: Mapping[str, tuple[int, ...]],
    side: _Side,
) -> _Fit:
    found, missing, unexpected = _paired(_keys(name, settings), shapes, side)
    narrow = _leaves(name, settings)

    def size(path: str, axis: int) -> int:
        """Zero if that cannot be told."""
        shape = shapes.get(found.get(path, ""), ())
        return shape[axis] if len(shape) == len(narrow[path].shape) else 0

    stem, head = "params/conv0/kernel", "params/head/kernel"
    channels, image_channels = size(stem, side.outputs), size(stem, side.inputs)
    n_classes, features = size(head, side.outputs), size(head, side.inputs)
    told = all((channels, image_channels, n_classes, features))
    leaves, arguments = narrow, dict[str, Any](settings)
    if told:
        width = channels / narrow[stem].shape[-1]
        pixels = max(int(features / (width * narrow[head].shape[0])), 1)
        leaves = _leaves(name, settings, n_classes, width, image_channels, pixels)
        arguments = {"n_classes": n_classes, "width": width, **arguments}
    misshapen = []
    for path, label in found.items():
        shape, expected = shapes[label], side.shape(leaves[path])
        if len(shape) != len(expected) or 0 in shape:
            misshapen.append(f"{label} {shape}, expected {len(expected)} axes, none 0")
        elif told and shape != expected:
            misshapen.append(f"{label} {shape}, expected {expected}")
    faults = {
        "missing": missing,
        "unexpected": [f"{label} {shapes[label]}" for label in unexpected],
        "of another shape": misshapen,
    }
    labelled = {label: leaves[path] for path, label in found.items()}
    return _Fit(name, arguments, labelled, faults)


def _paired(
    keys: Mapping[str, tuple[str, ...]], labels: Collection[str], side: _Side
) -> tuple[dict[str, str], list[str], list[str]]:
    """Which label each leaf has; the labels that are missing; those that are no leaf's.

    Of two spellings that are both there, one is no leaf's.
    """
    found, missing, present = {}, [], set(labels)
    for path, spellings in keys.items():
        names = side.labels(path, spellings)
        if there := [name for name in names if name in present]:
            found[path] = there[0]
        else:
            missing.append(names[0])
    known = set(found.values())
    counters = {
        f"{label.removesuffix('.running_mean')}.num_batches_tracked" for label in known
    }
    return found, missing, [label for label in labels if label not in known | counters]


def _architectures_of(labels: Collection[str], side: _Side) -> tuple[str, ...]:
    """The architectures whose leaves have just these labels."""

    def fits(name: str, settings: _Settings) -> bool:
        _, missing, unexpected = _paired(_keys(name, settings), labels, side)
        return not missing and not unexpected

    return tuple(
        name
        for name in ARCHITECTURES
        if any(fits(name, settings) for settings in _settings(name))
    )


def _without_prefix(
    source: str, tensors: dict[str, Any], name: str
) -> tuple[str, dict[str, Any]]:
    """Takes off what all keys begin with, unless some key is known as it is."""
    known = {
        key
        for settings in _settings(name)
        for spellings in _keys(name, settings).values()
        for key in spellings
    }
    prefix = os.path.commonprefix(list(tensors))
    prefix = prefix[: prefix.rfind(".") + 1]
    if not prefix or known & tensors.keys():
        return source, tensors
    return f"{source} (its keys without {prefix!r})", {
        key.removeprefix(prefix): tensor for key, tensor in tensors.items()
    }
