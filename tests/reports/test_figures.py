"""Tests what the figures of a report show, and that everything in them can be read."""

import itertools
import json
from typing import Any

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.figure import Figure

from dimat_jax import reports
from dimat_jax.reports import _looks
from tests.reports.made_up import add_to_rows, by_class, write_run

N_AGENTS, N_CLASSES = 4, 3


def saw_teeth(row: dict[str, Any]) -> float:
    """0.8 right after a merge, and 0.2 after the local training."""
    return 0.8 if row["phase"] == "merged" else 0.2


def axes_of(figure: Any) -> list[Any]:
    return figure.axes


def named_lines(axis: Any) -> dict[str, Any]:
    return {
        line.get_label(): line
        for line in axis.lines
        if not line.get_label().startswith("_")
    }


def unnamed_lines(axis: Any) -> list[Any]:
    found = [line for line in axis.lines if line.get_label().startswith("_")]
    return [line for line in found if len(line.get_xdata())]


# --- The curves -----------------------------------------------------------------------


def test_the_curve_of_an_algorithm_is_what_it_has_right_after_each_communication(
    tmp_path,
):
    write_run(tmp_path, algorithm="wa", rounds=6, sent={"params": 5})
    add_to_rows(tmp_path, test_accuracy_mean=saw_teeth)
    (axis,) = axes_of(reports.accuracy_figure(reports.load(tmp_path)))
    (line,) = named_lines(axis).values()
    np.testing.assert_array_equal(line.get_xdata(), range(7))
    np.testing.assert_allclose(line.get_ydata(), [20, 80, 80, 80, 80, 80, 80])
    (lighter,) = unnamed_lines(axis)
    np.testing.assert_allclose(lighter.get_ydata(), 20)
    assert lighter.get_color() == line.get_color()
    assert lighter.get_alpha() < 0.5 and lighter.get_linewidth() < line.get_linewidth()


@pytest.mark.parametrize("every", [1, 2])
def test_agents_that_send_with_every_step_have_communicated_after_training(
    tmp_path, every
):
    rounds = 4
    write_run(tmp_path, algorithm="cdsgd", rounds=rounds, eval__every=every)
    add_to_rows(
        tmp_path,
        test_accuracy_mean=saw_teeth,
        communicated=lambda row: row["phase"] == "trained",
    )
    metrics = tmp_path / "metrics.jsonl"
    kept = [
        line
        for line in metrics.read_text().splitlines(keepends=True)
        if json.loads(line)["round"] % every == 0
    ]
    metrics.write_text("".join(kept))
    (axis,) = axes_of(reports.accuracy_figure(reports.load(tmp_path)))
    (line,) = named_lines(axis).values()
    np.testing.assert_allclose(line.get_ydata()[1:], 20)
    assert not unnamed_lines(axis)
    assert list(line.get_xdata()) == list(range(0, rounds + 1, every))


def test_bands_are_the_deviation_over_seeds_and_the_figure_says_so(tmp_path):
    for seed, accuracy in ((0, 0.4), (1, 0.6)):
        write_run(tmp_path / str(seed), algorithm="wa", seed=seed, accuracy=accuracy)
    figure: Any = reports.accuracy_figure(reports.load(tmp_path))
    (axis,) = figure.axes
    (band,) = axis.collections
    edges = band.get_paths()[0].vertices
    last = edges[edges[:, 0] == 2][:, 1]
    deviation = 100 * np.std([0.41, 0.61], ddof=1)
    assert last.min() == pytest.approx(51 - deviation)
    assert last.max() == pytest.approx(51 + deviation)
    said = figure.get_supxlabel().replace("\n", " ")
    assert "one sample standard deviation over the seeds" in said
    assert "n = 2 seeds" in said and "right after a communication" in said


def test_the_figure_does_not_speak_of_bands_that_it_does_not_have(tmp_path):
    write_run(tmp_path, algorithm="wa")
    figure: Any = reports.accuracy_figure(reports.load(tmp_path))
    assert not figure.axes[0].collections
    assert "Bands" not in figure.get_supxlabel()
    assert "n = 1 seed;" in figure.get_supxlabel().replace("\n", " ")


