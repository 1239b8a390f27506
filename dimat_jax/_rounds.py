"""Runs the parts of rounds: a communication, and the local steps up to the next one."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dimat_jax._run_progress import Progress
from dimat_jax._trainer import Trainer
from dimat_jax.algorithms._merge_times import Part, parts_of_round
from dimat_jax.algorithms.base import State
from dimat_jax.experiment import Experiment
from dimat_jax.ledger import Messages

__all__ = ["Rounds"]


class Rounds:
    """Runs the parts of rounds, and books what has been done and sent.

    Args:
        experiment: What the run's config describes.
        progress: How far the run has come. Its steps and its ledger are kept up.
        messages: What an agent sends a neighbour.
        tick: A function that is called with the number of steps just done.

    Attributes:
        frames: The agents' frames after the latest merge of the round; None if it has
            had none, or if the algorithm aligns no agents.
    """

    def __init__(
        self,
        experiment: Experiment,
        progress: Progress,
        messages: Messages,
        tick: Callable[[int], Any],
    ):
        self._experiment, self._algorithm = experiment, experiment.algorithm
        self._progress, self._messages, self._tick = progress, messages, tick
        self.frames: Any = None
        self._trainer = Trainer(
            experiment, self._algorithm, experiment.sampler, experiment.key("rounds")
        )

    def parts(self, number: int) -> Iterator[Part]:
        """Yields the parts of a round, which counts from 1."""
        merge, steps = self._experiment.config.merge, self._experiment.steps_of_round
        return parts_of_round(merge.every, merge.unit, number, steps(number))

    def communicate(self, state: State, part: Part) -> tuple[State, dict[str, Any]]:
        """Lets the agents communicate at the beginning of a part.

        If the gradient of a step is to be computed before the merge, this step is a
        part of the communication.

        Returns:
            The new state, and the metrics of the communication.
        """
        experiment, merge = self._experiment, part.merge
        if part.begins_round:
            self.frames = None
        if self._looks_ahead(part):
            first = part.steps.start
            now = experiment.network_at_step(first, part.round)
            state = self._trainer.look_ahead(state, first, now)
            self._count(1)
        slots = experiment.placement.slots
        network = experiment.links.at_round(part.round, slots, merge)
        data = None if merge is None else experiment.merge_data(merge)
        key = experiment.communication_key(merge or part.round)
        state, metrics = self._algorithm.communicate(state, data, network, key)
        if merge == 1:
            self._progress.ledger.record_images(experiment.examples.image_bytes)
        if merge is not None:
            self.frames = metrics.pop("frames", None)
            matching = metrics.pop("matching_bytes", None)
            self._progress.ledger.record_round(
                self._messages, network, experiment.links.edges, matching
            )
        return state, metrics

    def train(self, state: State, part: Part) -> State:
        """Takes the local steps of a part that its communication has not taken."""
        steps = part.steps[self._looks_ahead(part) :]
        now = [self._experiment.network_at_step(step, part.round) for step in steps]
        state = self._trainer.steps(state, steps.start, now, self._count)
        self._progress.ledger.record_steps(self._messages, now)
        return state

    def metrics(self) -> dict[str, np.ndarray]:
        """Returns what the agents have seen since the last call; see `Trainer`."""
        return self._trainer.metrics()

    def _looks_ahead(self, part: Part) -> bool:
        ahead = self._algorithm.ahead is not None
        return ahead and part.merge is not None and len(part.steps) > 0

    def _count(self, steps: int) -> None:
        self._progress.step += steps
        self._tick(steps)
