"""Runs the parts of rounds: a communication, and the local steps up to the next one."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dimat_jax._pauses import RunPauses
from dimat_jax._run_progress import Progress
from dimat_jax._trainer import Trainer, means
from dimat_jax.algorithms._common_frame import Frames, frames_of
from dimat_jax.algorithms._merge_times import Part, parts_of_round
from dimat_jax.algorithms.base import State
from dimat_jax.experiment import Experiment
from dimat_jax.ledger import Messages

__all__ = ["Rounds"]


class Rounds:
    """Runs the parts of rounds, and books what has been done and sent.

    A run may go on within a round. What the round has done before is not done again.

    Args:
        experiment: What the run's config describes.
        progress: How far the run has come. It is kept up.
        messages: What an agent sends a neighbour.
        pauses: What may save the state between two steps, or end the run.
        tick: A function that is called with the number of steps just done.
        report: A function that is called after every epoch of rounds that have several:
            with the round, the number of its epochs that are done, and what the agents
            have seen in the last one.
    """

    def __init__(
        self,
        experiment: Experiment,
        progress: Progress,
        messages: Messages,
        pauses: RunPauses,
        tick: Callable[[int], Any],
        report: Callable[[int, int, dict[str, Any]], None],
    ):
        self._report = report
        self._experiment, self._algorithm = experiment, experiment.algorithm
        self._progress, self._messages = progress, messages
        self._pauses, self._tick = pauses, tick
        self._frames = frames_of(progress.frames, experiment.placement)
        # Whether the communication of this part has taken its first step.
        self._has_looked_ahead = False
        self._trainer = Trainer(
            experiment, self._algorithm, experiment.sampler, experiment.key("rounds")
        )

    @property
    def frames(self) -> Any:
        """The agents' frames after the latest merge.

        None if there was none, or if the algorithm aligns no agents.
        """
        return self._frames

    def parts(self, number: int) -> Iterator[Part]:
        """Yields the parts of a round that are not done. Rounds count from 1.

        A part counts as done once what its steps have sent is booked. So a part is
        yielded again if the run was saved right after its last step.
        """
        within, totals = self._pauses.begin()
        self._trainer.go_on(totals)
        merge, steps = self._experiment.config.merge, self._experiment.steps_of_round
        for part in parts_of_round(merge.every, merge.unit, number, steps(number)):
            if within == 0 or self._offset(part) + len(part.steps) >= within:
                yield part

    def is_begun(self, part: Part) -> bool:
        """Whether the communication of a part is done already."""
        return self._progress.within > self._offset(part)

    def communicate(self, state: State, part: Part) -> tuple[State, dict[str, Any]]:
        """Lets the agents communicate at the beginning of a part.

        If the gradient of a step is to be computed before the merge, this step is a
        part of the communication.

        Returns:
            The new state, and the metrics of the communication.
        """
        experiment, progress, merge = self._experiment, self._progress, part.merge
        if self._looks_ahead(part):
            first = part.steps.start
            now = experiment.network_at_step(first, part.round)
            state = self._trainer.look_ahead(state, first, now)
            progress.within = self._offset(part) + 1
            self._has_looked_ahead = True
            self._tick(1)
        slots = experiment.placement.slots
        network = experiment.links.at_round(part.round, slots, merge)
        data = None if merge is None else experiment.merge_data(merge)
        key = experiment.communication_key(merge or part.round)
        state, metrics = self._algorithm.communicate(state, data, network, key)
        if merge == 1:
            progress.ledger.record_images(experiment.examples.image_bytes)
        if merge is not None:
            self._keep_frames(metrics.pop("frames", None))
            matching = metrics.pop("matching_bytes", None)
            progress.ledger.record_round(
                self._messages,
                network,
                experiment.links.edges,
                matching,
                experiment.links.senders(part.round),
            )
        return state, metrics

    def train(self, state: State, part: Part) -> State:
        """Takes the local steps of a part that are left."""
        ahead, offset = int(self._looks_ahead(part)), self._offset(part)
        last = part.steps.start - offset + self._experiment.local_steps - 1

        def after(state: State, totals: Any, number: int) -> None:
            done = offset + number - part.steps.start + 1
            # A checkpoint that is saved now has the row of the epoch.
            self._end_epoch(part.round, done)
            self._pauses.after_step(state, totals, done, number == last)

        networks = [
            self._experiment.network_at_step(step, part.round) for step in part.steps
        ]
        taken = max(ahead, self._progress.within - offset)
        first, left = part.steps.start + taken, networks[taken:]
        if self._has_looked_ahead and left:
            self._end_epoch(part.round, offset + 1)
        elif self._has_looked_ahead:
            # The communication has taken the only step, so nothing else calls this.
            after(state, self._trainer.totals, first - 1)
        self._has_looked_ahead = False
        state = self._trainer.steps(state, first, left, self._tick, after)
        self._progress.ledger.record_steps(self._messages, networks[ahead:])
        return state

    def _end_epoch(self, number: int, done: int) -> None:
        """Reports an epoch of a long round if a step was its last one.

        Args:
            number: The round.
            done: The number of its steps that are done.
        """
        experiment, progress = self._experiment, self._progress
        steps = experiment.sampler.steps_per_epoch
        if experiment.local_steps <= steps or done % steps:
            return
        progress.within, seen = done, self._trainer.seen()
        before = 0.0 if progress.seen is None else np.array(progress.seen)
        self._report(
            number, done // steps, means(seen - before, self._experiment.learnt)
        )
        progress.seen = seen.tolist()

    def end(self, number: int) -> dict[str, Any]:
        """Ends a round.

        Returns:
            What the agents have seen in it; see `Trainer.metrics`.
        """
        progress = self._progress
        progress.step += self._experiment.local_steps
        progress.within, progress.round, progress.seen = 0, number, None
        return self._trainer.metrics()

    def _offset(self, part: Part) -> int:
        """The number of the round's steps before a part."""
        return part.steps.start - self._experiment.steps_of_round(part.round).start

    def _looks_ahead(self, part: Part) -> bool:
        ahead = self._algorithm.ahead is not None
        return ahead and part.merge is not None and len(part.steps) > 0

    def _keep_frames(self, frames: Frames | None) -> None:
        self._frames = frames
        n_agents = self._experiment.placement.n_agents
        self._progress.frames = frames and frames.record(n_agents)
