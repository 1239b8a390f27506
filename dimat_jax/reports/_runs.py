"""The runs of a report, and the config fields in which they differ."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from dimat_jax._folders import read_json
from dimat_jax.config import ROOT
from dimat_jax.data.partition import (
    MIN_SAMPLES,
    PARTITION,
    PARTITIONS,
    PRETRAIN_PARTITION,
    VALIDATION,
)
from dimat_jax.data.selection import HELD_OUT
from dimat_jax.data.sources import SOURCE, TEST_SIZE, TRAIN_SIZE
from dimat_jax.errors import UserError, reading
from dimat_jax.evaluate import SAMPLES
from dimat_jax.options import SEED, Option, every
from dimat_jax.placement import AGENTS
from dimat_jax.reports._read import FoundRun, common_metric, find_runs
from dimat_jax.tasks import CLASSIFICATION, Metric, metric_of
from dimat_jax.topology import TOPOLOGY

__all__ = [
    "PHASES",
    "SENT",
    "DataFrame",
    "Partition",
    "Runs",
    "describe",
    "load",
]

# A pandas.DataFrame. Type checkers find so many possible types in what its methods
# return that the name says more to readers than to them.
DataFrame = Any

# The phases in which agents are evaluated, in the order of a round.
PHASES = ("pretrained", "merged", "trained")
# The beginning of the names of the columns that hold the bytes of one kind of message.
SENT = "bytes_sent."

# Runs that differ in this field alone are repetitions; reports show their mean.
_REPEATS = SEED.path


def _paths(*roots: Option) -> tuple[str, ...]:
    """Lists options and all further options that they lead to, without the seed."""
    return tuple(option.path for option in every(roots) if option is not SEED)


# Where these options and those that they lead to differ, figures have panels; where
# others do, lines. The first ones say which images the agents learn and are measured
# on.
_PANELS = (
    SOURCE,
    TRAIN_SIZE,
    TEST_SIZE,
    VALIDATION,
    HELD_OUT,
    SAMPLES,
    TOPOLOGY,
    PARTITION,
    PRETRAIN_PARTITION,
)
# The fields in which two partitions of the same name and options can differ.
_SPLIT_BY = (SOURCE.path, TRAIN_SIZE.path, AGENTS.path)
# How many runs a message lists at most.
_MOST_LISTED = 10


class Partition(NamedTuple):
    """How many samples of each class each agent holds.

    Attributes:
        title: the words that distinguish this partition from the others of a report.
        counts: `[agents][classes]`, how many samples of each class an agent has.
        classes: the names of the classes; None: figures show their numbers instead.
    """

    title: str
    counts: Sequence[Sequence[int]]
    classes: Sequence[str] | None = None


class Runs(NamedTuple):
    """Runs to be compared.

    Attributes:
        evaluations: the metrics of all evaluations of the finished runs (bytes of each
            kind as "bytes_sent.KIND"), with the run's folder as "run", its seed, and
            `fields`. An evaluation has a row for each panel that shows its run. This is
            one panel, or several if the run does not read a panel's field.
            "communicated" says whether an evaluation comes right after a communication.
            "test_accuracy_std" is the sample standard deviation over the agents. Where
            the runs have another metric, its name stands for "accuracy".
        panels: the config fields that vary and that say which problem is solved, on
            which data and on which graph. In a figure, each of their combinations has a
            panel.
        lines: the algorithm, and the other config fields that vary among the runs of an
            algorithm. A field is blank for an algorithm that does not read it.
        settings: a row for each algorithm, and a column for each field that varies
            with the algorithm alone.
        partitions: all different ones; those of further seeds come last.
        started: a row for each run and each panel that shows it, also for the runs that
            are left out, but not for copies: "run", its seed, `fields`, and whether the
            run is counted.
        left_out: a row for each run that is not counted: "run", its "state", the
            "reason", the mean metric of its last evaluation, its seed, and
            `fields`.
        metric: the metric of the runs.
    """

    evaluations: DataFrame
    panels: list[str]
    lines: list[str]
    settings: DataFrame
    partitions: list[Partition]
    started: DataFrame
    left_out: DataFrame
    metric: Metric = CLASSIFICATION.shown

    @property
    def fields(self) -> list[str]:
        """The fields in which the runs differ: those of panels, then those of lines."""
        return [*self.panels, *self.lines]


def describe(fields: Sequence[str], values: Sequence[Any]) -> str:
    """Fields and their values in a few words.

    A value that is clear without its field's name stands alone: "dimat, stay 0.1".
    Fields with blank values are left out.
    """

    def is_clear(field: str, value: str) -> bool:
        is_word = value.isidentifier() and value not in ("True", "False", "None")
        return is_word and not field.startswith("pretrain.")

    return ", ".join(
        value if is_clear(field, value) else f"{field} {value}"
        for field, value in zip(fields, map(str, values), strict=True)
        if value
    )


def load(directories: str | Path | Sequence[str | Path]) -> Runs:
    """Reads all runs in or below a folder, or several.

    Runs that have not finished, have diverged or are copies of other runs are listed in
    `left_out`, and nothing else is computed from them.

    Raises:
        UserError: a folder does not exist or holds no run, no run has finished, two
            finished runs have the same config and the same seed, or runs have different
            metrics.
    """
    if isinstance(directories, (str, Path)):
        directories = [directories]
    found = find_runs(directories)
    counted = [run for run in found if run.counts]
    evaluations = _evaluations_of(counted, found)
    metric = common_metric(counted)
    # The others may be copies, or their configs cannot be read.
    started = [run for run in found if run.fields and run.state != "copy"]
    read = _configs(started)
    panels, lines, settings = _varying(read)
    fields = [*panels, *lines]
    short = _short_names([*fields, *settings])
    described = _in_every_panel(read[[*fields, _REPEATS]], panels)
    # A field is missing for the runs that do not read it; in a report it is blank.
    described = described.fillna("").rename(columns=short)
    described = _by_panel(described, [short[field] for field in panels])
    by_algorithm = read.groupby("algorithm", sort=False)[settings].first()
    counts = pd.Series({run.folder: run.counts for run in started}, name="counted")
    return Runs(
        _by_panel(evaluations.join(described, on="run"), [short[f] for f in panels]),
        [short[field] for field in panels],
        [short[field] for field in lines],
        by_algorithm.fillna("").rename(columns=short),
        _partitions(read[read.index.map(counts)]),
        described.join(counts).rename_axis("run").reset_index(),
        _left_out(found, [*fields, _REPEATS], short),
        metric,
    )


def _by_panel(table: DataFrame, panels: list[str]) -> DataFrame:
    """Sorts rows by panels, and panels by the rows in which their values come first.

    Runs that go on side by side start in any order, but reports look alike.
    """
    if not panels:
        return table
    ranks = [pd.factorize(table[field])[0] for field in reversed(panels)]
    return table.iloc[np.lexsort(ranks)]


def _evaluations_of(counted: Sequence[FoundRun], found: Sequence[FoundRun]) -> Any:
    """All evaluations of the runs that are counted.

    Raises:
        UserError: no run is counted.
    """
    if not counted:
        lines = [f"{run.folder} is {run.state}: {run.reason}" for run in found]
        more = len(lines) - _MOST_LISTED
        lines[_MOST_LISTED:] = [f"and {more} more"] if more > 0 else []
        raise UserError("no run has finished\n    " + "\n    ".join(lines))
    frames = [_evaluations(run.rows).assign(run=run.folder) for run in counted]
    evaluations: DataFrame = pd.concat(frames, ignore_index=True)
    sent = evaluations.filter(like=SENT)
    # Where the kinds that a run counts sum up to its total, it sent nothing of other
    # kinds. Older runs did not count kinds.
    complete = sent.sum(axis=1) == evaluations.bytes_sent_total
    evaluations[list(sent)] = sent.mask(sent.isna() & complete.to_frame().to_numpy(), 0)
    return evaluations


def _configs(runs: Sequence[FoundRun]) -> DataFrame:
    """A row for each run, a column for each field that at least one of them reads.

    A field is missing for the runs that do not read it. A field that an older run's
    config lacks has its default.
    """
    configs = {run.folder: run.fields for run in runs}
    read: DataFrame = pd.DataFrame.from_dict(configs, orient="index")
    known = [option.path for option in every(ROOT) if option.path in read]
    # The options of a plugin that is not there come last.
    return read[[*known, *read.columns.difference(known)]]


def _left_out(
    found: Sequence[FoundRun], fields: list[str], short: dict[str, str]
) -> DataFrame:
    """The runs that are not counted, with the reasons."""
    rows = []
    for run in found:
        if not run.counts:
            metric = metric_of(run.rows[-1] if run.rows else {})
            last = run.rows[-1].get(metric.field()) if run.rows else None
            title = f"last {metric.words}{metric.unit}"
            rows.append(
                {
                    "run": run.folder,
                    "state": run.state,
                    "reason": run.reason,
                    title: "" if last is None else f"{metric.scale * last:.2f}",
                    **{short.get(f, f): run.fields.get(f, "") for f in fields},
                }
            )
    return pd.DataFrame(rows)


def _evaluations(rows: list[dict[str, Any]]) -> DataFrame:
    """A run's rows, with the bytes of each kind in columns of their own."""
    # The bytes of each kind get columns. Those of each link would get too many.
    nested = ["bytes_sent_by_kind", "bytes_sent_by_link"]
    kinds = pd.DataFrame([row.get("bytes_sent_by_kind", {}) for row in rows])
    frame = pd.DataFrame(rows).drop(columns=nested, errors="ignore")
    # As for seeds: the sample deviation (n - 1), which is NaN for a single agent.
    metric = metric_of(rows[0])
    values = frame[metric.field("")]
    frame[metric.field("std")] = values.map(lambda a: pd.Series(a).std())
    # Before the first round agents do not communicate, and rows do not mention it.
    frame["communicated"] = [row.get("communicated", False) for row in rows]
    return frame.join(kinds.add_prefix(SENT))


