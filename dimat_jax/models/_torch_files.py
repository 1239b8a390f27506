"""Files of PyTorch weights: reads them, and writes safetensors.

Only this file imports PyTorch, and only to read a file that PyTorch has written.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dimat_jax.errors import UserError, reading

__all__ = [
    "ENDINGS",
    "TorchImportError",
    "is_torch_file",
    "read_file",
    "save_safetensors",
]


class TorchImportError(UserError):
    """Weights do not fit an architecture. The message names the keys and the shapes."""


# The endings of files that `read_file` reads. An index names the files over which the
# tensors are spread.
_INDEX = ".index.json"
ENDINGS = (".pth", ".pt", ".safetensors", ".bin", ".ckpt", ".tar", _INDEX)
# The files that a folder of weights may hold, the first that is there counts.
_IN_FOLDERS = tuple(
    f"{name}{ending}"
    for ending in ("", _INDEX)
    for name in ("model.safetensors", "pytorch_model.bin")
)


def is_torch_file(path: Path) -> bool:
    """Whether `read_file` can read a path, as its name tells."""
    if path.is_dir():
        return any((path / name).is_file() for name in _IN_FOLDERS)
    return path.name.endswith(ENDINGS)


def read_file(path: Path) -> Any:
    """Reads a file of weights, or a folder that holds one, as Hugging Face's do.

    Returns:
        what the file holds: a state dict, or a checkpoint that holds some.

    Raises:
        TorchImportError: the file cannot be read.
    """
    if path.is_dir():
        found = [path / name for name in _IN_FOLDERS if (path / name).is_file()]
        if not found:
            raise TorchImportError(
                f"{path}: the folder holds none of {', '.join(_IN_FOLDERS)}"
            )
        path = found[0]
    if not path.is_file():
        raise TorchImportError(f"{path}: there is no such file")
    if path.name.endswith(_INDEX):
        return _read_index(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _read_torch(path)


def _read_index(path: Path) -> dict[str, Any]:
    """Reads all files that an index names. Their tensors make one state dict."""
    with reading(f"{path}: as an index of weights it", TorchImportError):
        files = json.loads(path.read_text())["weight_map"]
    tensors: dict[str, Any] = {}
    for name in sorted(set(files.values())):
        # A name with a folder in it could lead anywhere.
        if Path(name).name != name or name.endswith(_INDEX):
            raise TorchImportError(f"{path} names {name!r}, which is no file beside it")
        tensors |= read_file(path.parent / name)
    if missing := [key for key in files if key not in tensors]:
        raise TorchImportError(f"{path}: {missing[0]!r} is in none of its files")
    return {key: tensors[key] for key in files}


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


# The dtypes that are read and written. This library converts them itself because
# safetensors.numpy does not know bfloat16. Weights are floating-point numbers; the
# others are for what stands beside them, as BatchNorm's counts of batches.
_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def save_safetensors(
    path: str | os.PathLike[str], state_dict: Mapping[str, Any]
) -> None:
    """Writes a state dict into a safetensors file, which PyTorch users can load.

    Neither PyTorch nor safetensors has to be installed.

    Args:
        path: the file. It is replaced if it is there.
        state_dict: arrays of NumPy, JAX or PyTorch by key, as `to_torch` returns them.

    Raises:
        TorchImportError: the dtype of an array is none of those of weights, integers
            or truth values that are allowed.
    """
    names = {np.dtype(dtype): name for name, dtype in _SAFETENSORS_DTYPES.items()}
    arrays = {key: _as_numpy(value) for key, value in state_dict.items()}
    header, offset = {}, 0
    for key, array in arrays.items():
        if array.dtype not in names:
            allowed = ", ".join(dtype.name for dtype in names)
            raise TorchImportError(
                f"{path}: {key!r} holds {array.dtype}; allowed: {allowed}"
            )
        header[key] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    head = json.dumps(header).encode()
    # The data begin at a multiple of 8 bytes, so that they can be mapped from the file.
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for array in arrays.values():
            file.write(array.tobytes())


def _as_numpy(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # NumPy alone does not know it
            return value.float().numpy().astype(jnp.bfloat16)
    return np.asarray(value)


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
