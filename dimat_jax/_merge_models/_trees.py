"""Files of a user's own models: reads pytrees of weights, and writes the same kind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict

from dimat_jax.errors import UserError, reading
from dimat_jax.models._torch_files import is_torch_file
from dimat_jax.models.torch_import import from_torch, save_safetensors, to_torch
from dimat_jax.tree import PyTree, flatten

__all__ = ["Place", "kind_of", "read_tree", "write_tree"]


class Place(NamedTuple):
    """Where in files the weights are: an entry, and a prefix of PyTorch's keys."""

    entry: tuple[str, ...] | None = None
    prefix: str | None = None


class _Kind(NamedTuple):
    """A kind of files.

    Attributes:
        is_kind: whether a path is of this kind, as its name tells.
        read: reads a file, at a place.
        write: `write(folder, variables, like, place)` writes variables like the file
            that they came from, and returns the new file's name.
    """

    is_kind: Callable[[Path], bool]
    read: Callable[[Path, Place], PyTree]
    write: Callable[[Path, PyTree, Path, Place], str]


def kind_of(path: Path) -> str | None:
    """The kind of a file or folder of weights, or None if it is none."""
    return next((name for name, kind in _KINDS.items() if kind.is_kind(path)), None)


def read_tree(path: Path, place: Place) -> PyTree:
    """Reads weights, as NumPy or JAX arrays.

    Raises:
        UserError: the file is of no known kind, cannot be read, or lacks the entry.
    """
    kind = kind_of(path)
    if kind is None:
        raise UserError(
            f"{path} is no file of weights: PyTorch's, .msgpack (Flax), .npz, or a "
            "folder that Orbax has written"
        )
    return _KINDS[kind].read(path, place)


def write_tree(folder: Path, variables: PyTree, like: Path, place: Place) -> str:
    """Writes weights as a file of the same kind as `like`, with its names and dtypes.

    What else the file `like` holds is not copied, except for the keys beside the
    weights in one of PyTorch's state dicts. PyTorch's weights become safetensors.

    Returns:
        the name of the new file in the folder.
    """
    kind = kind_of(like)
    assert kind is not None
    return _KINDS[kind].write(folder, variables, like, place)


def _entry(path: Path, tree: Any, place: Place) -> PyTree:
    if place.prefix:
        raise UserError(f"--prefix is for PyTorch files; {path} is none")
    for key in place.entry or ():
        if not isinstance(tree, dict) or key not in tree:
            keys = ", ".join(map(str, tree)) if isinstance(tree, dict) else "none"
            raise UserError(f"{path} has no entry {key!r}; its entries are {keys}")
        tree = tree[key]
    return tree


def _read_torch(path: Path, place: Place) -> PyTree:
    return from_torch(None, path, entry=place.entry, prefix=place.prefix)


def _write_torch(folder: Path, variables: PyTree, like: Path, place: Place) -> str:
    state_dict = to_torch(
        None, variables, like=like, entry=place.entry, prefix=place.prefix
    )
    save_safetensors(folder / "model.safetensors", state_dict)
    return "model.safetensors"


def _read_msgpack(path: Path, place: Place) -> PyTree:
    with reading(f"{path}: as a file of flax.serialization it"):
        tree = flax.serialization.msgpack_restore(path.read_bytes())
    return _entry(path, tree, place)


def _write_msgpack(folder: Path, variables: PyTree, like: Path, place: Place) -> str:
    del like, place
    content = flax.serialization.msgpack_serialize(variables)
    (folder / "model.msgpack").write_bytes(content)
    return "model.msgpack"


def _read_npz(path: Path, place: Place) -> PyTree:
    with reading(f"{path}: as an .npz file it"):
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    return _entry(path, unflatten_dict(arrays, sep="/"), place)


def _write_npz(folder: Path, variables: PyTree, like: Path, place: Place) -> str:
    del like, place
    leaves: dict[str, Any] = {
        path: np.asarray(leaf) for path, leaf in flatten(variables).items()
    }
    with open(folder / "model.npz", "wb") as file:
        np.savez(file, **leaves)
    return "model.npz"


# A folder of Orbax holds one of these files.
_ORBAX = ("_CHECKPOINT_METADATA", "_METADATA")


def _read_orbax(path: Path, place: Place) -> PyTree:
    with reading(f"{path}: as a folder of Orbax it"):
        tree = ocp.PyTreeCheckpointer().restore(path.absolute())
    return _entry(path, tree, place)


def _write_orbax(folder: Path, variables: PyTree, like: Path, place: Place) -> str:
    del like, place
    # NumPy's arrays have no sharding, of which Orbax would warn those who read them.
    arrays = jax.tree.map(np.asarray, variables)
    ocp.PyTreeCheckpointer().save((folder / "model").absolute(), arrays)
    return "model"


_KINDS = {
    "orbax": _Kind(
        lambda path: any((path / name).is_file() for name in _ORBAX),
        _read_orbax,
        _write_orbax,
    ),
    "msgpack": _Kind(
        lambda path: path.suffix == ".msgpack", _read_msgpack, _write_msgpack
    ),
    "npz": _Kind(lambda path: path.suffix == ".npz", _read_npz, _write_npz),
    "torch": _Kind(is_torch_file, _read_torch, _write_torch),
}
