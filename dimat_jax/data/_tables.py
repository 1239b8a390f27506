"""Data sets in Hugging Face's formats: folders of parquet files or of `save_to_disk`.

A table has a column of images or of other inputs, and a column of labels. Nothing here
uses the network.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dimat_jax.data._arrays import TESTS, expect_path, make_dataset
from dimat_jax.data._cache import cached, parts_of
from dimat_jax.data._dataset import DataError, Dataset, Split, make_split
from dimat_jax.data._decoding import decode_all, with_equal_channels
from dimat_jax.data._random_access import INPUTS, LABELS, field
from dimat_jax.errors import reading

__all__ = ["parquet_files", "parquet_split", "read_huggingface"]

# The files that `datasets.save_to_disk` writes for several splits, and for one.
_SPLITS_FILE, _STATE_FILE = "dataset_dict.json", "state.json"


def read_huggingface(directory: str | None, cache_dir: str | None) -> Dataset:
    """A Hugging Face data set on disk: from `save_to_disk`, or parquet files.

    Raises:
        DataError: the folder is missing, or holds no such data set.
    """
    what = "a folder of parquet files, or one that datasets.save_to_disk has written"
    root = expect_path(directory, what)
    if (root / _SPLITS_FILE).exists() or (root / _STATE_FILE).exists():
        files = sorted(path for path in root.rglob("*") if path.is_file())
        tables = _saved_tables(root)
    else:
        found = parquet_files(root)
        files = [file for part in found.values() for file in part]
        if not files:
            raise DataError(f"{root} holds no data set; it must be {what}")
        tables = {split: _parquet_table(part) for split, part in found.items()}
    train = tables.get("train")
    if train is None:
        raise DataError(f"{root} has no split train, but {', '.join(sorted(tables))}")
    test = next((tables[name] for name in TESTS if name in tables), None)

    is_encoded = _is_encoded(train, f"{root}: train")

    def make() -> Dataset:
        pairs = [_arrays(train, f"{root}: train")]
        if test is not None:
            pairs.append(_arrays(test, f"{root}: test"))
        if is_encoded:
            pairs = with_equal_channels(pairs)
        return make_dataset("huggingface", *pairs, class_names=_class_names(train))

    if not is_encoded:
        return make()
    return cached("huggingface", root, files, cache_dir, lambda: parts_of(make()))


def parquet_files(root: Path, below: str = "*") -> dict[str, list[Path]]:
    """Finds the parquet files of each split, in a folder or one folder below it.

    The files are called train.parquet or train-00000-of-00001.parquet, as Hugging Face
    names them. A file without the name of a split belongs to train.

    Args:
        root: The folder, or one of the files.
        below: The pattern of the names of the folders below that are searched as well.
    """
    found: dict[str, list[Path]] = {}
    folder = root if root.is_dir() else root.parent
    files = sorted([*folder.glob("*.parquet"), *folder.glob(f"{below}/*.parquet")])
    for path in files if root.is_dir() else [root]:
        known = (name for name in ("train", *TESTS) if path.name.startswith(name))
        found.setdefault(next(known, "train"), []).append(path)
    return found


def parquet_split(
    files: Sequence[Path], label: tuple[str, ...]
) -> tuple[Split, tuple[str, ...] | None]:
    """Reads the images of a split, and the names of the classes.

    Args:
        files: the parquet files, in order.
        label: the names that the column of labels may have.

    Raises:
        DataError: a file is damaged, or the columns are missing.
    """
    table = _parquet_table(files)
    images, labels = _arrays(table, str(files[0].parent), label)
    return make_split(images, labels), _class_names(table, label)


def _parquet_table(files: Sequence[Path]) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{files[0]}: reading it needs pyarrow; pip install "
            "'dimat_jax[huggingface]'"
        ) from error
    tables = []
    for file in files:
        with reading(file, DataError):
            tables.append(pyarrow.parquet.ParquetFile(file).read())
    with reading(files[0].parent, DataError):
        return pyarrow.concat_tables(tables)


def _saved_tables(root: Path) -> dict[str, Any]:
    """The table of each split in a folder of `datasets.save_to_disk`."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{root}: reading it needs datasets; pip install 'dimat_jax[huggingface]'"
        ) from error
    with reading(root, DataError):
        loaded: Any = datasets.load_from_disk(str(root))
        splits = loaded if isinstance(loaded, dict) else {"train": loaded}
        return {name: part.with_format("arrow")[:] for name, part in splits.items()}


def _is_encoded(table: Any, where: str) -> bool:
    """Whether the inputs of a table are encoded images."""
    import pyarrow.types

    kind = table.schema.field(field(table.column_names, INPUTS, where)).type
    return pyarrow.types.is_struct(kind) or pyarrow.types.is_binary(kind)


def _arrays(
    table: Any, where: str, labels_in: tuple[str, ...] = LABELS
) -> tuple[np.ndarray, np.ndarray]:
    """The inputs and the labels of a table."""
    images = table[field(table.column_names, INPUTS, where)]
    labels = table[field(table.column_names, labels_in, where)]
    with reading(where, DataError):
        if labels.null_count:
            first = labels.is_null().to_pylist().index(True)
            raise DataError(f"{where}: sample {first} has no label")
        # A label may be several numbers, or as many tokens as an input has.
        labels = _nested(labels.combine_chunks(), f"{where}: label")
        if not _is_encoded(table, where):
            return _nested(images.combine_chunks(), f"{where}: input"), labels
        files = images.to_pylist()

        def content(i: int) -> bytes:
            data = files[i]["bytes"] if isinstance(files[i], dict) else files[i]
            if not isinstance(data, bytes):
                raise DataError(f"{where}: image {i} is not within the files")
            return data

        decoded = decode_all(len(files), content, lambda i: f"{where}: image {i}")
        return decoded, labels


def _nested(column: Any, what: str) -> np.ndarray:
    """Makes an array of a column of numbers, or of lists of equally many numbers.

    Args:
        column: The column of a table, as an array of pyarrow.
        what: What an entry of the column is, for messages.

    Raises:
        DataError: An entry lacks a number, or has more or fewer than the first.
    """
    import pyarrow as pa

    column = getattr(column, "storage", column)
    shape = [len(column)]
    while (
        pa.types.is_list(column.type)
        or pa.types.is_large_list(column.type)
        or (pa.types.is_fixed_size_list(column.type))
    ):
        sizes = np.array([len(x) if x is not None else -1 for x in column])
        if sizes.size and (sizes != sizes[0]).any():
            bad = int((sizes != sizes[0]).argmax()) // int(np.prod(shape[1:]))
            raise DataError(f"{what} {bad} is of another size than the first one")
        shape.append(int(sizes[0]) if sizes.size else 0)
        column = column.flatten()
    if column.null_count:
        first = column.is_null().to_pylist().index(True) // int(np.prod(shape[1:]))
        raise DataError(f"{what} {first} lacks a number")
    return column.to_numpy(zero_copy_only=False).reshape(shape)


def _class_names(
    table: Any, labels_in: tuple[str, ...] = LABELS
) -> tuple[str, ...] | None:
    """The names of the classes, as the table's metadata tell them; None without."""
    metadata = table.schema.metadata or {}
    with reading("the features in the table's metadata", DataError):
        features = json.loads(metadata.get(b"huggingface", b"{}"))
        features = features.get("info", {}).get("features", {})
        label = field(table.column_names, labels_in, "columns")
        names = features.get(label, {}).get("names")
        return tuple(map(str, names)) if names else None
