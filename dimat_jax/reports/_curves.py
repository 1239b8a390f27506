"""What the curves of a report show, for pictures and for the page.

A curve has the values right after each communication, since those of agents that hold
different classes go up and down within a round. Where the agents communicate before the
local training of a round, the values after that training are a second, lighter curve.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from dimat_jax.reports._runs import DataFrame, Runs, describe

__all__ = ["AXES", "Chart", "Curve", "Line", "Panel", "chart", "measured", "measures"]


class Measure(NamedTuple):
    """Something that every evaluation measures.

    Attributes:
        column: its column in `Runs.evaluations`.
        label: the label of an axis.
        scale: the factor from the column to the axis.
    """

    column: str
    label: str
    scale: float = 1.0


_LOCAL = Measure(
    "test_accuracy_local_mean", "test accuracy on classes like an agent's (%)", 100
)
_MEASURES = {
    "consensus": Measure("consensus_distance", "consensus distance"),
    "aligned": Measure("consensus_distance_aligned", "consensus distance, aligned"),
    "disagreement": Measure("test_disagreement", "disagreement of the agents (%)", 100),
}

AXES = {
    "rounds": Measure("round", "round"),
    "bytes": Measure("bytes_sent_total", "MB sent by all agents", 1e-6),
    "seconds": Measure("seconds_total", "seconds"),
}
"""What curves are drawn over, by the names that `chart` takes."""


class Curve(NamedTuple):
    """Means over the seeds, in the order of rounds. The lists are equally long.

    Attributes:
        rounds: the rounds.
        x: the means on the horizontal axis.
        y: the means on the vertical axis.
        deviation: the sample standard deviations of y over the seeds; NaN for one seed.
    """

    rounds: list[int]
    x: list[float]
    y: list[float]
    deviation: list[float]


class Line(NamedTuple):
    """What a panel shows of an algorithm and its options.

    Attributes:
        label: the algorithm and its options.
        number: the place among all lines of the report. It decides about the colour.
        n_seeds: the number of seeds.
        communicated: the values right after each communication.
        trained: the values after the local training of each round. It is empty if the
            agents communicate while they train, and if they never communicate.
        silent: whether the agents send nothing, so that they have no curve over bytes.
    """

    label: str
    number: int
    n_seeds: int
    communicated: Curve
    trained: Curve
    silent: bool


class Panel(NamedTuple):
    """The lines of one problem on one graph."""

    title: str
    lines: list[Line]


class Chart(NamedTuple):
    """Curves of one measure over another.

    Attributes:
        x_label: the label of the horizontal axis.
        y_label: the label of the vertical axis.
        logarithmic: whether the horizontal axis is logarithmic.
        labels: the labels of all lines, by their numbers.
        panels: at least one.
    """

    x_label: str
    y_label: str
    logarithmic: bool
    labels: dict[int, str]
    panels: list[Panel]

    @property
    def lines(self) -> list[Line]:
        """The lines of all panels."""
        return [line for panel in self.panels for line in panel.lines]

    @property
    def has_bands(self) -> bool:
        """Whether there is a deviation over seeds to show."""
        return any(line.n_seeds > 1 for line in self.lines)

    def caption(self, bands: bool) -> str:
        """Says what curves, marks and bands mean.

        Args:
            bands: whether bands are drawn.
        """
        counts = sorted({line.n_seeds for line in self.lines})
        n = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        sentences = [
            f"Curves with marks: right after a communication, mean over the agents and "
            f"over n = {n} seed{'s' * (counts[-1] > 1)}; those that never communicate, "
            "after local training."
        ]
        if any(line.trained.x for line in self.lines):
            sentences.append(
                "Light curves: the same agents after the local training of the round."
            )
        if any(line.silent for line in self.lines) and self.logarithmic:
            sentences.append("Dashed: agents that send nothing, at their end.")
        if bands:
            sentences.append(
                "Bands: plus and minus one sample standard deviation over the seeds."
            )
        elif self.has_bands:
            sentences.append("The deviations over the seeds are in the tables.")
        return " ".join(sentences)


def measures(runs: Runs) -> dict[str, Measure]:
    """What curves of these runs may show, by the names that `chart` takes.

    The first one is the metric of the runs, by its own name.
    """
    metric, title = runs.metric, f"test {runs.metric.words}"
    averaged = f"{title} of the average model{metric.unit}"
    return {
        metric.name: Measure(metric.field(), title + metric.unit, metric.scale),
        "average": Measure(metric.field("average_model"), averaged, metric.scale),
        "local": _LOCAL,
        "loss": Measure("test_loss_mean", metric.loss),
        **_MEASURES,
    }


def measured(runs: Runs) -> list[str]:
    """The measures that the runs have, by name."""
    columns = runs.evaluations
    return [
        name
        for name, measure in measures(runs).items()
        if measure.column in columns and columns[measure.column].notna().any()
    ]


def chart(runs: Runs, measure: str = "", against: str = "rounds") -> Chart:
    """Collects curves.

    Args:
        runs: the runs to compare.
        measure: a key of `measures`; by default it is the runs' metric.
        against: a key of `AXES`.
    """
    y, x = measures(runs)[measure or runs.metric.name], AXES[against]
    rows = runs.evaluations
    rows = rows[rows[y.column].notna()]
    rows = rows.assign(x=x.scale * rows[x.column], y=y.scale * rows[y.column])
    # A line has the same number in all charts, also where others have no such measure.
    names = [name for name, _ in runs.evaluations.groupby(runs.lines, sort=False)]
    grouped: list[tuple[Any, DataFrame]] = [((), rows)]
    if runs.panels:
        grouped = list(rows.groupby(runs.panels, sort=False))
    panels = [
        Panel(
            describe(runs.panels, values),
            [
                _line(line, describe(runs.lines, name), names.index(name), against)
                for name, line in panel.groupby(runs.lines, sort=False)
            ],
        )
        for values, panel in grouped
    ]
    labels = {line.number: line.label for panel in panels for line in panel.lines}
    in_order = dict(sorted(labels.items()))
    return Chart(x.label, y.label, against == "bytes", in_order, panels)


def _line(rows: DataFrame, label: str, number: int, against: str) -> Line:
    start = rows.phase == "pretrained"
    n_seeds = rows.run.nunique()
    communicated = _curve(rows[start | rows.communicated], n_seeds)
    trained = _curve(rows[start | (rows.phase == "trained")], n_seeds)
    if (rows.communicated == (rows.phase == "trained")).all():
        trained = Curve([], [], [], [])
    silent = not (rows.bytes_sent_total > 0).any()
    if against == "bytes" and not silent:
        communicated, trained = _sent(communicated), _sent(trained)
    return Line(label, number, n_seeds, communicated, trained, silent)


def _curve(rows: DataFrame, n_seeds: int) -> Curve:
    """The means of the rounds in which all seeds were evaluated."""
    groups = rows.groupby("round")
    means = groups[["x", "y"]].mean()
    complete = groups.size() == n_seeds
    means, deviation = means[complete], groups.y.std()[complete]
    return Curve(
        means.index.astype(int).tolist(),
        means.x.tolist(),
        means.y.tolist(),
        deviation.tolist(),
    )


def _sent(curve: Curve) -> Curve:
    """Drops a curve's points before the first byte was sent: 0 has no logarithm."""
    shown = [i for i, x in enumerate(curve.x) if x > 0 and math.isfinite(x)]

    def pick(values: Sequence[Any]) -> list[Any]:
        return [values[i] for i in shown]

    return Curve(*map(pick, curve))
