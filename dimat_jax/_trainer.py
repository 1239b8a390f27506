"""Takes local steps: the training between two communications."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64, Key

from dimat_jax.algorithms import Algorithm
from dimat_jax.algorithms.base import State
from dimat_jax.data._own import load_own
from dimat_jax.data.pipeline import Augmentation, Sampler
from dimat_jax.errors import NonFiniteError
from dimat_jax.experiment import Experiment
from dimat_jax.network import Network
from dimat_jax.tasks import TaskRecord

__all__ = ["AfterStep", "Trainer", "means"]


AfterStep = Callable[[State, Any, int], None]
"""`after(state, totals, number)` is called after each local step, with its number.

The totals are sums over the steps since the last call of `Trainer.metrics`.
"""


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
        self._totals = experiment.placement.zeros(3)
        # The first and the last step that the totals are of.
        self._steps_seen: tuple[int, int] | None = None
        placement = experiment.placement
        augmentation = Augmentation(**experiment.config.augmentation)

        def reading(take_step):
            """Adds to a step that it reads its batch, and counts what it has seen."""

            def step(state, totals, pool, indices, mask, network, number):
                data_key, step_key = jax.random.split(jax.random.fold_in(key, number))
                keys = placement.keys(data_key)
                batch = load_own(placement, pool, indices, mask, keys, augmentation)
                batch = placement.split_batch(batch)
                state, metrics = take_step(state, batch, network, step_key)
                n = metrics["examples"].astype(jnp.float32)
                loss, score = n * metrics["loss"], n * metrics["score"]
                return state, totals + jnp.stack([loss, score, n], axis=1)

            return placement.jit(
                step, donate_argnums=(0, 1), out_shardings=placement.sharding
            )

        self._step = reading(algorithm.step)
        self._ahead = algorithm.ahead and reading(algorithm.ahead)

    def train(
        self,
        state: State,
        first_step: int,
        networks: Sequence[Network],
        tick: Callable[[int], Any] = lambda steps: None,
        after: AfterStep = lambda state, totals, number: None,
    ) -> tuple[State, dict[str, Any]]:
        """Takes steps, and returns their `metrics` with the new state; see `steps`."""
        return self.steps(state, first_step, networks, tick, after), self.metrics()

    @property
    def totals(self) -> Any:
        """What the steps since the last call of `metrics` have added up."""
        return self._totals

    def go_on(self, totals: Any) -> None:
        """Goes on within steps whose metrics are counted together.

        Args:
            totals: What the steps that are done have added up, as `after` received it;
                None if there are none.
        """
        if totals is not None:
            self._totals = totals

    def steps(
        self,
        state: State,
        first_step: int,
        networks: Sequence[Network],
        tick: Callable[[int], Any] = lambda steps: None,
        after: AfterStep = lambda state, totals, number: None,
    ) -> State:
        """Takes one step for every network.

        Args:
            state: The agents' state. Its memory is reused, so that only the returned
                state is valid afterwards.
            first_step: The number of steps of the phase that are done already.
            networks: The network of each step. If steps share the same object, it is
                copied to the devices once.
            tick: A function that is called with the number of steps just done.
            after: What is called after each step. It may end the training.
        """
        for number, network in enumerate(networks, first_step):
            state = self._run(self._step, state, number, network)
            tick(1)
            after(state, self._totals, number)
        return state

    def look_ahead(self, state: State, number: int, network: Network) -> State:
        """Computes a step that the next communication takes; see `Algorithm.ahead`.

        Args:
            state: The agents' state. Its memory is reused.
            number: The number of steps of the phase that are done already.
            network: The network of the step.
        """
        assert self._ahead is not None
        return self._run(self._ahead, state, number, network)

    def _run(
        self, program: Callable, state: State, number: int, network: Network
    ) -> State:
        experiment = self._experiment
        indices, mask = experiment.placement.put(self._sampler.batch(number))
        state, self._totals = program(
            state,
            self._totals,
            experiment.train_pool,
            indices,
            mask,
            experiment.placed(network),
            np.uint32(number),
        )
        self._steps_seen = (self._steps_seen or (number, number))[0], number
        return state

    def seen(self) -> Float64[np.ndarray, "agents 3"]:
        """What each agent has seen since the last call of `metrics`.

        Returns:
            Sums over the examples: of the losses, of the scores (for classes, of the
            correct predictions), and of the examples themselves. `means` makes means of
            them.

        Raises:
            NonFiniteError: An agent's loss was NaN or infinite.
        """
        seen = self._experiment.placement.gather(self._totals).astype(np.float64)
        loss = seen[:, 0]
        if not np.isfinite(loss).all():
            agents = np.flatnonzero(~np.isfinite(loss)).tolist()
            first, last = self._steps_seen or (0, 0)
            raise NonFiniteError(
                f"the training loss of agent(s) {agents} is not finite within local "
                f"steps {first} to {last}; a lower learning rate may help"
            )
        return seen

    def metrics(self) -> dict[str, Any]:
        """Returns the `means` of what has been seen since the last call.

        Raises:
            NonFiniteError: An agent's loss was NaN or infinite.
        """
        seen = self.seen()
        self._totals, self._steps_seen = self._experiment.placement.zeros(3), None
        return means(seen, self._experiment.learnt)


def means(seen: Float64[np.ndarray, "agents 3"], task: TaskRecord) -> dict[str, Any]:
    """Makes the entries of a row from what the agents have seen.

    Args:
        seen: What `Trainer.seen` has returned.
        task: What the agents learn.

    Returns:
        Each agent's mean "train_loss" and its metric (as "train_accuracy") over the
        examples that it has seen (NaN if it has seen none), and the means of these over
        the agents that have seen some.
    """
    loss, score, n = seen.T
    with np.errstate(invalid="ignore"):
        metric = task.metric_of(score / n)
        found = {"train_loss": loss / n, f"train_{task.metric}": metric}
    some = n > 0
    return found | {
        f"{name}_mean": value[some].mean() if some.any() else np.nan
        for name, value in found.items()
    }
