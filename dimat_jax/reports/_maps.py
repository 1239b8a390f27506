"""The figures of a report that show agents one by one, and who holds which samples."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dimat_jax.reports._agents import AgentPanel, ClassMap, agent_panels, class_maps
from dimat_jax.reports._figures import captioned, finished
from dimat_jax.reports._looks import CELLS
from dimat_jax.reports._runs import Partition, Runs
from dimat_jax.reports._shown import ShownFigure

__all__ = ["agents_figure", "classes_figure", "partition_figure"]

# With more agents or more classes than these, a cell has no room for its number.
_NUMBERED = (12, 20)
# The colours of agents by number. The brightest ones would be too faint on white.
_AGENTS = LinearSegmentedColormap.from_list(
    "agents", matplotlib.colormaps[CELLS](np.linspace(0, 0.85, 256))
)
# More panels than these would make a figure too small to read.
_MOST_PANELS = 12
# The map begins at a visible blue, so that a single sample does not look like none.
_BLUES = LinearSegmentedColormap.from_list(
    "counts", matplotlib.colormaps["Blues"](np.linspace(0.12, 0.95, 256))
).with_extremes(bad="white")


def agents_figure(runs: Runs, path: str | Path | None = None) -> Figure:
    """Draws the accuracy of every agent over the rounds, in a panel for each line.

    The panels show one seed, since the agents of different seeds are not the same.

    Args:
        runs: the runs to compare.
        path: the file to write, if any.
    """
    panels = agent_panels(runs)
    shown = panels[:_MOST_PANELS]
    n_columns = min(len(shown), 3)
    n_rows = -(-len(shown) // n_columns)
    fig = ShownFigure(layout="constrained")
    axes = fig.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
    for axis, panel in zip(axes.flat, shown, strict=False):
        _draw_agents(axis, panel)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("round")
    for axis in axes[:, 0]:
        axis.set_ylabel(shown[0].label)
    most = max(len(panel.accuracies) for panel in shown)
    colors = ScalarMappable(Normalize(0, max(most - 1, 1)), _AGENTS)
    bar = fig.colorbar(colors, ax=axes, pad=0.02, label="agent")
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    caption = (
        "Thin curves: each agent, right after each communication. Thick curve: the "
        "mean over the agents. One seed." + _how_many(len(shown), len(panels))
    )
    captioned(fig, caption, (3.4 * n_columns + 0.8, 2.6 * n_rows))
    return finished(fig, path)


def _draw_agents(axis: Any, panel: AgentPanel) -> None:
    n_agents = len(panel.accuracies)
    colors = _AGENTS(np.arange(n_agents) / max(n_agents - 1, 1))
    for color, accuracies in zip(colors, panel.accuracies, strict=True):
        axis.plot(panel.rounds, accuracies, color=color, lw=0.8)
    mean = np.mean(panel.accuracies, axis=0)
    axis.plot(panel.rounds, mean, color="black", lw=1.8)
    axis.set_title(textwrap.fill(panel.title, 40), fontsize=9)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def classes_figure(runs: Runs, path: str | Path | None = None) -> Figure:
    """Draws each agent's accuracy on each class: a map for each line, of one seed.

    Args:
        runs: the runs to compare. Some of them must have measured the accuracies.
        path: the file to write, if any.
    """
    maps = class_maps(runs)
    shown = maps[:_MOST_PANELS]
    fig, axes = _grid(shown, [np.shape(one.accuracies) for one in shown])
    for axis, one in zip(axes, shown, strict=False):
        _draw_map(axis, one)
    caption = (
        "A cell: the accuracy (%) of an agent on the test images of a class, in the "
        "last round of one seed." + _how_many(len(shown), len(maps))
    )
    captioned(fig, caption, tuple(fig.get_size_inches()))
    return finished(fig, path)


def _how_many(n_shown: int, n_all: int) -> str:
    return f" These are {n_shown} of {n_all} panels." if n_all > n_shown else ""


def _draw_map(axis: Any, one: ClassMap) -> None:
    accuracies = np.asarray(one.accuracies, float)
    image = axis.imshow(accuracies, cmap=CELLS, aspect="auto", vmin=0, vmax=100)
    _add_bar(axis, image, "accuracy (%)")
    if _has_room(accuracies.shape):
        for agent, label in np.argwhere(np.isfinite(accuracies)).tolist():
            value = accuracies[agent, label]
            _write(axis, agent, label, f"{value:.0f}", dark=bool(value < 50))
    _finish_map(axis, accuracies.shape, one.classes, one.title)


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
    shapes = [np.shape(partition.counts) for partition in partitions]
    fig, axes = _grid(partitions, shapes)
    for axis, partition in zip(axes, partitions, strict=False):
        _draw_partition(axis, partition)
    fig.suptitle(note, fontsize=10)
    return finished(fig, path)


def _grid(panels: Sequence[Any], shapes: Sequence[Any]) -> tuple[Figure, Any]:
    """A figure with a panel for each map, and its axes in a row.

    Args:
        panels: what the panels will show.
        shapes: the agents and the classes of each panel.
    """
    n_columns = min(len(panels), 2)
    n_rows = -(-len(panels) // n_columns)
    n_agents, n_classes = np.asarray(shapes).max(axis=0)
    width, height = np.clip(0.45 * n_classes, 4, 8), np.clip(0.3 * n_agents, 1.5, 6)
    fig = ShownFigure(
        figsize=((width + 1.2) * n_columns, (height + 1) * n_rows + 0.3),
        layout="constrained",
    )
    axes = fig.subplots(n_rows, n_columns, squeeze=False).flat
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return fig, axes


def _draw_partition(axis, partition: Partition) -> None:
    counts = np.asarray(partition.counts)
    most = max(counts.max(), 1)
    image = axis.imshow(
        np.ma.masked_equal(counts, 0), cmap=_BLUES, aspect="auto", vmin=1, vmax=most
    )
    _add_bar(axis, image, "samples")
    if _has_room(counts.shape):
        for agent, label in np.argwhere(counts).tolist():
            count = counts[agent, label]
            _write(axis, agent, label, f"{count}", dark=bool(count > 0.6 * most))
    _finish_map(axis, counts.shape, partition.classes, partition.title)


def _add_bar(axis: Any, image: Any, label: str) -> None:
    """Adds the bar that says which colour is which number."""
    bar = axis.figure.colorbar(image, ax=axis, pad=0.02)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_linewidth(0.4)


def _has_room(shape: tuple[int, ...]) -> bool:
    """Whether the cells of a map are large enough for numbers."""
    return all(size <= room for size, room in zip(shape, _NUMBERED, strict=True))


def _write(axis: Any, agent: int, label: int, text: str, dark: bool) -> None:
    """Writes into a cell, whose colour may be dark."""
    color = "white" if dark else "black"
    axis.text(label, agent, text, color=color, ha="center", va="center", fontsize=7)


def _finish_map(
    axis: Any, shape: tuple[int, ...], classes: Sequence[str] | None, title: str
) -> None:
    """Draws lines between the cells, and labels the agents and the classes."""
    n_agents, n_classes = shape
    axis.set_xticks(np.arange(n_classes - 1) + 0.5, minor=True)
    axis.set_yticks(np.arange(n_agents - 1) + 0.5, minor=True)
    axis.grid(which="minor", color="0.9", lw=0.4)
    axis.tick_params(which="both", length=0, labelsize=8)
    axis.spines[:].set_color("0.8")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    if classes is None or n_classes > _NUMBERED[1]:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    else:
        tilted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        long = max(map(len, classes)) > 3
        axis.set_xticks(range(n_classes), classes, **(tilted if long else {}))
    axis.set_xlabel("class", fontsize=9)
    axis.set_ylabel("agent", fontsize=9)
    axis.set_title(textwrap.fill(title, 60), fontsize=10)
