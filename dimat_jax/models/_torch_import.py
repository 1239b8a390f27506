"""Weights from PyTorch, and back.

    variables = from_torch("resnet50", "resnet50.safetensors")
    model = infer_model("resnet50", variables)
    logits = model.apply(variables, images, train=False)  # images: [batch, H, W, C]

The names of layers in PyTorch code are these (`_torch_names` has them as tables):

* ResNet-20/32/44/56: the names of DIMAT's and ZipIt's code. `conv1, bn1,
  layer{1-3}.{i}.conv{1,2}, .bn{1,2}, .shortcut.{0,1}, linear`.
* ResNet-18/34/50/101: torchvision's. `conv1, bn1, layer{1-4}.{i}.conv{1-3}, .bn{1-3},
  .downsample.{0,1}, fc`.
* VGG-11/13/16/19, with BatchNorm or without: `features.{n}`, numbered as torchvision
  does, and one dense layer, `classifier`.

Some names are interchangeable: `shortcut` and `downsample`; `linear` and `fc`;
`classifier`, `classifier.0` and `classifier.1`. The width, the number of classes, the
stem and the kernel of shortcuts follow from the weights. Kernels are transposed. The
kernel of a head behind a feature map is reordered as well, because PyTorch flattens the
map as C x H x W and this library as H x W x C.

PyTorch itself is needed only for reading `.pth` files.
"""

import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.typing import DTypeLike

from dimat_jax.models import MODELS
from dimat_jax.models._state_dict import TorchImportError, float32, read_state_dict
from dimat_jax.models._torch_fit import FLAX, TORCH, Fit, find_fit
from dimat_jax.models._torch_names import (
    ARCHITECTURES,
    architecture,
    keys_of,
    settings_of,
)
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
    """Converts PyTorch's weights to the variables of a bundled architecture.

    Args:
        name: a key of `ARCHITECTURES`.
        state_dict: a `.safetensors` file; a file that `torch.save` has written; or a
            mapping from keys to NumPy arrays or PyTorch tensors. PyTorch's files are
            read with `weights_only=True`, so nothing in them is executed. A prefix of
            all keys, as "module.", is removed. The mapping may also be a checkpoint
            with one state dict among other entries (`{"state_dict": ..., "epoch":
            ...}`).

    Returns:
        {"params": ..., "batch_stats": ...}, always in float32. BatchNorm's
        `num_batches_tracked` has no counterpart and is left out.

    Raises:
        TorchImportError: a file cannot be read, keys are missing or unexpected, shapes
            are those of another architecture or width, or weights are not finite real
            numbers.
    """
    refused = architecture(name).refused
    source, tensors = read_state_dict(state_dict)
    source, tensors = _without_prefix(source, tensors, name)
    for key, reason in refused.items():
        if key in tensors:
            raise TorchImportError(f"{source} has {key!r}: {reason}")
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    fit = find_fit(name, shapes, TORCH)
    fit.check(source)
    variables = {
        leaf.path: jnp.asarray(leaf.from_torch(float32(source, key, tensors[key])))
        for key, leaf in fit.leaves.items()
    }
    return unflatten_dict(variables, sep="/")


def to_torch(name: str, variables: PyTree) -> dict[str, np.ndarray]:
    """Converts variables to a PyTorch state dict: the inverse of `from_torch`.

    Returns:
        float32 arrays that own their memory, by the keys of the module docstring.
        `module.load_state_dict({k: torch.from_numpy(v) for k, v in ...items()})` loads
        them; BatchNorm's `num_batches_tracked` then starts at zero.
        `safetensors.numpy.save_file` saves them.

    Raises:
        TorchImportError: the variables do not belong to that architecture, or they are
            not finite.
    """
    arrays = flatten(variables)
    fit = _fit_variables(name, arrays)
    return {
        leaf.keys[0]: leaf.to_torch(float32("the variables", path, arrays[path]))
        for path, leaf in fit.leaves.items()
    }


def infer_arguments(name: str, variables: PyTree) -> dict[str, Any]:
    """Infers the arguments with which `MODELS[name]` builds these variables' module.

    Raises:
        TorchImportError: the variables do not belong to that architecture.
    """
    return _fit_variables(name, flatten(variables)).arguments


def infer_model(
    name: str, variables: PyTree, *, dtype: DTypeLike | None = None
) -> nn.Module:
    """Builds the module of these variables. It computes in `dtype` (None: float32).

    Raises:
        TorchImportError: the variables do not belong to that architecture.
    """
    arguments = infer_arguments(name, variables)
    return MODELS[name](**arguments, dtype=dtype)


def _fit_variables(name: str, arrays: Mapping[str, Any]) -> Fit:
    """How variables fit an architecture. Raises a TorchImportError if they do not."""
    shapes = {path: np.shape(array) for path, array in arrays.items()}
    fit = find_fit(name, shapes, FLAX)
    fit.check("the variables")
    return fit


def _without_prefix(
    source: str, tensors: dict[str, Any], name: str
) -> tuple[str, dict[str, Any]]:
    """Removes the prefix that all keys share, unless some key is right as it is.

    Returns:
        the source for messages, and the tensors by their keys.
    """
    right_keys = {
        key
        for settings in settings_of(name)
        for spellings in keys_of(name, settings).values()
        for key in spellings
    }
    prefix = os.path.commonprefix(list(tensors))
    prefix = prefix[: prefix.rfind(".") + 1]
    if not prefix or right_keys & tensors.keys():
        return source, tensors
    return f"{source} (its keys without {prefix!r})", {
        key.removeprefix(prefix): tensor for key, tensor in tensors.items()
    }
