"""The kinds of labels that a data set may have, and the checks of each kind.

classes   a whole number for each input, int32
numbers   one number for each input, or k of them, float32
tokens    a whole number for each token of an input, int32
"""

from collections.abc import Callable, Mapping

import numpy as np

from dimat_jax.data._dataset import DataError, Split

__all__ = ["KINDS", "check_labels"]


def check_labels(what: str, split: Split, n_outputs: int, kind: str) -> None:
    """Refuses labels that are not of a kind.

    Args:
        what: the names of the data set and of the split, for messages.
        split: the split.
        n_outputs: the number of classes, of numbers in a label, or of different tokens.
        kind: a key of `KINDS`.

    Raises:
        DataError: the message says which labels are wrong, and what is expected.
    """
    if kind not in KINDS:
        raise DataError(
            f"{what} labels are of the kind {kind!r}; it must be one of "
            f"{', '.join(KINDS)}"
        )
    n_images, n_labels = len(split.images), len(split.labels)
    if n_images != n_labels or not n_labels:
        raise DataError(f"{what}: there are {n_images} images and {n_labels} labels")
    KINDS[kind](what, split, n_outputs)


def _check_classes(what: str, split: Split, n_classes: int) -> None:
    labels = split.labels
    _check_form(f"{what} labels", labels, "iu", labels.shape[:1], "a whole number")
    _check_range(f"{what} labels", labels, n_classes, "classes")


def _check_numbers(what: str, split: Split, n_outputs: int) -> None:
    labels = split.labels
    # A single number may stand without an axis of its own.
    shape = (len(labels), n_outputs)[: 1 if labels.ndim == n_outputs == 1 else 2]
    _check_form(f"{what} labels", labels, "f", shape, f"{n_outputs} float number(s)")
    if not np.isfinite(labels).all():
        is_bad = ~np.isfinite(labels.reshape(len(labels), -1)).all(axis=1)
        raise DataError(f"{what} label {is_bad.argmax()} is not finite")


def _check_tokens(what: str, split: Split, n_tokens: int) -> None:
    shape = split.images.shape
    for name, array in (("inputs", split.images), ("labels", split.labels)):
        expected = "a whole number for each token"
        _check_form(f"{what} {name}", array, "iu", shape, expected)
        _check_range(f"{what} {name}", array, n_tokens, "tokens")


def _check_form(
    what: str, array: np.ndarray, kinds: str, shape: tuple[int, ...], expected: str
) -> None:
    if array.dtype.kind not in kinds or array.shape != shape:
        found = f"{array.dtype}{list(array.shape)}"
        raise DataError(f"{what} are {found}; expected {expected} for each example")


def _check_range(what: str, values: np.ndarray, n: int, name: str) -> None:
    least, most = int(values.min()), int(values.max())
    if least < 0 or most >= n:
        is_bad = ((values < 0) | (values >= n)).reshape(len(values), -1).any(axis=1)
        raise DataError(
            f"{what} reach from {least} to {most}, but the {name} are 0 to {n - 1}; "
            f"the first bad one is {what.split()[-1][:-1]} {is_bad.argmax()}"
        )


KINDS: Mapping[str, Callable[[str, Split, int], None]] = {
    "classes": _check_classes,
    "numbers": _check_numbers,
    "tokens": _check_tokens,
}
"""`KINDS[kind](what, split, n_outputs)` refuses labels of another kind."""
