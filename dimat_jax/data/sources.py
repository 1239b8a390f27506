"""Labelled images as NumPy arrays, decoded once and cached.

`load("cifar100")` gives a `Dataset`: raw uint8 pixels and int32 labels, with the
training split's own mean and standard deviation. Nothing here downloads anything, and
nothing here needs TensorFlow or JAX.

A new data set is a function of `(directory, cache_dir)` in `SOURCES`.
"""

import collections
import functools
import hashlib
import io
import os
import re
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Float32, Int, Int32, UInt8
from PIL import Image

from dimat_jax.errors import UserError, nearest

__all__ = ["SOURCES", "DataError", "Dataset", "Split", "load"]


class Split(NamedTuple):
    """Images and their classes, from 0; the arrays are read-only."""

    images: UInt8[np.ndarray, "samples height width channels"]
    labels: Int32[np.ndarray, " samples"]


class Dataset(NamedTuple):
    """A data set with the statistics that normalise it.

    `mean` and `std` are those of the full training split, in the units of the stored
    pixels: 0 to 255, or 0 to 16 for the digits.
    """

    name: str
    train: Split
    test: Split
    n_classes: int
    mean: Float32[np.ndarray, " channels"]
    std: Float32[np.ndarray, " channels"]


class DataError(UserError):
    """A data set that is unknown, missing, malformed or too small."""


