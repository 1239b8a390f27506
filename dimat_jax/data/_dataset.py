"""Data sets, and how they are made from decoded images and other arrays."""

import contextlib
import hashlib
import io
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, Shaped, UInt8
from PIL import Image

from dimat_jax.errors import UserError, reading

__all__ = [
    "DataError",
    "Dataset",
    "Signature",
    "Split",
    "choose",
    "decode_image",
    "digest",
    "is_every_fifth",
    "kind_of",
    "make_split",
    "mean_std",
    "normalised",
    "opened",
    "stored",
]


class Split(NamedTuple):
    """A part of a data set. Its arrays are read-only.

    Attributes:
        images: the inputs. uint8[samples, height, width, channels] are the pixels of
            images as stored. Inputs of any other shape are float32 (features, time
            series, images with other than whole pixels) or int32 (tokens).
        labels: the classes of the inputs, counted from 0; or labels of another kind,
            float32 numbers or int32 tokens (see `Source.labels`).
    """

    images: Shaped[np.ndarray, "samples ..."]
    labels: Shaped[np.ndarray, "samples ..."]

    @property
    def classes(self) -> Int32[np.ndarray, " samples"]:
        """The class of each example. Labels that are no classes make it 0 for all."""
        if kind_of(self.labels) == "classes":
            return self.labels
        return np.zeros(len(self.labels), np.int32)


class Signature(NamedTuple):
    """What a model must know of a data set to be built.

    Attributes:
        name: the name of the data set.
        input_shape: the shape of one input.
        input_dtype: the dtype of the inputs that the model gets: "float32", or "int32"
            for tokens.
        n_classes: the number of classes; see `Dataset`.
        labels: the kind of its labels: "classes", "numbers" or "tokens".
    """

    name: str
    input_shape: tuple[int, ...]
    input_dtype: str
    n_classes: int
    labels: str = "classes"

    @property
    def has_images(self) -> bool:
        """Whether an input is an image, [height, width, channels]."""
        return len(self.input_shape) == 3 and self.input_dtype == "float32"


class Dataset(NamedTuple):
    """A data set with the statistics that normalise it.

    Attributes:
        name: the name of the data set.
        train: the images (or other inputs) for training.
        test: the images for testing.
        n_classes: the number of classes; or of numbers in a label, or of different
            tokens. A model has so many outputs.
        mean: what is subtracted from each channel, which is the last axis of an input.
            For images it is the mean over the full training split, in the units of the
            stored pixels: 0 to 255, or 0 to 16 for the digits. Tokens are not
            normalised; their `mean` and `std` are empty.
        std: what each channel is divided by, as `mean`.
        class_names: the name of each class; None if the source does not have them.
    """

    name: str
    train: Split
    test: Split
    n_classes: int
    mean: Float32[np.ndarray, " channels"]
    std: Float32[np.ndarray, " channels"]
    class_names: tuple[str, ...] | None = None

    @property
    def signature(self) -> Signature:
        """What a model must know of this data set."""
        dtype = "int32" if self.train.images.dtype == np.int32 else "float32"
        shape = self.train.images.shape[1:]
        return Signature(self.name, shape, dtype, self.n_classes, self.labels)

    @property
    def labels(self) -> str:
        """The kind of its labels: "classes", "numbers" or "tokens"."""
        return kind_of(self.train.labels)


def kind_of(labels: np.ndarray) -> str:
    """The kind of labels, by their dtype and shape: "classes", "numbers" or "tokens".

    Integer labels are classes if there is one for each example.
    """
    if labels.dtype.kind == "f":
        return "numbers"
    return "classes" if labels.ndim == 1 else "tokens"


class DataError(UserError):
    """A data set is unknown, missing, malformed or too small."""


