"""What a report shows of single agents: their curves, and their accuracy by class."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dimat_jax.reports._runs import DataFrame, Runs, describe
from dimat_jax.tasks import CLASSIFICATION, Metric

__all__ = ["BY_CLASS", "AgentPanel", "ClassMap", "agent_panels", "class_maps"]

BY_CLASS = "test_accuracy_by_class"
"""The field of an evaluation that has `[agents][classes]` accuracies, from 0 to 1."""


class AgentPanel(NamedTuple):
    """The accuracies of the agents of one run, or their values of another metric.

    Attributes:
        title: the algorithm, its options, the problem and the seed.
        rounds: the rounds in which the agents were evaluated.
        accuracies: `[agents][rounds]`, in %, right after each communication.
        metric: the metric.
    """

    title: str
    rounds: list[int]
    accuracies: list[list[float]]
    metric: Metric = CLASSIFICATION.shown

    @property
    def label(self) -> str:
        """The label of the axis."""
        return f"test {self.metric.words}{self.metric.unit}"


class ClassMap(NamedTuple):
    """The accuracy of each agent on each class.

    Attributes:
        title: the algorithm, its options, the problem, the seed, and when it was.
        accuracies: `[agents][classes]`, in %.
        classes: the names of the classes; None: figures show their numbers instead.
    """

    title: str
    accuracies: list[list[float]]
    classes: Sequence[str] | None


def agent_panels(runs: Runs) -> list[AgentPanel]:
    """The accuracies of the agents of the first seed of every line in every panel."""
    panels = []
    for title, rows in _first_seeds(runs, runs.evaluations):
        rows = rows[(rows.phase == "pretrained") | rows.communicated]
        by_round = rows.set_index("round")[runs.metric.field("")]
        accuracies = zip(*by_round, strict=True)
        panels.append(
            AgentPanel(
                title,
                by_round.index.tolist(),
                [[runs.metric.scale * value for value in vs] for vs in accuracies],
                runs.metric,
            )
        )
    return panels


def class_maps(runs: Runs) -> list[ClassMap]:
    """The last accuracies by class of the first seed of every line in every panel.

    Where the agents communicate before the local training of a round, there is a map
    for right after the last communication, and one for the end. The list is empty if no
    run has measured accuracies by class.
    """
    if BY_CLASS not in runs.evaluations:
        return []
    maps = []
    rows = runs.evaluations[runs.evaluations[BY_CLASS].notna()]
    for title, run in _first_seeds(runs, rows):
        classes = _class_names(run.run.iloc[0])
        moments = {
            "after the last communication": run[run.communicated],
            "at the end": run[run.phase == "trained"],
        }
        if moments["at the end"].index.equals(run[run.communicated].index):
            del moments["after the last communication"]
        for when, evaluations in moments.items():
            if len(evaluations):
                last = evaluations[BY_CLASS].iloc[-1]
                cells = [[_percent(value) for value in agent] for agent in last]
                maps.append(ClassMap(f"{title}, {when}", cells, classes))
    return maps


def _percent(value: float | None) -> float:
    """A share in %. The share of a class without test images is None."""
    return float("nan") if value is None else 100 * value


def _first_seeds(runs: Runs, rows: DataFrame) -> Iterator[tuple[str, Any]]:
    """The first seed of every line in every panel, with words that say what it is."""
    for values, line in rows.groupby(runs.fields, sort=False):
        seed = min(line.seed, key=int)
        of_seed = line[line.seed == seed]
        first = of_seed[of_seed.run == of_seed.run.iloc[0]]
        n_panels = len(runs.panels)
        words = [
            describe(runs.lines, values[n_panels:]),
            describe(runs.panels, values[:n_panels]),
            f"seed {seed}",
        ]
        yield ", ".join(filter(None, words)), first


def _class_names(run: str) -> Sequence[str] | None:
    path = Path(run) / "partition.json"
    return json.loads(path.read_text())["classes"] if path.exists() else None
