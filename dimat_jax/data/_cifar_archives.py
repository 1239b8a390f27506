"""Reads CIFAR-10 and CIFAR-100 from the archives of their authors.

The archives are those for Python (pickles) and those in binary form. A Python archive
holds dicts with rows of 3,072 bytes: 1,024 red pixels, then the green and blue ones. A
binary archive holds records of one label (CIFAR-100: two, coarse and fine) and such a
row. See https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dimat_jax.data._cache import Decoded
from dimat_jax.data._dataset import DataError, Split, make_split
from dimat_jax.data._safe_pickle import load_pickle
from dimat_jax.errors import reading

__all__ = ["ARCHIVES", "decode_archive"]

# No file in the archives has this many bytes. Larger ones may be meant to fill memory.
_MOST_BYTES = 2**29
_ROW = 3 * 32 * 32


class _Layout(NamedTuple):
    """The files in the archives of a data set.

    Attributes:
        train: the files with the images for training, in order.
        test: the file with the images for testing.
        names: the Python archive's file with the names of the classes, and their key.
        names_text: the binary archive's file with the names of the classes.
        labels: the key of the labels in the Python archive.
        n_labels: the number of labels before a row in the binary archive. The last one
            counts.
    """

    train: tuple[str, ...]
    test: str
    names: tuple[str, bytes]
    names_text: str
    labels: bytes
    n_labels: int


_LAYOUTS = {
    "cifar10": _Layout(
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test_batch",
        ("batches.meta", b"label_names"),
        "batches.meta.txt",
        b"labels",
        1,
    ),
    "cifar100": _Layout(
        ("train",),
        "test",
        ("meta", b"fine_label_names"),
        "fine_label_names.txt",
        b"fine_labels",
        2,
    ),
}

ARCHIVES = {
    name: tuple(f"{stem}-{kind}.tar.gz" for kind in ("python", "binary"))
    for name, stem in (("cifar10", "cifar-10"), ("cifar100", "cifar-100"))
}
"""The names of the archives of each data set."""


def decode_archive(path: Path, name: str, n_classes: int) -> Decoded:
    """Reads an archive. It never runs code from it, and writes nothing.

    Args:
        path: the archive.
        name: the name of the data set.
        n_classes: the number of its classes.

    Raises:
        DataError: the archive is damaged, or lacks a file, or a pickle is refused.
    """
    layout, is_binary = _LAYOUTS[name], "binary" in path.name
    ending = ".bin" if is_binary else ""
    names_file = layout.names_text if is_binary else layout.names[0]
    wanted = [f"{file}{ending}" for file in (*layout.train, layout.test)]
    members = _members(path, [*wanted, names_file])
    for file in wanted:
        if file not in members:
            raise DataError(f"{path} lacks the file {file}")
    read = _binary if is_binary else _python

    def split(files: list[str]) -> Split:
        parts = [read(members[f], layout, f"{path}: {f}") for f in files]
        rows, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        images = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return make_split(np.ascontiguousarray(images), labels)

    names = _names(members, layout, is_binary, path)
    names = names if names is not None and len(names) == n_classes else None
    return split(wanted[:-1]), split(wanted[-1:]), n_classes, names


def _members(path: Path, wanted: list[str]) -> dict[str, bytes]:
    """The contents of files in an archive, by the last part of their names."""
    found = {}
    with reading(path, DataError), tarfile.open(path, "r:gz") as archive:
        for member in archive:
            name = member.name.rpartition("/")[2]
            if name not in wanted or not member.isfile():
                continue
            if member.size > _MOST_BYTES:
                raise DataError(f"{path}: {name} has more than {_MOST_BYTES} bytes")
            file = archive.extractfile(member)
            assert file is not None  # the member is a file
            found[name] = file.read()
    return found


def _python(
    content: bytes, layout: _Layout, where: str
) -> tuple[np.ndarray, np.ndarray]:
    batch = load_pickle(content, where)
    with reading(where, DataError):
        rows, labels = batch[b"data"], np.asarray(batch[layout.labels])
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8:
        raise DataError(f"{where}: the pixels are no array of uint8")
    if rows.ndim != 2 or rows.shape[1] != _ROW:
        raise DataError(f"{where}: rows must have {_ROW} bytes, got {rows.shape}")
    if labels.shape != (len(rows),) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{where}: there are {len(rows)} images, but labels of shape "
            f"{labels.shape} and dtype {labels.dtype}"
        )
    return rows, labels.astype(np.int32)


def _binary(
    content: bytes, layout: _Layout, where: str
) -> tuple[np.ndarray, np.ndarray]:
    size = layout.n_labels + _ROW
    if not content or len(content) % size:
        raise DataError(
            f"{where}: it has {len(content)} bytes, which are no records of {size}"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    labels = records[:, layout.n_labels - 1].astype(np.int32)
    return records[:, layout.n_labels :], labels


def _names(
    members: Mapping[str, bytes], layout: _Layout, is_binary: bool, path: Path
) -> tuple[str, ...] | None:
    """The names of the classes; None if the archive does not have them."""
    file, key = layout.names
    if is_binary:
        text = members.get(layout.names_text, b"").decode("utf-8", "replace")
        return tuple(text.split())
    if file not in members:
        return None
    where = f"{path}: {file}"
    meta = load_pickle(members[file], where)
    with reading(where, DataError):
        return tuple(
            name.decode() if isinstance(name, bytes) else str(name)
            for name in meta[key]
        )
