"""Measuring BatchNorm statistics anew: one policy for every algorithm."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dimat_jax._stopwatch import Stopwatch
from dimat_jax.algorithms.base import Algorithm, Task, Variables
from dimat_jax.data.pipeline import Samples
from dimat_jax.merge import add_batch
from dimat_jax.placement import Placement
from dimat_jax.tree import PyTree

__all__ = ["Recalibrator", "recalibrating"]


class Recalibrator:
    """Measures BatchNorm statistics anew: the mean of batch means and variances.

    Averaged weights do not have the averages of the statistics (Jordan et al. 2022,
    arXiv 2211.08403). Without this step merged networks with BatchNorm classify badly.

    Args:
        batch_statistics: a function of one agent,
            `batch_statistics(variables, inputs, mask)`, that returns the batch_stats of
            that batch alone.
        placement: the devices on which the agents live.
    """

    def __init__(
        self,
        batch_statistics: Callable[[Variables, Array, Array], PyTree],
        placement: Placement,
    ):
        def add(total, count, variables, inputs, mask):
            statistics = batch_statistics(variables, inputs, mask)
            n = mask.sum().astype(jnp.float32)
            return add_batch(total, count, statistics, n)

        self._add = {
            shared: placement.jit(
                placement.per_agent(
                    add, in_axes=(0, 0, 0, *[None if shared else 0] * 2)
                ),
                donate_argnums=(0, 1),
            )
            for shared in (True, False)
        }
        self._mean = jax.jit(
            placement.per_agent(lambda t, n: jax.tree.map(lambda x: x / n, t)),
            out_shardings=placement.sharding,
        )
        self._placement = placement

    def __call__(self, variables: Variables, samples: Samples) -> Variables:
        """Returns stacked variables with the statistics of own or shared `samples`."""
        zeros = self._placement.zeros
        total = jax.tree.map(lambda x: zeros(*x.shape[1:]), variables["batch_stats"])
        count = zeros()
        for inputs, _, mask in samples:
            total, count = self._add[samples.shared](
                total, count, variables, inputs, mask
            )
        return {**variables, "batch_stats": self._mean(total, count)}


def recalibrating(algorithm: Algorithm, task: Task, placement: Placement) -> Algorithm:
    """Makes an algorithm that measures BatchNorm statistics after a communication.

    It does so if the communication is given examples (`MergeData.recalibrate`). The
    same holds for algorithms that gossip with every step or never communicate: what is
    compared are then the algorithms, and not their running statistics.

    Args:
        algorithm: the algorithm, which does not measure statistics itself.
        task: the task that the agents learn.
        placement: the devices on which the agents live.
    """
    if task.batch_statistics is None:
        return algorithm
    measure = Recalibrator(task.batch_statistics, placement)

    def communicate(state, data, network, key):
        state, metrics = algorithm.communicate(state, data, network, key)
        if data.recalibrate is None:
            return state, metrics
        stopwatch = Stopwatch()
        with stopwatch("recalibration") as block:
            variables = measure(algorithm.variables(state), data.recalibrate)
            statistics = variables["batch_stats"]
            state = block(algorithm.with_statistics(state, statistics))
        seconds = {**metrics.get("merge_seconds", {}), **stopwatch.seconds}
        return state, {**metrics, "merge_seconds": seconds}

    return algorithm._replace(communicate=communicate)
