"""The tables of a report."""

from typing import Any

import numpy as np
import pandas as pd

from dimat_jax.reports._runs import SENT, DataFrame, Runs, describe
from dimat_jax.tasks import Metric

__all__ = ["CONVENTION", "tables"]

CONVENTION = (
    "Accuracies and other metrics are means over the agents, and then over the seeds. "
    "n is the number of seeds whose run has finished; n=3 of 5 means that the runs of "
    "2 more seeds have begun and are not counted. What follows ± is the standard "
    "deviation over the seeds. All deviations, over seeds and over agents, are sample "
    "deviations: they divide by the number minus one."
)
"""What the numbers of all tables and figures mean."""

# More rounds than these would make a table too wide.
_MOST_ROUNDS = 20
# A table that is left out of the report.
_EMPTY: DataFrame = pd.DataFrame()


def tables(runs: Runs) -> dict[str, DataFrame]:
    """The tables of a report, by title.

    Accuracies are in %. Metrics are means over the agents and over the seeds. Each cell
    with a mean, or its row, has the number n of seeds. A table that would be empty is
    left out.
    """
    at_the_end = _grid(runs, runs.evaluations.phase == "trained")
    communicated = _grid(runs, runs.evaluations.communicated)
    if communicated.equals(at_the_end):
        communicated = _EMPTY
    left_out = runs.left_out
    if len(left_out):
        left_out = left_out.set_index("run")
    words, unit = runs.metric.words, runs.metric.unit
    result = {
        "Runs that are not counted": left_out,
        f"Mean test {words} of the agents{unit}": _overview(runs),
        f"Mean test {words} at the end{unit}, and MB sent": at_the_end,
        f"Right after the last communication{unit}, and MB sent": communicated,
        f"Right after each communication, by round{unit}": _by_round(runs),
        "The agents at the end": _agents(runs),
        "MB sent, by kind": _by_kind(runs),
        "Agents that were away or not drawn, in the rounds evaluated": _absences(runs),
        "Settings by algorithm": runs.settings,
    }
    return {title: table for title, table in result.items() if table.size}


def _overview(runs: Runs) -> DataFrame:
    """A row for each line of each panel, also where no run has finished."""
    evaluations, fields = runs.evaluations, runs.fields
    last = _last(runs, evaluations.phase == "trained")
    communicated = _last(runs, evaluations.communicated)
    columns = {
        "pretrained": evaluations[evaluations.phase == "pretrained"],
        "after the last communication": communicated,
        "trained (last round)": last,
    }
    average, mean = runs.metric.field("average_model"), runs.metric.field()
    if average in communicated:
        rows = communicated.assign(**{mean: communicated[average]})
        rows = rows.dropna(subset=mean)
        columns["the average model, after the last communication"] = rows
    begun = _numbers(runs)
    final = pd.DataFrame(index=begun.index)
    for name, rows in columns.items():
        if rows.empty:
            continue
        groups = rows.groupby(fields, sort=False)
        final[name] = _with_numbers(_over_seeds(groups, 2, runs.metric), begun)
    totals = last.groupby(fields, sort=False)
    final["MB sent"] = (totals.bytes_sent_total.mean() / 1e6).round(2)
    final["comm rounds"] = totals.comm_rounds_total.mean().round(2)
    final["seconds"] = totals.seconds_total.mean().round(2)
    return final


def _last(runs: Runs, chosen: Any) -> DataFrame:
    """The last of the chosen evaluations of each run, in each panel that shows it."""
    return runs.evaluations[chosen].groupby(["run", *runs.panels]).tail(1)


def _numbers(runs: Runs) -> Any:
    """The number of seeds of each line of each panel, e.g. "n=3" or "n=3 of 5"."""
    groups = runs.started.groupby(runs.fields, sort=False)
    counted, begun = groups.counted.sum(), groups.seed.nunique()
    return pd.Series(
        [f"n={n}" + f" of {m}" * (m > n) for n, m in zip(counted, begun, strict=True)],
        index=counted.index,
    )


def _with_numbers(cells: Any, numbers: Any, more: Any = "") -> Any:
    """Cells with their numbers of seeds, also where no run has finished."""
    cells = cells.reindex(numbers.index)
    full = (cells + " (" + numbers + more + ")").fillna("")
    return full.where(~numbers.str.startswith("n=0"), "none (" + numbers + ")")


def _over_seeds(groups: Any, digits: int, metric: Metric) -> Any:
    """Grouped metrics as text: the mean, ± the deviation over several seeds."""
    values = groups[metric.field()]
    mean, deviation = (
        # An empty column of numbers would stay numeric and could not be joined as text.
        (metric.scale * numbers).map(f"{{:.{digits}f}}".format).astype(object)
        for numbers in (values.mean(), values.std())
    )
    return mean.where(groups.size() == 1, mean + " ± " + deviation)


