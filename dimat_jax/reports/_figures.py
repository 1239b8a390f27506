"""The figures of a report whose curves compare algorithms.

They are made without pyplot, which would choose a backend for the whole process.
"""

import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from dimat_jax.reports._curves import Chart, Curve, Line, chart
from dimat_jax.reports._looks import look
from dimat_jax.reports._runs import Runs
from dimat_jax.reports._shown import ShownFigure

__all__ = ["accuracy_figure", "bytes_figure", "captioned", "curves_figure", "finished"]

# Bands of more lines than these would hide each other.
_MOST_BANDS = 6
# A legend has at most this number of lines in a column.
_MOST_IN_A_COLUMN = 40
# A label that is longer goes on in the next line of the legend.
_LABEL_WIDTH = 44
# The size of a panel in inches, and how many panels are side by side.
_PANEL = (5.2, 3.4)
_MOST_BESIDE = 2
# A curve has about this number of marks.
_MARKS = 12


def accuracy_figure(runs: Runs, path: str | Path | None = None) -> Figure:
    """Draws accuracy over the rounds: `curves_figure` with its defaults.

    Args:
        runs: the runs to compare.
        path: the file to write, if any.
    """
    return curves_figure(runs, path)


def bytes_figure(runs: Runs, path: str | Path | None = None) -> Figure:
    """Draws accuracy over the bytes that all agents together have sent.

    Args:
        runs: the runs to compare. Some of them must have sent something.
        path: the file to write, if any.
    """
    return curves_figure(runs, path, against="bytes")


def curves_figure(
    runs: Runs,
    path: str | Path | None = None,
    *,
    measure: str = "",
    against: str = "rounds",
) -> Figure:
    """Draws curves that compare the algorithms, in a panel for each problem.

    An algorithm has one curve with marks: the values right after each communication,
    as means over the agents and the seeds. A lighter curve has the values after the
    local training of each round. Where lines are few, a band is one sample standard
    deviation over the seeds wide on both sides. The text below says all of this. The
    legend is beside the panels, and the figure is as large as it takes.

    A curve over bytes begins with the first bytes that are sent. The final value of
    agents that never send anything is a dashed horizontal line.

    Args:
        runs: the runs to compare.
        path: the file to write, if any.
        measure: the runs' metric by its name, as "accuracy" (the default); "loss",
            "consensus" (the consensus distance), "aligned" (the same after alignment),
            "disagreement", "average" (the metric of the average model) or "local" (the
            accuracy on test images like an agent's own).
        against: "rounds", "bytes" or "seconds".
    """
    content = chart(runs, measure, against)
    n_columns = min(len(content.panels), _MOST_BESIDE)
    n_rows = -(-len(content.panels) // n_columns)
    fig = ShownFigure(layout="constrained")
    axes = fig.subplots(n_rows, n_columns, sharex=True, squeeze=False)
    bands = content.has_bands and len(content.labels) <= _MOST_BANDS
    for axis, panel in zip(axes.flat, content.panels, strict=False):
        for line in panel.lines:
            _draw(axis, line, content.logarithmic, bands)
        axis.set_title(panel.title, fontsize=10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(content.panels) :]:
        axis.set_visible(False)
    _label(axes, content, integers=against == "rounds")
    legend = _legend(fig, content)
    size = (_PANEL[0] * n_columns, _PANEL[1] * n_rows)
    captioned(fig, content.caption(bands), size, legend)
    return finished(fig, path)


def _draw(axis: Any, line: Line, logarithmic: bool, bands: bool) -> None:
    style = look(line.number)
    if line.silent and logarithmic:
        level = line.communicated.y[-1:] or [float("nan")]
        axis.axhline(level[0], color=style.color, ls="--", lw=1.4, label=line.label)
        return
    curve = line.communicated
    if bands and line.n_seeds > 1:
        low, high = _band(curve)
        axis.fill_between(curve.x, low, high, color=style.color, alpha=0.15, lw=0)
    trained = line.trained
    axis.plot(trained.x, trained.y, color=style.color, alpha=0.4, lw=0.8)
    axis.plot(
        curve.x,
        curve.y,
        color=style.color,
        linestyle=style.dash,
        marker=style.mark,
        markevery=max(1, len(curve.x) // _MARKS),
        ms=4,
        lw=1.5,
        label=line.label,
    )


def _band(curve: Curve) -> tuple[list[float], list[float]]:
    """One deviation below and above a curve."""
    pairs = list(zip(curve.y, curve.deviation, strict=True))
    return [y - d for y, d in pairs], [y + d for y, d in pairs]


def _label(axes: Any, content: Chart, integers: bool) -> None:
    """Names the axes, and chooses their scales."""
    first = axes[0, 0]  # the others share its horizontal scale
    if integers:
        first.xaxis.set_major_locator(MaxNLocator(integer=True))
    if content.logarithmic:
        first.set_xscale("log")
        least, most = first.get_xlim()
        steps = (1, 2, 5) if most < 50 * least else (1,)
        first.xaxis.set_major_locator(LogLocator(subs=steps))
        first.xaxis.set_major_formatter("{x:g}")
        first.xaxis.set_minor_formatter(NullFormatter())
    for axis in axes[-1]:
        axis.set_xlabel(content.x_label)
    for axis in axes[:, 0]:
        axis.set_ylabel(content.y_label)


def _legend(fig: Figure, content: Chart) -> Any:
    """The legend of all panels, beside them. A line looks the same in each of them."""
    silent = {line.label for line in content.lines if line.silent}
    handles = []
    for number, label in content.labels.items():
        style = look(number)
        flat = content.logarithmic and label in silent
        handles.append(
            Line2D(
                [],
                [],
                color=style.color,
                linestyle="--" if flat else style.dash,
                marker="" if flat else style.mark,
                ms=4,
                lw=1.5,
                label=textwrap.fill(label, _LABEL_WIDTH),
            )
        )
    return fig.legend(
        handles=handles,
        loc="outside right upper",
        frameon=False,
        fontsize=9,
        handlelength=3,
        ncols=-(-len(handles) // _MOST_IN_A_COLUMN),
    )


def captioned(
    fig: Figure, caption: str, size: tuple[float, float], legend: Any = None
) -> None:
    """Writes a text below all panels, and makes the figure as large as it takes.

    Args:
        fig: a figure with constrained layout.
        caption: the text.
        size: the width and the height of all panels together, in inches.
        legend: the legend beside the panels, if any.
    """
    width, height = size
    if legend is not None:
        box = legend.get_window_extent()
        width += box.width / fig.dpi + 0.2
        height = max(height, box.height / fig.dpi)
    # A letter of this size is about 1/14 inch wide, and a line 1/7 inch high.
    text = textwrap.fill(caption, max(40, int(14 * width)))
    fig.supxlabel(text, fontsize=8, color="0.3", x=0.01, ha="left")
    fig.set_size_inches(width, height + (text.count("\n") + 1) / 7 + 0.2)


def finished(fig: Figure, path: str | Path | None) -> Figure:
    """Writes a figure if there is a path."""
    if path is not None:
        fig.savefig(path, dpi=150)
    return fig
