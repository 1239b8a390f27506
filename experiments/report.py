"""Tables and figures of runs, or of sweeps of them.

    python -m experiments.report DIR [DIR ...]

Every folder in or below DIR that holds a metrics.jsonl is a run. Writes report.md,
report.csv and accuracy.png into the first DIR, and prints the tables.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

# Figures go to files; a machine without a display must do.
matplotlib.use("agg")

import matplotlib.pyplot as plt  # noqa: E402
import pandas as pd  # noqa: E402

from dimat_jax.algorithms import ALIGNING, WATCHING  # noqa: E402
from dimat_jax.config import substance  # noqa: E402
from dimat_jax.errors import UserError  # noqa: E402
from dimat_jax.metrics import read_rows  # noqa: E402
from experiments import program  # noqa: E402

__all__ = ["load", "tables", "write"]

# A pandas.DataFrame. Its indexing may return nearly anything, as type checkers see it.
Frame = Any

# What runs are repeated over, not compared by.
_REPEATS = ("seed",)
# The fields that make a panel of the figure; the others make a line.
_PANELS = ["partition", "topology"]
# Fields that say nothing of other algorithms than these.
_READ_BY = {
    "merge.frame": ALIGNING,
    "merge.stay": ALIGNING,
    "merge.match_data": WATCHING,
    "merge.match_samples": WATCHING,
}
_PHASES = ("pretrained", "merged", "trained")


def load(directories: Sequence[str | Path]) -> tuple[Frame, list[str]]:
    """Reads all runs.

    Returns:
        a frame with a row for each evaluation: the metrics, the run's folder as "run",
        its seed, and the config fields that not all runs share; and these fields.

    Raises:
        UserError: a folder that does not exist, or holds no run.
    """
    frames, configs = [], {}
    for directory in map(Path, directories):
        runs = [
            path.parent
            for path in directory.rglob("metrics.jsonl")
            if path.with_name("config.json").exists()
        ]
        if not runs:
            raise UserError(f"no run (no metrics.jsonl) in or below {directory}")
        # In the order in which they were started: a sweep's own.
        for run in sorted(runs, key=lambda run: (run / "config.json").stat().st_mtime):
            if rows := read_rows(run):  # a run that has just started has none
                config = json.loads((run / "config.json").read_text())
                configs[str(run)] = substance(config)
                frames.append(pd.DataFrame(rows).assign(run=str(run)))
    if not frames:
        raise UserError(
            f"no run in {', '.join(map(str, directories))} got anywhere yet"
        )
    table: Frame = pd.DataFrame.from_dict(configs, orient="index").astype(str)
    varying = [
        field for field in table if field not in _REPEATS and table[field].nunique() > 1
    ]
    fields = ["algorithm", *(field for field in varying if field != "algorithm")]
    fields.sort(key=lambda field: field.rsplit(".", 1)[-1] not in _PANELS)
    # "data.partition" is "partition" where no other field ends like that.
    last = [field.rsplit(".", 1)[-1] for field in fields]
    short = {
        field: name if last.count(name) == 1 else field
        for field, name in zip(fields, last, strict=True)
    }
    for field in set(fields).intersection(_READ_BY):
        table.loc[~table.algorithm.isin(_READ_BY[field]), field] = ""
    described: Frame = table[[*fields, *_REPEATS]].rename(columns=short)
    evaluations: Frame = pd.concat(frames, ignore_index=True).join(described, on="run")
    return evaluations, list(short.values())


def tables(evaluations: Frame, fields: list[str]) -> dict[str, Frame]:
    """The tables of a report, by title. Accuracies are in %, means over seeds."""
    merged = evaluations[evaluations.phase == "merged"]
    last_round = evaluations.groupby("run")["round"].transform("max")
    last = evaluations[evaluations["round"] == last_round]
    names = {phase: f"{phase} (last round)" for phase in ("merged", "trained")}
    latest = last[last.phase != "pretrained"]
    start = evaluations[evaluations.phase == "pretrained"]
    final = _by_phase(start, fields).join(
        _by_phase(latest, fields).rename(columns=names), how="left"
    )
    totals = last[last.phase == "trained"].groupby(fields, sort=False)
    final["MB sent"] = totals.bytes_sent_total.mean() / 1e6
    final["comm rounds"] = totals.comm_rounds_total.mean()
    final["seconds"] = totals.seconds_total.mean()
    result = {"Mean test accuracy of the agents (%)": final.round(2)}
    if len(merged):
        by_round = merged.groupby([*fields, "round"], sort=False)
        accuracy = (100 * by_round.test_accuracy_mean.mean()).unstack("round")
        result["Right after the merge, by round (%)"] = accuracy.round(1)
    return result


def _by_phase(evaluations: Frame, fields: list[str]) -> Frame:
    """Accuracies in %, a column for each phase, as mean ± deviation over seeds."""
    groups = evaluations.groupby([*fields, "phase"], sort=False).test_accuracy_mean
    text = (100 * groups.mean()).map("{:.2f}".format)
    if groups.size().max() > 1:
        text += " ± " + (100 * groups.std()).map("{:.2f}".format)
    frame = text.unstack("phase")
    return frame[[phase for phase in _PHASES if phase in frame]]


def figure(evaluations: Frame, fields: list[str], path: Path) -> None:
    """Accuracy over local training; a merge is a vertical step, marked where it ends.

    The band reaches from the worst agent to the best.
    """
    panels = [field for field in _PANELS if field in fields]
    lines = [field for field in fields if field not in panels]
    groups = (
        list(evaluations.groupby(panels, sort=False)) if panels else [((), evaluations)]
    )
    n_columns = min(len(groups), 2)
    n_rows = -(-len(groups) // n_columns)
    fig, axes = plt.subplots(
        n_rows,
        n_columns,
        figsize=(5.2 * n_columns, 3.4 * n_rows),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (values, panel) in zip(axes.flat, groups, strict=False):
        for color, (names, line) in enumerate(panel.groupby(lines, sort=False)):
            _draw(axis, line, ", ".join(filter(None, map(str, names))), f"C{color}")
        axis.set_title(", ".join(map(str, values)), fontsize=10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("rounds of local training")
    for axis in axes[:, 0]:
        axis.set_ylabel("test accuracy (%)")
    axes[0, 0].legend(frameon=False)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def _draw(axis, line: Frame, label: str, color: str) -> None:
    line = line.assign(
        low=line.test_accuracy.map(min),
        high=line.test_accuracy.map(max),
        phase=pd.Categorical(line.phase, _PHASES),
    )
    # A merge happens where the round before it ended.
    line["rounds"] = line["round"] - (line.phase == "merged")
    order = ["rounds", "round", "phase"]
    scores = ["test_accuracy_mean", "low", "high"]
    mean = 100 * line.groupby(order, observed=True)[scores].mean()
    steps = mean.index.get_level_values("rounds")
    axis.plot(steps, mean.test_accuracy_mean, color=color, label=label, lw=1.4)
    axis.fill_between(steps, mean.low, mean.high, color=color, alpha=0.12, lw=0)
    merged = mean.index.get_level_values("phase") == "merged"
    axis.plot(steps[merged], mean.test_accuracy_mean[merged], ".", color=color, ms=6)


def write(directories: Sequence[str | Path], out: str | Path) -> list[Path]:
    """Writes the report of all runs in `directories` into `out`; returns its files."""
    out = Path(out)
    evaluations, fields = load(directories)
    text = "\n\n".join(
        f"## {title}\n\n{frame.reset_index().to_markdown(index=False)}"
        for title, frame in tables(evaluations, fields).items()
    )
    files = [out / "report.md", out / "report.csv", out / "accuracy.png"]
    files[0].write_text(f"{text}\n")
    evaluations.to_csv(files[1], index=False)
    figure(evaluations, fields, files[2])
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
