"""Finds runs, reads their files, and says which of them a report may count.

A report counts the runs that have finished, and each of them once. All others are
listed with the reason.
"""

import contextlib
import itertools
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from dimat_jax._folders import read_json
from dimat_jax._inputs import fields_of_run
from dimat_jax._metrics import read_evaluations
from dimat_jax._run_options import ROUNDS
from dimat_jax.algorithms._merge_times import EVERY as MERGE_EVERY
from dimat_jax.algorithms._merge_times import UNIT as MERGE_UNIT
from dimat_jax.algorithms._merge_times import begins_with_merge
from dimat_jax.errors import UserError, concerning, reading
from dimat_jax.evaluate import EVERY
from dimat_jax.options import SEED, Option
from dimat_jax.tasks import Metric, metric_of
from dimat_jax.workdir import FAILURE

__all__ = ["FoundRun", "common_metric", "find_runs"]

# Values of a row that are not finite if the agents have diverged; also the metric.
_FINITE = ("test_loss", "test_loss_mean")
# What every row has beside its metric, with the types of the values.
_COLUMNS: dict[str, type | tuple[type, ...]] = {
    "round": int,
    "phase": str,
    "bytes_sent_total": int,
    "comm_rounds_total": (int, float),
    "seconds_total": (int, float),
}
# A mean cross-entropy (in nats) above this is that of a model that has diverged,
# although it is still finite. Guessing among a million classes has 14 nats.
_LARGEST_LOSS = 1e3


class FoundRun(NamedTuple):
    """A run that a report has found.

    Attributes:
        folder: the run's folder, as the report was given it.
        fields: the options that the run reads, by path. Their values are text. It is
            empty if the config cannot be read.
        rows: the run's evaluations.
        state: "finished" if the report counts the run. Otherwise "unfinished",
            "diverged", "damaged" or "copy".
        reason: why the report does not count the run. It is empty if it does.
    """

    folder: str
    fields: dict[str, str]
    rows: list[dict[str, Any]]
    state: str
    reason: str = ""

    @property
    def counts(self) -> bool:
        """Whether the report counts the run."""
        return self.state == "finished"


def find_runs(directories: Sequence[str | Path]) -> list[FoundRun]:
    """Finds all runs in or below some folders.

    A folder that is reached by two paths is one run. So is a copy of a run's folder,
    also if it was made while the run went on; the copy with most rows is the run.

    Raises:
        UserError: there is no run in or below one of the folders, or two finished runs
            have the same config and the same seed.
    """
    runs, seen = [], set()
    for directory in map(Path, directories):
        folders = _run_folders(directory)
        if not folders:
            raise UserError(f"no run (no metrics.jsonl) in or below {directory}")
        for folder in folders:
            real = os.path.realpath(folder)
            if real not in seen:
                seen.add(real)
                runs.append(_read(folder))
    return list(_each_once(runs))


def _run_folders(directory: Path) -> list[Path]:
    """The folders of runs in or below a folder, in the order of their configs' times.

    A sweep writes its configs one after the other, so this is the order of the sweep.
    """
    folders = {path.parent for path in directory.rglob("metrics.jsonl")}
    # A run whose process ended very early has no metrics.jsonl.
    folders |= {
        path.parent
        for path in directory.rglob("partition.json")
        if path.with_name("config.json").exists()
    }

    def order(folder: Path) -> tuple[float, str]:
        config = folder / "config.json"
        return (config.stat().st_mtime if config.exists() else math.inf, str(folder))

    return sorted(folders, key=order)


def _read(folder: Path) -> FoundRun:
    """Reads a run, and checks whether a report may count it."""
    name = str(folder)
    fields, rows = {}, []
    try:
        with concerning("its config.json"):
            read = fields_of_run(folder)
            fields = {path: str(value) for path, value in read.items()}
        with concerning("its metrics.jsonl"), reading("a row"):
            found = read_evaluations(folder)
            _check_rows(found)
            state, reason = _state(folder, fields, found)
            rows = found
    except UserError as error:
        state, reason = "damaged", str(error)
    return FoundRun(name, fields, rows, state, reason)


def _check_rows(rows: list[dict[str, Any]]) -> None:
    """Refuses rows without what every evaluation has, or with values of other types."""
    metric = metric_of(rows[0] if rows else {})
    by_agent, mean = metric.field(""), metric.field()
    columns = {by_agent: list, mean: (int, float), **_COLUMNS}
    for number, row in enumerate(rows, 1):
        for name, kind in columns.items():
            value = row.get(name)
            # A number that is not finite is null in the file.
            may_be_null = name in (*_FINITE, by_agent, mean)
            if not (isinstance(value, kind) or (value is None and may_be_null)):
                raise UserError(f"row {number} has {value!r} as {name}")
        if not all(_is_number(value) for value in row[by_agent] or ()):
            raise UserError(f"row {number} has other things than numbers")


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, (int, float))


