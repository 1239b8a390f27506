"""The figures of a report: accuracy over rounds and over bytes, and who holds what."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

# Figures go to files; a machine without a display must do.
matplotlib.use("agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from matplotlib.colors import LinearSegmentedColormap  # noqa: E402
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter  # noqa: E402

from experiments.runs import PHASES, Frame, Partition, Runs, describe  # noqa: E402

__all__ = [
    "accuracy_figure",
    "bytes_figure",
    "partition_figure",
    "partition_figures",
]

# Ten bright colours, and the same ones dark.
_BRIGHT = plt.get_cmap("tab10")(range(10))[:, :3]
_COLORS = [tuple(color) for color in np.concatenate([_BRIGHT, 0.55 * _BRIGHT])]
# For ten lines each; plain dashes are for who sends nothing.
_DASHES = ("-", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
# With more lines than this, a legend among them would hide some, and bands all.
_FEW = 6
# Up to so many agents and classes, a cell has room for its number.
_NUMBERED = (12, 20)
# From here on, so that a single sample does not look like none.
_BLUES = LinearSegmentedColormap.from_list(
    "counts", plt.get_cmap("Blues")(np.linspace(0.12, 0.95, 256))
).with_extremes(bad="white")


def accuracy_figure(runs: Runs, path: Path) -> None:
    """Accuracy over local training; a merge is a vertical step, marked where it ends.

    The band reaches from the worst agent to the best, where lines are few.
    """
    _save(_figure(runs, _draw_rounds, "rounds of local training"), path)


def bytes_figure(runs: Runs, path: Path) -> None:
    """Accuracy over what all agents together have sent, once they have sent anything.

    A dashed line is where those end who never do.
    """
    fig = _figure(runs, _draw_bytes, "MB sent")
    axis = fig.axes[0]  # the others share its scale
    axis.set_xscale("log")
    least, most = axis.get_xlim()
    steps = (1, 2, 5) if most < 50 * least else (1,)
    axis.xaxis.set_major_locator(LogLocator(subs=steps))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    _save(fig, path)


def _figure(runs: Runs, draw: Callable[..., Any], x_label: str) -> Any:
    """Panels in which a line always looks the same, and one legend."""
    lines = runs.evaluations.groupby(runs.lines, sort=False)
    names = [name for name, _ in lines]
    panels: list[tuple[Any, Frame]] = [((), runs.evaluations)]
    if runs.panels:
        panels = list(runs.evaluations.groupby(runs.panels, sort=False))
    beside = len(names) > _FEW
    n_columns = min(len(panels), 2)
    n_rows = -(-len(panels) // n_columns)
    fig, axes = plt.subplots(
        n_rows,
        n_columns,
        figsize=(
            5.2 * n_columns + 2.4 * beside,
            max(3.4 * n_rows, 0.19 * len(names) * beside),
        ),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
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


def _draw_rounds(axis, line: Frame, style: dict[str, Any], few: bool) -> Any:
    # A merge happens where the round before it ended.
    mean = _means(line.assign(x=line["round"] - (line.phase == "merged")))
    if few:
        axis.fill_between(
            mean.x, mean.low, mean.high, color=style["color"], alpha=0.12, lw=0
        )
    return _draw(axis, mean, style)


def _draw_bytes(axis, line: Frame, style: dict[str, Any], few: bool) -> Any:
    del few  # there are no bands
    mean = _means(line.assign(x=line.bytes_sent_total / 1e6))
    sent = mean[mean.x > 0]  # 0 has no logarithm
    if sent.empty:
        style = {**style, "linestyle": "--"}
        return axis.axhline(mean.accuracy.iloc[-1], **style)
    return _draw(axis, sent, style)


def _draw(axis, mean: Frame, style: dict[str, Any]) -> Any:
    (drawn,) = axis.plot(mean.x, mean.accuracy, **style)
    merged = mean[mean.phase == "merged"]
    axis.plot(merged.x, merged.accuracy, ".", color=style["color"], ms=6)
    return drawn


def _means(line: Frame) -> Frame:
    """Means over seeds of x and of accuracies in %, in the order of evaluation."""
    table: Frame = pd.DataFrame(
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
    counts: Sequence[Sequence[int]],
    path: Path,
    title: str,
    classes: Sequence[str] | None = None,
) -> None:
    """A picture of one partition; see `Partition` for what it takes."""
    partition_figures([Partition(title, counts, classes)], path)


def partition_figures(
    partitions: Sequence[Partition], path: Path, note: str = ""
) -> None:
    """Agents over classes, the darker the more samples; white where there are none.

    Args:
        partitions: at least one, each of which gets a panel.
        path: of the file.
        note: written above.
    """
    n_columns = min(len(partitions), 2)
    n_rows = -(-len(partitions) // n_columns)
    shapes = np.asarray([np.shape(partition.counts) for partition in partitions])
    n_agents, n_classes = shapes.max(axis=0)
    width, height = np.clip(0.45 * n_classes, 4, 8), np.clip(0.3 * n_agents, 1.5, 6)
    fig, axes = plt.subplots(
        n_rows,
        n_columns,
        figsize=((width + 1.2) * n_columns, (height + 1) * n_rows + 0.3),
        squeeze=False,
        layout="constrained",
    )
    for axis, partition in zip(axes.flat, partitions, strict=False):
        _draw_partition(axis, partition)
    for axis in axes.flat[len(partitions) :]:
        axis.set_visible(False)
    fig.suptitle(note, fontsize=10)
    _save(fig, path)


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


def _save(fig: Any, path: Path) -> None:
    fig.savefig(path, dpi=150)
    plt.close(fig)
