"""Tunes a config field: which of its values does best on validation images.

Every line, which is an algorithm with its settings, gets the value whose runs have the
best validation accuracy (or other metric): the mean over the agents, then over the
cells (the problems and graphs), then over the seeds. Nothing here reads what was
measured on test images.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate

from dimat_jax._inputs import fields_of_run
from dimat_jax._metrics import read_rows
from dimat_jax._near_names import no_such_field
from dimat_jax.algorithms import ALGORITHM
from dimat_jax.config import field_paths
from dimat_jax.data.partition import PARTITION, PRETRAIN_PARTITION, VALIDATION
from dimat_jax.errors import UserError, concerning, reading
from dimat_jax.options import SEED, every
from dimat_jax.tasks import CLASSIFICATION, Metric, metric_of
from dimat_jax.topology import TOPOLOGY

__all__ = ["MOMENTS", "Tuned", "Tuning", "tune"]

MOMENTS = {
    "communication": "right after the last communication",
    "end": "at the end of the run",
}
"""The evaluations that may count. Agents that train alone have only the end."""

Cell = tuple[tuple[str, Any], ...]
"""The fields of `_cells` that a run reads, with their values, sorted by path."""


def _cells() -> frozenset[str]:
    """The fields that tell problems and graphs apart.

    Runs that differ in these fields alone solve other problems, or the same on other
    graphs. One value of the tuned field is chosen for all of them.
    """
    roots = (TOPOLOGY, PARTITION, PRETRAIN_PARTITION)
    return frozenset(option.path for option in every(roots) if option is not SEED)


class Tuned(NamedTuple):
    """What was found for one line.

    Attributes:
        line: the fields that tell the line from the others, in words.
        scores: for each value the mean metric (an accuracy from 0 to 1); NaN if a run
            with this value did not finish, e.g. because its loss was not finite.
        deviations: for each value the standard deviation over seeds, ddof 1; NaN for
            one seed.
        best: the value with the best score.
        inside: whether smaller and larger numbers were tried too. It is true if the
            value is no number.
    """

    line: str
    scores: dict[Any, float]
    deviations: dict[Any, float]
    best: Any
    inside: bool


class Tuning(NamedTuple):
    """A tuned field, and on what it was tuned.

    Attributes:
        field: the path of the field.
        at: the name in `MOMENTS` of the evaluation that counts.
        validation: the value of data.validation.
        seeds: the seeds of the runs.
        n_cells: the number of problems and graphs, of the line with the most of them.
        lines: what was found for each line.
        left_out: the lines with runs that do not read the field, in words. These runs
            do not count.
        metric: what was measured on validation samples.
    """

    field: str
    at: str
    validation: float
    seeds: list[int]
    n_cells: int
    lines: list[Tuned]
    left_out: list[str]
    metric: Metric

    def report(self) -> str:
        """Says which field was tuned on what, with a table of all values, in Markdown.

        A chosen value is bold; a star marks one at the end of its grid.
        """
        values = {value for tuned in self.lines for value in tuned.scores}
        values = sorted(values, key=_order)
        rows = [
            [
                tuned.line,
                *(_cell(tuned, value, self.metric) for value in values),
                tuned.best,
            ]
            for tuned in self.lines
        ]
        left_out = (
            f"\nRuns that do not read `{self.field}` are left out: "
            f"{'; '.join(self.left_out)}.\n"
        )
        return (
            f"`{self.field}` was tuned on `{self._measure}`{self.metric.unit}, the "
            f"{self.metric.words} on images that no agent trains on "
            f"({VALIDATION.path}={self.validation:g}), "
            f"{MOMENTS[self.at]}: means over the agents, over "
            f"{self.n_cells} cell(s) and over the seed(s) "
            f"{', '.join(map(str, self.seeds))}, ± the deviation over seeds. No test "
            "image was looked at. A star marks a choice at an end of its grid.\n\n"
            + tabulate(rows, ["", *values, "chosen"], "pipe")
            + "\n"
            + (left_out if self.left_out else "")
        )

    @property
    def _measure(self) -> str:
        """The column of metrics.jsonl by which values are compared."""
        return self.metric.field(split="validation")

    def record(self) -> dict[str, Any]:
        """The same as JSON content."""
        lines = [tuned._asdict() for tuned in self.lines]
        # JSON's keys are texts.
        for line in lines:
            for name in ("scores", "deviations"):
                line[name] = {str(value): x for value, x in line[name].items()}
        content = {**self._asdict(), "measure": self._measure, "lines": lines}
        del content["metric"]
        return content


def _order(value: Any) -> tuple[bool, float, str]:
    """The place of a value among others: numbers come first, by size, then texts."""
    is_number = isinstance(value, (int, float))
    return not is_number, value if is_number else 0, str(value)


def _cell(tuned: Tuned, value: Any, metric: Metric) -> str:
    if value not in tuned.scores:
        return ""
    if np.isnan(tuned.scores[value]):
        return "failed"
    digits = 1 if metric.percent else 3
    text = f"{metric.scale * tuned.scores[value]:.{digits}f}"
    if not np.isnan(tuned.deviations[value]):
        text += f" ± {metric.scale * tuned.deviations[value]:.{digits}f}"
    if value != tuned.best:
        return text
    return f"**{text}**" + ("" if tuned.inside else " *")


def tune(
    directories: Sequence[str | Path], field: str, *, at: str = "communication"
) -> Tuning:
    """Finds the best value of a field for every line of a sweep.

    Args:
        directories: the folders of the runs.
        field: the path of the tuned field, e.g. "optimizer.learning_rate".
        at: which evaluation counts: "communication" is the one right after the last
            communication, and "end" the last one.

    Raises:
        UserError: there are no runs, no such field or no validation images, the field
            has one value only, the values of a line were not tried in the same cells
            with the same seeds, or two runs have the same config.
    """
    runs = _read(directories, at)
    if field not in field_paths():
        raise UserError(no_such_field(field, field_paths()))
    if len({run.fields[field] for run in runs if field in run.fields}) < 2:
        raise UserError(f"the runs have no different values of {field}")
    validation = {run.fields[VALIDATION.path] for run in runs}
    if len(validation) > 1 or not all(validation):
        raise UserError(
            f"runs to be compared set aside the same part of their images, but "
            f"{VALIDATION.path} is {', '.join(f'{v:g}' for v in sorted(validation))} "
            "here; options are not tuned on test images"
        )
    metric = _metric(runs)
    all_lines = _lines(runs, field)
    lines = {
        words: reading
        for words, line in all_lines.items()
        if (reading := [run for run in line if field in run.fields])
    }
    return Tuning(
        field,
        at,
        validation.pop(),
        sorted({run.fields[SEED.path] for run in runs}),
        max(len({_cell_of(run) for run in line}) for line in lines.values()),
        [_tuned(words, line, field, metric) for words, line in lines.items()],
        [
            words
            for words, line in all_lines.items()
            if any(field not in run.fields for run in line)
        ],
        metric,
    )


class _Run(NamedTuple):
    """A run: its folder, the fields that it reads, its score, and of which metric.

    The score is NaN and the metric None if the run has not finished.
    """

    folder: Path
    fields: Mapping[str, Any]
    score: float
    metric: Metric | None


def _metric(runs: Sequence[_Run]) -> Metric:
    """The metric of the runs that have finished.

    Raises:
        UserError: they have several, or it is not known what is better.
    """
    metrics = {run.metric for run in runs if run.metric}
    if len(metrics) > 1:
        names = ", ".join(sorted(metric.words for metric in metrics))
        raise UserError(f"the runs are not to be compared: they measure {names}")
    metric = metrics.pop() if metrics else CLASSIFICATION.shown
    if not metric.better:
        raise UserError(
            f"larger or smaller values of {metric.name} may be better; --plugin has to "
            "name the plugin of its task"
        )
    return metric


def _read(directories: Sequence[str | Path], at: str) -> list[_Run]:
    """Reads all runs in or below some folders, in the order in which they began."""
    paths = {
        path.resolve()
        for directory in directories
        for path in Path(directory).rglob("config.json")
        if path.with_name("metrics.jsonl").exists()
    }
    if not paths:
        raise UserError(f"no run in or below {', '.join(map(str, directories))}")
    runs = []
    for path in sorted(paths, key=lambda path: path.stat().st_mtime):
        with concerning(path):
            fields = fields_of_run(path.parent)
        with reading(path.with_name("metrics.jsonl")):
            rows = read_rows(path.parent)
            if at == "communication":
                rows = [row for row in rows if row.get("communicated")]
            finished = path.with_name("summary.json").exists() and rows
            metric, score = None, None
            if finished:
                metric = metric_of(rows[-1], "validation")
                score = metric.deciding(rows[-1], "validation")
            score = np.nan if score is None else float(score)
        runs.append(_Run(path.parent, fields, score, metric))
    return runs


def _lines(runs: Sequence[_Run], field: str) -> dict[str, list[_Run]]:
    """Sorts runs into lines: the algorithm, and what else varies among its runs."""
    by_algorithm: dict[str, list[_Run]] = defaultdict(list)
    for run in runs:
        by_algorithm[run.fields[ALGORITHM.path]].append(run)
    lines: dict[str, list[_Run]] = defaultdict(list)
    for algorithm, its_runs in by_algorithm.items():
        paths = sorted(set().union(*(run.fields for run in its_runs)))
        varying = [
            path
            for path in paths
            if len({str(run.fields.get(path)) for run in its_runs}) > 1
            and path not in _cells() | {field, SEED.path}
        ]
        for run in its_runs:
            settings = [
                f"{_short(path)} {run.fields[path]}"
                for path in varying
                if path in run.fields
            ]
            lines[", ".join([algorithm, *settings])].append(run)
    return lines


def _short(path: str) -> str:
    """The last part of a path, unless it would be "name"."""
    last = path.rpartition(".")[2]
    return path if last == "name" else last


def _cell_of(run: _Run) -> Cell:
    return tuple(sorted((p, v) for p, v in run.fields.items() if p in _cells()))


def _tuned(line: str, runs: Sequence[_Run], field: str, metric: Metric) -> Tuned:
    """Compares the values of the field on one line."""
    by_value: dict[Any, dict[tuple[Cell, int], _Run]] = defaultdict(dict)
    for run in runs:
        place = _cell_of(run), run.fields[SEED.path]
        other = by_value[run.fields[field]].setdefault(place, run)
        if other is not run:
            raise UserError(
                f"{other.folder} and {run.folder} are runs of the same config with the "
                "same seed, which would count twice; name only one of these folders"
            )
    everywhere = set().union(*by_value.values())
    for value, found in by_value.items():
        if len(found) < len(everywhere):
            raise UserError(
                f"{line}: {field}={value} was run in {len(found)} of "
                f"{len(everywhere)} cells and seeds; run every value in the same cells "
                "with the same seeds"
            )
    scores, deviations = {}, {}
    for value in sorted(by_value, key=_order):
        by_seed: dict[int, list[float]] = defaultdict(list)
        for (_, seed), run in by_value[value].items():
            by_seed[seed].append(run.score)
        means = [float(np.mean(of_seed)) for of_seed in by_seed.values()]
        scores[value] = float(np.mean(means))
        deviations[value] = float(np.std(means, ddof=1)) if len(means) > 1 else np.nan
    if np.isnan(list(scores.values())).all():
        raise UserError(
            f"{line}: for every value of {field}, at least one run did not finish"
        )
    sign = 1 if metric.better == "larger" else -1
    known = [value for value in scores if not np.isnan(scores[value])]
    best = max(known, key=lambda value: sign * scores[value])
    numbers = [value for value in scores if isinstance(value, (int, float))]
    inside = best not in numbers or min(numbers) < best < max(numbers)
    return Tuned(line, scores, deviations, best, inside)
