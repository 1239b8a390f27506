"""Reads all samples of a random-access data source, such as a grain source.

A source has `__len__` and `__getitem__`. A sample is a pair (input, label), or a dict
that has both. Neither grain nor another library of sources is imported here.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dimat_jax.data._dataset import DataError
from dimat_jax.errors import reading

__all__ = ["INPUTS", "LABELS", "RandomAccess", "collect", "field"]

# The names under which data sets keep inputs and labels, the likeliest first.
INPUTS = (
    *("image", "images", "img", "input", "inputs", "features", "x"),
    *("tokens", "input_ids"),
)
LABELS = ("label", "labels", "fine_label", "y", "target")
# A source of grain that repeats for ever says that it has about 2**63 samples.
_MOST_SAMPLES = 2**31


@runtime_checkable
class RandomAccess(Protocol):
    """A random-access source of samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


def collect(source: RandomAccess, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads all samples of a source.

    Args:
        source: the source.
        what: the name of the source in error messages.

    Returns:
        the inputs and the labels.

    Raises:
        DataError: a sample cannot be read, is no sample, or its input or its label
            differs from the first in shape or dtype, or the label holds other things
            than numbers. The message tells its index.
    """
    n = len(source)
    if not 0 < n < _MOST_SAMPLES:
        raise DataError(f"{what}: a source has 1 to {_MOST_SAMPLES} samples, got {n}")
    images, labels = None, []
    for i in range(n):
        where = f"{what}: sample {i}"
        with reading(where, DataError):
            image, label = (np.asarray(part) for part in _parts(source[i], where))
        if images is None:
            images = np.empty((n, *image.shape), image.dtype)
        if image.shape != images.shape[1:] or image.dtype != images.dtype:
            raise DataError(
                f"{where} is {image.dtype}{list(image.shape)}, but the first is "
                f"{images.dtype}{list(images.shape[1:])}; all must be alike"
            )
        if label.dtype.kind not in "iuf":
            raise DataError(f"{where}: the label must be of numbers, got {label}")
        first = labels[0] if labels else label
        # One sample may have int32 where another has int64, but no float.
        if label.shape != first.shape or _is_float(label) != _is_float(first):
            raise DataError(
                f"{where}: the label is {label.dtype}{list(label.shape)}, but the first"
                f" is {first.dtype}{list(first.shape)}; all must be alike"
            )
        images[i] = image
        labels.append(label)
    assert images is not None
    return images, np.array(labels)


def _is_float(array: np.ndarray) -> bool:
    return array.dtype.kind == "f"


def field(names: Any, known: tuple[str, ...], what: str) -> str:
    """Finds which of the names of fields is one of the known ones.

    Raises:
        DataError: none is.
    """
    for name in known:
        if name in names:
            return name
    raise DataError(f"{what}: expected one of {', '.join(known)}, got {sorted(names)}")


def _parts(sample: Any, where: str) -> tuple[Any, Any]:
    """The input and the label of a sample."""
    if isinstance(sample, Mapping):
        return sample[field(sample, INPUTS, where)], sample[
            field(sample, LABELS, where)
        ]
    if isinstance(sample, tuple | list) and len(sample) == 2:
        return sample[0], sample[1]
    raise DataError(
        f"{where} is a {type(sample).__name__}; expected a pair (input, label) or a "
        "dict with both"
    )
