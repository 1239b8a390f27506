"""The report of a merge: tables, and a figure of the lines between the models."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dimat_jax.merge import Barrier
from dimat_jax.tasks import Metric

__all__ = ["Line", "figure", "markdown"]


class Line(NamedTuple):
    """The straight line between two models.

    Attributes:
        start: the name of the model at 0.
        end: the name of the model at 1.
        curves: the measurements on the line. Their names say how the models and the
            points were treated: "plain" or "aligned", and then perhaps ", recalibrated"
            or ", repaired".
    """

    start: str
    end: str
    curves: dict[str, Barrier]

    def as_json(self) -> dict[str, Any]:
        """Returns the line in the form of barrier.json."""
        curves = {name: curve._asdict() for name, curve in self.curves.items()}
        return {"from": self.start, "to": self.end, "curves": curves}


def markdown(
    scores: Mapping[str, tuple[float, float]],
    lines: Sequence[Line],
    merged: str,
    metric: Metric,
) -> str:
    """Writes the tables of the report as Markdown.

    Args:
        scores: the loss and the metric of each model and each average.
        lines: the lines between the models.
        merged: the name of the average that is saved.
        metric: the metric.
    """
    title = f"{metric.words}{metric.unit}"
    worst, of = ("lowest", np.min)
    if metric.better == "smaller":
        worst, of = "highest", np.max
    models = [
        {"model": name, title: f"{metric.scale * value:.2f}", "loss": f"{loss:.4f}"}
        for name, (loss, value) in scores.items()
    ]
    barriers = [
        {
            "from": line.start,
            "to": line.end,
            "line": name,
            "loss barrier": f"{curve.barrier:.4f}",
            f"{worst} {title}": f"{metric.scale * of(curve.accuracies):.2f}",
        }
        for line in lines
        for name, curve in line.curves.items()
    ]
    if not scores:
        return f"Saved: the {merged}.\n"
    return (
        f"## Test {metric.words} and loss\n\n{_table(models)}\n\n"
        f"Saved: the {merged}.\n\n"
        f"## On the straight lines\n\n{_table(barriers)}\n"
    )


def _table(rows: Sequence[dict[str, str]]) -> str:
    # The numbers are formatted already.
    return str(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True))


def figure(lines: Sequence[Line], path: Path, metric: Metric) -> None:
    """Draws loss and metric along each line.

    A curve is solid if its points were mended, and dashed otherwise.
    """
    fig = Figure(figsize=(4.8 * len(lines), 5.6), layout="constrained")
    axes = fig.subplots(2, len(lines), sharex=True, sharey="row", squeeze=False)
    for (losses, accuracies), line in zip(axes.T, lines, strict=True):
        for name, curve in line.curves.items():
            form, _, mended = name.partition(", ")
            style: dict[str, Any] = {
                "color": "C0" if form == "aligned" else "C3",
                "linestyle": "-" if mended else "--",
                "marker": ".",
                "lw": 1.4,
                "label": name,
            }
            losses.plot(curve.ts, curve.losses, **style)
            accuracies.plot(
                curve.ts, metric.scale * np.asarray(curve.accuracies), **style
            )
        losses.set_title(f"{line.start} (0) to {line.end} (1)", fontsize=10)
        accuracies.set_xlabel("position on the straight line")
    axes[0, 0].set_ylabel(metric.loss)
    axes[1, 0].set_ylabel(f"test {metric.words}{metric.unit}")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=8)
    fig.savefig(path, dpi=150)
