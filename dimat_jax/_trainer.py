"""The local steps of a phase: what happens between two communications."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from dimat_jax.algorithms import Algorithm
from dimat_jax.algorithms.base import State
from dimat_jax.data.pipeline import Augmentation, Sampler, load
from dimat_jax.errors import NonFiniteError
from dimat_jax.experiment import Experiment
from dimat_jax.network import Network

__all__ = ["Trainer"]


class Trainer:
    """The local steps of one phase: pre-training, or the rounds.

    Args:
        experiment: data and placement.
        algorithm: what steps.
        sampler: which examples.
        key: the root of the phase's randomness.
    """

    def __init__(
        self,
        experiment: Experiment,
        algorithm: Algorithm,
        sampler: Sampler,
        key: Key[Array, ""],
    ):
        self._experiment = experiment
        self._sampler = sampler
        placement = experiment.placement
        augmentation = Augmentation(**experiment.config.augmentation)

        def read(pool, indices, mask, key):
            return load(pool, indices, mask, key, augmentation)

        def step(state, totals, pool, indices, mask, network, number):
            data_key, step_key = jax.random.split(jax.random.fold_in(key, number))
            batch = placement.per_agent(read, in_axes=(None, 0, 0, 0))(
                pool, indices, mask, placement.keys(data_key)
            )
            state, metrics = algorithm.step(state, batch, network, step_key)
            n = metrics["examples"].astype(jnp.float32)
            seen = jnp.stack([n * metrics["loss"], n * metrics["accuracy"], n], axis=1)
            return state, totals + seen

        self._step = jax.jit(
            step, donate_argnums=(0, 1), out_shardings=placement.sharding
        )

    def train(
        self,
        state: State,
        first_step: int,
        n_steps: int,
        network_at: Callable[[int], Network],
        tick: Callable[[], Any] = lambda: None,
    ) -> tuple[State, dict[str, np.ndarray]]:
        """Takes steps.

        Args:
            state: where the agents stand; given up.
            first_step: counts from the beginning of the phase.
            n_steps: how many.
            network_at: the network of every step.
            tick: is called after every step.

        Returns:
            the state, and each agent's mean "train_loss" and "train_accuracy" over
            the examples it has seen (NaN if it has seen none).

        Raises:
            NonFiniteError: an agent's loss was NaN or infinite.
        """
        experiment = self._experiment
        totals = experiment.placement.zeros(3)
        for number in range(first_step, first_step + n_steps):
            indices, mask = experiment.placement.put(self._sampler.batch(number))
            state, totals = self._step(
                state,
                totals,
                experiment.train_pool,
                indices,
                mask,
                experiment.placed(network_at(number)),
                np.uint32(number),
            )
            tick()
        loss, accuracy, n = experiment.placement.gather(totals).T.astype(np.float64)
        if not np.isfinite(loss).all():
            agents = np.flatnonzero(~np.isfinite(loss)).tolist()
            raise NonFiniteError(
                f"the training loss of agent(s) {agents} is not finite within local "
                f"steps {first_step} to {first_step + n_steps - 1}; a lower learning "
                "rate may help"
            )
        with np.errstate(invalid="ignore"):
            return state, {"train_loss": loss / n, "train_accuracy": accuracy / n}
