"""Keeps decoded data sets on disk, because decoding takes seconds to minutes."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from dimat_jax._folders import map_array
from dimat_jax.data._dataset import DataError, Dataset, Split, mean_std
from dimat_jax.errors import concerning, reading

__all__ = ["Decoded", "cached", "parts_of", "read_arrays", "user_cache", "write_arrays"]

# The version of the cache. Change it whenever the stored arrays change.
_FORMAT = "2"
# The names of the stored arrays, with the kinds that their dtypes may have, and their
# ranks. A label is a class, a number to be predicted, or several of these.
_FIELDS = {
    "train_images": (("u1",), (4,)),
    "train_labels": (("i", "f"), (1, 2)),
    "test_images": (("u1",), (4,)),
    "test_labels": (("i", "f"), (1, 2)),
    "n_classes": (("i",), (0,)),
    "mean": (("f",), (1,)),
    "std": (("f",), (1,)),
    "class_names": (("U",), (1,)),  # This array is empty if the names are not known.
}
_KINDS = {
    "u1": "bytes (uint8)",
    "i": "whole numbers",
    "f": "floats",
    "U": "texts",
}

Decoded = tuple[Split, Split, int, tuple[str, ...] | None]
"""The training split, the test split, the number of classes and the classes' names."""


def user_cache() -> Path:
    """The folder of the user's caches: dimat_jax in `$XDG_CACHE_HOME` or `~/.cache`."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return home / "dimat_jax"


def cached(
    name: str,
    root: Path,
    files: Sequence[Path],
    cache_dir: str | None,
    decode: Callable[[], Decoded],
) -> Dataset:
    """Returns a data set from the cache, or decodes it and stores it in the cache.

    Args:
        name: the name of the data set.
        root: a folder that holds all files. Files are identified by their paths below
            `root`, their sizes and their times, so `root` itself may be moved.
        files: the files that are decoded. If one changes, they are decoded again.
        cache_dir: the folder of the cache; None means `user_cache()`. If nothing can be
            written there, a warning is logged.
        decode: decodes the files.
    """
    digest = hashlib.sha256(_FORMAT.encode())
    for file in files:
        stat = file.stat()
        member = file.relative_to(root).as_posix()
        digest.update(f"{member} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    home = Path(cache_dir).expanduser() if cache_dir else user_cache()
    folder = home / f"{name}-{digest.hexdigest()[:16]}"

    arrays = _read_or_discard(folder)
    if arrays is None:
        logging.info("Decoding %s, to be kept in %s", name, folder)
        stored = _arrays(decode())
        try:
            _write(folder, stored)
        except OSError as error:
            logging.warning("Cannot keep the decoded %s: %s", name, error)
            arrays = stored
        else:
            # Mapped arrays need no memory of their own, and processes share them.
            arrays = _read_or_discard(folder) or stored
    return _dataset(name, arrays)


def write_arrays(folder: Path, decoded: Decoded) -> None:
    """Stores a data set as arrays, which `read_arrays` reads.

    The arrays serve machines that have neither the data set's own files nor what is
    needed to decode them. A folder that exists already is left as it is.
    """
    _write(folder, _arrays(decoded))


def read_arrays(name: str, folder: Path) -> Dataset:
    """Reads a data set that `write_arrays` has stored. The arrays are mapped.

    Raises:
        DataError: an array is missing or damaged.
    """
    with concerning(name), reading(f"arrays in {folder}", DataError):
        return _dataset(name, _read(folder))


def parts_of(dataset: Dataset) -> Decoded:
    """The parts of a data set of images that are stored."""
    return dataset.train, dataset.test, dataset.n_classes, dataset.class_names


def _arrays(decoded: Decoded) -> list[np.ndarray]:
    """The arrays that are stored, in the order of `_FIELDS`."""
    train, test, n_classes, class_names = decoded
    mean, std = mean_std(train.images)
    names = np.array(class_names or (), np.str_)
    return [*train, *test, np.array(n_classes), mean, std, names]


def _dataset(name: str, arrays: Sequence[np.ndarray]) -> Dataset:
    """The data set of stored arrays."""
    *splits, n_classes, mean, std, names = arrays
    train, test = Split(*splits[:2]), Split(*splits[2:])
    class_names = tuple(names.tolist()) or None
    return Dataset(name, train, test, int(n_classes), mean, std, class_names)


def _read(folder: Path) -> list[np.ndarray]:
    """Maps the stored arrays read-only.

    Raises:
        DataError: An array is missing or damaged, or of another dtype or rank.
    """
    arrays = []
    for field, (kinds, ranks) in _FIELDS.items():
        path = folder / f"{field}.npy"
        array = np.asarray(map_array(path, DataError))
        if not array.dtype.str[1:].startswith(kinds) or array.ndim not in ranks:
            expected = " or ".join(_KINDS[kind] for kind in kinds)
            raise DataError(
                f"{path} holds an array of {array.dtype} and shape {array.shape}; "
                f"expected {expected} with {' or '.join(map(str, ranks))} axes"
            )
        arrays.append(array)
    return arrays


def _read_or_discard(folder: Path) -> list[np.ndarray] | None:
    """Maps the stored arrays. Removes the folder if they cannot be read."""
    try:
        return _read(folder) if folder.exists() else None
    except Exception as error:  # a damaged file can make NumPy raise any error
        logging.warning("Discarding %s, which is unreadable: %s", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _write(folder: Path, arrays: Sequence[np.ndarray]) -> None:
    """Stores arrays in a folder that appears only when it is complete."""
    partial = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    partial.mkdir(parents=True)
    try:
        for field, array in zip(_FIELDS, arrays, strict=True):
            with open(partial / f"{field}.npy", "wb") as file:
                np.save(file, array)
                file.flush()
                # Without fsync, a power failure could leave a file full of zeros.
                os.fsync(file.fileno())
        try:
            os.replace(partial, folder)
        except OSError:
            # The folder exists if another process has just stored the same arrays.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
