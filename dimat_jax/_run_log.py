"""What a run tells about itself: a row and a line for every evaluation and epoch."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from dimat_jax._measuring import Measuring
from dimat_jax.algorithms.base import State, Variables
from dimat_jax.errors import NonFiniteError
from dimat_jax.evaluate import deviation
from dimat_jax.experiment import Experiment
from dimat_jax.tasks import OF_SAMPLED, TaskRecord
from dimat_jax.workdir import Results

__all__ = ["RunLog", "TimeLeft"]


class RunLog:
    """Measures the agents of a run, writes rows, and prints a line for each.

    Args:
        experiment: What the run's config describes.
        results: The run's files, which get the rows.
        log: A function that receives the lines.
    """

    def __init__(
        self, experiment: Experiment, results: Results, log: Callable[[str], None]
    ):
        self._experiment = experiment
        self._measure = Measuring(experiment)
        self._results = results
        self._log = log
        # What was measured last, and the number of local steps done before it.
        self._last: tuple[int, dict[str, Any]] | None = None
        alone = experiment.pretrain_steps
        rounds = experiment.config.rounds * experiment.local_steps
        self._of_pretraining = TimeLeft(alone, " of pre-training")
        self._of_rounds = TimeLeft(alone + rounds)

    def line(self, text: str) -> None:
        """Prints a line that belongs to no row."""
        self._log(text)

    def evaluation(
        self,
        phase: str,
        number: int,
        state: State,
        metrics: dict[str, Any],
        frames: Any = None,
        changed: bool = True,
    ) -> None:
        """Evaluates the agents.

        Args:
            phase: "pretrained", "merged" or "trained".
            number: The round; 0 before the first one.
            state: The agents' state.
            metrics: Further entries of the row in metrics.jsonl.
            frames: The agents' frames after the round's communication; None if there
                was none, or it aligned no agents.
            changed: Whether the agents may have changed since the last local step. If
                they have not, an evaluation after that step still holds.

        Raises:
            NonFiniteError: An agent's test loss is not finite.
        """
        step = self._results.progress.steps_done
        if changed or self._last is None or self._last[0] != step:
            self._last = step, self._measure(state, frames, number, step)
        _, measures = self._last
        loss = measures["test_loss"]
        if not np.isfinite(loss).all():
            agents = np.flatnonzero(~np.isfinite(loss)).tolist()
            raise NonFiniteError(
                f"the test loss of agent(s) {agents} is not finite in round {number} "
                f"(phase {phase!r})"
            )
        metrics = {**metrics, **self._of_sampled(number, measures)}
        self._results.write(phase, number, measures, metrics)
        task = self._experiment.learnt
        name, words = f"test_{task.metric}", task.words
        trained = metrics.get(f"train_{task.metric}_mean")
        # The first merge comes before the programs of local steps are compiled.
        left = self._of_rounds(step) if phase == "trained" else ""
        self._log(
            f"round {number:3d} {phase:>10}: "
            f"test {words} {measures[f'{name}_mean']:.4f} "
            f"± {measures[f'{name}_std']:.4f} over agents, "
            f"loss {measures['test_loss_mean']:.4f}, "
            f"consensus distance {measures['consensus_distance']:.3g}"
            + ("" if trained is None else f", training {words} {trained:.4f}")
            + self._of_sampled_in_words(metrics)
            + left
        )

    def _of_sampled(self, number: int, measures: dict[str, Any]) -> dict[str, float]:
        """The metric of the agents that a server has drawn; empty if it draws none.

        Right after the communication it is the metric of the server's model, which all
        of these agents have. The other agents' models are old.
        """
        links = self._experiment.links
        present = links.present(number)
        if not links.faults.sampled or number == 0 or not present.any():
            return {}
        shown = self._experiment.learnt.shown
        return {
            shown.field(OF_SAMPLED, split): float(
                np.asarray(measures[by_agent])[present].mean()
            )
            for split in ("test", "validation")
            if (by_agent := shown.field("", split)) in measures
        }

    def _of_sampled_in_words(self, metrics: dict[str, Any]) -> str:
        shown = self._experiment.learnt.shown
        value = metrics.get(shown.field(OF_SAMPLED))
        if value is None:
            return ""
        return f", test {shown.words} of the sampled agents {value:.4f}"

    def pretraining(
        self, epoch: int, metrics: dict[str, Any], variables: Variables
    ) -> None:
        """Reports an epoch of pre-training.

        Args:
            epoch: The number of epochs done.
            metrics: What the agents have seen in it; see `_trainer.means`.
            variables: The agents' variables after it.
        """
        options, progress = self._experiment.config.pretrain, self._results.progress
        if options.eval_every and epoch % options.eval_every == 0:
            evaluated = self._measure.alone(variables, progress.steps_done)
            metrics = metrics | evaluated
        self._results.write_epoch("pretraining", 0, epoch, metrics)
        left = self._of_pretraining(progress.steps_done)
        where = f"pre-training, epoch {epoch:3d} of {options.epochs}"
        self._log(f"{where}: {_of_epoch(metrics, self._experiment.learnt)}{left}")

    def training(self, number: int, epoch: int, metrics: dict[str, Any]) -> None:
        """Reports an epoch of a round that has several.

        Args:
            number: The round.
            epoch: The number of epochs of the round that are done.
            metrics: What the agents have seen in the epoch; see `_trainer.means`.
        """
        experiment = self._experiment
        self._results.write_epoch("training", number, epoch, metrics)
        epochs = experiment.local_steps / experiment.sampler.steps_per_epoch
        left = self._of_rounds(self._results.progress.steps_done)
        where = f"round {number:3d}, epoch {epoch} of {epochs:.4g}"
        self._log(f"{where}: {_of_epoch(metrics, self._experiment.learnt)}{left}")


def _of_epoch(metrics: dict[str, Any], task: TaskRecord) -> str:
    """Says how an epoch went."""
    name = f"train_{task.metric}"
    text = (
        f"training {task.words} {metrics[f'{name}_mean']:.4f} "
        f"± {deviation(metrics[name]):.4f} over agents, "
        f"loss {metrics['train_loss_mean']:.4f}"
    )
    if (tested := metrics.get(f"test_{task.metric}_mean")) is not None:
        text += f", test {task.words} {tested:.4f}"
    return text


class TimeLeft:
    """Estimates how long it will take until a number of local steps is done.

    The estimate is the mean time of the steps since the first call, because programs
    are compiled before it. It includes what happens between the steps.

    Args:
        steps: The number of steps.
        of: What is done then, for the text; by default the run.
        clock: The clock, in seconds.
    """

    def __init__(
        self, steps: int, of: str = "", clock: Callable[[], float] = time.perf_counter
    ):
        self._steps, self._of, self._clock = steps, of, clock
        self._first: tuple[int, float] | None = None

    def __call__(self, done: int) -> str:
        """The estimate as the end of a line, when some steps are done.

        Returns:
            ", about 3 min left" for example. It is empty at the first call, and if less
            than a second is left.
        """
        now = self._clock()
        if self._first is None:
            self._first = done, now
        first, since = self._first
        if done <= first or done >= self._steps:
            return ""
        seconds = (now - since) / (done - first) * (self._steps - done)
        if seconds < 1:
            return ""
        return f", about {_in_words(seconds)} left{self._of}"


def _in_words(seconds: float) -> str:
    """A duration in the unit that needs two digits or three."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
