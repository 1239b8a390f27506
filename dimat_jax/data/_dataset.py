"""Data sets, and how they are made from decoded images."""

import hashlib
import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, UInt8
from PIL import Image

from dimat_jax.errors import UserError, reading

__all__ = [
    "DataError",
    "Dataset",
    "Split",
    "choose",
    "decode_image",
    "digest",
    "is_every_fifth",
    "make_split",
    "mean_std",
]


class Split(NamedTuple):
    """A part of a data set. Its arrays are read-only.

    Attributes:
        images: the pixels as stored.
        labels: the classes of the images, counted from 0.
    """

    images: UInt8[np.ndarray, "samples height width channels"]
    labels: Int32[np.ndarray, " samples"]


class Dataset(NamedTuple):
    """A data set with the statistics that normalise it.

    Attributes:
        name: the name of the data set.
        train: the images for training.
        test: the images for testing.
        n_classes: the number of classes.
        mean: the mean of each channel over the full training split, in the units of the
            stored pixels: 0 to 255, or 0 to 16 for the digits.
        std: the standard deviation of each channel, as `mean`.
        class_names: the name of each class; None if the source does not have them.
    """

    name: str
    train: Split
    test: Split
    n_classes: int
    mean: Float32[np.ndarray, " channels"]
    std: Float32[np.ndarray, " channels"]
    class_names: tuple[str, ...] | None = None


class DataError(UserError):
    """A data set is unknown, missing, malformed or too small."""


def make_split(images: np.ndarray, labels: Int[np.ndarray, " samples"]) -> Split:
    """Makes a split of pixels (0 to 255) and classes of any dtypes.

    If `images` is uint8 already, it is not copied but becomes read-only itself.
    """
    split = Split(images.astype(np.uint8, copy=False), labels.astype(np.int32))
    # Arrays from the cache are read-only. So these are, too: otherwise a write would
    # fail only if the cache was used.
    for array in split:
        array.flags.writeable = False
    return split


def mean_std(
    images: UInt8[np.ndarray, "samples height width channels"],
) -> tuple[Float32[np.ndarray, " channels"], Float32[np.ndarray, " channels"]]:
    """Computes the mean and the (population) standard deviation of each channel."""
    total = squares = np.zeros(images.shape[-1])
    # The images are converted in parts, because float64 takes 8 times their memory.
    for start in range(0, len(images), 1000):
        pixels = images[start : start + 1000].reshape(-1, images.shape[-1]).T
        pixels = np.ascontiguousarray(pixels, dtype=np.float64)
        total, squares = total + pixels.sum(1), squares + (pixels**2).sum(1)
    # The sums are exact, because they are integers below 2**53. So the difference
    # loses little precision.
    mean = total / images[..., 0].size
    std = np.sqrt(squares / images[..., 0].size - mean**2)
    return mean.astype(np.float32), std.astype(np.float32)


def choose(
    labels: Int[np.ndarray, " samples"], size: int, what: str, seed: list[int]
) -> Int[np.ndarray, " size"]:
    """Draws samples, from every class in turn. Their indices are in ascending order.

    Args:
        labels: the classes of all samples.
        size: the number of samples to draw.
        what: the name of the size in error messages.
        seed: the seed by which they are drawn.

    Raises:
        DataError: the size is below 1 or above the number of samples.
    """
    n_samples = len(labels)
    if not 1 <= size <= n_samples:
        raise DataError(f"{what}: expected 1 to {n_samples} samples, got {size}")
    shuffled = np.random.default_rng(seed).permutation(n_samples)
    in_turn = np.argsort(_rank_in_class(labels[shuffled]), kind="stable")
    return np.sort(shuffled[in_turn[:size]])


def is_every_fifth(
    labels: Int[np.ndarray, " samples"],
) -> Bool[np.ndarray, " samples"]:
    """Marks every fifth sample of a class, which are used for testing."""
    return _rank_in_class(labels) % 5 == 0


def _rank_in_class(labels: Int[np.ndarray, " samples"]) -> Int[np.ndarray, " samples"]:
    """Counts for each sample the earlier samples that have the same label."""
    order = np.argsort(labels, kind="stable")
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(labels)) - np.repeat(starts, counts)
    return ranks


def decode_image(
    data: bytes, shape: tuple[int, ...], where: str
) -> UInt8[np.ndarray, "height width 3"]:
    """Decodes an image file to RGB.

    Args:
        data: the content of the file, in any format that Pillow knows.
        shape: the shape that the pixels must have.
        where: the name of the image in error messages.

    Raises:
        DataError: the image cannot be read, or it has another shape.
    """
    height, width, _ = shape
    # A damaged file can make Pillow raise any error. It warns of images so large that
    # decoding them may be an attack; here the size is looked at before decoding.
    with reading(where, DataError), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(data)) as image:
            if (image.height, image.width) != (height, width):
                found = (image.height, image.width, 3)
                raise DataError(f"{where}: expected shape {shape}, got {found}")
            # A few JPEGs are greyscale.
            return np.asarray(image.convert("RGB"))


def digest(dataset: Dataset) -> str:
    """A text that differs between data sets whose images, labels or means differ."""
    train, test = dataset.train, dataset.test
    arrays = (*train, *test, dataset.mean, dataset.std)

    def of(array: np.ndarray) -> str:
        content = np.ascontiguousarray(array)
        found = hashlib.blake2b(content.data, digest_size=32).hexdigest()
        return f"{content.dtype} {content.shape} {found}"

    # The digests are computed without the interpreter's lock.
    with ThreadPoolExecutor() as pool:
        whole = "\n".join([*pool.map(of, arrays), str(dataset.n_classes)])
    return hashlib.blake2b(whole.encode(), digest_size=32).hexdigest()
