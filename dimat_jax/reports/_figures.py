"""The figures of a report: accuracy over rounds and over bytes, and partitions.

They are made without pyplot, which would choose a backend for the whole process.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from dimat_jax.reports._runs import PHASES, DataFrame, Partition, Runs, describe

__all__ = ["accuracy_figure", "bytes_figure", "partition_figure"]

# Ten bright colours, and the same ten darkened.
_BRIGHT = matplotlib.colormaps["tab10"](range(10))[:, :3]
_COLORS = [tuple(color) for color in np.concatenate([_BRIGHT, 0.55 * _BRIGHT])]
# The style changes after ten lines, when the bright colours are used up. Plain dashes
# are not among the styles: they are for lines that send nothing.
_DASHES = ("-", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
# With more lines than these, a legend inside a panel would hide some of them, and bands
# would hide all of them.
_FEW = 6
# With more agents or more classes than these, a cell has no room for its number.
_NUMBERED = (12, 20)
# The map begins at a visible blue, so that a single sample does not look like none.
_BLUES = LinearSegmentedColormap.from_list(
    "counts", matplotlib.colormaps["Blues"](np.linspace(0.12, 0.95, 256))
).with_extremes(bad="white")


def accuracy_figure(runs: Runs, path: str | Path | None = None) -> Figure:
    """Draws accuracy over local training.

    A merge is a vertical step, with a mark at its end. Where lines are few, a band
    reaches from the worst agent to the best.

    Args:
        runs: the runs to compare.
        path: the file to write, if any.
    """
    fig = _figure(runs, _draw_rounds, "rounds of local training")
    return _finished(fig, path)


def bytes_figure(runs: Runs, path: str | Path | None = None) -> Figure:
    """Draws accuracy over the bytes that all agents together have sent.

    A line begins with the first bytes that are sent. The final accuracy of agents that
    never send anything is a dashed horizontal line.

    Args:
        runs: the runs to compare. Some of them must have sent something.
        path: the file to write, if any.
    """
    fig = _figure(runs, _draw_bytes, "MB sent")
    axis = fig.axes[0]  # the others share its scale
    axis.set_xscale("log")
    least, most = axis.get_xlim()
    steps = (1, 2, 5) if most < 50 * least else (1,)
    axis.xaxis.set_major_locator(LogLocator(subs=steps))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    return _finished(fig, path)


def _figure(runs: Runs, draw: Callable[..., Any], x_label: str) -> Figure:
    """Draws a panel for each problem, and one legend.

    A line looks the same in all panels.
    """
    lines = runs.evaluations.groupby(runs.lines, sort=False)
    names = [name for name, _ in lines]
    panels: list[tuple[Any, DataFrame]] = [((), runs.evaluations)]
    if runs.panels:
        panels = list(runs.evaluations.groupby(runs.panels, sort=False))
    beside = len(names) > _FEW
    n_columns = min(len(panels), 2)
    n_rows = -(-len(panels) // n_columns)
    fig = Figure(
        figsize=(
            5.2 * n_columns + 2.4 * beside,
            max(3.4 * n_rows, 0.19 * len(names) * beside),
        ),
        layout="constrained",
    )
    axes = fig.subplots(n_rows, n_columns, sharex=True, squeeze=False)
    drawn = {}
    for axis, (values, panel) in zip(axes.flat, panels, strict=False):
        for name, line in panel.groupby(runs.lines, sort=False):
            number = names.index(name)
            style = {
                "color": _COLORS[number % len(_COLORS)],
                "linestyle": _DASHES[number // 10 % len(_DASHES)],
                "label": describe(runs.lines, name),
                "lw": 1.4,
            }
            drawn[name] = draw(axis, line, style, not beside)
        axis.set_title(describe(runs.panels, values), fontsize=10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel(x_label)
    for axis in axes[:, 0]:
        axis.set_ylabel("test accuracy (%)")
    handles = [drawn[name] for name in names]
    if beside:
        fig.legend(handles=handles, loc="outside right center", frameon=False)
    else:
        axes[0, 0].legend(handles=handles, frameon=False)
    return fig


def _draw_rounds(axis, line: DataFrame, style: dict[str, Any], few: bool) -> Any:
    # A merge comes before the local training of its round.
    mean = _means(line.assign(x=line["round"] - (line.phase == "merged")))
    if few:
        axis.fill_between(
            mean.x, mean.low, mean.high, color=style["color"], alpha=0.12, lw=0
        )
    return _draw(axis, mean, style)


def _draw_bytes(axis, line: DataFrame, style: dict[str, Any], few: bool) -> Any:
    del few  # there are no bands
    mean = _means(line.assign(x=line.bytes_sent_total / 1e6))
    sent = mean[mean.x > 0]  # 0 has no logarithm
    if sent.empty:
        style = {**style, "linestyle": "--"}
        return axis.axhline(mean.accuracy.iloc[-1], **style)
    return _draw(axis, sent, style)


def _draw(axis, mean: DataFrame, style: dict[str, Any]) -> Any:
    (drawn,) = axis.plot(mean.x, mean.accuracy, **style)
    merged = mean[mean.phase == "merged"]
    axis.plot(merged.x, merged.accuracy, ".", color=style["color"], ms=6)
    return drawn


def _means(line: DataFrame) -> DataFrame:
    """The means over seeds of x and of accuracies in %, in the order of evaluation."""
    table: DataFrame = pd.DataFrame(
        {
            "round": line["round"],
            "phase": pd.Categorical(line.phase, PHASES),
            "x": line.x,
            "accuracy": 100 * line.test_accuracy_mean,
            "low": 100 * line.test_accuracy.map(min),
            "high": 100 * line.test_accuracy.map(max),
        }
    )
    return table.groupby(["round", "phase"], observed=True).mean().reset_index()


def partition_figure(
    partitions: Sequence[Partition], path: str | Path | None = None, note: str = ""
) -> Figure:
    """Draws which agent holds how many samples of which class.

    A cell is the darker the more samples it stands for, and white if there are none.

    Args:
        partitions: at least one; each has a panel.
        path: the file to write, if any.
        note: a line of text above all panels.
    """
    n_columns = min(len(partitions), 2)
    n_rows = -(-len(partitions) // n_columns)
    shapes = np.asarray([np.shape(partition.counts) for partition in partitions])
    n_agents, n_classes = shapes.max(axis=0)
    width, height = np.clip(0.45 * n_classes, 4, 8), np.clip(0.3 * n_agents, 1.5, 6)
    fig = Figure(
        figsize=((width + 1.2) * n_columns, (height + 1) * n_rows + 0.3),
        layout="constrained",
    )
    axes = fig.subplots(n_rows, n_columns, squeeze=False)
    for axis, partition in zip(axes.flat, partitions, strict=False):
        _draw_partition(axis, partition)
    for axis in axes.flat[len(partitions) :]:
        axis.set_visible(False)
    fig.suptitle(note, fontsize=10)
    return _finished(fig, path)


def _draw_partition(axis, partition: Partition) -> None:
    counts = np.asarray(partition.counts)
    (n_agents, n_classes), most = counts.shape, max(counts.max(), 1)
    image = axis.imshow(
        np.ma.masked_equal(counts, 0), cmap=_BLUES, aspect="auto", vmin=1, vmax=most
    )
    bar = axis.figure.colorbar(image, ax=axis, pad=0.02)
    bar.set_label("samples", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_linewidth(0.4)
    rooms = zip(counts.shape, _NUMBERED, strict=True)
    if all(size <= room for size, room in rooms):
        for agent, label in np.argwhere(counts):
            count = counts[agent, label]
            color = "white" if count > 0.6 * most else "black"
            axis.text(
                label, agent, count, color=color, ha="center", va="center", fontsize=7
            )
    # Lines between the cells.
    axis.set_xticks(np.arange(n_classes - 1) + 0.5, minor=True)
    axis.set_yticks(np.arange(n_agents - 1) + 0.5, minor=True)
    axis.grid(which="minor", color="0.9", lw=0.4)
    axis.tick_params(which="both", length=0, labelsize=8)
    axis.spines[:].set_color("0.8")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    if partition.classes is None or n_classes > _NUMBERED[1]:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    else:
        tilted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        long = max(map(len, partition.classes)) > 3
        axis.set_xticks(range(n_classes), partition.classes, **(tilted if long else {}))
    axis.set_xlabel("class", fontsize=9)
    axis.set_ylabel("agent", fontsize=9)
    axis.set_title(partition.title, fontsize=10)


def _finished(fig: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        fig.savefig(path, dpi=150)
    return fig