def load(
    name: str,
    *,
    directory: str | None = None,
    cache_dir: str | None = None,
    train_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Loads a data set, or a class-balanced part of it.

    Args:
        name: a key of `SOURCES`.
        directory: where the data are. For CIFAR, tfds's data directory (None: tfds's
            own default); for Tiny ImageNet, the authors' zip, the unpacked folder, or a
            folder that holds either. The digits come with scikit-learn.
        cache_dir: where decoded arrays are kept; None means `$XDG_CACHE_HOME/dimat_jax`
            or `~/.cache/dimat_jax`.
        train_size: how many training samples to keep, equally many of each class as
            far as they last; None keeps all.
        test_size: the same for the test split.
        seed: decides which samples are kept.

    Raises:
        DataError: `name` is unknown, the data are missing or malformed, or a size is
            below 1 or above what there is.
    """
    if name not in SOURCES:
        raise DataError(f"unknown data set {name!r}; {nearest(name, SOURCES)}")
    dataset = SOURCES[name](directory, cache_dir)
    return dataset._replace(
        train=_subset(dataset.train, train_size, f"{name}: train_size", [seed, 0]),
        test=_subset(dataset.test, test_size, f"{name}: test_size", [seed, 1]),
    )


def _subset(split: Split, size: int | None, what: str, seed: list[int]) -> Split:
    """A seeded subset that takes from every class in turn, kept in stored order."""
    n_samples = len(split.labels)
    if size is None:
        return split
    if not 1 <= size <= n_samples:
        raise DataError(f"{what}: expected 1 to {n_samples} samples, got {size}")
    shuffled = np.random.default_rng(seed).permutation(n_samples)
    in_turn = np.argsort(_rank_in_class(split.labels[shuffled]), kind="stable")
    kept = np.sort(shuffled[in_turn[:size]])
    return _split(split.images[kept], split.labels[kept])


def _rank_in_class(labels: Int[np.ndarray, " samples"]) -> Int[np.ndarray, " samples"]:
    """How many earlier samples have the same label."""
    order = np.argsort(labels, kind="stable")
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(labels)) - np.repeat(starts, counts)
    return ranks


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    split = Split(images.astype(np.uint8, copy=False), labels.astype(np.int32))
    for array in split:  # as the cache's are: a write must not fail only sometimes
        array.flags.writeable = False
    return split


def _mean_std(
    images: UInt8[np.ndarray, "samples height width channels"],
) -> tuple[Float32[np.ndarray, " channels"], Float32[np.ndarray, " channels"]]:
    total = squares = np.zeros(images.shape[-1])
    for start in range(0, len(images), 1000):  # all at once would take 8x the memory
        pixels = images[start : start + 1000].reshape(-1, images.shape[-1]).T
        pixels = np.ascontiguousarray(pixels, dtype=np.float64)
        total, squares = total + pixels.sum(1), squares + (pixels**2).sum(1)
    # The sums are integers below 2**53, so exact, and the difference loses little.
    mean = total / images[..., 0].size
    std = np.sqrt(squares / images[..., 0].size - mean**2)
    return mean.astype(np.float32), std.astype(np.float32)


def _decode_image(
    data: bytes, shape: tuple[int, ...], where: str
) -> UInt8[np.ndarray, "height width channels"]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("RGB"))  # a few JPEGs are greyscale
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow may raise
        raise DataError(f"{where} is no readable image: {error}") from error
    if pixels.shape != shape:
        raise DataError(f"{where}: expected shape {shape}, got {pixels.shape}")
    return pixels


def _digits(directory: str | None, cache_dir: str | None) -> Dataset:
    """The 1,797 digits (8x8, 0 to 16) in scikit-learn; every fifth of a class tests."""
    del directory, cache_dir
    from sklearn.datasets import load_digits  # slow to import

    digits: Any = load_digits()
    images, labels = digits["images"][..., None].astype(np.uint8), digits["target"]
    tests = _rank_in_class(labels) % 5 == 0
    train = _split(images[~tests], labels[~tests])
    test = _split(images[tests], labels[tests])
    return Dataset("digits", train, test, 10, *_mean_std(train.images))


# CIFAR, as prepared by tfds ===========================================================


def _cifar(
    directory: str | None, cache_dir: str | None, *, name: str, n_classes: int
) -> Dataset:
    data_dir = directory or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = Path(data_dir).expanduser() / name
    prepare = (
        "prepare it with `pip install 'dimat_jax[prepare]'` and "
        f"`tfds build {name} --file_format=array_record --data_dir={root.parent}`"
    )
    versions = [
        path.parent
        for path in root.glob("*/dataset_info.json")
        if re.fullmatch(r"\d+\.\d+\.\d+", path.parent.name)  # not "3.0.2.incomplete"
    ]
    if not versions:
        raise DataError(f"{name}: no {root}/<version>/dataset_info.json; {prepare}")
    folder = max(versions, key=lambda path: [int(n) for n in path.name.split(".")])
    files = sorted(folder.glob(f"{name}-*.array_record*"))
    for split in ("train", "test"):
        if not any(file.name.startswith(f"{name}-{split}.") for file in files):
            raise DataError(
                f"{name}: no {folder}/{name}-{split}.array_record*; {prepare}"
            )

    def decode() -> tuple[Split, Split, int]:
        return _tfds_split(folder, "train"), _tfds_split(folder, "test"), n_classes

    return _cached(name, root, files, cache_dir, decode)


def _tfds_split(folder: Path, split: str) -> Split:
    import tensorflow_datasets as tfds  # here, since a cache hit does without it

    try:
        # Unlike `tfds.data_source`, this cannot start a download.
        builder: Any = tfds.builder_from_directory(folder)
        # Decoding with Pillow directly takes half as long as through tfds.
        records = builder.as_data_source(
            split=split, decoders={"image": tfds.decode.SkipDecoding()}
        )
        images = np.empty((len(records), 32, 32, 3), np.uint8)
        labels = np.empty(len(records), np.int32)
        for start in range(0, len(records), 1000):
            batch = range(start, min(start + 1000, len(records)))
            for i, record in zip(batch, records.__getitems__(batch), strict=True):
                where = f"{folder}: image {i} of {split}"
                images[i] = _decode_image(record["image"], (32, 32, 3), where)
                labels[i] = record["label"]
    except (OSError, RuntimeError) as error:
        raise DataError(f"cannot read {split} from {folder}: {error}") from error
    return _split(images, labels)


# Tiny ImageNet, as its authors publish it =============================================

_TINY = "tiny-imagenet-200"


def _tiny_imagenet(directory: str | None, cache_dir: str | None) -> Dataset:
    if directory is None:
        raise DataError(
            "tiny_imagenet: `directory` is missing; expected the path of "
            f"{_TINY}.zip (http://cs231n.stanford.edu/{_TINY}.zip) or of its contents"
        )
    path = Path(directory).expanduser()
    places = (path, path / f"{_TINY}.zip", path / _TINY)
    root = next((p for p in places if p.is_file() or (p / "wnids.txt").is_file()), None)
    if root is None:
        raise DataError(
            f"tiny_imagenet: expected {path} to be or hold {_TINY}.zip, or to hold "
            f"wnids.txt or {_TINY}/wnids.txt"
        )
    files = [root] if root.is_file() else sorted(filter(Path.is_file, root.rglob("*")))
    return _cached(
        "tiny_imagenet",
        root.parent,
        files,
        cache_dir,
        lambda: _tiny_decode(root, files),
    )


def _tiny_decode(root: Path, files: list[Path]) -> tuple[Split, Split, int]:
    if root.is_dir():
        paths = {file.relative_to(root).as_posix(): file for file in files}
        return _tiny_splits(root, paths, lambda name: paths[name].read_bytes())
    try:
        with zipfile.ZipFile(root) as archive:
            names = {
                name.removeprefix(f"{_TINY}/"): name for name in archive.namelist()
            }
            return _tiny_splits(root, names, lambda name: archive.read(names[name]))
    except (zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{root} is no intact zip: {error}") from error


def _tiny_splits(
    root: Path, names: Collection[str], read: Callable[[str], bytes]
) -> tuple[Split, Split, int]:
    """Both splits and the number of classes, from the files' names and contents."""

    def lines(name: str) -> list[str]:
        text = read(name).decode().strip() if name in names else ""
        if not text:
            raise DataError(f"{root}: {name} is missing or empty")
        return text.splitlines()

    def split(labels: dict[str, int]) -> Split:
        images = np.empty((len(labels), 64, 64, 3), np.uint8)
        for image, name in zip(images, labels, strict=True):
            image[:] = _decode_image(read(name), image.shape, f"{root}: {name}")
        return _split(images, np.array(list(labels.values())))

    folders = collections.defaultdict(list)
    for name in sorted(names):
        if name.endswith(".JPEG"):
            folders[os.path.dirname(name)].append(name)
    classes = {wnid.strip(): label for label, wnid in enumerate(lines("wnids.txt"))}
    train, test = {}, {}
    for wnid, label in classes.items():
        if f"train/{wnid}/images" not in folders:
            raise DataError(f"{root}: train/{wnid}/images/*.JPEG is missing")
        train |= dict.fromkeys(folders[f"train/{wnid}/images"], label)
    for line in lines("val/val_annotations.txt"):
        file, wnid, *_ = [*line.split(), "", ""]
        if wnid not in classes:
            raise DataError(
                f"{root}: val/val_annotations.txt: expected '<file> <wnid> ...' with a "
                f"wnid of wnids.txt, got {line!r}"
            )
        if f"val/images/{file}" not in names:
            raise DataError(f"{root}: val/images/{file} is missing")
        test[f"val/images/{file}"] = classes[wnid]
    return split(train), split(test), len(classes)


