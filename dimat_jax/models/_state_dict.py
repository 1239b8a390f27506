"""Reads PyTorch's state dicts: from files, checkpoints and mappings to arrays by key.

Only this file imports PyTorch, and only to read a file that PyTorch has written.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dimat_jax._metrics import write_bytes
from dimat_jax.errors import UserError, reading

__all__ = [
    "TorchImportError",
    "float32",
    "listed",
    "read_state_dict",
    "write_safetensors",
]


class TorchImportError(UserError):
    """Weights do not fit an architecture. The message names the keys and the shapes."""


def read_state_dict(
    state_dict: str | os.PathLike[str] | Mapping[str, Any],
) -> tuple[str, dict[str, Any]]:
    """Reads a state dict.

    Args:
        state_dict: a file or a mapping, as for `from_torch`.

    Returns:
        the name of the source for messages, and the arrays by key.

    Raises:
        TorchImportError: the state dict cannot be read, or it holds other things than
            arrays.
    """
    if isinstance(state_dict, Mapping):
        source, tensors = "the state dict", state_dict
    elif isinstance(state_dict, (str, os.PathLike)):
        source, path = os.fspath(state_dict), Path(state_dict)
        if not path.is_file():
            raise TorchImportError(f"{source}: there is no such file")
        read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
        tensors = read(path)
    else:
        raise TorchImportError(
            "expected a file or a mapping of arrays, as module.state_dict() is, got "
            f"{type(state_dict).__name__}"
        )
    if not isinstance(tensors, Mapping):
        raise TorchImportError(
            f"{source}: expected a state dict, found {type(tensors).__name__}"
        )
    source, tensors = _unwrapped(source, tensors)
    strangers = [str(key) for key, value in tensors.items() if not _is_array(value)]
    if strangers:
        raise TorchImportError(f"{source}: not arrays: {listed(strangers)}")
    return source, {str(key): value for key, value in tensors.items()}


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        from safetensors import deserialize
    except ImportError as error:
        raise TorchImportError(
            f"{path}: reading it needs safetensors; pip install 'dimat_jax[torch]'"
        ) from error
    arrays = {}
    with reading(f"{path}: as a safetensors file it", TorchImportError):
        tensors = deserialize(path.read_bytes())
        for key, tensor in tensors:
            if tensor["dtype"] not in _SAFETENSORS_DTYPES:
                raise TorchImportError(
                    f"{path}: {key!r} holds {tensor['dtype']}; allowed: "
                    f"{', '.join(_SAFETENSORS_DTYPES)}"
                )
            array = np.frombuffer(tensor["data"], _SAFETENSORS_DTYPES[tensor["dtype"]])
            arrays[key] = array.reshape(tensor["shape"])
    return arrays


# The dtypes that are read. This library converts them itself because
# safetensors.numpy does not know bfloat16. I64 is here for BatchNorm's counts of
# batches.
_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
}


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a .safetensors file. A crash leaves the whole file or none.

    Raises:
        TorchImportError: safetensors is not installed.
    """
    try:
        from safetensors.numpy import save
    except ImportError as error:
        raise TorchImportError(
            f"{path}: writing it needs safetensors; pip install 'dimat_jax[torch]'"
        ) from error
    write_bytes(path, save(dict(arrays)))


def _read_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise TorchImportError(
            f"{path}: reading it needs PyTorch; pip install 'dimat_jax[torch]', or "
            "save the weights as .safetensors"
        ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a malformed file can make it raise any error
        raise TorchImportError(
            f"{path}: refused. This is neither a .safetensors file nor one in which "
            "torch.save has put tensors alone; unpickling anything else could execute "
            "what it holds. Save module.state_dict()"
        ) from error


def _unwrapped(
    source: str, tensors: Mapping[Any, Any]
) -> tuple[str, Mapping[Any, Any]]:
    """Returns the one state dict among a checkpoint's entries, or the mapping itself.

    The source for messages comes first.
    """
    inner = [
        key
        for key, value in tensors.items()
        if isinstance(value, Mapping) and value and all(map(_is_array, value.values()))
    ]
    # Only arrays with axes show that the mapping is a state dict itself: a checkpoint
    # may hold scalar arrays, as its best accuracy.
    if not inner or any(_is_array(v) and v.ndim for v in tensors.values()):
        return source, tensors
    if len(inner) > 1:
        raise TorchImportError(
            f"{source}: several entries are state dicts, {listed(inner)}; pass one"
        )
    return f"{source}[{inner[0]!r}]", tensors[inner[0]]


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
    if n_bad := int((~np.isfinite(array)).sum()):
        raise TorchImportError(
            f"{source}: {key!r} holds {n_bad} value(s) that are NaN or infinite"
        )
    return array


def listed(items: list[str], most: int = 10) -> str:
    """Joins the first `most` items to a text, with the number of the others."""
    more = f", and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
