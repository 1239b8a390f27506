"""Explains what fails because a batch holds labels beside its inputs.

A DataLoader yields pairs of inputs and labels, but functions of models take inputs. A
model may take a pair as well, so only a failure tells.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from dimat_jax.errors import UserError, first_line

__all__ = ["labels_explained"]


@contextlib.contextmanager
def labels_explained(batch: Any, kind: type[UserError]) -> Iterator[None]:
    """Runs a block that gives a batch to a function of a model.

    Args:
        batch: the batch, with arrays as leaves.
        kind: the class of the error.

    Raises:
        UserError: the block has failed, and the batch looks like inputs with labels.
            Other errors are raised as they are.
    """
    try:
        yield
    except Exception as error:
        if not _has_labels(batch):
            raise
        raise kind(
            f"the model's function does not take a batch that is a pair, of shapes "
            f"{np.shape(batch[0])} and {np.shape(batch[1])} ({first_line(error)}); if "
            "these are inputs and labels, as of a DataLoader, pass the inputs alone: "
            "(x for x, _ in loader)"
        ) from error


def _has_labels(batch: Any) -> bool:
    """Whether a batch is a pair whose second entry has a number for each example."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        return False
    inputs, labels = batch
    if not hasattr(inputs, "shape") or not hasattr(labels, "shape"):
        return False
    return len(labels.shape) <= 2 and inputs.shape[:1] == labels.shape[:1]
