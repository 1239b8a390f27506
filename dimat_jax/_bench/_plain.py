"""The sizes of a model that a plain loop trains, in Flax or in PyTorch."""

from typing import Any, NamedTuple

import numpy as np

__all__ = ["Plain"]


class Plain(NamedTuple):
    """The sizes of a plain model and of its data.

    Attributes:
        blocks: the number of residual blocks in each of three stages; 0 for an MLP.
        units: the channels of each stage, or the units of each hidden layer.
        n_classes: the number of logits.
        image: the height, the width and the number of channels of an image.
        batch_size: the number of images in a batch.
        learning_rate: the learning rate of Adam.
        dtype: the name of the dtype of the computation; parameters are float32.
    """

    blocks: int
    units: tuple[int, ...]
    n_classes: int
    image: tuple[int, ...]
    batch_size: int
    learning_rate: float = 1e-3
    dtype: str = "float32"

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "Plain":
        """Makes the sizes from `_asdict()`, whose tuples JSON has turned into lists."""
        tuples = {name: tuple(fields[name]) for name in ("units", "image")}
        return cls(**{**fields, **tuples})

    def batches(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws float32 images and int32 labels, `[n, batch_size, ...]`."""
        random = np.random.default_rng(0)
        images = random.standard_normal((n, self.batch_size, *self.image), np.float32)
        labels = random.integers(self.n_classes, size=(n, self.batch_size))
        return images, labels.astype(np.int32)
