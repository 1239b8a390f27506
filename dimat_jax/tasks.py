"""What agents learn: the loss of an example, and the metric that reports show.

A task is a function of a model's outputs and of labels, with a record in `TASKS` that
says which labels it is for, and what its metric is:

    TASKS.add(TaskRecord("absolute", absolute_error, labels="numbers", metric="mae"))

Losses and scores are computed for each example, on the devices. Everything that is
reported are means of these over examples, so batches and agents can be added up.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from dimat_jax.errors import UserError
from dimat_jax.options import Option, Record, Registry, registry

__all__ = [
    "CLASSIFICATION",
    "OF_SAMPLED",
    "TASK",
    "TASKS",
    "Metric",
    "TaskError",
    "TaskRecord",
    "metric_of",
    "output_shape",
    "task_for",
]

Losses = Float[Array, " batch"]

OF_SAMPLED = "of_sampled"
"""The ending of a field of rows: the mean over the agents that a server has drawn."""


class TaskError(UserError):
    """A task cannot be used. The message says why."""


class Metric(NamedTuple):
    """A metric as rows and reports show it.

    Attributes:
        name: its name in the fields of rows.
        words: its name in words.
        percent: whether it is shown as a percentage.
        better: whether "larger" or "smaller" values are better; "" if that is unknown.
        nats: whether the loss is a cross-entropy, in nats.
    """

    name: str
    words: str
    percent: bool = False
    better: str = ""
    nats: bool = False

    @property
    def scale(self) -> int:
        """The factor from the values in rows to those that are shown."""
        return 100 if self.percent else 1

    @property
    def unit(self) -> str:
        """The unit behind a title, " (%)" or nothing."""
        return " (%)" if self.percent else ""

    def field(self, ending: str = "mean", split: str = "test") -> str:
        """The name of a field of rows, as "test_accuracy_mean"."""
        return "_".join(filter(None, [split, self.name, ending]))

    @property
    def loss(self) -> str:
        """The loss as the title of an axis."""
        return "test loss (nats)" if self.nats else "test loss"

    def deciding(self, row: Mapping[str, Any], split: str) -> float | None:
        """The number by which a row is compared with others; None if it has none.

        It is the mean over the agents. Where a server has drawn agents for the round,
        it is the mean over these, since the models of the others are old.
        """
        mean = row.get(self.field(split=split))
        return row.get(self.field(OF_SAMPLED, split), mean)

    def text(self, value: float, digits: int = 2) -> str:
        """A value with its unit, as "93.25 %"."""
        return f"{self.scale * value:.{digits}f}" + " %" * self.percent


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TaskRecord(Record[Losses]):
    """A task. `record(outputs, labels)` computes one loss for each example.

    Attributes:
        labels: the kind of labels (see `dimat_jax.data.labels`). "classes" are whole
            numbers [batch], "numbers" are float32 [batch] or [batch, k], and "tokens"
            are whole numbers [batch, length], one for each token of an input.
        metric: the name of the metric, as it is in the names of a row's fields
            ("test_accuracy").
        score: `score(outputs, labels)` computes what the metric is made of, one number
            for each example. None: the losses.
        of_mean: `of_mean(mean)` makes the metric of the mean score of some examples, as
            float64 on the host.
        better: whether "larger" or "smaller" values of the metric are better.
        percent: whether reports show the metric as a percentage.
        title: the name of the metric in words. By default it is its name.
        nats: whether the loss is a cross-entropy, in nats.
    """

    labels: str
    metric: str
    score: Callable[[Any, Any], Losses] | None = None
    of_mean: Callable[[Any], Any] = np.asarray
    better: str = "smaller"
    percent: bool = False
    title: str = ""
    nats: bool = False

    def __post_init__(self) -> None:
        if self.metric == "loss" or not self.metric.isidentifier():
            raise TaskError(
                f"the task {self.name!r} calls its metric {self.metric!r}; the name is "
                "a part of the names of fields, and the loss has its own"
            )
        if self.better not in ("larger", "smaller"):
            raise TaskError(
                f"the task {self.name!r}: better is {self.better!r}; it must be "
                "'larger' or 'smaller'"
            )

    @property
    def words(self) -> str:
        """The metric in words."""
        return self.shown.words

    @property
    def shown(self) -> Metric:
        """The metric as rows and reports show it."""
        words = self.title or self.metric.replace("_", " ")
        return Metric(self.metric, words, self.percent, self.better, self.nats)

    def scores(self, outputs: Any, labels: Any) -> Losses:
        """Computes what the metric is made of; see `score`."""
        return (self.score or self.build)(outputs, labels)

    def metric_of(self, mean: Any) -> Any:
        """Computes the metric from mean scores (float64). It may become infinite."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self.of_mean(mean)


def output_shape(
    task: TaskRecord, n_outputs: int, input_shape: tuple[int, ...]
) -> tuple[int, ...]:
    """The shape that a model's output for one input must have.

    Args:
        task: the task.
        n_outputs: the number of classes, of numbers in a label, or of different tokens.
        input_shape: the shape of one input.
    """
    places = input_shape if task.labels == "tokens" else ()
    return (*places, n_outputs)


def classification(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]
) -> Losses:
    """The class of an input: its cross-entropy, in nats; the metric is the accuracy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _is_correct(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]
) -> Losses:
    return (logits.argmax(axis=-1) == labels).astype(jnp.float32)


def regression(outputs: Float[Array, "batch k"], labels: Float[Array, "..."]) -> Losses:
    """One number or several: the mean squared error; the metric is its square root."""
    errors = jnp.square(outputs.reshape(labels.shape) - labels)
    return errors.reshape(len(labels), -1).mean(axis=1)


def language_modelling(
    logits: Float[Array, "batch length tokens"], labels: Int[Array, "batch length"]
) -> Losses:
    """The next token at every place of a text: the cross-entropy of a token, in nats.

    The metric is the perplexity, which is exp(cross-entropy).
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(axis=1)


TASKS: Registry[TaskRecord] = registry(
    TaskRecord(
        "classification",
        classification,
        labels="classes",
        metric="accuracy",
        score=_is_correct,
        better="larger",
        percent=True,
        nats=True,
    ),
    TaskRecord(
        "regression",
        regression,
        labels="numbers",
        metric="rmse",
        of_mean=np.sqrt,
        title="RMSE",
    ),
    TaskRecord(
        "language_modelling",
        language_modelling,
        labels="tokens",
        metric="perplexity",
        of_mean=np.exp,
        nats=True,
    ),
    kind=TaskRecord,
)
"""`TASKS[name](outputs, labels)` computes losses; see `TaskRecord`."""

CLASSIFICATION = TASKS["classification"]
"""The task of everything that names no other."""


def task_for(labels: str) -> TaskRecord:
    """The bundled task for a kind of labels, for programs that have no config."""
    return next(task for task in TASKS.values() if task.labels == labels)


def metric_of(row: Mapping[str, Any], split: str = "test") -> Metric:
    """The metric that a row of metrics.jsonl has; the accuracy if it has none.

    The plugin of a task need not be there: then the metric is known by its name alone.

    Args:
        row: the row.
        split: what the metric was measured on: "test", "validation" or "train".
    """
    for field in row:
        name = field.removeprefix(f"{split}_").removesuffix("_mean")
        if field == f"{split}_{name}_mean" and name != "loss":
            known = (task.shown for task in TASKS.values() if task.metric == name)
            return next(known, Metric(name, name.replace("_", " ")))
    return CLASSIFICATION.shown


TASK = Option(
    "task",
    "classification",
    "What agents learn: the loss, and the metric in rows and reports.",
    choices=TASKS,
)
