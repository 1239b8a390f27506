"""A merge by the schedule of the published code, with this library's computations.

The published code (DIMAT, CVPR 2024) merges one receiver after the other, and shares
nothing between receivers. For each receiver, the receiver itself and every neighbour
run on all images, the activations of every pair are correlated, and BatchNorm
statistics are measured anew. The code does this for the merged model, and also for the
models from which it is merged. A profile of that code shows about two such resets for
each forward pass.

Here the forward passes, the correlations, the assignments and the resets are those that
this library uses itself. So the two programs differ in their schedules alone.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dimat_jax import merge, permutation
from dimat_jax.algorithms.base import Task, Variables
from dimat_jax.data.pipeline import Batch, Samples
from dimat_jax.matching._activation import activation_scorers, descended, settle
from dimat_jax.matching._descent import (
    PairPerms,
    Pairs,
    Problem,
    every_pair_alone,
)
from dimat_jax.matching._observed import ListedNetworks, NetworkPrograms
from dimat_jax.network import Network
from dimat_jax.tree import PyTree, unstack

__all__ = ["PublishedSchedule"]

RESETS_PER_FORWARD = 2
"""The number of BatchNorm resets for each model that a receiver runs forward."""


class PublishedSchedule:
    """Merges agents in their own frames, one receiver after the other.

    Args:
        task: the task that the agents learn.
    """

    def __init__(self, task: Task):
        self._task = task
        self._programs = NetworkPrograms(task.spec, task.activations)

    def __call__(
        self, agents: Variables, samples: Samples, network: Network
    ) -> list[Variables]:
        """Merges every agent with its neighbours.

        Args:
            agents: the agents' variables, stacked on one device.
            samples: the examples that all agents share, for matching and for BatchNorm.
            network: the network of the round.

        Returns:
            the merged variables of each agent.
        """
        models, W = unstack(agents), np.asarray(network.W)
        return [
            self._merged(
                [models[receiver], *(models[sender] for sender in senders)],
                W[receiver, [receiver, *senders]].tolist(),
                samples,
            )
            for receiver, edges in enumerate(np.asarray(network.active_edges))
            for senders in [np.flatnonzero(edges).tolist()]
        ]

    def _merged(
        self, models: list[PyTree], weights: list[float], samples: Samples
    ) -> Variables:
        """Merges one receiver, the first of the models, with its neighbours."""
        perms = self._matched(models, samples)
        aligned = [
            permutation.apply(
                self._task.spec, {g: jnp.asarray(p[k]) for g, p in perms.items()}, model
            )
            for k, model in enumerate(models[1:])
        ]
        merged = merge.average([models[0], *aligned], weights)
        statistics = self._task.batch_statistics
        if statistics is None:
            return merged
        n_resets = RESETS_PER_FORWARD * len(models) - 1
        for k in range(n_resets):
            jax.block_until_ready(
                self._reset(statistics, models[k % len(models)], samples)
            )
        return self._reset(statistics, merged, samples)

    def _matched(self, models: list[PyTree], samples: Samples) -> PairPerms:
        """Runs all models on all examples, and matches each with the first one."""
        n = len(models) - 1
        if not n:
            return {}
        wave = Pairs(np.zeros(n, np.int32), np.arange(1, n + 1, dtype=np.int32), n)
        networks = ListedNetworks(self._programs, models, _read)
        solver = every_pair_alone(n)
        _, found = settle(
            activation_scorers(networks, samples, [wave]),
            lambda scorer: descended(Problem(scorer, solver)),
        )
        return found.perms

    def _reset(
        self,
        statistics: Callable[[Variables, Array, Array], PyTree],
        model: Variables,
        samples: Samples,
    ) -> Variables:
        """Measures a model's BatchNorm statistics on all examples."""
        return merge.recalibrate(statistics, model, _inputs(samples))


def _read(batch: Batch, network: int) -> tuple[Any, Array]:
    del network
    return batch.inputs, batch.mask


def _inputs(samples: Samples) -> Iterator[Array]:
    """Yields the inputs of each batch, without those that only fill up the batch."""
    for batch, mask in zip(samples, samples.mask, strict=True):
        yield batch.inputs if mask.all() else batch.inputs[: int(mask.sum())]
