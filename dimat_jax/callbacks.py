"""Callbacks: functions that get every row of a run, and may end it.

A config names them, `config.callbacks = "csv,early_stopping"`; `run(...,
callbacks=[print])` adds functions from Python. A callback is `callback(row)`, where a
row is a dict as in metrics.jsonl. If it has a method `end(summary)`, that gets
the content of summary.json when the run has ended. With several processes, process 0
has the callbacks.

`CALLBACKS.add(CallbackRecord(name, build, options))` adds one of your own.
`build(run, **options)` returns the callback of a run, at its start.
"""

import dataclasses
import hashlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dimat_jax.data.partition import VALIDATION
from dimat_jax.errors import UserError, in_one_line
from dimat_jax.network import SAMPLED
from dimat_jax.options import Option, Record, Registry, arguments, registry
from dimat_jax.tasks import OF_SAMPLED, TASK, TASKS, TaskRecord

__all__ = [
    "CALLBACKS",
    "CallbackError",
    "CallbackRecord",
    "Callbacks",
    "Run",
    "Stop",
    "check_callbacks",
    "numbers",
]

Row = Mapping[str, Any]
Fields = Mapping[str, Any]
"""The values of a config's fields, by dotted path; empty ones are resolved."""


class Stop(Exception):
    """A callback raises it to end the run after this round. Its text is the reason."""


class CallbackError(UserError):
    """A callback cannot be used, or it has failed. The message names it."""


class Run(NamedTuple):
    """The run that a callback is for.

    Attributes:
        workdir: its folder, which exists.
        config: its config, as nested dicts.
        rows: the rows that it has already, if it goes on after an interruption.
    """

    workdir: Path
    config: Mapping[str, Any]
    rows: Sequence[Row]


@dataclasses.dataclass(frozen=True, eq=False)
class CallbackRecord(Record[Any]):
    """A callback. `record(run, **options)` makes it for a run.

    Attributes:
        check: `check(fields)` raises a UserError if the callback cannot be used with a
            config. It is called before anything is computed.
    """

    check: Callable[[Fields], None] | None = None


class Callbacks:
    """The callbacks of a run.

    Args:
        callbacks: the callbacks by name.

    Attributes:
        reason: why a callback has asked for the end of the run; "" if none has.
        error: the failure of a callback; None if none has failed.
    """

    def __init__(self, callbacks: Mapping[str, Any]):
        self._callbacks = callbacks
        self.reason = ""
        self.error: CallbackError | None = None

    @classmethod
    def start(
        cls, fields: Fields, run: Run, more: Sequence[Callable[[Row], Any]] = ()
    ) -> "Callbacks":
        """Makes the callbacks that a config names.

        Args:
            fields: the config's fields.
            run: the run.
            more: further callbacks.

        Raises:
            CallbackError: a callback fails.
        """
        made = {}
        for name in CALLBACK.names(fields[CALLBACK.path]):
            record = CALLBACKS[name]
            try:
                made[name] = record(run, **arguments(record, fields))
            except Exception as error:
                raise _failure(name, error) from error
        return cls(made | {repr(each): each for each in more})

    def __call__(self, row: Row) -> None:
        """Passes on a row. A failure or a stop is noted; the run ends after its round.

        A callback that has failed is not called again.
        """
        for name, callback in list(self._callbacks.items()):
            try:
                callback(row)
            except Stop as stop:
                self.reason = self.reason or f"{name}: {stop}"
            except Exception as error:
                self.error = self.error or _failure(name, error)
                self._callbacks = {
                    n: c for n, c in self._callbacks.items() if n != name
                }

    def end(self, summary: Row) -> None:
        """Tells the callbacks that the run has ended. A failure is noted."""
        for name, callback in self._callbacks.items():
            try:
                if callable(end := getattr(callback, "end", None)):
                    end(summary)
            except Exception as error:
                self.error = self.error or _failure(name, error)


def check_callbacks(fields: Fields) -> None:
    """Refuses callbacks that cannot be used with a config.

    Raises:
        UserError: the message says what is needed.
    """
    for name in CALLBACK.names(fields[CALLBACK.path]):
        record = CALLBACKS[name]
        if record.check is not None:
            record.check(fields)


def _failure(name: str, error: Exception) -> CallbackError:
    return CallbackError(f"the callback {name!r} has failed: {in_one_line(error)}")


def numbers(row: Row) -> dict[str, int | float]:
    """The single numbers of a row, by name. Those of single agents are left out."""
    return {name: x for name, x in row.items() if type(x) in (int, float)}


# The callbacks ========================================================================


def csv(run: Run) -> Callable[[Row], None]:
    """Writes the numbers of all rows into metrics.csv in the run's folder."""
    import pandas as pd  # slow to import

    rows = [{"phase": row["phase"], **numbers(row)} for row in run.rows]

    def write(row: Row) -> None:
        rows.append({"phase": row["phase"], **numbers(row)})
        pd.DataFrame(rows).to_csv(run.workdir / "metrics.csv", index=False)

    return write