def _in_every_panel(described: DataFrame, panels: list[str]) -> DataFrame:
    """The runs' fields, in which a run that does not read a panel's field is repeated.

    Agents that train alone read no topology, for example. Such a run is a line in the
    panels of all topologies. A panel's own fields may be blank too: IID data have no
    alpha. So a combination of fields is a panel unless another combination has the
    same fields and more.

    Args:
        described: a row for each run; fields that a run does not read are missing.
        panels: the fields that make panels.
    """
    if not panels:
        return described
    known = {run: row[panels].dropna().to_dict() for run, row in described.iterrows()}
    combinations: list[dict[str, str]] = []
    for fields in known.values():
        if fields not in combinations:
            combinations.append(fields)
    shown = [
        fields
        for fields in combinations
        if not any(fields.items() < other.items() for other in combinations)
    ]
    rows = [
        pd.DataFrame([{**row, **panel}], index=[run])
        for run, row in described.iterrows()
        for panel in shown
        if known[run].items() <= panel.items()
    ]
    return pd.concat(rows)


def _varying(read: DataFrame) -> tuple[list[str], list[str], list[str]]:
    """Which fields vary: those of panels, those of lines, and algorithms' settings."""
    panels, lines, settings = [], ["algorithm"], []
    of_panels = _paths(*_PANELS)
    values = read.groupby("algorithm").nunique()
    for field in read.columns.difference(["algorithm", _REPEATS], sort=False):
        if not _varies(read, field):
            continue
        if field in of_panels:
            # Most runs pre-train on the partition on which they train later. The two
            # fields are then equal in all runs, and one of them is enough.
            if not any(read[field].equals(read[panel]) for panel in panels):
                panels.append(field)
        elif values[field].max() < 2:
            settings.append(field)
        else:
            lines.append(field)
    return panels, lines, settings


