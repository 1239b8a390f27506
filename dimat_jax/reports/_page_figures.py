"""The figures of the page: they zoom, and say the numbers under the pointer."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from bokeh.models import (
    BooleanFilter,
    CDSView,
    ColorBar,
    ColumnDataSource,
    FixedTicker,
    HoverTool,
    LinearColorMapper,
)
from bokeh.palettes import Blues256, Cividis256
from bokeh.plotting import figure

from dimat_jax.reports._agents import AgentPanel, ClassMap
from dimat_jax.reports._curves import Chart, Curve, Line, Panel
from dimat_jax.reports._looks import look
from dimat_jax.reports._runs import Partition

__all__ = [
    "LINE_FILTER",
    "agents_plot",
    "classes_plot",
    "curve_plots",
    "partition_plot",
]

LINE_FILTER = "lines"
"""The name of the filters by which the page hides lines. Their tags are the numbers of
the lines that they filter."""

# A cell of a map has room for its number up to this number of agents and of classes.
_NUMBERED = (12, 20)
# Up to this number of classes, they have their names under the map.
_MOST_NAMES = 20


def _figure(title: str, height: int, **options: Any) -> Any:
    """An empty figure, as wide as its place on the page."""
    fig: Any = figure(
        title=title,
        height=height,
        sizing_mode="stretch_width",
        tools="box_zoom,pan,wheel_zoom,reset,save",
        active_drag="box_zoom",
        active_scroll=None,  # the wheel scrolls the page until its tool is chosen
        **options,
    )
    fig.toolbar.logo = None
    fig.title.text_font_size = "10pt"
    return fig


def curve_plots(chart: Chart, bands: bool) -> list[Any]:
    """A figure for each panel of a chart. Zooming in one of them zooms all in x.

    Args:
        chart: the curves.
        bands: whether to draw one deviation over the seeds on both sides of curves.
    """
    plots: list[Any] = []
    for panel in chart.panels:
        fig = _figure(
            panel.title,
            360,
            x_axis_label=chart.x_label,
            y_axis_label=chart.y_label,
            x_axis_type="log" if chart.logarithmic else "linear",
            **({"x_range": plots[0].x_range} if plots else {}),
        )
        if bands:
            _add_bands(fig, [line for line in panel.lines if line.n_seeds > 1])
        _add_curves(fig, panel, chart.logarithmic)
        _add_marks(fig, panel, chart)
        plots.append(fig)
    return plots


def _source(lines: Sequence[Line], **columns: list[Any]) -> dict[str, Any]:
    """A source with a row for each line, and a filter by which the page hides lines."""
    return _filtered([line.number for line in lines], columns)


def _filtered(numbers: list[int], columns: dict[str, list[Any]]) -> dict[str, Any]:
    shown = BooleanFilter(
        booleans=[True] * len(numbers), name=LINE_FILTER, tags=list(numbers)
    )
    data: Any = columns
    return {"source": ColumnDataSource(data=data), "view": CDSView(filter=shown)}


def _add_bands(fig: Any, lines: Sequence[Line]) -> None:
    curves = [line.communicated for line in lines]
    fig.patches(
        "xs",
        "ys",
        fill_color="color",
        fill_alpha=0.15,
        line_alpha=0,
        **_source(
            lines,
            xs=[curve.x + curve.x[::-1] for curve in curves],
            ys=[_around(curve) for curve in curves],
            color=[look(line.number).color for line in lines],
        ),
    )


def _around(curve: Curve) -> list[float]:
    """The way round a band: its lower edge, and its upper edge backwards."""
    pairs = list(zip(curve.y, curve.deviation, strict=True))
    return [y - d for y, d in pairs] + [y + d for y, d in pairs[::-1]]


def _add_curves(fig: Any, panel: Panel, logarithmic: bool) -> None:
    """Adds the curves right after communications, and the lighter ones."""
    flat = [line for line in panel.lines if line.silent and logarithmic]
    curves = [line for line in panel.lines if line not in flat]
    style: dict[str, Any] = {"line_color": "color"}
    fig.multi_line(
        "xs",
        "ys",
        line_alpha=0.4,
        line_width=1,
        **style,
        **_source(
            curves,
            xs=[line.trained.x for line in curves],
            ys=[line.trained.y for line in curves],
            color=[look(line.number).color for line in curves],
        ),
    )
    sent = [x for line in curves for x in line.communicated.x] or [1.0]
    ends = [min(sent), max(sent)]
    lines = [*curves, *flat]
    fig.multi_line(
        "xs",
        "ys",
        line_width=2,
        line_dash="dash",
        **style,
        **_source(
            lines,
            xs=[line.communicated.x for line in curves] + [ends] * len(flat),
            ys=[line.communicated.y for line in curves]
            + [2 * line.communicated.y[-1:] for line in flat],
            color=[look(line.number).color for line in lines],
            dash=[look(line.number).page_dash for line in curves]
            + ["dashed"] * len(flat),
        ),
    )


def _add_marks(fig: Any, panel: Panel, chart: Chart) -> None:
    """Adds a mark for each evaluation, with its numbers under the pointer."""
    numbers, columns = [], {name: [] for name in ("x", "y", "round", "color", "mark")}
    columns |= {"label": [], "spread": [], "n": []}
    for line in panel.lines:
        if line.silent and chart.logarithmic:
            continue
        curve, style = line.communicated, look(line.number)
        n = len(curve.x)
        numbers += [line.number] * n
        columns["x"] += curve.x
        columns["y"] += curve.y
        columns["round"] += curve.rounds
        columns["color"] += [style.color] * n
        columns["mark"] += [style.page_mark] * n
        columns["label"] += [line.label] * n
        columns["n"] += [line.n_seeds] * n
        columns["spread"] += [
            "" if math.isnan(deviation) else f" ± {deviation:.2f}"
            for deviation in curve.deviation
        ]
    marks = fig.scatter(
        "x", "y", color="color", marker="mark", size=6, **_filtered(numbers, columns)
    )
    tips = [
        ("", "@label"),
        ("round", "@round"),
        (chart.x_label, "@x{0,0.[000]}"),
        (chart.y_label, "@y{0,0.[000]}@spread (n=@n)"),
    ]
    if chart.x_label == "round":
        del tips[2]
    fig.add_tools(HoverTool(renderers=[marks], tooltips=tips))


def agents_plot(panel: AgentPanel) -> Any:
    """The accuracy of every agent over the rounds, and their mean in black."""
    n_agents, unit = len(panel.accuracies), " %" * panel.metric.percent
    fig = _figure(panel.title, 300, x_axis_label="round", y_axis_label=panel.label)
    # The brightest colours would be too faint on white.
    places = np.linspace(0, 0.85 * (len(Cividis256) - 1), n_agents).astype(int)
    source = ColumnDataSource(
        {
            "xs": [panel.rounds] * n_agents,
            "ys": panel.accuracies,
            "agent": list(range(n_agents)),
            "color": [Cividis256[place] for place in places],
        }
    )
    lines = fig.multi_line(
        "xs", "ys", line_color="color", line_width=1.2, source=source
    )
    fig.add_tools(
        HoverTool(
            renderers=[lines],
            tooltips=[
                ("agent", "@agent"),
                (f"round, {panel.metric.words}", "$x{0}, $y{0.0}" + unit),
            ],
        )
    )
    mean = np.mean(panel.accuracies, axis=0).tolist()
    fig.line(panel.rounds, mean, line_color="black", line_width=2.5)
    return fig


def classes_plot(one: ClassMap) -> Any:
    """A map of each agent's accuracy on each class."""
    mapper = LinearColorMapper(palette=Cividis256, low=0, high=100, nan_color="white")
    cells = [[round(value, 2) for value in agent] for agent in one.accuracies]
    return _map(one.title, cells, one.classes, mapper, "accuracy (%)", dark_below=50)


