"""Writes a report: the tables as Markdown, all evaluations as CSV, and the figures."""

from collections.abc import Sequence
from pathlib import Path

from dimat_jax.reports._figures import accuracy_figure, bytes_figure, partition_figure
from dimat_jax.reports._runs import load
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
        the files: report.md, report.csv and accuracy.png; bytes.png too if anything was
        sent, and partition.png if the runs say which agent holds which samples.

    Raises:
        UserError: a folder that does not exist, or that holds no run; no run that has
            finished; or two different runs of the same config and seed.
    """
    out = Path(out)
    runs = load(directories)
    out.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(
        f"## {title}\n\n{table.reset_index().to_markdown(index=False)}"
        for title, table in tables(runs).items()
    )
    files = [out / "report.md", out / "report.csv", out / "accuracy.png"]
    files[0].write_text(f"{CONVENTION}\n\n{text}\n")
    runs.evaluations.to_csv(files[1], index=False)
    accuracy_figure(runs, files[2])
    if runs.evaluations.bytes_sent_total.any():
        files.append(out / "bytes.png")
        bytes_figure(runs, files[-1])
    if runs.partitions:
        files.append(out / "partition.png")
        shown, n_all = runs.partitions[:_MOST_PARTITIONS], len(runs.partitions)
        note = f"{len(shown)} of {n_all} partitions" if n_all > len(shown) else ""
        partition_figure(shown, files[-1], note)
    return files
