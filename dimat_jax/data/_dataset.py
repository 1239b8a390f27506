"""What a data set is, and how decoded images become one."""

import io
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Int32, UInt8
from PIL import Image

from dimat_jax.errors import UserError

__all__ = ["DataError", "Dataset", "Split", "decode_image", "make_split", "mean_std"]


class Split(NamedTuple):
    """Images and their classes, from 0; the arrays are read-only."""

    images: UInt8[np.ndarray, "samples height width channels"]
    labels: Int32[np.ndarray, " samples"]


class Dataset(NamedTuple):
    """A data set with the statistics that normalise it.

    Attributes:
        name: Its name in `SOURCES`.
        train: The training split.
        test: The test split.
        n_classes: The number of classes.
        mean: The mean of each channel over the full training split, in the units of the
            stored pixels: 0 to 255, or 0 to 16 for the digits.
        std: The standard deviation of each channel, likewise.
        class_names: The name of each class; None if the source does not have them.
    """

    name: str
    train: Split
    test: Split
    n_classes: int
    mean: Float32[np.ndarray, " channels"]
    std: Float32[np.ndarray, " channels"]
    class_names: tuple[str, ...] | None = None


class DataError(UserError):
    """A data set that is unknown, missing, malformed or too small."""


def make_split(images: np.ndarray, labels: Int[np.ndarray, " samples"]) -> Split:
    """A split of these pixels (0 to 255) and classes, whatever their dtypes.

    `images`, where uint8 already, is not copied but becomes read-only itself.
    """
    split = Split(images.astype(np.uint8, copy=False), labels.astype(np.int32))
    for array in split:  # as the cache's are: a write must not fail only sometimes
        array.flags.writeable = False
    return split


def mean_std(
    images: UInt8[np.ndarray, "samples height width channels"],
) -> tuple[Float32[np.ndarray, " channels"], Float32[np.ndarray, " channels"]]:
    """Mean and (population) standard deviation of each channel."""
    total = squares = np.zeros(images.shape[-1])
    for start in range(0, len(images), 1000):  # all at once would take 8x the memory
        pixels = images[start : start + 1000].reshape(-1, images.shape[-1]).T
        pixels = np.ascontiguousarray(pixels, dtype=np.float64)
        total, squares = total + pixels.sum(1), squares + (pixels**2).sum(1)
    # The sums are integers below 2**53, so exact, and the difference loses little.
    mean = total / images[..., 0].size
    std = np.sqrt(squares / images[..., 0].size - mean**2)
    return mean.astype(np.float32), std.astype(np.float32)


def decode_image(
    data: bytes, shape: tuple[int, ...], where: str
) -> UInt8[np.ndarray, "height width 3"]:
    """Decodes an image file to RGB.

    Args:
        data: the file's content, in any format that Pillow knows.
        shape: what the pixels' shape has to be.
        where: what errors call the image.

    Raises:
        DataError: it is no readable image, or one of another shape.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("RGB"))  # a few JPEGs are greyscale
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow may raise
        raise DataError(f"{where} is no readable image: {error}") from error
    if pixels.shape != shape:
        raise DataError(f"{where}: expected shape {shape}, got {pixels.shape}")
    return pixels
