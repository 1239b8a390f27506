"""Measures the agents' accuracies and losses, and how far they agree."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dimat_jax.data.pipeline import Batch, Samples
from dimat_jax.options import Option
from dimat_jax.placement import Placement
from dimat_jax.tasks import CLASSIFICATION, TaskRecord
from dimat_jax.tree import PyTree, exact_dtype, take

__all__ = [
    "Evaluation",
    "Evaluator",
    "consensus_distance",
    "deviation",
    "disagreement",
    "local_accuracy",
    "masked_sums",
]


EVERY = Option(
    "eval.every",
    1,
    "The number of rounds between two evaluations. The last round is always evaluated.",
    at_least=1,
    unit="rounds",
)
SAMPLES = Option(
    "eval.samples",
    0,
    "The number of test images, the same ones every time.",
    at_least=0,
    unit="images",
    empty="all of them",
)
BATCH_SIZE = Option(
    "eval.batch_size",
    500,
    "The number of test images in a batch.",
    at_least=1,
    unit="images",
)


class Evaluation(NamedTuple):
    """The results of an evaluation, on the host.

    Attributes:
        metric: each agent's metric; for classes, its share of correct predictions, from
            0 to 1.
        loss: each agent's mean loss; for classes and tokens, in nats.
        accuracy_by_class: each agent's share of correct predictions among the samples
            of each class; NaN for a class without samples. None if the labels are no
            classes.
        disagreement: how far the agents' predictions differ; see `disagreement`. None
            if the labels are no classes.
        consensus_distance: how far the agents' params differ; see `consensus_distance`.
    """

    metric: Float[np.ndarray, " agents"]
    loss: Float[np.ndarray, " agents"]
    accuracy_by_class: Float[np.ndarray, "agents classes"] | None
    disagreement: float | None
    consensus_distance: float

    @property
    def accuracy(self) -> Float[np.ndarray, " agents"]:
        """The metric, which is the accuracy if agents learn classes."""
        return self.metric


def deviation(values: Float[np.ndarray, " values"]) -> float:
    """Computes the sample standard deviation, with n - 1 in its divisor.

    All reported deviations have this divisor, over the agents of a run as well as over
    the runs of several seeds. It is 0 for a single value, for which reports show none.
    """
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


class Evaluator:
    """Evaluates every agent on the same samples, in one pass over them.

    Args:
        forward: `forward(variables, inputs) -> logits` of one agent in eval mode.
        samples: the samples, which all agents share.
        placement: the layout of the agents over devices.
        task: the task, which computes the losses and the metric.
    """

    def __init__(
        self,
        forward: Callable[[PyTree, Array], Float[Array, "batch ..."]],
        samples: Samples,
        placement: Placement,
        task: TaskRecord = CLASSIFICATION,
    ):
        if not samples.shared:
            raise ValueError("agents are compared on samples that they share")
        self._forward = forward
        self._samples = samples
        self._placement, self._task = placement, task
        # The labels of all samples and the number of classes, once they are known.
        self._classes: tuple[Int[np.ndarray, " samples"], int] | None = None

        def predict(totals, variables, batch):
            outputs = forward(variables, batch.inputs)
            totals += masked_sums(task, outputs, batch)
            predicted = outputs.argmax(axis=-1) if task.labels == "classes" else ()
            return totals, predicted

        self._predict = placement.jit(
            placement.per_agent(predict, in_axes=(0, 0, None)), donate_argnums=0
        )
        self._join = jax.jit(
            lambda *batches: jnp.concatenate(batches, axis=1),
            out_shardings=placement.sharding,
        )
        self._distance = jax.jit(
            lambda params: consensus_distance(params, placement.n_agents)
        )

    def __call__(self, variables: PyTree) -> Evaluation:
        """Evaluates the stacked variables of all agents."""
        totals, predictions = self._placement.zeros(2), []
        for batch in self._samples:
            totals, predicted = self._predict(totals, variables, batch)
            predictions.append(predicted)
        totals = self._placement.gather(totals)
        means = totals.astype(np.float64) / self._samples.mask.sum()
        by_class, apart = None, None
        if self._task.labels == "classes":
            by_class, apart = self._compare(variables, self._join(*predictions))
        return Evaluation(
            self._task.metric_of(means[:, 1]),
            means[:, 0],
            by_class,
            apart,
            float(self._distance(variables["params"])),
        )

    def _compare(
        self, variables: PyTree, predictions: Array
    ) -> tuple[Float[np.ndarray, "agents classes"], float]:
        """Computes the accuracies by class, and the disagreement of the agents."""
        if self._classes is None:
            self._classes = self._read_classes(variables)
        labels, n_classes = self._classes
        predicted = self._placement.gather(predictions)
        predicted = predicted[:, self._samples.mask.ravel()]
        by_class = _by_class(predicted == labels, labels, n_classes)
        return by_class, disagreement(predicted)

    def _read_classes(
        self, variables: PyTree
    ) -> tuple[Int[np.ndarray, " samples"], int]:
        """Brings the labels of all samples to the host, and counts the classes."""
        labels = self._placement.fetch([batch.labels for batch in self._samples])
        one = jax.eval_shape(lambda tree: take(tree, 0), variables)
        inputs = next(iter(self._samples)).inputs
        logits = jax.eval_shape(self._forward, one, inputs)
        return np.concatenate(labels)[self._samples.mask.ravel()], logits.shape[-1]


def masked_sums(
    task: TaskRecord, outputs: Float[Array, "batch ..."], batch: Batch
) -> Float[Array, "2"]:
    """Sums one agent's losses and scores of a batch. It is pure."""
    losses, scores = task(outputs, batch.labels), task.scores(outputs, batch.labels)
    sums = [jnp.where(batch.mask, x, 0).sum() for x in (losses, scores)]
    return jnp.stack([x.astype(jnp.float32) for x in sums])


