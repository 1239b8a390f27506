"""The page of a report: one HTML file with all tables and figures, and no network."""

import html
from importlib.resources import files
from typing import Any, NamedTuple

from bokeh.document import Document
from bokeh.embed import components
from bokeh.resources import Resources
from jinja2 import Environment
from markupsafe import Markup

from dimat_jax.reports._agents import agent_panels, class_maps
from dimat_jax.reports._curves import AXES, chart, measured
from dimat_jax.reports._looks import look
from dimat_jax.reports._page_figures import (
    LINE_FILTER,
    agents_plot,
    classes_plot,
    curve_plots,
    partition_plot,
)
from dimat_jax.reports._runs import DataFrame, Runs
from dimat_jax.reports._tables import CONVENTION, tables

__all__ = ["page"]

# More figures of single agents, of classes or of partitions than these would make the
# page slow.
_MOST_PLOTS = 24
# Bands of more lines than these would hide each other until some lines are hidden.
_MOST_BANDS = 12
# The marks of lines as text, for the legend.
_MARKS = {
    "circle": "●",
    "square": "■",
    "triangle": "▲",
    "diamond": "◆",
    "inverted_triangle": "▼",
    "star": "★",
    "hex": "⬢",
    "plus": "✚",
    "x": "✖",
}


class _Section(NamedTuple):
    """A part of the page that has figures.

    Attributes:
        title: its heading.
        caption: what its figures show.
        plots: the figures. Those of a key of `AXES` are shown if it is chosen, and
            those of "" always.
    """

    title: str
    caption: str
    plots: dict[str, list[Any]]


def page(runs: Runs) -> str:
    """The HTML of the page. It holds all scripts and data that it needs."""
    sections = [*_curves(runs), *_agents(runs), *_classes(runs), *_partitions(runs)]
    plots = {
        f"{number}-{axis}-{place}": plot
        for number, section in enumerate(sections)
        for axis, group in section.plots.items()
        for place, plot in enumerate(group)
    }
    document = Document()
    # Every new root would look through all models of the document otherwise.
    with document.models.freeze():
        for plot in plots.values():
            document.add_root(plot)
    script, places = components(plots)
    source = (files("dimat_jax.reports") / "page.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True).from_string(source)
    return template.render(
        title=_title(runs),
        convention=CONVENTION,
        resources=Markup(Resources(mode="inline", components=["bokeh"]).render_js()),
        script=Markup(script),
        filter_name=LINE_FILTER,
        axes=[(name, measure.label) for name, measure in AXES.items()],
        lines=_legend(runs),
        sections=[
            {
                "title": section.title,
                "caption": section.caption,
                "groups": {
                    axis: [
                        Markup(places[f"{number}-{axis}-{place}"])
                        for place in range(len(group))
                    ]
                    for axis, group in section.plots.items()
                },
            }
            for number, section in enumerate(sections)
        ],
        n_first=1 + bool(len(runs.left_out)),
        tables=[(title, _table(table)) for title, table in tables(runs).items()],
    )


def _title(runs: Runs) -> str:
    n_runs, n_more = runs.evaluations.run.nunique(), len(runs.left_out)
    more = f", and {n_more} that {'are' if n_more > 1 else 'is'} not counted"
    return f"{n_runs} run{'s' * (n_runs > 1)}" + more * (n_more > 0)


def _legend(runs: Runs) -> list[dict[str, Any]]:
    """The number, the label and the look of every line."""
    labels = chart(runs).labels
    return [
        {
            "number": number,
            "label": label,
            "color": look(number).color,
            "mark": _MARKS[look(number).page_mark],
        }
        for number, label in labels.items()
    ]


def _curves(runs: Runs) -> list[_Section]:
    """A section for each measure, with figures for each axis."""
    axes = [
        axis
        for axis in AXES
        if axis != "bytes" or runs.evaluations.bytes_sent_total.any()
    ]
    sections = []
    for measure in measured(runs):
        charts = {axis: chart(runs, measure, axis) for axis in axes}
        first = charts[axes[0]]
        bands = first.has_bands and len(first.labels) <= _MOST_BANDS
        title = first.y_label
        sections.append(
            _Section(
                title[:1].upper() + title[1:],
                first.caption(bands),
                {axis: curve_plots(one, bands) for axis, one in charts.items()},
            )
        )
    return sections


def _agents(runs: Runs) -> list[_Section]:
    panels = agent_panels(runs)
    caption = (
        "Thin curves: each agent, right after each communication. Black: the mean over "
        "the agents. One seed." + _how_many(len(panels))
    )
    plots = [agents_plot(panel) for panel in panels[:_MOST_PLOTS]]
    return [_Section("The agents, one by one", caption, {"": plots})]


def _classes(runs: Runs) -> list[_Section]:
    maps = class_maps(runs)
    caption = (
        "A cell: the accuracy (%) of an agent on the test images of a class, in the "
        "last round of one seed." + _how_many(len(maps))
    )
    plots = [classes_plot(one) for one in maps[:_MOST_PLOTS]]
    return [_Section("Accuracy by class and agent", caption, {"": plots})] * bool(maps)


def _partitions(runs: Runs) -> list[_Section]:
    found = runs.partitions
    caption = "A cell: how many training samples of a class an agent holds."
    plots = [partition_plot(one) for one in found[:_MOST_PLOTS]]
    section = _Section("Partitions", caption + _how_many(len(found)), {"": plots})
    return [section] * bool(found)


def _how_many(n_all: int) -> str:
    more = f" These are {_MOST_PLOTS} of {n_all} figures."
    return more if n_all > _MOST_PLOTS else ""


def _table(table: DataFrame) -> Markup:
    """A table whose columns the page can sort."""
    flat = table.reset_index()
    head = "".join(
        f'<th><button type="button">{html.escape(str(name))}</button></th>'
        for name in flat.columns
    )
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>"
        for row in flat.itertuples(index=False)
    )
    return Markup(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def _cell(value: Any) -> str:
    """A value as text; missing numbers are blank."""
    if isinstance(value, float):
        return "" if value != value else f"{value:,.10g}"
    return html.escape(str(value))
