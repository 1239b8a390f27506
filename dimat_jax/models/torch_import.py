"""Weights from PyTorch, and back.

    variables = from_torch("resnet50", "resnet50.safetensors")
    model = infer_model("resnet50", variables)
    logits = model.apply(variables, images, train=False)  # images: [batch, H, W, C]
    state_dict = to_torch("resnet50", variables, like="resnet50.safetensors")

The names of layers in PyTorch code are these (`_torch_names` has them as tables):

* ResNet-20/32/44/56: the names of DIMAT's and ZipIt's code. `conv1, bn1,
  layer{1-3}.{i}.conv{1,2}, .bn{1,2}, .shortcut.{0,1}, linear`. Shortcuts may be
  convolutions, or have no weights (option A: strided, and padded with zero channels).
* ResNet-18/34/50/101/152 and Wide ResNet-50-2 and 101-2: torchvision's. `conv1, bn1,
  layer{1-4}.{i}.conv{1-3}, .bn{1-3}, .downsample.{0,1}, fc`.
* VGG-11/13/16/19, with BatchNorm or without: `features.{n}`, numbered as torchvision
  does, and one dense layer, `classifier`.

Some names are interchangeable: `shortcut` and `downsample`; `linear`, `fc` and
`classifier`, alone or with `.0`, `.1` or `.2` behind them. Other names, and those of a
model of your own, come in a table, `names`. Checkpoints may hold more than the model:
the entry and the prefix where the weights are follow from the names, or are given.

The width, the number of classes, the stem and the kind of shortcuts follow from the
weights. Kernels are transposed. The kernel of a head behind a feature map is reordered
as well, because PyTorch flattens the map as C x H x W and this library as H x W x C. A
convolution or dense layer without a bias has a bias of zeros here where the module has
one: it computes the same.

What does not fit, with an error that says so: grouped convolutions (ResNeXt), heads of
several dense layers (as torchvision's VGGs have them), names of unknown layers.

A model that you have written in JAX as a function of PyTorch's state dict itself needs
no names: `from_torch(None, file)` reads the state dict as it is.

PyTorch itself is needed only for reading files that `torch.save` has written.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.typing import DTypeLike
from jaxtyping import Array

from dimat_jax.models import MODELS
from dimat_jax.models._state_dict import (
    Entry,
    StateDict,
    cast_like,
    float32,
    is_floating,
)
from dimat_jax.models._torch_files import TorchImportError, save_safetensors
from dimat_jax.models._torch_fit import FLAX, TORCH, Fit, find_fit, fit_leaves
from dimat_jax.models._torch_locate import Located, Schema, as_it_is, locate
from dimat_jax.models._torch_names import ARCHITECTURES, Leaf, keys_of, settings_of
from dimat_jax.models._torch_names import Names as Pairs
from dimat_jax.models._torch_tables import Flattened, table_leaves
from dimat_jax.tree import PyTree, flatten, map_with_path

__all__ = [
    "ARCHITECTURES",
    "Flattened",
    "TorchImportError",
    "from_torch",
    "infer_arguments",
    "infer_image_shape",
    "infer_model",
    "save_safetensors",
    "to_torch",
]

Names = Mapping[str, str | Flattened]
"""A user's names of layers; see `from_torch`."""


