"""Reads a user's own images: a folder with a folder for each class, or an .npz file."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageOps
from tqdm import tqdm

from dimat_jax.data._arrays import TESTS, expect_path, make_dataset, npz_arrays
from dimat_jax.data._cache import cached, parts_of
from dimat_jax.data._dataset import (
    DataError,
    Dataset,
    Split,
    choose,
    is_every_fifth,
    make_split,
    mean_std,
    opened,
)
from dimat_jax.data._decoding import decode_all, with_equal_channels
from dimat_jax.errors import reading

__all__ = ["Form", "read_folder", "read_images"]

_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
# The images of most data sets have less than this many pixels. Larger ones may be
# attacks that fill the memory.
_MOST_PIXELS = 2**28


@dataclasses.dataclass(frozen=True)
class Form:
    """How images are made alike and normalised.

    Attributes:
        shape: the height, the width and the channels (1: grey, 3: RGB) of an image.
            Other images are scaled until they cover it, and their middle is cut out.
            A height and width of 0: images must be of one size, and stay as they are.
        mean: the mean that is subtracted from each channel, or one for all channels.
            Pixels count from 0 to 1 for it, as for torchvision's `Normalize`. None:
            the mean of the images that are read for training.
        std: the standard deviation by which channels are divided, as `mean`.
        train_size: the largest number of training images that are read, equally many of
            each class.
        test_size: the number of test images. None: all.
        seed: the seed by which images are chosen.
    """

    shape: tuple[int, int, int] = (0, 0, 3)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    train_size: int = 1000
    test_size: int | None = None
    seed: int = 0


class _Labelled(NamedTuple):
    """Images that are not read yet.

    Attributes:
        labels: the classes of all images.
        read: a function that reads the images with given indices.
    """

    labels: Int[np.ndarray, " samples"]
    read: Callable[
        [Int[np.ndarray, " chosen"]], UInt8[np.ndarray, "chosen height width channels"]
    ]


def read_images(path: Path, form: Form) -> Dataset:
    """Reads images.

    Args:
        path: a folder that holds a folder of images for each class, in the order of the
            classes' names; or that holds two such folders, train and test (or val,
            validation). Or an .npz file with the arrays images (uint8[samples, height,
            width] with or without channels) and labels, or with train_images,
            train_labels, test_images and test_labels. Without images for testing, every
            fifth image of a class is one.
        form: how the images are made alike and normalised.

    Raises:
        DataError: there are no images, or some cannot be read or do not fit.
    """
    with reading(path, DataError):
        if path.is_dir():
            names, splits = _folder(path, form)
        elif path.suffix == ".npz":
            names, splits = None, _npz(path, form)
        else:
            raise DataError("it is neither a folder of images nor an .npz file")
        train, test = _halves(splits)
        size = min(form.train_size, len(train.labels))
        test_size = form.test_size or len(test.labels)
        train = _read(train, size, f"{path}: train_size", [form.seed, 0])
        test = _read(test, test_size, f"{path}: test_size", [form.seed, 1])
        if train.images.shape[1:] != test.images.shape[1:]:
            raise DataError(
                f"training images are of shape {train.images.shape[1:]}, test images "
                f"of shape {test.images.shape[1:]}; choose one with --size"
            )
        n_classes = 1 + max(int(s.labels.max()) for s in splits.values())
        mean, std = _statistics(form, train)
    return Dataset(
        str(path), train, test, len(names or ()) or n_classes, mean, std, names
    )


def _read(images: _Labelled, size: int, what: str, seed: list[int]) -> Split:
    kept = choose(images.labels, size, what, seed)
    return make_split(images.read(kept), images.labels[kept])


def _halves(splits: dict[str, _Labelled]) -> tuple[_Labelled, _Labelled]:
    """The images for training and for testing."""
    if "train" in splits:
        test = next((splits[name] for name in TESTS if name in splits), None)
        if test is None:
            raise DataError(f"there is 'train', but none of {', '.join(TESTS)}")
        return splits["train"], test
    labels, read = splits["all"]
    is_test = is_every_fifth(labels)

    def part(is_chosen):
        places = np.flatnonzero(is_chosen)
        return _Labelled(labels[places], lambda indices: read(places[indices]))

    if is_test.all():
        raise DataError("there must be two images of a class, or more")
    return part(~is_test), part(is_test)


def _statistics(form: Form, train: Split) -> tuple[np.ndarray, np.ndarray]:
    channels, found = train.images.shape[-1], mean_std(train.images)
    result = []
    for name, given, own in zip(
        ("mean", "std"), (form.mean, form.std), found, strict=True
    ):
        if given is not None and len(given) not in (1, channels):
            raise DataError(
                f"--{name} has {len(given)} numbers for {channels} channels"
            )
        scaled = own if given is None else 255 * np.asarray(given)
        result.append(np.broadcast_to(scaled, channels).astype(np.float32))
    if not (result[1] > 0).all():
        raise DataError("the standard deviation of a channel is not above 0")
    return result[0], result[1]


# Folders ==============================================================================


def read_folder(directory: str | None, cache_dir: str | None) -> Dataset:
    """A folder of images of one size: a folder for each class, or train and test.

    Raises:
        DataError: the folder is missing, or some images cannot be read.
    """
    root = expect_path(directory, "a folder that holds a folder of images per class")
    if not root.is_dir():
        raise DataError(f"{root} is no folder")
    names, found = _listing(root)
    test = next((found[name] for name in TESTS if name in found), None)
    pairs = [found.get("train") or found["all"], *([test] if test else [])]

    def arrays(files: Sequence[Path], labels: np.ndarray) -> tuple:
        images = decode_all(
            len(files), lambda i: files[i].read_bytes(), lambda i: str(files[i])
        )
        return images, labels

    def make() -> Dataset:
        decoded = with_equal_channels([arrays(*pair) for pair in pairs])
        return make_dataset("image_folder", *decoded, class_names=names)

    files = [file for pair in pairs for file in pair[0]]
    return cached("image_folder", root, files, cache_dir, lambda: parts_of(make()))


_Listing = dict[str, tuple[list[Path], Int[np.ndarray, " samples"]]]
"""The files of images and their classes, by split."""


def _listing(root: Path) -> tuple[tuple[str, ...], _Listing]:
    """Finds the names of the classes, and the images of each split."""
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    roots = {path.name: path for path in folders if path.name in ("train", *TESTS)}
    if "train" not in roots:
        roots = {"all": root}
    names, splits = (), {}
    for split, folder in roots.items():
        classes = sorted(path for path in folder.iterdir() if path.is_dir())
        if names and tuple(path.name for path in classes) != names:
            raise DataError(f"{folder} has other classes than {root / 'train'}")
        names = tuple(path.name for path in classes)
        files = [
            (file, label)
            for label, folder_of_class in enumerate(classes)
            for file in sorted(folder_of_class.rglob("*"))
            if file.suffix.lower() in _ENDINGS
        ]
        if not files:
            raise DataError(
                f"{folder} holds no folders with images, one for each class"
            )
        labels = np.array([label for _, label in files], np.int32)
        splits[split] = [file for file, _ in files], labels
    return names, splits


def _folder(root: Path, form: Form) -> tuple[tuple[str, ...], dict[str, _Labelled]]:
    names, found = _listing(root)
    return names, {
        split: _Labelled(labels, _reader(files, form))
        for split, (files, labels) in found.items()
    }


def _reader(files: Sequence[Path], form: Form) -> Callable[[np.ndarray], np.ndarray]:
    def read(indices: np.ndarray) -> np.ndarray:
        images = [
            _decode(files[i], form)
            for i in tqdm(indices, "reading images", unit="", leave=False, disable=None)
        ]
        for i, image in zip(indices, images, strict=True):
            if image.shape != images[0].shape:
                raise DataError(
                    f"{files[indices[0]]} is of shape {images[0].shape}, {files[i]} of "
                    f"shape {image.shape}; choose one with --size"
                )
        return np.stack(images)

    return read


def _decode(file: Path, form: Form) -> np.ndarray:
    with opened(file, file) as image:
        if image.width * image.height > _MOST_PIXELS:
            raise DataError(f"{file}: it has more than {_MOST_PIXELS} pixels")
        return _formed(image, form)


def _formed(image: Image.Image, form: Form) -> np.ndarray:
    """Gives an image its size and its channels."""
    height, width, channels = form.shape
    image = image.convert("L" if channels == 1 else "RGB")
    if height and (image.height, image.width) != (height, width):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(image.height, image.width, channels)


# Files of arrays ======================================================================


def _npz(path: Path, form: Form) -> dict[str, _Labelled]:
    splits = {}
    for split, (images, labels) in npz_arrays(path).items():
        prefix = "" if split == "all" else f"{split}_"
        labels = labels.reshape(len(labels), -1)
        if images.dtype != np.uint8 or images.ndim not in (3, 4):
            raise DataError(
                f"{prefix}images must be uint8[samples, height, width, channels], got "
                f"{images.dtype}{list(images.shape)}"
            )
        if labels.shape != (len(images), 1) or not np.issubdtype(
            labels.dtype, np.integer
        ):
            raise DataError(
                f"{prefix}labels must be {len(images)} integers, got {labels.dtype}"
                f"{list(labels.shape)}"
            )
        if labels.size and labels.min() < 0:
            raise DataError(f"{prefix}labels count from 0, got {labels.min()}")
        splits[split] = _Labelled(
            labels[:, 0].astype(np.int32), _array_reader(images, form)
        )
    return splits


def _array_reader(images: np.ndarray, form: Form) -> Callable[[np.ndarray], np.ndarray]:
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[-1] not in (1, 3):
        raise DataError(f"images have 1 or 3 channels, these have {images.shape[-1]}")

    def read(indices: np.ndarray) -> np.ndarray:
        return np.stack(
            [
                _formed(
                    Image.fromarray(
                        np.squeeze(image, -1) if image.shape[-1] == 1 else image
                    ),
                    form,
                )
                for image in images[indices]
            ]
        )

    return read