PROJECT = Option(
    "wandb.project",
    "dimat_jax",
    "The project of Weights & Biases.",
    changes_results=False,
)
MODE = Option(
    "wandb.mode",
    "online",
    "Whether Weights & Biases sends the rows, or keeps them in the run's folder.",
    choices=("online", "offline"),
    changes_results=False,
)


class WeightsAndBiases:
    """Logs the numbers of rows to Weights & Biases (the extra "wandb")."""

    def __init__(
        self, run: Run, *, project: str = PROJECT.default, mode: Any = MODE.default
    ):
        import wandb  # type: ignore

        # The time when the run began tells it from others that had the same folder.
        began = (run.workdir / "config.json").stat().st_mtime_ns
        name = f"{run.workdir.resolve()} {began}"
        self._session = wandb.init(
            project=project,
            mode=mode,
            dir=run.workdir,
            id=hashlib.sha256(name.encode()).hexdigest()[:16],
            name=run.workdir.name,
            resume="allow",
            config=dict(run.config),
        )

    def __call__(self, row: Row) -> None:
        found = {f"{row['phase']}/{name}": x for name, x in numbers(row).items()}
        self._session.log(found, step=row["step"])

    def end(self, summary: Row) -> None:
        self._session.finish()


def _check_wandb(fields: Fields) -> None:
    if importlib.util.find_spec("wandb") is None:
        raise CallbackError(
            f"config.{CALLBACK.path} names wandb, which is not installed: "
            "pip install 'dimat_jax[wandb]'"
        )


FIELD = Option(
    "early_stopping.field",
    "",
    "The field of rows that has to improve.",
    empty="the mean metric on validation images, as validation_accuracy_mean",
)
BETTER = Option(
    "early_stopping.better",
    "",
    "Whether larger or smaller values of the field are better.",
    choices=("larger", "smaller"),
    empty="what is better for the field: a larger accuracy, a smaller loss",
)
PATIENCE = Option(
    "early_stopping.patience",
    10,
    "The number of evaluations after training in a row that may bring no improvement.",
    at_least=1,
)


def early_stopping(
    run: Run,
    *,
    field: str = FIELD.default,
    better: str = BETTER.default,
    patience: int = PATIENCE.default,
) -> Callable[[Row], None]:
    """Ends a run whose agents have ceased to improve, by their validation metric."""
    task = TASKS[run.config.get(TASK.path, TASK.default)]
    sign = 1 if (better or _better(task, field)) == "larger" else -1
    name = field or task.shown.field(split="validation")

    def value_of(row: Row) -> float:
        value = row.get(field) if field else task.shown.deciding(row, "validation")
        if value is None:
            raise UserError(f"rows have no field {name!r}")
        return sign * value

    values = [value_of(row) for row in run.rows if row["phase"] == "trained"]

    def watch(row: Row) -> None:
        if row["phase"] == "trained":
            values.append(value_of(row))
            best = values.index(max(values))
            if len(values) - 1 - best >= patience:
                raise Stop(
                    f"{name} has not improved in the last {patience} evaluations"
                )

    return watch


def _better(task: TaskRecord, field: str) -> str:
    """Whether larger or smaller values of a field are better."""
    parts = field.split("_")
    is_cost = {"loss", "std", "disagreement", "consensus"} & set(parts)
    return "smaller" if is_cost else task.better


def _watched(task: TaskRecord, sampled: bool) -> list[str]:
    """The numbers that rows have after training."""
    metric, splits = task.metric, ("test", "validation", "train")
    found = [f"test_{metric}_std", f"test_{metric}_average_model"]
    found += ["test_loss_average_model"]
    if task.labels == "classes":
        found += ["test_accuracy_local_mean", "test_disagreement"]
    if sampled:
        found += [task.shown.field(OF_SAMPLED, split) for split in splits[:2]]
    means = [f"{split}_{name}_mean" for name in (metric, "loss") for split in splits]
    return [*means, *found, "consensus_distance", "consensus_distance_aligned"]


def _check_early_stopping(fields: Fields) -> None:
    task = TASKS[fields[TASK.path]]
    field = fields[FIELD.path] or task.shown.field(split="validation")
    if field not in (allowed := _watched(task, fields[SAMPLED.path] > 0)):
        raise CallbackError(
            f"config.{FIELD.path} is {field!r}, which no row has; allowed: "
            f"{', '.join(allowed)}"
        )
    if field.startswith("validation") and not fields[VALIDATION.path]:
        raise CallbackError(
            f"config.{FIELD.path} is {field!r}, but config.{VALIDATION.path} is 0: "
            "there are no validation images"
        )


CALLBACKS: Registry[CallbackRecord] = registry(
    CallbackRecord("csv", csv),
    CallbackRecord("wandb", WeightsAndBiases, (PROJECT, MODE), check=_check_wandb),
    CallbackRecord(
        "early_stopping",
        early_stopping,
        (FIELD, BETTER, PATIENCE),
        check=_check_early_stopping,
    ),
    kind=CallbackRecord,
)
"""`CALLBACKS[name](run, **options)` makes a callback for a run."""

CALLBACK = Option(
    "callbacks",
    "",
    "What gets every row of the run, names with commas between them.",
    choices=CALLBACKS,
    several=True,
    empty="nothing",
    changes_results=False,
)