def make_split(images: np.ndarray, labels: np.ndarray) -> Split:
    """Makes a split of inputs and labels.

    Args:
        images: the inputs of any numeric dtype; see `stored`. If their dtype stays as
            it is, they are not copied but become read-only themselves.
        labels: the classes, or labels of another kind: whole numbers of any dtype,
            which become int32, or floats, which become float32.

    Raises:
        DataError: the inputs are no numbers, or do not fit their dtype.
    """
    dtype = np.float32 if labels.dtype.kind == "f" else np.int32
    split = Split(stored(images), labels.astype(dtype))
    # Arrays from the cache are read-only. So these are, too: otherwise a write would
    # fail only if the cache was used.
    for array in split:
        array.flags.writeable = False
    return split


def stored(inputs: np.ndarray) -> Shaped[np.ndarray, "samples ..."]:
    """Gives inputs the dtype in which they are kept.

    uint8 stays uint8: pixels of images. Other whole numbers become int32: tokens.
    All else becomes float32, and its values stay as they are.

    Raises:
        DataError: the inputs are no numbers, or do not fit their dtype.
    """
    kind = inputs.dtype.kind
    if kind not in "uifb":
        raise DataError(f"inputs must be numbers, got an array of {inputs.dtype}")
    if inputs.dtype == np.uint8:
        return inputs
    if kind in "ui":
        limits = np.iinfo(np.int32)
        if inputs.size and not (
            limits.min <= inputs.min() and inputs.max() <= limits.max
        ):
            raise DataError(
                f"whole numbers must fit int32, got {inputs.min()} to {inputs.max()}"
            )
        return inputs.astype(np.int32, copy=False)
    with np.errstate(over="ignore"):  # infinite values are refused with their place
        return inputs.astype(np.float32, copy=False)


def normalised(
    dataset: Dataset, inputs: Shaped[np.ndarray, "samples ..."]
) -> Shaped[np.ndarray, "samples ..."]:
    """Normalises inputs of a data set on the host, as the devices do."""
    if inputs.dtype == np.int32:
        return inputs
    return (inputs.astype(np.float32) - dataset.mean) / dataset.std


def mean_std(
    images: Shaped[np.ndarray, "samples ..."],
) -> tuple[Float32[np.ndarray, " channels"], Float32[np.ndarray, " channels"]]:
    """Computes the mean and the (population) standard deviation of each channel.

    Channels are the last axis. A float channel that is constant has the deviation 1.
    Tokens (int32) are not normalised: their statistics are empty.
    """
    if images.dtype == np.uint8:
        return _pixels_mean_std(images)
    if images.dtype.kind in "ui":
        return np.zeros(0, np.float32), np.zeros(0, np.float32)
    axes = tuple(range(images.ndim - 1))
    is_constant = (images == images.reshape(-1, images.shape[-1])[0]).all(axes)
    with np.errstate(invalid="ignore"):  # infinite values are refused with their place
        mean, std = images.mean(axes, np.float64), images.std(axes, np.float64)
    return mean.astype(np.float32), np.where(is_constant, 1, std).astype(np.float32)


def _pixels_mean_std(
    images: UInt8[np.ndarray, "samples ... channels"],
) -> tuple[Float32[np.ndarray, " channels"], Float32[np.ndarray, " channels"]]:
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
    with opened(data, where) as image:
        if (image.height, image.width) != (height, width):
            found = (image.height, image.width, 3)
            raise DataError(f"{where}: expected shape {shape}, got {found}")
        # A few JPEGs are greyscale.
        return np.asarray(image.convert("RGB"))


@contextlib.contextmanager
def opened(file: bytes | Path, where: Any) -> Iterator[Image.Image]:
    """Opens an image file. Its pixels are decoded only when they are used.

    Pillow's warning of images so large that decoding them may be an attack is left out.
    The block has to look at the size before it uses the pixels.

    Args:
        file: the content of the file, or its path.
        where: the name of the image in error messages.

    Raises:
        DataError: the image cannot be read, here or in the block.
    """
    # A damaged file can make Pillow raise any error.
    with reading(where, DataError), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            yield image


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