@pytest.mark.parametrize(
    ("measure", "against", "column", "label"),
    [
        ("loss", "rounds", "test_loss_mean", "test loss (nats)"),
        ("consensus", "seconds", "consensus_distance", "consensus distance"),
        (
            "disagreement",
            "bytes",
            "test_disagreement",
            "disagreement of the agents (%)",
        ),
    ],
)
def test_every_measure_is_drawn_against_every_axis(
    tmp_path, measure, against, column, label
):
    values = {column: lambda row: row["round"] / 2}
    write_run(tmp_path / "new", algorithm="wa", sent={"params": 2_000_000})
    add_to_rows(tmp_path / "new", seconds_total=lambda row: 7 * row["round"], **values)
    write_run(tmp_path / "old", algorithm="dimat", sent={"params": 2_000_000})
    runs = reports.load(tmp_path)
    (axis,) = axes_of(reports.curves_figure(runs, measure=measure, against=against))
    (line,) = named_lines(axis).values()  # the older run has no such measure
    scale = 100 if measure == "disagreement" else 1
    expected = {
        "rounds": ([0, 1, 2], [0, 0.5, 1]),
        "seconds": ([0, 7, 14], [0, 0.5, 1]),
        "bytes": ([2, 4], [0.5, 1]),
    }[against]
    np.testing.assert_allclose(line.get_xdata(), expected[0])
    np.testing.assert_allclose(line.get_ydata(), scale * np.asarray(expected[1]))
    assert axis.get_ylabel() == label
    # A line has its colour in all figures.
    (everywhere,) = axes_of(reports.accuracy_figure(runs))
    assert named_lines(everywhere)["wa"].get_color() == line.get_color()


def test_a_round_that_not_all_seeds_have_evaluated_is_not_a_mean_of_the_others(
    tmp_path,
):
    for seed in (0, 1):
        write_run(tmp_path / str(seed), algorithm="wa", seed=seed, rounds=3)
    add_to_rows(
        tmp_path / "1", test_loss_mean=lambda row: 1.0 if row["round"] > 1 else None
    )
    add_to_rows(tmp_path / "0", test_loss_mean=3.0)
    metrics = tmp_path / "1" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    for row in rows:
        if row["test_loss_mean"] is None:
            del row["test_loss_mean"]
    metrics.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (axis,) = axes_of(reports.curves_figure(reports.load(tmp_path), measure="loss"))
    (line,) = named_lines(axis).values()
    np.testing.assert_allclose(line.get_xdata(), [2, 3])
    np.testing.assert_allclose(line.get_ydata(), 2)


# --- What can be read -----------------------------------------------------------------


@pytest.mark.every_nth(3)
@pytest.mark.parametrize("against", ["rounds", "bytes"])
@pytest.mark.parametrize(
    ("n_lines", "n_panels", "name"),
    [
        (1, 1, "rule"),
        (6, 1, "rule"),
        (7, 3, "rule"),
        (61, 2, "a_rule_of_a_long_name" * 3),
    ],
)
def test_the_legend_names_all_lines_and_covers_nothing_and_is_not_cut_off(
    tmp_path, against, n_lines, n_panels, name
):
    for panel in range(n_panels):
        for number in range(n_lines):
            write_run(
                tmp_path / f"{panel}-{number}",
                algorithm="wa",
                topology=("ring", "star", "fully_connected")[panel],
                mixing=f"{name}{number}",
                sent={"params": 1 + number},
            )
    figure: Any = reports.curves_figure(reports.load(tmp_path), against=against)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == n_lines
    whole, box = figure.bbox, legend.get_window_extent()
    for inner in (box, *(text.get_window_extent() for text in figure.texts)):
        assert whole.x0 <= inner.x0 and inner.x1 <= whole.x1
        assert whole.y0 <= inner.y0 and inner.y1 <= whole.y1
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert len(shown) == n_panels
    for axis in shown:
        assert axis.get_legend() is None
        panel = axis.get_tightbbox()
        assert not panel.overlaps(box)
        # The panels have not shrunk to make room for the legend.
        assert axis.get_window_extent().width / figure.dpi > 3.5
        assert axis.get_window_extent().height / figure.dpi > 2
    for text in figure.texts:
        assert not text.get_window_extent().overlaps(box)


def test_two_hundred_lines_all_look_different():
    looks = {tuple(map(str, _looks.look(number)[:3])) for number in range(200)}
    pages = {
        (look.color, str(look.page_dash), look.page_mark)
        for look in map(_looks.look, range(200))
    }
    assert len(looks) == len(pages) == 200


# What people without green cones, and without red ones, see of linear RGB (Machado et
# al. 2009, severity 1).
BLINDNESS = {
    "none": np.eye(3),
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
}


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_the_colours_of_lines_can_be_told_apart_by_the_colour_blind(
    tmp_path, blindness
):
    for number in range(7):
        write_run(tmp_path / str(number), algorithm="wa", mixing=f"rule{number}")
    (axis,) = axes_of(reports.accuracy_figure(reports.load(tmp_path)))
    colors = [line.get_color() for line in named_lines(axis).values()]
    seen = [_perceived(color, np.asarray(BLINDNESS[blindness])) for color in colors]
    white = _perceived("white", np.eye(3))
    for one, other in itertools.combinations([*seen, white], 2):
        assert np.linalg.norm(one - other) > 12


