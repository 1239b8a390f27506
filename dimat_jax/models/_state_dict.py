"""Reads PyTorch's state dicts: files, checkpoints and mappings become arrays by key."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dimat_jax.errors import nearest
from dimat_jax.models._torch_files import TorchImportError, read_file

__all__ = [
    "Entry",
    "StateDict",
    "cast_like",
    "float32",
    "is_floating",
    "listed",
    "read_checkpoint",
    "state_dicts",
]

StateDict = str | os.PathLike[str] | Mapping[str, Any]
"""A file, a folder that holds one, or a mapping to arrays or to such mappings."""

Entry = str | Sequence[str] | None
"""The place of a state dict in a checkpoint: one key, or those that lead to it."""


def read_checkpoint(checkpoint: StateDict) -> tuple[str, Mapping[Any, Any]]:
    """Reads a checkpoint, which may be a state dict or hold some.

    Returns:
        the name of the source for messages, and the mapping.

    Raises:
        TorchImportError: it cannot be read, or it is no mapping.
    """
    if isinstance(checkpoint, Mapping):
        return "the state dict", checkpoint
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise TorchImportError(
            "expected a file or a mapping of arrays, as module.state_dict() is, got "
            f"{type(checkpoint).__name__}"
        )
    source, tensors = os.fspath(checkpoint), read_file(Path(checkpoint))
    if not isinstance(tensors, Mapping):
        raise TorchImportError(
            f"{source}: expected a state dict, found {type(tensors).__name__}"
        )
    return source, tensors


def state_dicts(
    source: str, checkpoint: Mapping[Any, Any], entry: Entry = None
) -> dict[str, dict[str, Any]]:
    """Finds the state dicts in a checkpoint.

    Args:
        source: the name of the checkpoint for messages.
        checkpoint: the checkpoint.
        entry: the place in which to look. None: everywhere.

    Returns:
        the state dicts, by the names of their places for messages.

    Raises:
        TorchImportError: there is no such entry, or what would be a state dict holds
            other things than arrays.
    """
    if entry is not None:
        for key in [entry] if isinstance(entry, str) else entry:
            if not isinstance(checkpoint, Mapping) or key not in checkpoint:
                keys = map(str, checkpoint) if isinstance(checkpoint, Mapping) else ()
                raise TorchImportError(
                    f"{source} has no entry {key!r}; {nearest(key, keys)}"
                )
            source, checkpoint = f"{source}[{key!r}]", checkpoint[key]
        if not isinstance(checkpoint, Mapping):
            kind = type(checkpoint).__name__
            raise TorchImportError(f"{source}: expected a state dict, found {kind}")
    found = dict(_nested(source, checkpoint))
    # An optimizer's state has mappings of arrays too, but no names of layers.
    if dotted := {k: v for k, v in found.items() if any("." in str(key) for key in v)}:
        found = dotted
    elif len(found) > 1:
        found = {}
    # Only arrays with axes show that the mapping is a state dict itself: a checkpoint
    # may hold scalar arrays, as its best accuracy.
    if not found or any(_is_array(v) and v.ndim for v in checkpoint.values()):
        found = {source: checkpoint}
    for name, tensors in found.items():
        strangers = [str(key) for key, value in tensors.items() if not _is_array(value)]
        if strangers:
            raise TorchImportError(f"{name}: not arrays: {listed(strangers)}")
    return {
        name: {str(key): value for key, value in tensors.items()}
        for name, tensors in found.items()
    }


def _nested(
    source: str, checkpoint: Mapping[Any, Any]
) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Yields the mappings that hold nothing but arrays, each after its place."""
    for key, value in checkpoint.items():
        if isinstance(value, Mapping) and value:
            place = f"{source}[{key!r}]"
            if all(map(_is_array, value.values())):
                yield place, value
            else:
                yield from _nested(place, value)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def float32(source: str, key: str, array: Any) -> np.ndarray:
    """Copies an array of JAX, NumPy or PyTorch to a float32 array of NumPy.

    Raises:
        TorchImportError: the array holds integers, NaN or infinities. The message
            names the source and the key.
    """
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        # PyTorch cannot convert bfloat16 to NumPy, so all floats become float32 first.
        array = array.float() if array.is_floating_point() else array
    array = np.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TorchImportError(
            f"{source}: {key!r} holds {array.dtype}, expected floating-point numbers"
        )
    with np.errstate(over="ignore"):  # an overflow gives infinity, refused below
        array = np.array(array, np.float32)
    _check_finite(source, key, np.isfinite(array))
    return array


def cast_like(source: str, key: str, array: np.ndarray, like: Any) -> Any:
    """Gives an array the kind of another: NumPy's or PyTorch's, dtype and device.

    Raises:
        TorchImportError: the other dtype cannot hold a number of the array.
    """
    if not is_floating(like):
        raise TorchImportError(
            f"{source}: {key!r} holds {like.dtype}, expected floating-point numbers"
        )
    if hasattr(like, "new_tensor"):
        tensor = like.detach().new_tensor(array)
        _check_finite(source, key, tensor.isfinite().cpu().numpy())
        return tensor
    with np.errstate(over="ignore"):  # an overflow gives infinity, refused below
        array = array.astype(like.dtype)
    _check_finite(source, key, np.isfinite(array))
    return array


def is_floating(array: Any) -> bool:
    """Whether an array of JAX, NumPy or PyTorch holds floating-point numbers."""
    if hasattr(array, "is_floating_point"):
        return array.is_floating_point()
    return jnp.issubdtype(array.dtype, jnp.floating)


def _check_finite(source: str, key: str, finite: np.ndarray) -> None:
    if n_bad := int((~finite).sum()):
        raise TorchImportError(
            f"{source}: {key!r} holds {n_bad} value(s) that are NaN or infinite"
        )


def listed(items: Sequence[str], most: int = 10) -> str:
    """Joins the first `most` items to a text, with the number of the others."""
    more = f", and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
