"""Makes data sets of a user's own arrays, from .npz files or from Python."""

from pathlib import Path
from typing import Any

import numpy as np

from dimat_jax.data._checks import check, check_split
from dimat_jax.data._dataset import (
    DataError,
    Dataset,
    Split,
    is_every_fifth,
    kind_of,
    make_split,
    mean_std,
)
from dimat_jax.data._random_access import INPUTS, LABELS, collect
from dimat_jax.errors import concerning, reading

__all__ = ["TESTS", "expect_path", "make_dataset", "npz_arrays", "read_npz"]

# The names that folders and arrays of the images for testing have, the likeliest first.
TESTS = ("test", "val", "validation")


def make_dataset(
    name: str,
    train: Any,
    test: Any = None,
    *,
    n_classes: int | None = None,
    class_names: tuple[str, ...] | None = None,
    standardise: bool | None = None,
) -> Dataset:
    """Makes a data set of arrays, or of random-access sources such as grain's.

    uint8 inputs are images, [samples, height, width, channels] or [samples, height,
    width]. Other whole numbers are kept as int32 tokens, all else as float32.

    Args:
        name: the name of the data set, which is that of its record.
        train: the samples for training: a pair of arrays (inputs, labels), or a source
            with `__len__` and `__getitem__` whose samples are pairs (input, label) or
            dicts with both, as {"image": ..., "label": ...}.
        test: the samples for testing, as `train`. None: every fifth sample of a class.
        n_classes: the number of classes; None: that of `class_names`, or else one more
            than the largest label. Labels may also be floats, which are numbers to be
            predicted, or as many whole numbers as an input has tokens.
        class_names: the name of each class.
        standardise: whether inputs are normalised by the mean and the deviation of each
            channel (the last axis of an input) over the training samples. None: images
            are, and floats are kept as they are.

    Raises:
        DataError: the samples cannot be used; the message names the first bad one.
    """
    with concerning(name):
        trains = make_split(*_arrays(train, "training"))
        tests = None if test is None else make_split(*_arrays(test, "test"))
    given = [split for split in (trains, tests) if split is not None]
    if n_classes is None:
        n_classes = len(class_names or ()) or _n_outputs(*given)
    # Before samples are set aside, messages tell places in the arrays that were given.
    kind = kind_of(trains.labels)
    check_split(f"{name}: training", trains, n_classes, kind)
    if tests is None:
        is_test = is_every_fifth(trains.classes)
        if is_test.all():
            raise DataError(f"{name}: there must be two samples of a class, or more")
        trains, tests = (
            make_split(trains.images[part], trains.labels[part])
            for part in (~is_test, is_test)
        )
    statistics = _statistics(trains.images, standardise)
    dataset = Dataset(name, trains, tests, n_classes, *statistics, class_names)
    check(dataset, None)
    return dataset


def _n_outputs(*splits: Split) -> int:
    """The number of classes, of numbers in a label, or of different tokens."""
    kind, labels = kind_of(splits[0].labels), splits[0].labels
    if kind == "numbers":
        return 1 if labels.ndim == 1 else labels.shape[1]
    arrays = [split.labels for split in splits]
    if kind == "tokens":
        arrays += [split.images for split in splits]
    return 1 + max(int(array.max(initial=-1)) for array in arrays)


