"""The average of all agents' models: the x-bar of the papers, evaluated."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from dimat_jax import permutation
from dimat_jax.algorithms._recalibration import Recalibrator
from dimat_jax.algorithms.base import Task, Variables
from dimat_jax.data.pipeline import Samples
from dimat_jax.evaluate import consensus_distance, masked_sums
from dimat_jax.placement import Placement
from dimat_jax.tasks import CLASSIFICATION, TaskRecord
from dimat_jax.tree import PyTree, exact_dtype, is_inexact

__all__ = ["Average", "AverageModel", "Averaging"]


class Average(NamedTuple):
    """How good the average model is, and how far the agents are from it.

    Attributes:
        metric: the metric of the average model; see `Evaluation`.
        loss: its mean loss.
        consensus_distance: the consensus distance of the agents' params in the frame in
            which they were averaged.
    """

    metric: float
    loss: float
    consensus_distance: float


class Averaging:
    """Averages all agents' models; every agent counts 1/N.

    Args:
        task: the task, of which the symmetry and the BatchNorm statistics are used.
        placement: the devices on which the agents live.
    """

    def __init__(self, task: Task, placement: Placement):
        self._n_agents = placement.n_agents
        self._align = placement.per_agent(partial(permutation.apply, task.spec))
        self._average = jax.jit(self._averaged, out_shardings=placement.replicated)
        self._recalibrate = None
        if task.batch_statistics is not None:
            self._recalibrate = Recalibrator(task.batch_statistics, placement)

    def __call__(
        self,
        variables: Variables,
        perms: dict[str, np.ndarray],
        calibration: Samples | None,
    ) -> tuple[Variables, Float[Array, ""]]:
        """Averages the agents.

        Args:
            variables: the agents' stacked variables.
            perms: the permutations that align all agents, stacked. It is empty if the
                agents are averaged as they are.
            calibration: the examples on which the BatchNorm statistics of the average
                model are measured. None: they are the averages of the agents' ones.

        Returns:
            the average model, of which every device holds a copy; and the consensus
            distance of the agents' params in the frame in which they were averaged.
        """
        model, distance = self._average(variables, perms)
        if self._recalibrate is not None and calibration is not None:
            model = self._recalibrate.of_one_model(model, calibration)
        return model, distance

    def _averaged(
        self, variables: Variables, perms: PyTree
    ) -> tuple[Variables, Float[Array, ""]]:
        """Computes the average model, and the consensus distance of the agents."""
        if perms:
            variables = self._align(perms, variables)

        def mean(leaf):
            if not is_inexact(leaf):
                return leaf[0]
            exact = leaf[: self._n_agents].astype(exact_dtype(leaf.dtype))
            return exact.mean(axis=0).astype(leaf.dtype)

        distance = consensus_distance(variables["params"], self._n_agents)
        return jax.tree.map(mean, variables), distance


class AverageModel:
    """Evaluates the average of all agents' models; see `Averaging`.

    The agents share out the evaluation samples. So a pass of the average model takes a
    part of the time of the agents' own pass, and the memory of one more model on every
    device.

    Args:
        forward: `forward(variables, inputs) -> logits` of one model in eval mode.
        task: the task, of which the symmetry and the BatchNorm statistics are used.
        samples: the evaluation samples, which all agents share.
        placement: the devices on which the agents live.
        learnt: what the models have learnt, which computes the loss and the metric.
    """

    def __init__(
        self,
        forward: Callable[[Variables, Array], Float[Array, "batch ..."]],
        task: Task,
        samples: Samples,
        placement: Placement,
        learnt: TaskRecord = CLASSIFICATION,
    ):
        self._placement, self._learnt = placement, learnt
        n_samples = int(samples.mask.sum())
        size = min(samples.mask.shape[1], -(-n_samples // placement.n_agents))
        self._samples = samples.divided(placement.n_agents, size)
        self._average = Averaging(task, placement)

        def count(totals, variables, batch):
            outputs = forward(variables, batch.inputs)
            return totals + masked_sums(learnt, outputs, batch)

        self._count = placement.jit(
            placement.per_agent(count, in_axes=(0, None, 0)), donate_argnums=0
        )

    def __call__(
        self,
        variables: Variables,
        perms: dict[str, np.ndarray],
        calibration: Samples | None,
    ) -> Average:
        """Averages and evaluates the agents; see `Averaging.__call__`."""
        model, distance = self._average(variables, perms, calibration)
        totals = self._placement.zeros(2)
        for batch in self._samples:
            totals = self._count(totals, model, batch)
        totals = self._placement.gather(totals).astype(np.float64).sum(axis=0)
        loss, score = totals / self._samples.mask.sum()
        metric = float(self._learnt.metric_of(score))
        return Average(metric, float(loss), float(distance))
