"""Writes a report: a page, tables, all evaluations, and figures."""

from collections.abc import Sequence
from pathlib import Path

from dimat_jax.reports._agents import class_maps
from dimat_jax.reports._curves import measured
from dimat_jax.reports._figures import curves_figure
from dimat_jax.reports._latex import latex
from dimat_jax.reports._maps import agents_figure, classes_figure, partition_figure
from dimat_jax.reports._page import page
from dimat_jax.reports._runs import Runs, load
from dimat_jax.reports._tables import CONVENTION, tables

__all__ = ["write"]

# More partitions than these would make the figure too small to read.
_MOST_PARTITIONS = 6


def write(directories: Sequence[str | Path], out: str | Path) -> list[Path]:
    """Writes the report of all runs in `directories` into `out`.

    Files of an earlier report in this folder are replaced.

    Args:
        directories: every folder in or below one of them that holds a metrics.jsonl is
            a run.
        out: the folder of the report. It is made if it is missing.

    Returns:
        the files. report.md has the tables, report.html all tables and figures in one
        page that needs nothing else, report.tex the tables for LaTeX, and report.csv
        all evaluations of the runs that count. There is a figure over the rounds for
        each measure that the runs have: accuracy.png (named after the metric),
        average.png, local.png, loss.png, consensus.png, aligned.png and
        disagreement.png. The metric is also drawn over time, in seconds.png, and over
        bytes, in bytes.png, if anything was sent.
        agents.png shows the agents one by one, classes.png their accuracy on each class
        (if it was measured), and partition.png which agent holds which samples (if the
        runs say so).

    Raises:
        UserError: a folder that does not exist, or that holds no run; no run that has
            finished; or two different runs of the same config and seed.
    """
    out = Path(out)
    runs = load(directories)
    out.mkdir(parents=True, exist_ok=True)
    content = tables(runs)
    text = "\n\n".join(
        f"## {title}\n\n{table.reset_index().to_markdown(index=False)}"
        for title, table in content.items()
    )
    texts = {
        "report.md": f"{CONVENTION}\n\n{text}\n",
        "report.html": page(runs),
        "report.tex": latex(content),
        "report.csv": runs.evaluations.to_csv(index=False),
    }
    for name, written in texts.items():
        (out / name).write_text(written, encoding="utf-8")
    return [out / name for name in texts] + _write_figures(runs, out)


def _write_figures(runs: Runs, out: Path) -> list[Path]:
    """Writes the figures for which there is something to show."""
    curves = {name: (name, "rounds") for name in measured(runs)}
    if runs.evaluations.bytes_sent_total.any():
        curves["bytes"] = ("", "bytes")
    curves["seconds"] = ("", "seconds")
    files = [out / f"{name}.png" for name in curves]
    for path, (measure, against) in zip(files, curves.values(), strict=True):
        curves_figure(runs, path, measure=measure, against=against)
    files.append(out / "agents.png")
    agents_figure(runs, files[-1])
    if class_maps(runs):
        files.append(out / "classes.png")
        classes_figure(runs, files[-1])
    if runs.partitions:
        files.append(out / "partition.png")
        shown, n_all = runs.partitions[:_MOST_PARTITIONS], len(runs.partitions)
        note = f"{len(shown)} of {n_all} partitions" if n_all > len(shown) else ""
        partition_figure(shown, files[-1], note)
    return files
