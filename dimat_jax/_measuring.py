"""What a run measures of its agents at an evaluation."""

from dimat_jax.algorithms._recalibration import Recalibrator
from dimat_jax.algorithms.base import State
from dimat_jax.data import selection
from dimat_jax.evaluate import Evaluation
from dimat_jax.experiment import Experiment

__all__ = ["Measuring"]


class Measuring:
    """Measures the agents of a run.

    Args:
        experiment: the run's parts.
    """

    def __init__(self, experiment: Experiment):
        self._experiment = experiment
        self._recalibrate = None
        statistics = experiment.task.batch_statistics
        if statistics is not None and experiment.recalibrates == "evaluation":
            self._recalibrate = Recalibrator(statistics, experiment.placement)

    def __call__(self, state: State, step: int) -> Evaluation:
        """Measures the agents.

        Args:
            state: the agents' state.
            step: the number of local steps done. Evaluations after the same step look
                at the same images for BatchNorm.
        """
        experiment = self._experiment
        variables = experiment.algorithm.variables(state)
        if self._recalibrate is not None:
            samples = experiment.examples.choose(
                selection.BATCH_NORM, "own_for_evaluation", step
            )
            assert samples is not None  # otherwise nothing is recalibrated
            variables = self._recalibrate(variables, samples)
        return experiment.evaluator(variables)