def _perceived(color: Any, blindness: np.ndarray) -> np.ndarray:
    """A colour in CIELAB, where a distance of 2.3 is just visible."""
    srgb = np.asarray(matplotlib.colors.to_rgb(color))
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(blindness @ linear, 0, 1)
    to_xyz = np.asarray(
        [
            [0.4124, 0.3576, 0.1805],
            [0.2126, 0.7152, 0.0722],
            [0.0193, 0.1192, 0.9505],
        ]
    )
    x, y, z = np.cbrt(np.maximum(to_xyz @ linear / [0.9505, 1, 1.089], 1e-9))
    return np.asarray([116 * y - 16, 500 * (x - y), 200 * (y - z)])


# --- The agents, one by one -----------------------------------------------------------


def test_every_agent_has_a_curve_of_the_first_seed(tmp_path):
    for seed in (3, 10):
        for algorithm in ("wa", "wm"):
            folder = tmp_path / f"{algorithm}{seed}"
            write_run(folder, algorithm=algorithm, seed=seed, sent={"params": 1})
            add_to_rows(
                folder,
                test_accuracy=lambda row, seed=seed: [
                    (agent + seed) / 20 + (row["phase"] == "trained") / 100
                    for agent in range(N_AGENTS)
                ],
            )
    figure: Any = reports.agents_figure(reports.load(tmp_path))
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in panels] == ["wa, seed 3", "wm, seed 3"]
    for axis in panels:
        *agents, mean = axis.lines
        last = [line.get_ydata()[-1] for line in agents]
        np.testing.assert_allclose(last, [15, 20, 25, 30])
        np.testing.assert_allclose(mean.get_ydata()[-1], 22.5)
        assert list(mean.get_xdata()) == [0, 1, 2]
        assert len({str(line.get_color()) for line in agents}) == N_AGENTS


def by_agent(row: dict[str, Any]) -> list[list[float]]:
    """Each agent is right on its own class only, once it has trained."""
    own = [[float(c == a % N_CLASSES) for c in range(N_CLASSES)] for a in range(4)]
    return own if row["phase"] == "trained" else [[0.5] * N_CLASSES] * N_AGENTS


def test_accuracy_by_class_is_a_map_of_agents_and_classes(tmp_path):
    names = ["cat", "dog", "eel"]
    partition = by_class([1, 2, 3], [4, 5, 6]) | {"classes": names}
    write_run(tmp_path, algorithm="wa", sent={"params": 1}, partition=partition)
    assert "classes.png" not in {p.name for p in reports.write([tmp_path], tmp_path)}
    add_to_rows(tmp_path, test_accuracy_by_class=by_agent)
    figure: Any = reports.classes_figure(reports.load(tmp_path))
    merged, trained = (axis for axis in figure.axes if axis.images)
    assert merged.get_title() == "wa, seed 0, after the last communication"
    assert trained.get_title() == "wa, seed 0, at the end"
    np.testing.assert_allclose(merged.images[0].get_array(), 50)
    expected = [[100, 0, 0], [0, 100, 0], [0, 0, 100], [100, 0, 0]]
    np.testing.assert_allclose(trained.images[0].get_array(), expected)
    assert [label.get_text() for label in trained.get_xticklabels()] == names
    texts = [int(text.get_text()) for text in trained.texts]
    assert texts == list(itertools.chain.from_iterable(expected))
    assert "accuracy (%) of an agent" in figure.get_supxlabel().replace("\n", " ")
    assert "classes.png" in {p.name for p in reports.write([tmp_path], tmp_path)}


def test_a_class_without_test_images_is_an_empty_cell(tmp_path):
    write_run(tmp_path, algorithm="local")
    add_to_rows(tmp_path, test_accuracy_by_class=[[0.25, None], [0.75, None]])
    figure: Any = reports.classes_figure(
        reports.load(tmp_path), tmp_path / "classes.png"
    )
    (axis,) = (axis for axis in figure.axes if axis.images)  # it never communicates
    assert [text.get_text() for text in axis.texts] == ["25", "75"]


@pytest.mark.parametrize("n_runs", [1, 13])
def test_the_thirteenth_panel_of_agents_is_mentioned(tmp_path, n_runs):
    for number in range(n_runs):
        write_run(tmp_path / str(number), algorithm="wa", mixing=f"rule{number}")
    figure: Any = reports.agents_figure(reports.load(tmp_path))
    assert isinstance(figure, Figure)
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert len(titles) == min(n_runs, 12)
    said = figure.get_supxlabel().replace("\n", " ")
    assert ("These are 12 of 13 panels." in said) == (n_runs == 13)
