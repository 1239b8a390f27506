"""Reads CIFAR-10 and CIFAR-100 from any of the forms in which they are published.

These are the data of TensorFlow Datasets (array_record), the original archives, and the
parquet files of Hugging Face.

A folder `arrays` in the place of tfds's versions holds the same images as arrays (see
`_cache.write_arrays`). It is for machines without tfds.
"""

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dimat_jax.data._cache import Decoded, cached, read_arrays
from dimat_jax.data._cifar_archives import ARCHIVES, decode_archive
from dimat_jax.data._dataset import (
    DataError,
    Dataset,
    Split,
    decode_image,
    make_split,
)
from dimat_jax.data._tables import parquet_files, parquet_split
from dimat_jax.errors import reading

__all__ = ["ARRAYS", "read"]

# The folder of a data set that is stored as arrays.
ARRAYS = "arrays"
# The folder in which Hugging Face's repository of CIFAR-10 has its parquet files.
_HUGGINGFACE = "plain_text"


def read(
    directory: str | None, cache_dir: str | None, *, name: str, n_classes: int
) -> Dataset:
    """Reads a data set. It never downloads.

    Args:
        directory: the data directory of tfds, whose newest prepared version is read; or
            the folder of an original archive or of parquet files, or an archive itself.
            None means `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
        cache_dir: the folder of the cache, as for `cached`.
        name: the name of the data set in tfds.
        n_classes: the number of its classes.

    Raises:
        DataError: the data are missing or damaged.
    """
    data_dir = directory or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = Path(data_dir).expanduser() / name
    if (root / ARRAYS).is_dir():
        return read_arrays(name, root / ARRAYS)
    prepare = (
        "prepare it with `pip install 'dimat_jax[prepare]'` and "
        f"`tfds build {name} --file_format=array_record --data_dir={root.parent}`, or "
        f"put {' or '.join(ARCHIVES[name])} or Hugging Face's parquet files into "
        f"{root.parent}"
    )
    versions = [
        path.parent
        for path in root.glob("*/dataset_info.json")
        if re.fullmatch(r"\d+\.\d+\.\d+", path.parent.name)  # not "3.0.2.incomplete"
    ]
    if not versions:
        other = _archive(root, n_classes) or _parquet(root, n_classes)
        if other is not None:
            folder, files, decode = other
            return cached(name, folder, files, cache_dir, decode)
        raise DataError(f"{name}: no {root}/<version>/dataset_info.json; {prepare}")
    folder = max(versions, key=lambda path: [int(n) for n in path.name.split(".")])
    files = sorted(folder.glob(f"{name}-*.array_record*"))
    for split in ("train", "test"):
        if not any(file.name.startswith(f"{name}-{split}.") for file in files):
            raise DataError(
                f"{name}: no {folder}/{name}-{split}.array_record*; {prepare}"
            )

    names = folder / "label.labels.txt"

    def decode() -> Decoded:
        return (
            _decode_split(folder, "train"),
            _decode_split(folder, "test"),
            n_classes,
            _class_names(names, n_classes),
        )

    sources = [*files, *filter(Path.is_file, [names])]
    return cached(name, root, sources, cache_dir, decode)


_Reader = tuple[Path, list[Path], Callable[[], Decoded]]
"""A folder, the files of a data set in it, and the function that decodes them."""


def _archive(root: Path, n_classes: int) -> _Reader | None:
    """The archive in a data directory, or the data directory if it is one itself."""
    name, parent = root.name, root.parent
    found = [parent / archive for archive in ARCHIVES[name]]
    if parent.name in ARCHIVES[name]:
        found = [parent]
    for path in filter(Path.is_file, found):
        decode = functools.partial(decode_archive, path, name, n_classes)
        return path.parent, [path], decode
    return None


def _parquet(root: Path, n_classes: int) -> _Reader | None:
    """The parquet files in a data directory, or in its folder for this data set."""
    label = ("label",) if n_classes == 10 else ("fine_label",)
    # Other folders of the data directory hold other data sets.
    for folder, below in ((root, "*"), (root.parent, _HUGGINGFACE)):
        splits = parquet_files(folder, below) if folder.is_dir() else {}
        if {"train", "test"} <= splits.keys():
            break
    else:
        return None

    def decode() -> Decoded:
        train, names = parquet_split(splits["train"], label)
        test, _ = parquet_split(splits["test"], label)
        return train, test, n_classes, names

    return folder, [*splits["train"], *splits["test"]], decode


def _class_names(path: Path, n_classes: int) -> tuple[str, ...] | None:
    """The names of the labels, one a line, as tfds stores them beside the records."""
    if not path.is_file():
        return None
    with reading(path, DataError):
        names = tuple(path.read_text(encoding="utf-8").strip().splitlines())
    return names if len(names) == n_classes else None


def _decode_split(folder: Path, split: str) -> Split:
    # This import is slow, and reading from the cache does not need it.
    import tensorflow_datasets as tfds

    with reading(f"{split} in {folder}", DataError):
        # Unlike `tfds.data_source`, this cannot start a download.
        builder: Any = tfds.builder_from_directory(folder)
        # Decoding with Pillow directly takes half as long as decoding through tfds.
        records = builder.as_data_source(
            split=split, decoders={"image": tfds.decode.SkipDecoding()}
        )
        images = np.empty((len(records), 32, 32, 3), np.uint8)
        labels = np.empty(len(records), np.int32)
        for start in range(0, len(records), 1000):
            batch = range(start, min(start + 1000, len(records)))
            for i, record in zip(batch, records.__getitems__(batch), strict=True):
                where = f"{folder}: image {i} of {split}"
                images[i] = decode_image(record["image"], (32, 32, 3), where)
                labels[i] = record["label"]
    return make_split(images, labels)
