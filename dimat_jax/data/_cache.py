"""Decoded data sets, kept on disk: decoding takes seconds to minutes, mapping none."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from dimat_jax.data._dataset import Dataset, Split, mean_std

__all__ = ["Decoded", "cached", "user_cache"]

_FORMAT = "2"  # It changes whenever the stored fields do.
_FIELDS = (
    "train_images",
    "train_labels",
    "test_images",
    "test_labels",
    "n_classes",
    "mean",
    "std",
    "class_names",  # This array is empty if the names are not known.
)

Decoded = tuple[Split, Split, int, tuple[str, ...] | None]
"""The training split, the test split, the number of classes and the classes' names."""


def user_cache() -> Path:
    """Where this user's caches are: `$XDG_CACHE_HOME` or `~/.cache`, then dimat_jax."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return home / "dimat_jax"


def cached(
    name: str,
    root: Path,
    files: Sequence[Path],
    cache_dir: str | None,
    decode: Callable[[], Decoded],
) -> Dataset:
    """What `decode()` gives, or gave when it last saw the same files.

    Args:
        name: the data set's.
        root: a folder that holds all files. Files are known by their paths below it,
            sizes and times, so that `root` may move.
        files: what is decoded.
        cache_dir: where arrays are kept; None means `user_cache()`. If it cannot be
            written, a warning is logged.
        decode: A function that decodes the files.
    """
    digest = hashlib.sha256(_FORMAT.encode())
    for file in files:
        stat = file.stat()
        member = file.relative_to(root).as_posix()
        digest.update(f"{member} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    home = Path(cache_dir).expanduser() if cache_dir else user_cache()
    folder = home / f"{name}-{digest.hexdigest()[:16]}"

    arrays = _read(folder)
    if arrays is None:
        logging.info("Decoding %s, to be kept in %s", name, folder)
        train, test, n_classes, names = decode()
        mean, std = mean_std(train.images)
        names = np.array(names or (), np.str_)
        stored = [*train, *test, np.array(n_classes), mean, std, names]
        try:
            _write(folder, stored)
        except OSError as error:
            logging.warning("Cannot keep the decoded %s: %s", name, error)
            arrays = stored
        else:  # mapped arrays cost no memory, and processes share them
            arrays = _read(folder) or stored
    *splits, n_classes, mean, std, names = arrays
    train, test = Split(*splits[:2]), Split(*splits[2:])
    class_names = tuple(names.tolist()) or None
    return Dataset(name, train, test, int(n_classes), mean, std, class_names)


def _read(folder: Path) -> list[np.ndarray] | None:
    """The stored arrays, mapped read-only; an unreadable folder is removed."""
    try:
        if not folder.exists():
            return None
        return [
            np.asarray(np.load(folder / f"{field}.npy", mmap_mode="r"))
            for field in _FIELDS
        ]
    except Exception as error:  # damage makes NumPy raise nearly anything
        logging.warning("Discarding %s, which is unreadable: %s", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _write(folder: Path, arrays: Sequence[np.ndarray]) -> None:
    partial = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    partial.mkdir(parents=True)
    try:
        for field, array in zip(_FIELDS, arrays, strict=True):
            with open(partial / f"{field}.npy", "wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())  # or a power cut leaves plausible zeros
        try:
            os.replace(partial, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, and as good
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
