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

        def adding(variables: int | None, batch: int | None):
            """Compiles `add` for stacked or shared variables and batches."""
            lifted = placement.per_agent(add, in_axes=(0, 0, variables, batch, batch))
            return placement.jit(lifted, donate_argnums=(0, 1))

        def mean_of_all(total, count):
            # The copies of agents in the last slots have counted the same batches.
            n = count[: placement.n_agents].sum()
            return jax.tree.map(
                lambda x: x[: placement.n_agents].sum(axis=0) / n, total
            )

        self._add = {True: adding(0, None), False: adding(0, 0)}
        self._add_part = adding(None, 0)
        self._mean = jax.jit(
            placement.per_agent(lambda t, n: jax.tree.map(lambda x: x / n, t)),
            out_shardings=placement.sharding,
        )
        self._mean_of_all = jax.jit(mean_of_all, out_shardings=placement.replicated)
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

    def of_one_model(self, variables: Variables, samples: Samples) -> Variables:
        """Returns one model's variables with the statistics of shared samples.

        The agents share out the batches, so that the pass takes as long as one agent's
        pass over its part of them.

        Args:
            variables: the model, of which every device holds a copy.
            samples: the samples, which all agents share.
        """
        zeros = self._placement.zeros
        total = jax.tree.map(lambda x: zeros(*x.shape), variables["batch_stats"])
        count = zeros()
        for inputs, _, mask in samples.divided(self._placement.n_agents):
            total, count = self._add_part(total, count, variables, inputs, mask)
        return {**variables, "batch_stats": self._mean_of_all(total, count)}


def recalibrating(algorithm: Algorithm, task: Task, placement: Placement) -> Algorithm:
    """Makes an algorithm that measures BatchNorm statistics after a communication.

    It does so if the communication is given examples (`MergeData.recalibrate`). The
    same holds for algorithms that gossip with every step or never communicate. So a
    comparison does not depend on how each algorithm keeps its running statistics.

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
        if data is None or data.recalibrate is None:
            return state, metrics
        stopwatch = Stopwatch()
        with stopwatch("recalibration") as block:
            variables = measure(algorithm.variables(state), data.recalibrate)
            statistics = variables["batch_stats"]
            state = block(algorithm.with_statistics(state, statistics))
        seconds = {**metrics.get("merge_seconds", {}), **stopwatch.seconds}
        return state, {**metrics, "merge_seconds": seconds}

    return algorithm._replace(communicate=communicate)
