"""Tables and figures of runs, or of sweeps of them.

    python -m experiments.report DIR [DIR ...]

Every folder in or below DIR that holds a metrics.jsonl is a run. Writes report.md,
report.csv and accuracy.png into the first DIR, bytes.png too if anything was sent, and
partition.png if the runs say who holds what; prints the tables.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dimat_jax.errors import UserError
from experiments import figures, program
from experiments.runs import PHASES, SENT, Frame, Runs, describe, load

__all__ = ["tables", "write"]

# More than these make a table too wide, and a figure too small.
_MOST_ROUNDS = 20
_MOST_PARTITIONS = 6
_NOTHING: Frame = pd.DataFrame()


def tables(runs: Runs) -> dict[str, Frame]:
    """The tables of a report, by title. Accuracies are in %, means over seeds."""
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
    at_the_end, after_the_last = _grid(runs, "trained"), _grid(runs, "merged")
    if after_the_last.equals(at_the_end):
        after_the_last = _NOTHING
    result = {
        "Mean test accuracy of the agents (%)": final.round(2),
        "Mean test accuracy at the end (%), and MB sent": at_the_end,
        "Right after the last communication (%), and MB sent": after_the_last,
        "Right after the merge, by round (%)": _by_round(runs),
        "MB sent, by kind": _by_kind(runs),
        "Agents that were away, in the rounds evaluated": _absences(runs),
        "Settings by algorithm": runs.settings,
    }
    return {title: table for title, table in result.items() if table.size}


def _by_phase(evaluations: Frame, fields: list[str]) -> Frame:
    """A column for each phase."""
    groups = evaluations.groupby([*fields, "phase"], sort=False)
    frame = _over_seeds(groups.test_accuracy_mean, 2).unstack("phase")
    return frame[[phase for phase in PHASES if phase in frame]]


def _over_seeds(groups: Any, digits: int) -> Any:
    """Grouped accuracies as text: mean in %, ± deviation where there are several."""
    mean, deviation = (
        # As text even if there is none: what is empty would stay numbers.
        (100 * numbers).map(f"{{:.{digits}f}}".format).astype(object)
        for numbers in (groups.mean(), groups.std())
    )
    return mean.where(groups.size() == 1, mean + " ± " + deviation)


def _grid(runs: Runs, phase: str) -> Frame:
    """Each run's last evaluation of a phase: a row for each line, a column per panel.

    Nothing where there is but one panel.
    """
    if not runs.panels:
        return _NOTHING
    evaluations = runs.evaluations
    last = evaluations[evaluations.phase == phase].groupby("run").tail(1)
    groups = last.groupby([*runs.lines, *runs.panels], sort=False)
    accuracy = _over_seeds(groups.test_accuracy_mean, 1)
    sent = (groups.bytes_sent_total.mean() / 1e6).map(_megabytes)
    grid = (accuracy + " (" + sent + ")").unstack(runs.panels).fillna("")
    panels = grid.columns.to_frame().itertuples(index=False)
    return grid.set_axis([describe(runs.panels, values) for values in panels], axis=1)


def _megabytes(number: float) -> str:
    return f"{number:.0f} MB" if number >= 100 else f"{number:.3g} MB"


def _by_round(runs: Runs) -> Frame:
    """A column for each round, evenly thinned out where there are very many."""
    merged = runs.evaluations[runs.evaluations.phase == "merged"]
    groups = merged.groupby([*runs.fields, "round"], sort=False).test_accuracy_mean
    frame = (100 * groups.mean()).unstack("round").sort_index(axis=1).round(1)
    n_shown = min(len(frame.columns), _MOST_ROUNDS)
    shown = np.linspace(0, len(frame.columns) - 1, n_shown).round().astype(int)
    return frame.iloc[:, shown]


def _by_kind(runs: Runs) -> Frame:
    """Until the end, a column for each kind; nothing where all is of one kind."""
    last = runs.evaluations.groupby("run").tail(1)
    kinds = last.filter(like=SENT)
    kinds = kinds.loc[:, kinds.max() > 0]
    if len(kinds.columns) < 2:
        return _NOTHING
    sent = last.groupby(runs.fields, sort=False)[list(kinds)].mean() / 1e6
    return sent.round(3).rename(columns=lambda kind: kind.removeprefix(SENT))


def _absences(runs: Runs) -> Frame:
    """How many agent-rounds were missed; nothing where nobody was ever away."""
    if "present" not in runs.evaluations:
        return _NOTHING
    rounds = runs.evaluations[runs.evaluations.phase != "pretrained"]
    # A round's evaluations have the same agents.
    rounds = rounds.dropna(subset="present").drop_duplicates(["run", "round"])
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


def write(directories: Sequence[str | Path], out: str | Path) -> list[Path]:
    """Writes the report of all runs in `directories` into `out`; returns its files."""
    out = Path(out)
    runs = load(directories)
    text = "\n\n".join(
        f"## {title}\n\n{frame.reset_index().to_markdown(index=False)}"
        for title, frame in tables(runs).items()
    )
    files = [out / "report.md", out / "report.csv", out / "accuracy.png"]
    files[0].write_text(f"{text}\n")
    runs.evaluations.to_csv(files[1], index=False)
    figures.accuracy_figure(runs, files[2])
    if runs.evaluations.bytes_sent_total.any():
        files.append(out / "bytes.png")
        figures.bytes_figure(runs, files[-1])
    if runs.partitions:
        files.append(out / "partition.png")
        shown, n_all = runs.partitions[:_MOST_PARTITIONS], len(runs.partitions)
        note = f"{len(shown)} of {n_all} partitions" if n_all > len(shown) else ""
        figures.partition_figures(shown, files[-1], note)
    return files


def main(directories: list[str]) -> None:
    """Prints the tables and names the files."""
    if not directories:
        raise UserError("usage: python -m experiments.report DIR [DIR ...]")
    report, *others = write(directories, directories[0])
    print(report.read_text())
    for path in (report, *others):
        print(f"wrote {path}")


if __name__ == "__main__":
    program.run(main)