# Decoded arrays, cached ===============================================================

_CACHE_FORMAT = "1"  # to be changed with what the cache stores
_FIELDS = "train_images train_labels test_images test_labels n_classes mean std".split()


def _cached(
    name: str,
    root: Path,
    files: list[Path],
    cache_dir: str | None,
    decode: Callable[[], tuple[Split, Split, int]],
) -> Dataset:
    """What `decode()` gives, or gave when it last saw the same files under `root`."""
    digest = hashlib.sha256(_CACHE_FORMAT.encode())
    for file in files:
        stat = file.stat()
        member = file.relative_to(root).as_posix()
        digest.update(f"{member} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    if cache_dir is None:
        cache_home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        cache_dir = os.path.join(cache_home, "dimat_jax")
    folder = Path(cache_dir).expanduser() / f"{name}-{digest.hexdigest()[:16]}"

    arrays = _read_cache(folder)
    if arrays is None:
        logging.info("Decoding %s, to be kept in %s", name, folder)
        train, test, n_classes = decode()
        stored = [*train, *test, np.array(n_classes), *_mean_std(train.images)]
        try:
            _write_cache(folder, stored)
        except OSError as error:
            logging.warning("Cannot keep the decoded %s: %s", name, error)
            arrays = stored
        else:  # mapped arrays cost no memory, and processes share them
            arrays = _read_cache(folder) or stored
    *splits, n_classes, mean, std = arrays
    train, test = Split(*splits[:2]), Split(*splits[2:])
    return Dataset(name, train, test, int(n_classes), mean, std)


def _read_cache(folder: Path) -> list[np.ndarray] | None:
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


def _write_cache(folder: Path, arrays: list[np.ndarray]) -> None:
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


SOURCES: dict[str, Callable[[str | None, str | None], Dataset]] = {
    "digits": _digits,
    "cifar10": functools.partial(_cifar, name="cifar10", n_classes=10),
    "cifar100": functools.partial(_cifar, name="cifar100", n_classes=100),
    "tiny_imagenet": _tiny_imagenet,
}