def from_torch(
    model: str | PyTree | None,
    state_dict: StateDict,
    *,
    entry: Entry = None,
    prefix: str | None = None,
    names: Names | None = None,
) -> Any:
    """Converts PyTorch's weights to the variables of a Flax model.

        from_torch("resnet18", "moco.pth.tar", prefix="module.encoder_q")

        shapes = jax.eval_shape(module.init, jax.random.key(0), images)
        from_torch(shapes, "own.pt", names={"Conv_0": "features.0", "Dense_0": "fc"})

    Args:
        model: a key of `ARCHITECTURES`; or the variables of a model of your own (or
            their shapes, as `jax.eval_shape` returns them); or None for PyTorch's own
            keys and layouts.
        state_dict: a `.safetensors` file; a file that `torch.save` has written (`.pth`,
            `.pt`, `.pth.tar`, `.bin`, `.ckpt`); the index (`.index.json`) of weights in
            several files; a folder that holds one of these, as Hugging Face's do; or a
            mapping from keys to arrays of NumPy, JAX or PyTorch. PyTorch's files are
            read with `weights_only=True`, so nothing in them is executed. All of them
            may also be checkpoints, with state dicts among other entries
            (`{"state_dict": ..., "epoch": ...}`).
        entry: the entry in which to look, or the entries that lead to it. None: the one
            with this model's weights.
        prefix: what the keys of the model begin with ("model."). Other keys are then
            left out. None: the prefix behind which all of the model's keys are. Names
            of modules that wrap others ("module", "_orig_mod") do not count anywhere.
        names: the names of layers in PyTorch code. For a bundled architecture: those
            that differ, by the name that the module docstring tells, or by their path
            in the variables (`{"fc": "head.3"}`). For a model of your own: of every
            layer, by its path in the variables, which may lack "params". A dense layer
            behind a flattened feature map has `Flattened(name, pixels)` there.

    Returns:
        {"params": ..., "batch_stats": ...}, or a tree like `model`, or a dict by
        PyTorch's keys (without the prefix), always in float32. BatchNorm's
        `num_batches_tracked` has no counterpart and is left out.

    Raises:
        TorchImportError: a file cannot be read, keys are missing or unexpected, several
            parts of a checkpoint hold such a model, shapes are those of another
            architecture or width, or weights are not finite real numbers.
    """
    if model is None:
        return _read_as_it_is(as_it_is(state_dict, entry, prefix), names)
    located = locate(_schema(model, names), state_dict, entry, prefix)
    fit, source = located.fit, located.source
    fit.check(source)
    arrays = {leaf.path: np.zeros(leaf.shape, np.float32) for leaf in fit.absent}
    for key, leaf in fit.leaves.items():
        tensor = located.tensors[located.keys[key]]
        arrays[leaf.path] = leaf.from_torch(float32(source, key, tensor))
    like = unflatten_dict(arrays, sep="/") if isinstance(model, str) else model
    return map_with_path(lambda path, _: jnp.asarray(arrays[path]), like)


def _read_as_it_is(located: Located, names: Names | None) -> dict[str, Array]:
    if names:
        raise TorchImportError("names: they are for a model, but the model is None")
    # Integers are counts, as BatchNorm's of its batches, and no weights.
    return {
        label: jnp.asarray(float32(located.source, key, located.tensors[key]))
        for label, key in located.keys.items()
        if is_floating(located.tensors[key])
    }


def to_torch(
    model: str | PyTree | None,
    variables: PyTree,
    *,
    like: StateDict | None = None,
    entry: Entry = None,
    prefix: str | None = None,
    names: Names | None = None,
) -> dict[str, Any]:
    """Converts variables to a PyTorch state dict: the inverse of `from_torch`.

    Args:
        model: as for `from_torch`.
        variables: the variables of the model.
        like: the state dict, checkpoint or file from which such weights were read. The
            result has its keys, prefixes, shapes and dtypes. What it holds beside the
            model (BatchNorm's counts, metrics, other parts of a larger model) is copied
            to the result.
        entry: the entry of `like`, as for `from_torch`.
        prefix: the prefix of the keys in `like`, as for `from_torch`.
        names: as for `from_torch`.

    Returns:
        Without `like`: float32 arrays that own their memory, by the keys of the module
        docstring. With it: arrays of NumPy, or tensors of PyTorch where `like` has
        tensors. `module.load_state_dict(...)` loads tensors (make them of arrays with
        `torch.from_numpy`), and `save_safetensors` saves both.

    Raises:
        TorchImportError: the variables do not belong to that model, `like` does not, or
            the variables are not finite in the dtypes of the result.
    """
    arrays = flatten(variables)
    if model is None:
        return _written_as_it_was(arrays, like, entry, prefix)
    schema = _schema(model, names)
    leaves = _own_leaves(model, names, arrays)
    if like is not None:
        return _written_like(locate(schema, like, entry, prefix), arrays)
    return {leaf.keys[0]: _exported(leaf, arrays) for leaf in leaves}


