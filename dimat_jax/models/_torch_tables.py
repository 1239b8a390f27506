"""A user's own table of PyTorch names, for the leaves of any Flax model.

A table pairs layers of the model with names of modules in PyTorch code. The shapes come
from the model's variables. The names of a layer's parameters are the same everywhere.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dimat_jax.errors import nearest
from dimat_jax.models._torch_files import TorchImportError
from dimat_jax.models._torch_names import Leaf, leaf
from dimat_jax.tree import PyTree, flatten

__all__ = ["Flattened", "table_leaves"]


class Flattened(NamedTuple):
    """A dense layer that reads a feature map, flattened.

    PyTorch flattens a map as C x H x W, Flax as H x W x C. So the kernel is reordered.

    Attributes:
        name: the name of the layer in PyTorch code.
        pixels: the number of pixels of the feature map, H x W.
    """

    name: str
    pixels: int


# PyTorch's name for each parameter and statistic of a layer, as Flax and Haiku call
# them. Haiku's running statistics are leaves of modules of their own, so a table names
# each of these leaves.
_PARAMETERS = {
    "kernel": "weight",
    "w": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "b": "bias",
    "offset": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_KERNELS = ("kernel", "w")


def table_leaves(
    variables: PyTree, names: Mapping[str, str | Flattened]
) -> dict[str, Leaf]:
    """Makes the leaves of a model from a table of names.

    Args:
        variables: the model's variables, or their shapes.
        names: for each layer its name in PyTorch code. A layer is a leaf's path without
            its last part, with or without its first part ("params"). The whole path of
            a leaf is allowed too: its name is then the whole key.

    Raises:
        TorchImportError: a leaf has no name, or a name belongs to no leaf.
    """
    leaves, used, unnamed = {}, set(), []
    for path, array in flatten(variables).items():
        shape = tuple(np.shape(array))
        *parts, parameter = path.removesuffix("/value").split("/")
        layers = [path, "/".join(parts), "/".join(parts[1:])]
        found = next((layer for layer in layers if layer in names), None)
        if found is None or (found != path and parameter not in _PARAMETERS):
            unnamed.append(path)
            continue
        used.add(found)
        name, pixels = names[found], 1
        if isinstance(name, Flattened):
            name, pixels = name
        key = name if found == path else f"{name}.{_PARAMETERS[parameter]}"
        is_kernel = parameter in _KERNELS and 2 <= len(shape) <= 5
        if is_kernel and len(shape) == 2 and shape[0] % pixels:
            raise TorchImportError(
                f"names: {path!r} has {shape[0]} inputs, which are not {pixels} pixels "
                "of some channels"
            )
        leaves[path] = leaf(path, (key,), shape, is_kernel, pixels)
    _check(variables, names, used, unnamed)
    return leaves


def _check(
    variables: PyTree, names: Mapping[str, Any], used: set[str], unnamed: list[str]
) -> None:
    if unknown := sorted(names.keys() - used):
        layers = {path.rpartition("/")[0] for path in flatten(variables)}
        raise TorchImportError(
            f"names: the model has no layer {unknown[0]!r}; "
            f"{nearest(unknown[0], layers)}"
        )
    if unnamed:
        raise TorchImportError(
            f"names must also tell the PyTorch name of {', '.join(unnamed)}"
        )
