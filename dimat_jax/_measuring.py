"""What a run measures of its agents at an evaluation, under the names of its rows."""

from typing import Any

import jax
import numpy as np

from dimat_jax._average import Average, AverageModel, Averaging
from dimat_jax.algorithms._recalibration import Recalibrator
from dimat_jax.algorithms.base import MergeData, State, Variables
from dimat_jax.data import selection
from dimat_jax.data.partition import class_counts
from dimat_jax.data.pipeline import Samples
from dimat_jax.evaluate import Evaluation, deviation, local_accuracy
from dimat_jax.experiment import Experiment
from dimat_jax.models import classifier
from dimat_jax.tasks import CLASSIFICATION, TaskRecord

__all__ = ["Measuring", "average_model", "row_fields"]

_MOST_BY_CLASS = 20_000
"""Rows have the accuracies by class if they are at most so many numbers."""


class Measuring:
    """Measures the agents of a run, and the average of their models.

    Args:
        experiment: the run's parts.
    """

    def __init__(self, experiment: Experiment):
        self._experiment = experiment
        self._average_model = AverageModel(
            classifier.forward(experiment.model),
            experiment.task,
            experiment.test_samples,
            experiment.placement,
            experiment.learnt,
        )
        self._recalibrate = None
        statistics = experiment.task.batch_statistics
        if statistics is not None and experiment.recalibrates == "evaluation":
            self._recalibrate = Recalibrator(statistics, experiment.placement)
        classes = experiment.dataset.train.classes
        self._counts = class_counts(classes, experiment.shards)

    def __call__(self, state: State, frames: Any, number: int, step: int) -> dict:
        """Measures the agents.

        Everything that is drawn depends on the round or on the step alone, so that a
        run that resumes measures the same.

        Args:
            state: the agents' state.
            frames: the metric "frames" of the round's communication; None before the
                first round, and for algorithms that align no agents.
            number: the round; 0 before the first one.
            step: the number of local steps done. Evaluations after the same step look
                at the same images for BatchNorm.

        Returns:
            the fields of a row; see `row_fields`.
        """
        experiment = self._experiment
        variables = self._evaluated(experiment.algorithm.variables(state), step)
        evaluation = experiment.evaluator(variables)
        average = self._average_model(
            variables, *_averaged_by(experiment, variables, frames, number)
        )
        return {
            **row_fields("test", evaluation, average, self._counts, experiment.learnt),
            **self._validated(variables),
        }

    def alone(self, variables: Variables, step: int) -> dict[str, Any]:
        """Measures agents that train alone: only how good each of them is.

        Args:
            variables: the agents' variables.
            step: the number of local steps done; see `__call__`.
        """
        variables = self._evaluated(variables, step)
        metric, loss, *_ = self._experiment.evaluator(variables)
        name = f"test_{self._experiment.learnt.metric}"
        return {
            name: metric,
            f"{name}_mean": metric.mean(),
            f"{name}_std": deviation(metric),
            "test_loss": loss,
            "test_loss_mean": loss.mean(),
            **self._validated(variables),
        }

    def _validated(self, variables: Variables) -> dict[str, Any]:
        """Evaluates the agents on validation images; empty if the run has none."""
        validator = self._experiment.validator
        if validator is None:
            return {}
        metric, loss, *_ = validator(variables)
        name = f"validation_{self._experiment.learnt.metric}"
        return {
            name: metric,
            f"{name}_mean": metric.mean(),
            "validation_loss_mean": loss.mean(),
        }

    def _evaluated(self, variables: Variables, step: int) -> Variables:
        """Returns the variables with which the agents are evaluated."""
        experiment = self._experiment
        if self._recalibrate is None:
            return variables
        samples = experiment.examples.choose(
            selection.BATCH_NORM, "own_for_evaluation", step
        )
        assert samples is not None  # otherwise nothing is recalibrated
        return self._recalibrate(variables, samples)


def average_model(
    experiment: Experiment, variables: Variables, frames: Any, number: int
) -> Variables:
    """Returns the average of all agents' models, aligned and recalibrated, on the host.

    It is the model whose accuracy stands in the rows.

    Args:
        experiment: the run's parts.
        variables: the agents' stacked variables.
        frames: see `Measuring.__call__`.
        number: the round; 0 before the first one.

    Raises:
        DataError: the experiment was loaded without its data, and they are needed.
    """
    average = Averaging(experiment.task, experiment.placement)
    model, _ = average(variables, *_averaged_by(experiment, variables, frames, number))
    return jax.tree.map(np.asarray, model)


def _averaged_by(
    experiment: Experiment, variables: Variables, frames: Any, number: int
) -> tuple[dict[str, np.ndarray], Samples | None]:
    """The permutations and the examples with which agents are averaged."""
    perms = experiment.algorithm.common_frame(
        variables,
        frames,
        MergeData(match=experiment.match_samples(number)),
        jax.random.fold_in(experiment.key("align"), number),
    )
    if not experiment.recalibrates:
        return perms, None
    return perms, experiment.examples.choose_shared(selection.BATCH_NORM)


def row_fields(
    split: str,
    evaluation: Evaluation,
    average: Average,
    counts: np.ndarray,
    task: TaskRecord = CLASSIFICATION,
) -> dict[str, Any]:
    """Names the results of an evaluation as they stand in a row.

    Args:
        split: the name of the evaluated samples, with which the names begin.
        evaluation: the results of the agents.
        average: the results of the average model.
        counts: the number of each agent's training images of each class.
        task: what agents learn, which names the metric.
    """
    metric, loss, by_class, disagreement, distance = evaluation
    name = task.metric
    fields: dict[str, Any] = {
        name: metric,
        f"{name}_mean": metric.mean(),
        f"{name}_std": deviation(metric),
    }
    if by_class is not None:
        local = local_accuracy(by_class, counts)
        known = local[~np.isnan(local)]
        fields["accuracy_local"] = local
        fields["accuracy_local_mean"] = known.mean() if len(known) else np.nan
    fields |= {
        f"{name}_average_model": average.metric,
        "loss": loss,
        "loss_mean": loss.mean(),
        "loss_average_model": average.loss,
    }
    if disagreement is not None:
        fields["disagreement"] = disagreement
    if by_class is not None and by_class.size <= _MOST_BY_CLASS:
        fields["accuracy_by_class"] = by_class
    return {
        **{f"{split}_{name}": value for name, value in fields.items()},
        "consensus_distance": distance,
        "consensus_distance_aligned": average.consensus_distance,
    }