def _grid(runs: Runs, chosen: Any) -> DataFrame:
    """Each run's last chosen evaluation: a row for each line, a column for each panel.

    The table is empty if there is only one panel.
    """
    if not runs.panels:
        return _EMPTY
    groups = _last(runs, chosen).groupby(runs.fields, sort=False)
    begun = _numbers(runs)
    sent = "; " + (groups.bytes_sent_total.mean() / 1e6).map(_megabytes)
    values = _over_seeds(groups, 1, runs.metric)
    cells = _with_numbers(values, begun, sent.reindex(begun.index))
    grid = cells.unstack(runs.panels).fillna("")
    panels = grid.columns.to_frame().itertuples(index=False)
    return grid.set_axis([describe(runs.panels, values) for values in panels], axis=1)


def _megabytes(number: float) -> str:
    return f"{number:.0f} MB" if number >= 100 else f"{number:.3g} MB"


def _by_round(runs: Runs) -> DataFrame:
    """Accuracies right after a communication, with a column for each round.

    If there are many rounds, only some of them, evenly spaced, have a column. A cell is
    empty if not all seeds have an evaluation in that round.
    """
    rows = runs.evaluations[runs.evaluations.communicated]
    groups = rows.groupby([*runs.fields, "round"], sort=False)[runs.metric.field()]
    means = runs.metric.scale * groups.mean()
    table = means.unstack("round").sort_index(axis=1).round(1)
    n_shown = min(len(table.columns), _MOST_ROUNDS)
    shown = np.linspace(0, len(table.columns) - 1, n_shown).round().astype(int)
    return _numbered(runs, table.iloc[:, shown])


def _numbered(runs: Runs, table: DataFrame) -> DataFrame:
    """A table with a first column for the number of seeds."""
    numbers = _numbers(runs).str.removeprefix("n=").reindex(table.index)
    table.insert(0, "n", numbers)
    return table


def _agents(runs: Runs) -> DataFrame:
    """How the agents of a run differ at the end, as means over the seeds."""
    last = _last(runs, runs.evaluations.phase == "trained")
    metric = runs.metric
    last = last[last[metric.field("")].map(len) > 1]
    if last.empty:
        return _EMPTY
    values, words, unit = last[metric.field("")], metric.words, metric.unit
    columns = {
        f"lowest {words}{unit}": metric.scale * values.map(min),
        f"highest {words}{unit}": metric.scale * values.map(max),
        f"deviation over the agents{unit}": metric.scale * last[metric.field("std")],
    }
    measures = {
        "test_disagreement": ("disagreement (%)", 100),
        "test_loss_mean": ("loss", 1),
        "consensus_distance": ("consensus distance", 1),
        "consensus_distance_aligned": ("consensus distance, aligned", 1),
    }
    for name, (title, scale) in measures.items():
        if name in last:
            columns[title] = scale * last[name]
    fields = {field: last[field] for field in runs.fields}
    table: DataFrame = pd.DataFrame({**fields, **columns})
    means = table.groupby(runs.fields, sort=False)[list(columns)].mean()
    return _numbered(runs, means.round(2))


def _by_kind(runs: Runs) -> DataFrame:
    """Bytes sent until the end, with a column for each kind of message.

    The table is empty if all messages are of one kind.
    """
    last = runs.evaluations.groupby(["run", *runs.panels]).tail(1)
    kinds = last.filter(like=SENT)
    kinds = kinds.loc[:, kinds.max() > 0]
    if len(kinds.columns) < 2:
        return _EMPTY
    sent = last.groupby(runs.fields, sort=False)[list(kinds)].mean() / 1e6
    sent = sent.round(3).rename(columns=lambda kind: kind.removeprefix(SENT))
    return _numbered(runs, sent)


def _absences(runs: Runs) -> DataFrame:
    """How many agent-rounds were missed; empty if no agent was ever away."""
    if "present" not in runs.evaluations:
        return _EMPTY
    rounds = runs.evaluations[runs.evaluations.phase != "pretrained"]
    # All evaluations of a round have the same agents present.
    rounds = rounds.dropna(subset="present").drop_duplicates(
        ["run", "round", *runs.panels]
    )
    counted = rounds.assign(
        missed=rounds.present.map(lambda present: present.count(False)),
        total=rounds.present.map(len),
    )
    sums = counted.groupby(runs.fields, sort=False)[["missed", "total"]].sum()
    sums = sums[sums.missed > 0]
    share = (100 * sums.missed / sums.total).round(1)
    return sums.assign(share=share).rename(
        columns={"missed": "agent-rounds missed", "total": "of", "share": "share (%)"}
    )