def _state(
    folder: Path, fields: dict[str, str], rows: list[dict[str, Any]]
) -> tuple[str, str]:
    """The state of a run, and the reason if it is not "finished"."""
    n_rounds, every = _n_rounds(folder, fields), int(fields[EVERY.path])
    there = Counter((row["round"], row["phase"]) for row in rows)
    reached = max((number for number, _ in there), default=0)
    failure = folder / FAILURE
    if failure.exists():
        return "diverged", str(read_json(failure).get("message"))
    for row in rows:
        where = f"in round {row['round']} (phase {row['phase']!r})"
        metric = metric_of(row)
        for name in (metric.field(""), metric.field(), *_FINITE):
            if name in row and not _is_finite(row[name]):
                return "diverged", f"{name} is not finite {where}"
        loss = row.get("test_loss_mean", 0)
        if metric.nats and loss > _LARGEST_LOSS:
            return "diverged", f"the mean test loss is {loss:.3g} {where}"
    if any(row["round"] > 0 and "communicated" not in row for row in rows):
        return "damaged", "its rows do not say which of them follow a communication"
    twice = [key for key, times in there.items() if times > 1]
    if twice:
        number, phase = min(twice)
        return "damaged", f"it has several rows of round {number}, phase {phase!r}"
    merge_every, unit = int(_value(fields, MERGE_EVERY)), _value(fields, MERGE_UNIT)

    def is_whole(number: int) -> bool:
        merges = begins_with_merge(merge_every, unit, number)
        has_merged = (number, "merged") in there or not merges
        return has_merged and (number, "trained") in there

    # A damaged config may name any number of rounds, so the search ends at a gap.
    last = [n_rounds] if n_rounds % every else []
    evaluated = itertools.chain(range(every, n_rounds + 1, every), last)
    missing = next((number for number in evaluated if not is_whole(number)), None)
    if not rows or (missing is not None and missing >= reached):
        return "unfinished", _how_far(folder, bool(rows), reached, n_rounds)
    if missing is not None:
        return "damaged", f"it lacks evaluations of round {missing}"
    return "finished", ""


def _n_rounds(folder: Path, fields: dict[str, str]) -> int:
    """The number of rounds that a run does, unless it is interrupted."""
    summary = folder / "summary.json"
    with contextlib.suppress(UserError):
        # A callback may have ended the run before its last round.
        stopped = read_json(summary, dict).get("stopped") if summary.exists() else None
        if isinstance(stopped, dict):
            return int(stopped["round"])
    return int(fields[ROUNDS.path])


def _value(fields: dict[str, str], option: Option) -> str:
    """The value of an option, as text; its default if the run does not read it."""
    return fields.get(option.path, str(option.default))


def _is_finite(value: Any) -> bool:
    """Whether a number or all numbers of a list are finite. Files have null for NaN."""
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return value is not None and math.isfinite(value)


def _how_far(folder: Path, evaluated: bool, reached: int, n_rounds: int) -> str:
    if not evaluated:
        return "it has no evaluation"
    written = datetime.fromtimestamp((folder / "metrics.jsonl").stat().st_mtime)
    return (
        f"it has come to round {reached} of {n_rounds}, and wrote its last row at "
        f"{written:%Y-%m-%d %H:%M}"
    )


def common_metric(runs: Sequence[FoundRun]) -> Metric:
    """The metric of runs that are compared.

    Raises:
        UserError: they have several.
    """
    found = {metric_of(run.rows[0]): run.folder for run in runs}
    if len(found) > 1:
        named = " and ".join(f"{folder} ({m.words})" for m, folder in found.items())
        raise UserError(
            f"runs with different metrics cannot be compared: {named}; give the report "
            "the folders of one task"
        )
    return next(iter(found))


def _each_once(runs: Sequence[FoundRun]) -> Iterator[FoundRun]:
    """Marks copies of a run, and refuses different runs of one config and seed."""
    by_config: dict[tuple, list[int]] = {}
    for number, run in enumerate(runs):
        key = tuple(sorted(run.fields.items())) or (run.folder,)
        by_config.setdefault(key, []).append(number)
    originals = {}
    for numbers in by_config.values():
        # The run with most rows comes first, so it is no copy of a later one.
        kept: list[int] = []
        for number in sorted(numbers, key=lambda n: -len(runs[n].rows)):
            original = next((k for k in kept if _is_copy(runs[number], runs[k])), None)
            if original is None:
                kept.append(number)
            else:
                originals[number] = runs[original].folder
        _refuse_several([runs[number] for number in kept if runs[number].counts])
    for number, run in enumerate(runs):
        if number in originals:
            reason = f"it is a copy of {originals[number]}"
            run = run._replace(state="copy", reason=reason)
        yield run


def _is_copy(run: FoundRun, other: FoundRun) -> bool:
    """Whether a run has the first rows of another run of the same config.

    Rows have times, so those of two runs of the same config differ.
    """
    return bool(run.rows) and run.rows == other.rows[: len(run.rows)]


def _refuse_several(runs: Sequence[FoundRun]) -> None:
    """Refuses several finished runs of the same config and seed.

    Raises:
        UserError: there is more than one.
    """
    if len(runs) > 1:
        names = " and ".join(run.folder for run in runs)
        raise UserError(
            f"{names} are different runs of the same config and the same seed "
            f"({SEED.path} {runs[0].fields[SEED.path]}). Means over seeds would count "
            "this seed several times; give the report only one of these folders"
        )