def consensus_distance(params: PyTree, n_agents: int) -> Float[Array, ""]:
    """Computes sqrt(1/N sum_i |x_i - mean|^2) over the params x_i of all N agents.

    It is 0 at consensus (Kong et al. 2021). It is pure; call it within `jax.jit`.

    Args:
        params: the stacked params.
        n_agents: N, the number of agents. Further entries are left out.
    """

    def squares(leaf):
        agents = leaf[:n_agents].astype(exact_dtype(leaf.dtype))
        apart = agents - agents.mean(axis=0, keepdims=True)
        # The conjugate of a real number is the number itself.
        return (apart * apart.conj()).real.sum()

    total = sum(squares(leaf) for leaf in jax.tree.leaves(params))
    return jnp.sqrt(total / n_agents)


def disagreement(predictions: Int[np.ndarray, "agents samples"]) -> float:
    """Computes how often two agents predict different classes, from 0 to 1.

    It is the mean over all samples and all pairs of agents; 0 for a single agent.
    Unlike the consensus distance, it does not change if hidden units are permuted.
    """
    n_agents, _ = predictions.shape
    if n_agents == 1:
        return 0.0
    # After sorting, the agents that agree on a sample follow each other. So an agent
    # agrees with all agents from the first of its run up to itself.
    ordered = np.sort(predictions, axis=0)
    numbers = np.arange(n_agents)[:, None]
    is_first = np.ones(ordered.shape, bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    first = np.maximum.accumulate(np.where(is_first, numbers, 0), axis=0)
    agreeing = (numbers - first).sum(axis=0).mean()
    return float(1 - agreeing / (n_agents * (n_agents - 1) / 2))


def local_accuracy(
    by_class: Float[np.ndarray, "agents classes"],
    counts: Int[np.ndarray, "agents _classes"],
) -> Float[np.ndarray, " agents"]:
    """Computes each agent's accuracy on samples that are distributed like its shard.

    It is the mean of the accuracies by class, weighted by the frequencies of the
    classes in the agent's shard. So it takes no further forward pass, and all samples
    of the agent's classes count.

    Args:
        by_class: the accuracies of each agent by class; NaN for a class without
            samples, which is left out.
        counts: the number of each agent's training images of each class. The last
            classes may be missing, if there are no images of them.

    Returns:
        the accuracies; NaN for an agent without any class that has samples.
    """
    weights = np.zeros(by_class.shape)
    weights[:, : counts.shape[1]] = counts
    weights[np.isnan(by_class)] = 0
    with np.errstate(invalid="ignore"):
        return (weights * np.nan_to_num(by_class)).sum(axis=1) / weights.sum(axis=1)


def _by_class(
    correct: Bool[np.ndarray, "agents samples"],
    labels: Int[np.ndarray, " samples"],
    n_classes: int,
) -> Float[np.ndarray, "agents classes"]:
    counts = np.bincount(labels, minlength=n_classes)
    found = [np.bincount(labels[row], minlength=n_classes) for row in correct]
    with np.errstate(invalid="ignore"):
        return np.stack(found) / counts
