"""Data sets of labelled images or other inputs as NumPy arrays.

`load("cifar100")` returns a `Dataset`: raw uint8 pixels and int32 labels, with the
training split's own mean and standard deviation. Images are decoded once and cached.
The code here downloads no files, and needs neither TensorFlow nor JAX.

A new data set is a function of `(directory, cache_dir)` with a record in `SOURCES`, at
the foot of this file.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from dimat_jax.data import (
    _arrays,
    _cifar,
    _images,
    _mnist,
    _tables,
    _text,
    _tiny_imagenet,
)
from dimat_jax.data._arrays import make_dataset
from dimat_jax.data._checks import check
from dimat_jax.data._dataset import (
    DataError,
    Dataset,
    Signature,
    Split,
    choose,
    is_every_fifth,
    make_split,
    mean_std,
)
from dimat_jax.errors import nearest, reading
from dimat_jax.options import SEED, Option, Record, Registry, registry

__all__ = [
    "CACHE_DIRECTORY",
    "DIRECTORY",
    "SOURCE",
    "SOURCES",
    "DataError",
    "Dataset",
    "Signature",
    "Source",
    "Split",
    "load",
    "make_dataset",
    "make_split",
    "mean_std",
    "read",
    "select",
]

DIRECTORY = Option(
    "data.dir",
    "",
    "The folder that holds the data set's files, or the file itself. For CIFAR it is "
    "tfds's data folder, or the folder of the authors' archive or of parquet files. "
    "For Tiny ImageNet it is the authors' zip, the unpacked folder, or a folder that "
    "holds either. For a text it is the file, in UTF-8.",
    empty="the folder where tfds keeps its data sets; for a text, Python's reference "
    "manual",
    changes_results=False,
)
CACHE_DIRECTORY = Option(
    "data.cache_dir",
    "",
    "The folder where decoded images are kept.",
    empty="$XDG_CACHE_HOME/dimat_jax or ~/.cache/dimat_jax",
    changes_results=False,
)
TRAIN_SIZE = Option(
    "data.train_size",
    0,
    "The number of training samples that are used, equally many of each class.",
    at_least=0,
    unit="samples",
    empty="all of them",
)
TEST_SIZE = Option(
    "data.test_size",
    0,
    "The number of test samples that are used, equally many of each class.",
    at_least=0,
    unit="samples",
    empty="all of them",
)


def load(
    name: str,
    *,
    directory: str | None = None,
    cache_dir: str | None = None,
    train_size: int | None = None,
    test_size: int | None = None,
    seed: int = SEED.default,
) -> Dataset:
    """Loads a data set, or a class-balanced part of it.

    Args:
        name: a key of `SOURCES`.
        directory: the folder of the data, or their file. For CIFAR it is tfds's data
            folder (None: tfds's own default), or the folder of the authors' archive or
            of parquet files; for Tiny ImageNet it is the authors' zip, the unpacked
            folder, or a folder that holds either.
        cache_dir: the folder where decoded arrays are kept; None means
            `$XDG_CACHE_HOME/dimat_jax` or `~/.cache/dimat_jax`.
        train_size: the number of training samples to keep, equally many of each class
            unless a class has too few; None keeps all.
        test_size: the same for the test split.
        seed: the seed by which the samples are chosen.

    Raises:
        DataError: `name` is unknown, the data are missing or malformed, or a size is
            below 1 or above the number of samples.
    """
    return select(read(name, directory, cache_dir), train_size, test_size, seed)


def read(
    name: str, directory: str | None = None, cache_dir: str | None = None
) -> Dataset:
    """Reads a whole data set; see `load`.

    Raises:
        DataError: `name` is unknown, or the data are missing or malformed.
    """
    if name not in SOURCES:
        raise DataError(f"unknown data set {name!r}; {nearest(name, SOURCES)}")
    if directory and DIRECTORY not in SOURCES[name].reads:
        raise DataError(f"{name} comes without files; it cannot be in {directory!r}")
    where = f"the data in {directory}" if directory else "the data"
    with reading(f"{name}: {where}", DataError):
        dataset = SOURCES[name](directory, cache_dir)
        check(dataset, SOURCES[name].signature)
    return dataset


def select(
    dataset: Dataset, train_size: int | None, test_size: int | None, seed: int
) -> Dataset:
    """Draws a class-balanced part of a data set; see `load`.

    Raises:
        DataError: A size is below 1 or above the number of samples.
    """
    name = dataset.name
    return dataset._replace(
        train=_subset(dataset.train, train_size, f"{name}: train_size", [seed, 0]),
        test=_subset(dataset.test, test_size, f"{name}: test_size", [seed, 1]),
    )


def _subset(split: Split, size: int | None, what: str, seed: list[int]) -> Split:
    """Draws a subset that takes from every class in turn, in the stored order."""
    if size is None:
        return split
    kept = choose(split.classes, size, what, seed)
    return make_split(split.images[kept], split.labels[kept])


def _digits(directory: str | None, cache_dir: str | None) -> Dataset:
    """The 1,797 handwritten digits of scikit-learn, images of 8x8 pixels.

    Pixels are from 0 to 16. Every fifth image of a class belongs to the test split.
    """
    del directory, cache_dir
    from sklearn.datasets import load_digits  # slow to import

    digits: Any = load_digits()
    images, labels = digits["images"][..., None].astype(np.uint8), digits["target"]
    tests = is_every_fifth(labels)
    train = make_split(images[~tests], labels[~tests])
    test = make_split(images[tests], labels[tests])
    mean, std = mean_std(train.images)
    return Dataset("digits", train, test, 10, mean, std, tuple("0123456789"))


def _random(directory: str | None, cache_dir: str | None) -> Dataset:
    """Random pixels and labels: 12,000 images of 32x32 pixels in 100 classes.

    There is nothing to learn, but the sizes are those of CIFAR-100's images and logits.
    So programs that measure speed and memory need no files.
    """
    del directory, cache_dir
    random = np.random.default_rng(0)
    train, test = (
        make_split(
            random.integers(256, size=(size, 32, 32, 3), dtype=np.uint8),
            random.permutation(size) % 100,
        )
        for size in (10_000, 2_000)
    )
    return Dataset("random", train, test, 100, *mean_std(train.images))


_FILES = (DIRECTORY, CACHE_DIRECTORY)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Source(Record[Dataset]):
    """A data set that a config can name.

    A source may declare what its inputs are. Then a config is checked without its data.

    Attributes:
        image_shape: the shape of an image, or of another input. None: the data tell it.
        n_classes: the number of classes, unless a copy of the data set has fewer. None:
            the data tell it.
        input_dtype: the dtype of the inputs that a model gets: "float32", or "int32"
            for tokens.
        labels: the kind of its labels, which a task is for: "classes", "numbers" or
            "tokens". It matters only if the other attributes are known.
        dir_is_data: whether `data.dir` decides which data they are, as for a user's own
            files. Runs on other folders are then on other data, and so they are no
            repetitions of each other. Otherwise all folders hold the same data set.
    """

    image_shape: tuple[int, ...] | None = None
    n_classes: int | None = None
    input_dtype: str = "float32"
    labels: str = "classes"
    dir_is_data: bool = False

    @property
    def signature(self) -> Signature | None:
        """What a model must know of the data set; None if the data tell it."""
        if self.image_shape is None or self.n_classes is None:
            return None
        shape, n_outputs = self.image_shape, self.n_classes
        return Signature(self.name, shape, self.input_dtype, n_outputs, self.labels)


SOURCES: Registry[Source] = registry(
    Source("digits", _digits, image_shape=(8, 8, 1), n_classes=10),
    Source(
        "cifar10",
        functools.partial(_cifar.read, name="cifar10", n_classes=10),
        leads_to=_FILES,
        summary="CIFAR-10, 60,000 images of 32x32 pixels: as tfds prepares it, in the "
        "authors' archives, or as parquet files.",
        image_shape=(32, 32, 3),
        n_classes=10,
    ),
    Source(
        "cifar100",
        functools.partial(_cifar.read, name="cifar100", n_classes=100),
        leads_to=_FILES,
        summary="CIFAR-100, 60,000 images of 32x32 pixels: as tfds prepares it, in the "
        "authors' archives, or as parquet files.",
        image_shape=(32, 32, 3),
        n_classes=100,
    ),
    Source(
        "tiny_imagenet",
        _tiny_imagenet.read,
        leads_to=_FILES,
        image_shape=(64, 64, 3),
        n_classes=200,
    ),
    Source("image_folder", _images.read_folder, leads_to=_FILES, dir_is_data=True),
    Source("npz", _arrays.read_npz, leads_to=(DIRECTORY,), dir_is_data=True),
    Source("huggingface", _tables.read_huggingface, leads_to=_FILES, dir_is_data=True),
    Source("mnist_5k", _mnist.read, image_shape=(28, 28, 1), n_classes=10),
    Source(
        "text",
        _text.read,
        leads_to=(DIRECTORY,),
        image_shape=(_text.CONTEXT,),
        n_classes=_text.MOST_CHARACTERS,
        input_dtype="int32",
        labels="tokens",
        dir_is_data=True,
    ),
    Source("random", _random, image_shape=(32, 32, 3), n_classes=100),
    kind=Source,
)
"""`SOURCES[name](directory, cache_dir)` reads a data set; see `load`."""

SOURCE = Option("data.name", "cifar100", "The data set.", choices=SOURCES)
