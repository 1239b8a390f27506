"""Refuses data that no agent could train on, before anything is computed from them."""

import numpy as np

from dimat_jax.data._dataset import DataError, Dataset, Signature, Split
from dimat_jax.data._labels import check_labels

__all__ = ["check", "check_split"]

_DTYPES = ("uint8", "float32", "int32")


def check(dataset: Dataset, expected: Signature | None) -> None:
    """Checks a data set.

    Args:
        dataset: the data set.
        expected: what its source has declared; None if it declares nothing.

    Raises:
        DataError: the message names the split, the first bad sample, and what is wrong.
    """
    shape = expected.input_shape if expected else dataset.train.images.shape[1:]
    kind = expected.labels if expected else dataset.labels
    for name, split in (("training", dataset.train), ("test", dataset.test)):
        what = f"{dataset.name}: {name}"
        check_split(what, split, dataset.n_classes, kind)
        found = split.images.shape[1:]
        if found != shape:
            raise DataError(f"{what} images are of shape {found}, expected {shape}")
        if split.images.dtype != dataset.train.images.dtype:
            raise DataError(
                f"{what} inputs are {split.images.dtype}, but those for training are "
                f"{dataset.train.images.dtype}"
            )
    if expected and dataset.signature.input_dtype != expected.input_dtype:
        raise DataError(
            f"{dataset.name}: a model gets inputs of {dataset.signature.input_dtype}, "
            f"but the source declares {expected.input_dtype}"
        )
    _check_statistics(dataset)
    names = dataset.class_names
    if names is not None and len(names) != dataset.n_classes:
        raise DataError(
            f"{dataset.name}: there are {len(names)} names of {dataset.n_classes} "
            "classes"
        )


def check_split(what: str, split: Split, n_outputs: int, kind: str) -> None:
    """Checks the samples of a split.

    Args:
        what: the data set and the split, for messages.
        split: the samples.
        n_outputs: the number of classes, of numbers in a label, or of tokens.
        kind: the kind of labels; see `check_labels`.

    Raises:
        DataError: the message names the first bad sample, and what is wrong.
    """
    check_labels(what, split, n_outputs, kind)
    _check_inputs(what, split.images)


def _check_inputs(what: str, inputs: np.ndarray) -> None:
    if inputs.dtype not in _DTYPES:
        raise DataError(
            f"{what} inputs are {inputs.dtype}, expected one of {', '.join(_DTYPES)}; "
            "make_split converts them"
        )
    if inputs.dtype == np.uint8 and inputs.ndim != 4:
        raise DataError(
            f"{what} inputs are uint8{list(inputs.shape)}, but uint8 means images, "
            "[samples, height, width, channels]; convert other inputs to float32, or "
            "tokens to int32"
        )
    if inputs.ndim < 2 or 0 in inputs.shape[1:]:
        raise DataError(
            f"{what} inputs are of shape {inputs.shape}; expected [samples, features] "
            "or more axes"
        )
    if (bad := _first_not_finite(inputs)) is not None:
        values = inputs[bad][~np.isfinite(inputs[bad])]
        raise DataError(f"{what} input {bad} holds {values.flat[0]}")


def _first_not_finite(inputs: np.ndarray) -> int | None:
    """The index of the first input that holds NaN or an infinite value; or None."""
    if inputs.dtype.kind != "f":
        return None
    for start in range(0, len(inputs), 1000):
        part = np.isfinite(inputs[start : start + 1000])
        bad = ~part.all(axis=tuple(range(1, part.ndim)))
        if bad.any():
            return start + int(bad.argmax())
    return None


def _check_statistics(dataset: Dataset) -> None:
    images = dataset.train.images
    n_channels = 0 if images.dtype == np.int32 else images.shape[-1]
    for name, values in (("means", dataset.mean), ("deviations", dataset.std)):
        if values.shape != (n_channels,) or not np.isfinite(values).all():
            raise DataError(
                f"{dataset.name}: the {name} of the channels are {values.tolist()}; "
                f"expected {n_channels} finite number(s)"
            )
    if (dataset.std <= 0).any():
        raise DataError(
            f"{dataset.name}: the deviations of the channels are "
            f"{dataset.std.tolist()}; all must be above 0"
        )