def partition_plot(partition: Partition) -> Any:
    """A map of how many samples of each class each agent holds; white is none."""
    counts = [list(agent) for agent in partition.counts]
    most = max(max(map(max, counts)), 1)
    mapper = LinearColorMapper(
        palette=Blues256[::-1],
        low=0.5,
        high=most,
        low_color="white",
        nan_color="white",
    )
    title, classes = partition.title, partition.classes
    return _map(title, counts, classes, mapper, "samples", dark_above=0.6 * most)


def _map(
    title: str,
    cells: Sequence[Sequence[float]],
    classes: Sequence[str] | None,
    mapper: LinearColorMapper,
    meaning: str,
    dark_below: float = -math.inf,
    dark_above: float = math.inf,
) -> Any:
    """A map with a row for each agent and a column for each class."""
    n_agents, n_classes = np.shape(cells)
    names = list(classes) if classes else list(map(str, range(n_classes)))
    fig = _figure(
        title,
        int(np.clip(110 + 26 * n_agents, 200, 620)),
        x_axis_label="class",
        y_axis_label="agent",
        x_range=(-0.5, n_classes - 0.5),
        y_range=(n_agents - 0.5, -0.5),  # the first agent is at the top
    )
    places = [(agent, label) for agent in range(n_agents) for label in range(n_classes)]
    values = [cells[agent][label] for agent, label in places]
    source = ColumnDataSource(
        {
            "agent": [agent for agent, _ in places],
            "label": [label for _, label in places],
            "name": [names[label] for _, label in places],
            "value": values,
            "text": [f"{v:.0f}" if math.isfinite(v) and v > 0 else "" for v in values],
            "ink": [
                "white" if v < dark_below or v > dark_above else "black" for v in values
            ],
        }
    )
    color: Any = {"field": "value", "transform": mapper}
    drawn = fig.rect(
        "label", "agent", 1, 1, fill_color=color, line_color="#dddddd", source=source
    )
    if n_agents <= _NUMBERED[0] and n_classes <= _NUMBERED[1]:
        fig.text(
            "label",
            "agent",
            text="text",
            text_color="ink",
            text_align="center",
            text_baseline="middle",
            text_font_size="8pt",
            source=source,
        )
    tips = [("agent", "@agent"), ("class", "@name"), (meaning, "@value")]
    fig.add_tools(HoverTool(renderers=[drawn], tooltips=tips))
    fig.add_layout(ColorBar(color_mapper=mapper, title=meaning, width=10), "right")
    fig.grid.visible = False
    _label_cells(fig, n_agents, names)
    return fig


def _label_cells(fig: Any, n_agents: int, names: list[str]) -> None:
    """Labels the agents and the classes of a map, where there is room for all."""
    if n_agents <= _NUMBERED[0]:
        fig.yaxis.ticker = FixedTicker(ticks=list(range(n_agents)))
    if len(names) <= _MOST_NAMES:
        fig.xaxis.ticker = FixedTicker(ticks=list(range(len(names))))
        fig.xaxis.major_label_overrides = dict(enumerate(names))
        if max(map(len, names)) > 3:
            fig.xaxis.major_label_orientation = math.pi / 4
