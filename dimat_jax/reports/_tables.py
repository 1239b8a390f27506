"""The tables of a report."""

from typing import Any

import numpy as np
import pandas as pd

from dimat_jax.reports._runs import PHASES, SENT, DataFrame, Runs, describe

__all__ = ["tables"]

# More rounds than these would make a table too wide.
_MOST_ROUNDS = 20
# A table that is left out of the report.
_EMPTY: DataFrame = pd.DataFrame()


def tables(runs: Runs) -> dict[str, DataFrame]:
    """The tables of a report, by title.

    Accuracies are in %, and are means over the agents and over the seeds. A table that
    would be empty is left out.
    """
    evaluations, fields = runs.evaluations, runs.fields
    last_round = evaluations.groupby("run")["round"].transform("max")
    last = evaluations[evaluations["round"] == last_round]
    names = {phase: f"{phase} (last round)" for phase in ("merged", "trained")}
    start = evaluations[evaluations.phase == "pretrained"]
    final = _by_phase(start, fields).join(
        _by_phase(last[last.phase != "pretrained"], fields).rename(columns=names),
        how="left",
    )
    totals = last[last.phase == "trained"].groupby(fields, sort=False)
    final["MB sent"] = totals.bytes_sent_total.mean() / 1e6
    final["comm rounds"] = totals.comm_rounds_total.mean()
    final["seconds"] = totals.seconds_total.mean()
    at_the_end = _grid(runs, "trained")
    after_merge = _grid(runs, "merged")
    if after_merge.equals(at_the_end):
        after_merge = _EMPTY
    result = {
        "Mean test accuracy of the agents (%)": final.round(2),
        "Mean test accuracy at the end (%), and MB sent": at_the_end,
        "Right after the last communication (%), and MB sent": after_merge,
        "Right after the merge, by round (%)": _by_round(runs),
        "MB sent, by kind": _by_kind(runs),
        "Agents that were away, in the rounds evaluated": _absences(runs),
        "Settings by algorithm": runs.settings,
    }
    return {title: table for title, table in result.items() if table.size}


def _by_phase(evaluations: DataFrame, fields: list[str]) -> DataFrame:
    """Accuracies, in a table that has a column for each phase."""
    groups = evaluations.groupby([*fields, "phase"], sort=False)
    table = _over_seeds(groups.test_accuracy_mean, 2).unstack("phase")
    return table[[phase for phase in PHASES if phase in table]]


def _over_seeds(groups: Any, digits: int) -> Any:
    """Grouped accuracies as text: the mean in %, ± the deviation over several seeds."""
    mean, deviation = (
        # An empty column of numbers would stay numeric and could not be joined as text.
        (100 * numbers).map(f"{{:.{digits}f}}".format).astype(object)
        for numbers in (groups.mean(), groups.std())
    )
    return mean.where(groups.size() == 1, mean + " ± " + deviation)


def _grid(runs: Runs, phase: str) -> DataFrame:
    """Each run's last evaluation of a phase: a row for each line, a column per panel.

    The table is empty if there is only one panel.
    """
    if not runs.panels:
        return _EMPTY
    evaluations = runs.evaluations
    found = evaluations[evaluations.phase == phase]
    # A run that is shown in several panels has a last evaluation in each of them.
    last = found.groupby(["run", *runs.panels]).tail(1)
    groups = last.groupby([*runs.lines, *runs.panels], sort=False)
    accuracy = _over_seeds(groups.test_accuracy_mean, 1)
    sent = (groups.bytes_sent_total.mean() / 1e6).map(_megabytes)
    grid = (accuracy + " (" + sent + ")").unstack(runs.panels).fillna("")
    panels = grid.columns.to_frame().itertuples(index=False)
    return grid.set_axis([describe(runs.panels, values) for values in panels], axis=1)


def _megabytes(number: float) -> str:
    return f"{number:.0f} MB" if number >= 100 else f"{number:.3g} MB"


def _by_round(runs: Runs) -> DataFrame:
    """Accuracies after the merge, with a column for each round.

    If there are many rounds, only some of them, evenly spaced, have a column.
    """
    merged = runs.evaluations[runs.evaluations.phase == "merged"]
    groups = merged.groupby([*runs.fields, "round"], sort=False).test_accuracy_mean
    table = (100 * groups.mean()).unstack("round").sort_index(axis=1).round(1)
    n_shown = min(len(table.columns), _MOST_ROUNDS)
    shown = np.linspace(0, len(table.columns) - 1, n_shown).round().astype(int)
    return table.iloc[:, shown]


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
    return sent.round(3).rename(columns=lambda kind: kind.removeprefix(SENT))


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