def _statistics(
    images: np.ndarray, standardise: bool | None
) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the deviation by which inputs are normalised."""
    if standardise is None:
        standardise = images.dtype == np.uint8
    if standardise or images.dtype == np.int32:
        return mean_std(images)
    channels = images.shape[-1]
    return np.zeros(channels, np.float32), np.ones(channels, np.float32)


def _arrays(samples: Any, which: str) -> tuple[np.ndarray, np.ndarray]:
    """The inputs and the labels of samples, checked and in the dtypes of a split."""
    if isinstance(samples, tuple | list) and len(samples) == 2:
        with reading(f"the {which} samples", DataError):
            images, labels = (np.asarray(part) for part in samples)
    elif hasattr(samples, "__getitem__") and not isinstance(samples, np.ndarray):
        source: Any = samples
        images, labels = collect(source, f"the {which} source")
    else:
        raise DataError(
            f"the {which} samples are a {type(samples).__name__}; expected a pair "
            "(inputs, labels), or a source with __len__ and __getitem__"
        )
    if images.dtype == object:
        first = next((type(x).__name__ for x in images.flat), "none")
        raise DataError(
            f"the {which} inputs are an array of objects, not of numbers; the first "
            f"object is a {first}"
        )
    if images.dtype == np.uint8 and images.ndim == 3:
        images = images[..., None]
    if images.ndim < 2:
        raise DataError(
            f"the {which} inputs are of shape {images.shape}; expected [samples, "
            "features] or more axes"
        )
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    _check_labels(images, labels, which)
    if len(images) != len(labels):
        raise DataError(
            f"there are {len(images)} {which} inputs, but {len(labels)} labels"
        )
    return images, labels


def _check_labels(images: np.ndarray, labels: np.ndarray, which: str) -> None:
    """Refuses labels of which no kind can be made; see `dimat_jax.data._labels`."""
    is_class = labels.ndim == 1 and labels.dtype.kind in "iu"
    is_number = labels.ndim in (1, 2) and labels.dtype.kind == "f"
    is_token = labels.shape == images.shape and labels.dtype.kind in "iu"
    if not (is_class or is_number or is_token):
        raise DataError(
            f"the {which} labels must be whole numbers, one for each sample (or for "
            f"each token of an input), or floats, got {labels.dtype}"
            f"{list(labels.shape)}"
        )
    if not is_number:
        limits = np.iinfo(np.int32)
        is_bad = (labels < limits.min) | (labels > limits.max)
        if is_bad.any():
            bad = int(np.flatnonzero(is_bad.reshape(len(labels), -1).any(axis=1))[0])
            raise DataError(f"{which} label {bad} is {labels[bad]}")


def read_npz(directory: str | None, cache_dir: str | None) -> Dataset:
    """Arrays in an .npz file: inputs and labels, of any number of classes.

    Raises:
        DataError: the file is missing, or does not hold such arrays.
    """
    del cache_dir
    path = expect_path(directory, "the .npz file")
    splits = npz_arrays(path)
    if "all" in splits:
        return make_dataset("npz", splits["all"])
    test = next((splits[name] for name in TESTS if name in splits), None)
    if "train" not in splits:
        raise DataError(f"{path} holds no arrays train_images and train_labels")
    return make_dataset("npz", splits["train"], test)


def expect_path(directory: str | None, what: str) -> Path:
    """The path that `data.dir` names.

    Raises:
        DataError: it names none, or there is nothing.
    """
    if not directory:
        raise DataError(f"`directory` is missing (config.data.dir): it must be {what}")
    path = Path(directory).expanduser()
    if not path.exists():
        raise DataError(f"there is no {path}; it must be {what}")
    return path


def npz_arrays(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads the inputs and the labels of an .npz file, by split.

    The arrays have one of the names of `INPUTS` and one of `LABELS`, as images and
    labels, for the split "all"; or the same names with the name of a split before them,
    as train_images, or after them, as y_test.

    Raises:
        DataError: there are no such arrays.
    """
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    found = {}
    for split in ("all", "train", *TESTS):
        inputs = _named(arrays, split, INPUTS)
        if inputs is None:
            continue
        labels = _named(arrays, split, LABELS)
        if labels is None:
            prefix = "" if split == "all" else f"{split}_"
            raise DataError(f"it holds no array {prefix}labels")
        found[split] = arrays[inputs], arrays[labels]
    if not found:
        raise DataError(
            "it holds no array images or train_images, but "
            f"{', '.join(sorted(arrays)) or 'none'}"
        )
    return found


def _named(arrays: Any, split: str, names: tuple[str, ...]) -> str | None:
    """The name among `arrays` that a split's array has; None if it has none."""
    if split == "all":
        known = list(names)
    else:
        known = [form for n in names for form in (f"{split}_{n}", f"{n}_{split}")]
    return next((name for name in known if name in arrays), None)
