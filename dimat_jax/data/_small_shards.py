"""What an agent does after its last image, until the largest shard is finished.

The choice decides which objective the agents minimise together. F_i is the mean loss
of agent i's own examples, N the number of agents, and n_i the number of examples.

    repeat:  sum_i F_i / N              every agent counts the same
    idle:    sum_i n_i F_i / sum_i n_i  every example counts the same

Both hold for every batch size. The first is the problem of the paper (DIMAT, arXiv
2404.08079, equation 2). The second holds if steps are proportional to the gradient;
Adam takes steps of full length also along the gradient of a batch that counts little.
`fedavg` and `fedprox` weigh agents by n_i once more if agents idle, as their papers do.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from dimat_jax.options import Option, Record, Registry, registry

__all__ = ["SMALL_SHARDS", "WAYS", "SmallShards"]

Loss = Callable[..., tuple[Any, Any]]
"""The mean loss of a batch's examples, and other results, as `Task.loss`."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SmallShards(Record[np.ndarray]):
    """A way to spend an epoch.

    `build(shard, n, rng)` returns the examples that an agent sees in an epoch, in their
    order. There are at least one and at most `n` of them.

    Attributes:
        examples_count: whether every example counts the same in the objective. If not,
            every agent counts the same.
    """

    examples_count: bool

    def weighed(self, loss: Loss) -> Loss:
        """Scales the loss of each batch so that training has this objective.

        If every example counts the same, the loss is multiplied by the share of a batch
        that is filled. The other results stay as they are, so that reported losses are
        still means.
        """
        if not self.examples_count:
            return loss

        def weighed_loss(variables, batch, key):
            value, others = loss(variables, batch, key)
            return value * batch.mask.astype(value.dtype).mean(), others

        return weighed_loss


def repeat(shard: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Goes round the shard, in a new order each time, until there are `n` examples.

    In an epoch, two examples of an agent are seen equally often, or one of them once
    more. Which ones are seen once more is random, so in expectation all count the same.
    """
    times = -(-n // len(shard))
    return np.concatenate([rng.permutation(shard) for _ in range(times)])[:n]


def idle(shard: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Goes round the shard once, in a new order."""
    del n
    return rng.permutation(shard)


WAYS: Registry[SmallShards] = registry(
    SmallShards(
        "repeat",
        repeat,
        summary="They go round their shards again, each time in a new order; every "
        "agent counts 1/N in the objective (DIMAT, equation 2), whatever the batch "
        "size.",
        examples_count=False,
    ),
    SmallShards(
        "idle",
        idle,
        summary="They do nothing, and a batch that is not full counts with its share "
        "of a full one; every image counts the same in the objective, whatever the "
        "batch size, if steps are proportional to the gradient (Adam's are not).",
        examples_count=True,
    ),
)
"""The ways to spend an epoch, by name."""

SMALL_SHARDS = Option(
    "data.small_shards",
    "repeat",
    "What agents with small shards do until the agent with the largest shard has seen "
    "all of its images, which is the end of an epoch. It holds for pre-training too.",
    choices=WAYS,
)