def _written_like(located: Located, arrays: Mapping[str, Any]) -> dict[str, Any]:
    fit, source = located.fit, located.source
    fit.check(source)
    result = {key: _copy(tensor) for key, tensor in located.tensors.items()}
    for label, leaf in fit.leaves.items():
        key, shape = located.keys[label], np.shape(arrays[leaf.path])
        if shape != leaf.shape:
            raise TorchImportError(
                f"{source}: {key!r} is of shape {leaf.torch_shape}, for an array of "
                f"shape {leaf.shape}, but {leaf.path!r} is of shape {shape}"
            )
        like = located.tensors[key]
        result[key] = cast_like(source, key, _exported(leaf, arrays), like)
    for leaf in fit.absent:
        if np.any(arrays[leaf.path]):
            raise TorchImportError(
                f"{source} has no {leaf.keys[0]!r}, but {leaf.path!r} is not 0"
            )
    return result


def _written_as_it_was(
    arrays: Mapping[str, Any], like: StateDict | None, entry: Entry, prefix: str | None
) -> dict[str, Any]:
    exported = {path: float32("the variables", path, x) for path, x in arrays.items()}
    if like is None:
        return exported
    located = as_it_is(like, entry, prefix)
    result = {key: _copy(tensor) for key, tensor in located.tensors.items()}
    for path, array in exported.items():
        key = located.keys.get(path)
        if key is None or np.shape(located.tensors[key]) != array.shape:
            raise TorchImportError(
                f"{located.source} has no {path!r} of shape {array.shape}"
            )
        tensor = located.tensors[key]
        result[key] = cast_like(located.source, key, array, tensor)
    return result


def _exported(leaf: Leaf, arrays: Mapping[str, Any]) -> np.ndarray:
    array = float32("the variables", leaf.path, arrays[leaf.path])
    return leaf.to_torch(array)


def _copy(tensor: Any) -> Any:
    if hasattr(tensor, "detach"):
        return tensor.detach().clone()
    return np.array(tensor)


def _schema(model: str | PyTree, names: Names | None) -> Schema:
    """What `locate` must know of a model.

    Raises:
        TorchImportError: there is no such architecture, or `names` does not fit it.
    """
    if isinstance(model, str):
        own = _own_names(names)
        spellings = {
            key
            for settings in settings_of(model)
            for keys in keys_of(model, settings, own).values()
            for key in keys
        }
        fit = functools.partial(find_fit, model, framework=TORCH, names=own)
        return Schema(model, spellings, fit)
    leaves = table_leaves(model, names or {})
    spellings = {key for leaf in leaves.values() for key in leaf.keys}
    fit = functools.partial(fit_leaves, "the model", leaves, framework=TORCH)
    return Schema("model with these names", spellings, fit)


def _own_names(names: Names | None) -> Pairs:
    """Checks and sorts the names of layers of a bundled architecture."""
    pairs = []
    for layer, name in sorted((names or {}).items()):
        if isinstance(name, Flattened):
            raise TorchImportError(
                f"names: the weights tell the pixels that {layer!r} reads; give its "
                f"name alone, {name.name!r}"
            )
        pairs.append((layer, name))
    return tuple(pairs)


def _own_leaves(
    model: str | PyTree, names: Names | None, arrays: Mapping[str, Any]
) -> list[Leaf]:
    """The leaves of a model. Raises a TorchImportError if arrays do not fit them."""
    if isinstance(model, str):
        own = _own_names(names)
        return list(_fit_variables(model, arrays, own).leaves.values())
    leaves = table_leaves(model, names or {})
    shapes = {path: np.shape(array) for path, array in arrays.items()}
    fit_leaves("the model", leaves, shapes, FLAX).check("the variables")
    return list(leaves.values())


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


def infer_image_shape(name: str, variables: PyTree) -> tuple[int, int, int]:
    """Infers a shape of images, [height, width, channels], that these variables take.

    A VGG takes only images that give its head as many pixels as this one. Other
    architectures take images of other sizes, too.

    Raises:
        TorchImportError: the variables do not belong to that architecture.
    """
    leaves = _fit_variables(name, flatten(variables)).leaves
    pixels, *_ = leaves["params/head/kernel"].factors
    return 32, 32 * pixels, leaves["params/conv0/kernel"].shape[-2]


def _fit_variables(name: str, arrays: Mapping[str, Any], names: Pairs = ()) -> Fit:
    """How variables fit an architecture. Raises a TorchImportError if they do not."""
    shapes = {path: np.shape(array) for path, array in arrays.items()}
    fit = find_fit(name, shapes, FLAX, names)
    fit.check("the variables")
    return fit
