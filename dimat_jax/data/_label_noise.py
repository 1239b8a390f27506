"""Wrong labels of training samples, to test how well agents learn from such labels."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Int32

from dimat_jax.errors import UserError
from dimat_jax.options import Option

__all__ = ["LABEL_NOISE", "with_label_noise"]

LABEL_NOISE = Option(
    "data.label_noise",
    0.0,
    "The share of each agent's training samples that have a wrong label, which is any "
    "of the other classes with equal probability. Test and validation samples have "
    "their true labels, and the partition looks at true labels.",
    at_least=0,
    at_most=1,
)


def with_label_noise(
    labels: Int32[np.ndarray, " samples"],
    shards: Sequence[Int[np.ndarray, " _"]],
    n_classes: int,
    rate: float,
    seed: Sequence[int],
) -> Int32[np.ndarray, " samples"]:
    """Gives some training samples of each agent the label of another class.

    The noise is symmetric: `rate` is the share of wrong labels, so each other class has
    the share `rate / (n_classes - 1)`.

    Args:
        labels: the true labels; they stay as they are.
        shards: for each agent the indices of its training samples. Each agent has the
            same share of wrong labels, as far as whole numbers allow.
        n_classes: the number of classes.
        rate: the share, from 0 to 1.
        seed: the seed by which samples and classes are drawn.

    Returns:
        the labels of all samples; `labels` itself if the rate is 0.

    Raises:
        OptionError: the rate is out of range.
        UserError: there is no other class.
    """
    LABEL_NOISE.check(rate)
    if rate == 0:
        return labels
    if n_classes < 2:
        raise UserError(
            f"{LABEL_NOISE.path} is {rate:g}, but there is only one class, so that no "
            "label can be wrong"
        )
    noisy = labels.copy()
    for agent, shard in enumerate(shards):
        rng = np.random.default_rng([*seed, agent])
        chosen = rng.permutation(shard)[: round(rate * len(shard))]
        steps = rng.integers(1, n_classes, len(chosen))
        noisy[chosen] = (labels[chosen] + steps) % n_classes
    return noisy
