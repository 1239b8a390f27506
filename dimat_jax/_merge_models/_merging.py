"""Matches, averages, mends and evaluates models of one architecture."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from dimat_jax import _randomness, merge, permutation
from dimat_jax._merge_models._methods import METHODS, Problem
from dimat_jax._merge_models._options import Options
from dimat_jax._merge_models._subject import Subject
from dimat_jax.data.pipeline import Samples, share
from dimat_jax.data.sources import Dataset, Split
from dimat_jax.evaluate import Evaluator
from dimat_jax.options import arguments
from dimat_jax.permutation import Perms
from dimat_jax.placement import place
from dimat_jax.tasks import CLASSIFICATION, task_for
from dimat_jax.tree import PyTree

__all__ = ["Merging"]

# The batch size for matching and for statistics.
_BATCH = 100
# The batch size for evaluation.
_EVAL_BATCH = 500


class Merging:
    """The steps of a merge of models that have the same architecture.

    "Mending" an average means to measure its BatchNorm statistics anew, or, in a
    network without BatchNorm, to rescale its units (REPAIR). Without data, nothing is
    mended or evaluated.

    Args:
        options: the options of the merge.
        subject: the architecture.
        dataset: the data for matching, mending and evaluating, if there are any.
        example: a batch of inputs, on which the symmetry is verified.

    Attributes:
        spec: the architecture's permutation symmetry.
        after_evaluation: a function that is called whenever a model has been evaluated.
        mended: the word for a mended average; "" if there is nothing to mend.
    """

    def __init__(
        self,
        options: Options,
        subject: Subject,
        dataset: Dataset | None,
        example: Array | np.ndarray,
    ):
        self.options = options
        self.after_evaluation: Callable[[], object] = lambda: None
        self.subject = subject
        self.spec = subject.spec
        method = METHODS[options.method]
        self._matcher = method(**arguments(method, vars(options)))
        self._placement = place(1, jax.devices()[:1])
        self._example = example
        self._batches, self._evaluator, self.mended = [], None, ""
        self.metric = CLASSIFICATION.shown
        if dataset is not None:
            self._read(dataset)

    def _read(self, dataset: Dataset) -> None:
        test = self._samples(dataset, dataset.test, None, _EVAL_BATCH)
        task = task_for(dataset.labels)
        self.metric = task.shown
        # The evaluator knows where parameters are in a bundled model's variables alone.
        self._evaluator = Evaluator(
            lambda variables, x: self.subject.forward(variables["params"], x),
            test,
            self._placement,
            task,
        )
        chosen = self._samples(dataset, dataset.train, self.options.samples, _BATCH)
        # The last batch is cut where its padding begins.
        self._batches = [
            batch.inputs[: int(mask.sum())]
            for batch, mask in zip(chosen, chosen.mask, strict=True)
        ]
        if self.subject.batch_statistics is not None:
            self.mended = "recalibrated"
        elif self.subject.unit_moments is not None:
            self.mended = "repaired"

    def _samples(
        self, dataset: Dataset, split: Split, size: int | None, batch_size: int
    ) -> Samples:
        """Draws `size` images (None: all) at random.

        Some data sets are stored class by class, so the first images would be of a few
        classes only.
        """
        rng = np.random.default_rng(self.options.seed)
        order = rng.permutation(len(split.labels))[:size]
        statistics = dataset.mean, dataset.std
        return share(split, order, *statistics, batch_size, self._placement)

    def match(self, models: Sequence[PyTree]) -> list[Perms] | None:
        """Finds for each model the permutations that align it with the others.

        Returns:
            the permutations; None if the method matches nothing, or if the architecture
            has no symmetry.

        Raises:
            PermutationSpecError: the architecture lacks the symmetry that it declares.
        """
        if self._matcher is None or not self.spec.groups:
            return None
        verify_key, key = jax.random.split(_randomness.seed_key(self.options.seed))
        permutation.verify(
            self.spec, self.subject.outputs, models[0], self._example, verify_key
        )
        return self._matcher(
            Problem(models, self.spec, self.subject.activations, self._batches, key)
        )

    def averages(self, forms: dict[str, list[PyTree]]) -> dict[str, PyTree]:
        """Averages the models in each form, and mends each average."""
        weights, averages = self.options.weights, {}
        for form, models in forms.items():
            average = merge.average(models, weights)
            averages[f"{form} average"] = average
            if self.mended:
                mended = self._mend(average, models, weights)
                averages[f"{form} average, {self.mended}"] = mended
        return averages

    def curves(
        self, forms: dict[str, list[PyTree]], i: int
    ) -> dict[str, merge.Barrier]:
        """Evaluates the line from model 0 to model i, in each form.

        Where there is something to mend, the same line with all points mended follows.
        """
        ts = np.linspace(0, 1, self.options.points)
        curves = {}
        for form, models in forms.items():
            a, b = models[0], models[i]
            curves[form] = merge.barrier(self.evaluate, a, b, ts)

            def mend(point, t, ends=(a, b)):
                return self._mend(point, ends, [1 - t, t])

            if self.mended:
                curves[f"{form}, {self.mended}"] = merge.barrier(
                    self.evaluate, a, b, ts, repair=mend
                )
        return curves

    def _mend(self, average: PyTree, models: Sequence[PyTree], weights: Any) -> PyTree:
        known = self.subject
        if known.batch_statistics is not None:
            return merge.recalibrate(known.batch_statistics, average, self._batches)
        assert known.unit_moments is not None
        return merge.repair(known.unit_moments, average, models, self._batches, weights)

    def evaluate(self, model: PyTree) -> tuple[float, float]:
        """The loss and the metric of a model on the test images."""
        assert self._evaluator is not None
        stacked = jax.tree.map(lambda x: np.asarray(x)[None], {"params": model})
        result = self._evaluator(self._placement.put(stacked))
        self.after_evaluation()
        return float(result.loss[0]), float(result.metric[0])