def _varies(read: DataFrame, field: str) -> bool:
    """Whether a field makes a difference between runs.

    It does so if it has several values. A partition or a graph also differs from the
    others by an option that only it has, such as alpha.
    """
    if read[field].nunique() > 1:
        return True
    if field == MIN_SAMPLES.path:
        return False  # It is 1 in most runs, where it changes nothing.
    roots = (root for root in (TOPOLOGY, PARTITION) if field in _paths(root)[1:])
    opener = next((root.path for root in roots), None)
    return opener in read and read[field][read[opener].notna()].nunique(False) > 1


def _short_names(fields: Sequence[str]) -> dict[str, str]:
    """By path: "data.partition" is "partition" where only one field ends like that."""
    endings = {field: field.rsplit(".", 1)[-1] for field in fields}
    # The rounds have the same fields as pre-training, and several sections have a
    # "name": the endings of these would be misread.
    endings |= {
        field: field
        for field, ending in endings.items()
        if field.startswith("pretrain.") or ending == "name"
    }
    times = Counter(endings.values())
    return {
        field: ending if times[ending] == 1 else field
        for field, ending in endings.items()
    }


def _partitions(configs: DataFrame) -> list[Partition]:
    """The partitions in the runs' partition.json, each once; older runs have none."""
    known = configs.columns.intersection(_SPLIT_BY)
    varying = [field for field in known if configs[field].nunique() > 1]
    found: dict[str, tuple[Partition, str]] = {}
    for run, config in configs.iterrows():
        path = Path(run) / "partition.json"
        if not path.exists():
            continue
        with reading(path):
            content = read_json(path)
            counts, classes = content["counts"], content["classes"]
            counts = np.array(counts, np.int64).tolist()
            classes = classes and [str(name) for name in classes]
        if len(counts) > 1:  # a single agent has everything: nothing is divided
            name = content["partition"]
            # The options of the partition, for example its alpha, are always shown.
            reads = PARTITIONS[name].reads if name in PARTITIONS else ()
            own = [option.path for option in reads if option is not MIN_SAMPLES]
            shown = [f for f in (*own, *varying) if f in config and f != _REPEATS]
            names = _short_names(["data.partition", *shown])
            title = describe(
                [names[field] for field in ("data.partition", *shown)],
                [name, *config[shown].fillna("")],
            )
            partition = Partition(title, counts, classes)
            found.setdefault(json.dumps(counts), (partition, config[_REPEATS]))
    times = Counter(partition.title for partition, _ in found.values())
    earlier, ranked = Counter(), []
    for partition, seed in found.values():
        title = partition.title
        if times[title] > 1:
            partition = partition._replace(title=f"{title}, {_REPEATS} {seed}")
        ranked.append((earlier[title], partition))
        earlier[title] += 1
    return [partition for _, partition in sorted(ranked, key=lambda pair: pair[0])]
