"""Takes local steps: the training between two communications."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from dimat_jax.algorithms import Algorithm
from dimat_jax.algorithms.base import State
from dimat_jax.data._own import load_own
from dimat_jax.data.pipeline import Augmentation, Sampler
from dimat_jax.errors import NonFiniteError
from dimat_jax.experiment import Experiment
from dimat_jax.network import Network

__all__ = ["Pauses", "Trainer"]


@runtime_checkable
class Pauses(Protocol):
    """What happens between two local steps. Totals are sums over the steps done."""

    def begin(self) -> tuple[int, Any | None]:
        """Returns how many of the steps are done already, and their totals."""
        ...

    def after_step(self, state: State, totals: Any, done: int, is_last: bool) -> None:
        """Is called after each step, with the number of steps done."""
        ...


class Trainer:
    """Takes the local steps of one phase: of pre-training, or of the rounds.

    Args:
        experiment: The run's parts, of which the images and the placement are used.
        algorithm: The algorithm whose `step` is taken.
        sampler: The sampler, which decides which examples each step sees.
        key: The key from which all random numbers of the phase are drawn.
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

        def step(state, totals, pool, indices, mask, network, number):
            data_key, step_key = jax.random.split(jax.random.fold_in(key, number))
            keys = placement.keys(data_key)
            batch = load_own(placement, pool, indices, mask, keys, augmentation)
            batch = placement.split_batch(batch)
            state, metrics = algorithm.step(state, batch, network, step_key)
            n = metrics["examples"].astype(jnp.float32)
            seen = jnp.stack([n * metrics["loss"], n * metrics["accuracy"], n], axis=1)
            return state, totals + seen

        self._step = placement.jit(
            step, donate_argnums=(0, 1), out_shardings=placement.sharding
        )

    def train(
        self,
        state: State,
        first_step: int,
        networks: Sequence[Network],
        tick: Callable[[int], Any] = lambda steps: None,
        pauses: Pauses | None = None,
    ) -> tuple[State, dict[str, np.ndarray]]:
        """Takes one step for every network.

        Args:
            state: The agents' state. Its memory is reused, so that only the returned
                state is valid afterwards.
            first_step: The number of steps of the phase that are done already.
            networks: The network of each step. If steps share the same object, it is
                copied to the devices once.
            tick: A function that is called with the number of steps just done.
            pauses: What may save the state between two steps, or end the run. It also
                knows how many of the steps a run that goes on has done already.

        Returns:
            The new state, and each agent's mean "train_loss" and "train_accuracy" over
            the examples that it has seen (NaN if it has seen none).

        Raises:
            NonFiniteError: An agent's loss was NaN or infinite.
        """
        experiment = self._experiment
        done, totals = (0, None) if pauses is None else pauses.begin()
        if totals is None:
            totals = experiment.placement.zeros(3)
        left = networks[done:]
        for number, network in enumerate(left, first_step + done):
            indices, mask = experiment.placement.put(self._sampler.batch(number))
            state, totals = self._step(
                state,
                totals,
                experiment.train_pool,
                indices,
                mask,
                experiment.placed(network),
                np.uint32(number),
            )
            tick(1)
            if pauses is not None:
                is_last = number == first_step + len(networks) - 1
                pauses.after_step(state, totals, number - first_step + 1, is_last)
        loss, accuracy, n = experiment.placement.gather(totals).T.astype(np.float64)
        if not np.isfinite(loss).all():
            agents = np.flatnonzero(~np.isfinite(loss)).tolist()
            raise NonFiniteError(
                f"the training loss of agent(s) {agents} is not finite within local "
                f"steps {first_step} to {first_step + len(networks) - 1}; a lower "
                "learning rate may help"
            )
        with np.errstate(invalid="ignore"):
            return state, {"train_loss": loss / n, "train_accuracy": accuracy / n}
