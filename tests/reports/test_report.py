"""Tests reports on made-up runs: their comparisons, tables and figures."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from dimat_jax import reports
from dimat_jax.configs import quickstart
from dimat_jax.data.partition import PARTITIONS
from dimat_jax.data.sources import SOURCES
from dimat_jax.experiment import Experiment
from dimat_jax.reports import Partition, Runs, _runs, describe, load
from dimat_jax.topology import TOPOLOGIES
from dimat_jax.workdir import Workdir
from tests.reports.made_up import add_to_rows, by_class, write_run

ROOT = Path(__file__).parents[2]
END, AFTER, BY_ROUND, BY_KIND, AWAY, SETTINGS = (
    "Mean test accuracy at the end (%), and MB sent",
    "Right after the last communication (%), and MB sent",
    "Right after each communication, by round (%)",
    "MB sent, by kind",
    "Agents that were away or not drawn, in the rounds evaluated",
    "Settings by algorithm",
)


@pytest.fixture
def drawn(monkeypatch) -> list[Any]:
    """The figures that are written to files, in this order."""
    kept: list[Any] = []
    save = Figure.savefig

    def savefig(figure, *arguments, **options):
        kept.append(figure)
        return save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return kept


def lines_of(axis) -> dict[str, Any]:
    return {
        line.get_label(): line
        for line in axis.lines
        if not line.get_label().startswith("_")
    }


def labels(runs: Runs) -> list[str]:
    groups = runs.evaluations.groupby(runs.lines, sort=False)
    return [describe(runs.lines, name) for name, _ in groups]


# --- What is compared -----------------------------------------------------------------


def test_what_varies_with_the_algorithm_alone_is_its_setting_and_not_compared(tmp_path):
    for name, rate in (("cdsgd", 0.1), ("sgp", 0.1), ("wa", 0.001)):
        for topology in ("ring", "star"):
            write_run(
                tmp_path / f"{name}-{topology}",
                algorithm=name,
                topology=topology,
                optimizer__learning_rate=rate,
                mixing="column_stochastic" if name == "sgp" else "uniform",
            )
    runs = load([tmp_path])
    assert (runs.panels, runs.lines) == (["topology"], ["algorithm"])
    settings = reports.tables(runs)[SETTINGS]
    assert settings.to_dict() == {
        "mixing": {"cdsgd": "uniform", "sgp": "column_stochastic", "wa": "uniform"},
        # The algorithms' own choices, which their configs leave empty.
        "optimizer.name": {"cdsgd": "sgd", "sgp": "sgd", "wa": "adam"},
        "learning_rate": {"cdsgd": "0.1", "sgp": "0.1", "wa": "0.001"},
    }


def test_what_varies_within_an_algorithm_is_compared(tmp_path):
    for name, rate in (("cdsgd", 0.1), ("cdsgd", 0.01), ("sgp", 0.1)):
        path = tmp_path / f"{name}-{rate}"
        write_run(path, algorithm=name, optimizer__learning_rate=rate)
    runs = load([tmp_path])
    assert runs.lines == ["algorithm", "learning_rate"]
    assert labels(runs) == [
        "cdsgd, learning_rate 0.1",
        "cdsgd, learning_rate 0.01",
        "sgp, learning_rate 0.1",
    ]
    assert SETTINGS not in reports.tables(runs)


def test_a_field_is_blank_for_those_who_do_not_read_it(tmp_path):
    for name, frame in (("dimat", "own"), ("dimat", "joint"), ("wa", "own")):
        write_run(tmp_path / f"{name}-{frame}", algorithm=name, merge__frame=frame)
    runs = load([tmp_path])
    assert runs.lines == ["algorithm", "frame"]
    assert labels(runs) == ["dimat, own", "dimat, joint", "wa"]


def test_a_field_that_varies_only_among_those_who_do_not_read_it_is_left_out(tmp_path):
    for frame in ("own", "joint"):
        write_run(tmp_path / frame, algorithm="wa", merge__frame=frame)
        write_run(
            tmp_path / f"{frame}-local", algorithm="local", data__alpha=len(frame)
        )
    runs = load([tmp_path])
    assert runs.fields == ["algorithm"] and runs.settings.empty


def test_compression_is_told_of_those_who_compress(tmp_path):
    for name, fields in {
        "cdsgd": {},
        "choco": {},
        "some": {"compression__name": "top_k"},
        "half": {"compression__name": "top_k", "compression__fraction": 0.5},
    }.items():
        algorithm = name if name == "cdsgd" else "choco"
        write_run(tmp_path / name, algorithm=algorithm, **fields)
    runs = load([tmp_path])
    assert runs.lines == ["algorithm", "compression.name", "fraction"]
    assert labels(runs) == [
        "cdsgd",
        "choco, int8",
        "choco, top_k, fraction 0.1",
        "choco, top_k, fraction 0.5",
    ]


def test_an_option_of_the_gossip_between_merges_is_the_mergers_too(tmp_path):
    for momentum in (0.5, 0.9):
        for algorithm in ("qgm", "dimat", "cdsgd"):
            write_run(
                tmp_path / f"{algorithm}{momentum}",
                algorithm=algorithm,
                gossip__momentum=momentum,
                merge__inner="qgm",
            )
    runs = load([tmp_path])
    assert runs.lines == ["algorithm", "momentum"]
    assert labels(runs) == [
        "qgm, momentum 0.5",
        "dimat, momentum 0.5",
        "cdsgd",
        "qgm, momentum 0.9",
        "dimat, momentum 0.9",
    ]


def test_partitions_and_graphs_make_panels_with_their_parameters(tmp_path):
    for name, fields in {
        "iid": {"data__partition": "iid"},
        "much": {"data__partition": "dirichlet", "data__alpha": 0.1},
        "little": {"data__partition": "dirichlet", "data__alpha": 10.0},
    }.items():
        write_run(tmp_path / name, algorithm="wa", accuracy=len(name) / 10, **fields)
    runs = load([tmp_path])
    assert (runs.panels, runs.lines) == (["partition", "alpha"], ["algorithm"])
    assert list(reports.tables(runs)[END].iloc[0].items()) == [
        ("iid", "31.0 (n=1; 0 MB)"),
        ("dirichlet, alpha 0.1", "41.0 (n=1; 0 MB)"),
        ("dirichlet, alpha 10.0", "61.0 (n=1; 0 MB)"),
    ]


def test_a_partition_has_its_alpha_in_its_panel_also_where_it_is_the_only_one(
    tmp_path,
):
    for name in ("iid", "dirichlet"):
        fields: dict[str, Any] = {"data__partition": name}
        if name == "dirichlet":
            fields["data__alpha"] = 0.25
        write_run(tmp_path / name, algorithm="wa", **fields)
    write_run(tmp_path / "all", algorithm="centralized")
    assert set(reports.tables(load([tmp_path]))[END]) == {
        "iid",
        "dirichlet, alpha 0.25",
    }


@pytest.mark.parametrize(
    ("indifferent", "algorithm", "choices"),
    [
        (
            "centralized",
            "wa",
            [
                {"data.partition": "iid"},
                {"data.partition": "dirichlet", "data.alpha": 0.1},
                {"data.partition": "dirichlet", "data.alpha": 10.0},
            ],
        ),
        (
            "local",
            "cdsgd",
            [
                {"topology": "ring"},
                {"topology": "random_regular", "graph.degree": 3},
                {"topology": "random_regular", "graph.degree": 4},
            ],
        ),
    ],
)
def test_a_run_that_reads_no_field_of_the_panels_is_in_all_of_them(
    tmp_path, indifferent, algorithm, choices
):
    """Also in a panel that has a blank field: IID data have no alpha."""
    for number, chosen in enumerate(choices):
        fields: dict[str, Any] = {
            path.replace(".", "__"): value for path, value in chosen.items()
        }
        write_run(tmp_path / str(number), algorithm=algorithm, **fields)
    write_run(tmp_path / "all", algorithm=indifferent)
    grid = reports.tables(load([tmp_path]))[END]
    assert len(grid.columns) == 3
    assert (grid != "").all(axis=None)


def test_a_run_is_repeated_only_in_the_panels_that_fit_it(tmp_path):
    for partition in ("iid", "by_class"):
        for topology in ("ring", "star"):
            path = tmp_path / f"{partition}-{topology}"
            fields: dict[str, Any] = {
                "data__partition": partition,
                "topology": topology,
            }
            write_run(path, algorithm="wa", **fields)
    write_run(tmp_path / "one", algorithm="local", data__partition="iid")
    evaluations = load([tmp_path]).evaluations
    one = evaluations[evaluations.algorithm == "local"]
    assert set(zip(one.partition, one.topology, strict=True)) == {
        ("iid", "ring"),
        ("iid", "star"),
    }
    assert len(one) == 2 * len(one.drop_duplicates(["round", "phase"]))


def test_every_option_of_the_data_a_graph_or_a_partition_makes_panels():
    read = {
        option.path
        for registry in (SOURCES, TOPOLOGIES, PARTITIONS)
        for record in registry.values()
        for option in record.reads
    }
    images = {"data.name", "data.train_size", "data.test_size", "eval.samples"}
    images |= {"data.validation", "data.held_out"}
    panels = {"topology", "data.partition", "pretrain.partition", *images, *read}
    assert set(_runs._paths(*_runs._PANELS)) == panels - {"seed"}


def test_the_partition_for_pretraining_is_told_where_it_is_not_always_the_same(
    tmp_path,
):
    for name in ("iid", "by_class"):
        write_run(tmp_path / name, algorithm="wa", data__partition=name)
    assert load([tmp_path]).panels == ["partition"]
    write_run(
        tmp_path / "both",
        algorithm="wa",
        data__partition="by_class",
        pretrain__partition="iid",
        data__alpha=3.0,  # which neither of them takes
    )
    runs = load([tmp_path])
    assert runs.panels == ["partition", "pretrain.partition"]
    assert set(reports.tables(runs)[END]) == {
        "iid, pretrain.partition iid",
        "by_class, pretrain.partition by_class",
        "by_class, pretrain.partition iid",
    }


def test_a_short_name_that_two_fields_share_is_written_out(tmp_path):
    for number in (1, 2):
        write_run(
            tmp_path / str(number),
            algorithm="dimat",
            pretrain__optimizer__learning_rate=number / 10,
            merge__batch_size=number,
            eval__batch_size=number,
        )
    assert load([tmp_path]).lines == [
        "algorithm",
        "merge.batch_size",
        "pretrain.optimizer.learning_rate",
        "eval.batch_size",
    ]


def test_an_older_run_has_the_defaults_of_fields_that_it_lacks(tmp_path):
    write_run(tmp_path / "new", algorithm="wa", data__partition="iid", topology="ring")
    write_run(tmp_path / "old", algorithm="local")
    runs = load([tmp_path])
    assert runs.fields == ["algorithm"] and runs.settings.empty
    assert not runs.partitions


# --- The tables -----------------------------------------------------------------------


def test_the_grid_has_a_row_for_each_line_and_a_column_for_each_panel(tmp_path):
    for topology, mb in (("ring", 1_240_000), ("star", 150_000_000)):
        for name, accuracy in (("wa", 0.5), ("dimat", 0.75)):
            if (name, topology) != ("dimat", "star"):
                write_run(
                    tmp_path / f"{name}-{topology}",
                    algorithm=name,
                    topology=topology,
                    accuracy=accuracy,
                    sent={"params": mb},
                )
    tables = reports.tables(load([tmp_path]))
    assert tables[END].to_dict("index") == {
        "wa": {"ring": "51.0 (n=1; 2.48 MB)", "star": "51.0 (n=1; 300 MB)"},
        "dimat": {"ring": "76.0 (n=1; 2.48 MB)", "star": ""},
    }
    assert tables[AFTER].loc["wa", "ring"] == "50.0 (n=1; 2.48 MB)"


def test_the_grid_tells_how_far_seeds_deviate(tmp_path):
    for seed, accuracy in ((0, 0.5), (1, 0.6)):
        for topology in ("ring", "star"):
            write_run(
                tmp_path / f"{topology}{seed}",
                algorithm="wa",
                topology=topology,
                seed=seed,
                accuracy=accuracy,
            )
    write_run(tmp_path / "one", algorithm="local", topology="ring")
    grid = reports.tables(load([tmp_path]))[END]
    assert grid.loc["wa", "star"] == "56.0 ± 7.1 (n=2; 0 MB)"
    assert grid.loc["local", "ring"] == "51.0 (n=1; 0 MB)"


def test_the_average_model_and_the_disagreement_of_agents_are_in_the_tables(tmp_path):
    for seed in (0, 1):
        folder = tmp_path / f"new{seed}"
        write_run(folder, algorithm="wa", seed=seed, sent={"params": 1})
        add_to_rows(
            folder,
            test_accuracy_average_model=lambda row, seed=seed: (
                seed / 10 + (0.8 if row["phase"] == "merged" else 0.3)
            ),
            test_disagreement=0.25,
            consensus_distance_aligned=lambda row: row["round"],
        )
    write_run(tmp_path / "old", algorithm="local")
    tables = reports.tables(load(tmp_path))
    average = tables["Mean test accuracy of the agents (%)"].filter(like="average")
    assert average.squeeze().to_dict() == {
        "wa": "85.00 ± 7.07 (n=2)",
        "local": "",
    }
    agents = tables["The agents at the end"]
    assert agents.loc["wa", "disagreement (%)"] == 25
    assert agents.loc["wa", "consensus distance, aligned"] == 2
    assert np.isnan(agents.loc["local", "disagreement (%)"])


def test_there_is_no_grid_of_a_single_panel(tmp_path):
    for name in ("wa", "dimat"):
        write_run(tmp_path / name, algorithm=name)
    assert not {END, AFTER} & set(reports.tables(load([tmp_path])))


def test_of_a_hundred_rounds_twenty_are_shown_the_first_and_the_last_among_them(
    tmp_path,
):
    write_run(tmp_path, algorithm="wa", rounds=100)
    shown = list(reports.tables(load([tmp_path]))[BY_ROUND])
    assert shown.pop(0) == "n"
    assert len(shown) == 20 and shown[0] == 1 and shown[-1] == 100
    assert set(np.diff(shown)) == {5, 6}


def test_bytes_by_kind_are_columns_and_a_table(tmp_path):
    sent = {"params": 1_000_000, "matching": 250_000}
    write_run(tmp_path / "dimat", algorithm="dimat", sent=sent)
    write_run(tmp_path / "wa", algorithm="wa", sent={"params": 1_000_000})
    write_run(tmp_path / "local", algorithm="local", sent={})
    runs = load([tmp_path])
    kinds = runs.evaluations[["bytes_sent.params", "bytes_sent.matching"]]
    assert (kinds.sum(axis=1) == runs.evaluations.bytes_sent_total).all()
    assert kinds.notna().to_numpy().all()
    assert not [name for name in runs.evaluations if "link" in name]
    assert reports.tables(runs)[BY_KIND].to_dict("index") == {
        "dimat": {"n": "1", "params": 2.0, "matching": 0.5},
        "wa": {"n": "1", "params": 2.0, "matching": 0.0},
        "local": {"n": "1", "params": 0.0, "matching": 0.0},
    }


def test_there_is_no_table_by_kind_where_all_is_of_one_kind(tmp_path):
    write_run(tmp_path, algorithm="wa", sent={"params": 8, "matching": 0})
    assert BY_KIND not in reports.tables(load([tmp_path]))


def test_kinds_are_missing_where_an_older_run_does_not_tell_them(tmp_path):
    write_run(tmp_path / "new", algorithm="wa", sent={"params": 4, "matching": 4})
    write_run(tmp_path / "old", algorithm="wm", sent={"params": 8})
    metrics = tmp_path / "old" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    for row in rows:
        del row["bytes_sent_by_kind"], row["bytes_sent_by_link"]
    metrics.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    table = reports.tables(load([tmp_path]))[BY_KIND]
    sizes = table.drop(columns="n")
    assert sizes.loc["wm"].isna().all() and sizes.loc["wa"].notna().all()


def test_missed_agent_rounds_are_counted_once_a_round(tmp_path):
    everyone, one = [True, True], [True, False]
    write_run(tmp_path / "wa", algorithm="wa", rounds=3, present=[everyone, one, one])
    write_run(tmp_path / "wm", algorithm="wm", rounds=3, present=[everyone] * 3)
    write_run(tmp_path / "old", algorithm="local")
    assert reports.tables(load([tmp_path]))[AWAY].to_dict("index") == {
        "wa": {"agent-rounds missed": 2, "of": 6, "share (%)": 33.3}
    }


def test_nobody_was_away_is_not_worth_a_table(tmp_path):
    write_run(tmp_path, algorithm="wa", present=[[True, True]] * 2)
    assert AWAY not in reports.tables(load([tmp_path]))


# --- Who holds what -------------------------------------------------------------------


def test_equal_partitions_are_shown_once_and_those_of_further_seeds_last(tmp_path):
    for algorithm in ("wa", "dimat"):
        for seed in (0, 1):
            for alpha in (0.1, 1.0):
                counts = [[seed, int(10 * alpha)], [3, 4]]
                write_run(
                    tmp_path / f"{algorithm}-{seed}-{alpha}",
                    algorithm=algorithm,
                    seed=seed,
                    data__partition="dirichlet",
                    data__alpha=alpha,
                    partition=by_class(*counts, name="dirichlet"),
                )
    write_run(tmp_path / "class", algorithm="wa", partition=by_class([9, 0], [0, 9]))
    assert [partition.title for partition in load([tmp_path]).partitions] == [
        "dirichlet, alpha 0.1, seed 0",
        "dirichlet, alpha 1.0, seed 0",
        "by_class",
        "dirichlet, alpha 0.1, seed 1",
        "dirichlet, alpha 1.0, seed 1",
    ]


def test_a_partition_is_shown_with_its_options_also_where_all_have_the_same(tmp_path):
    for name, fields in {
        "dirichlet": {"data__alpha": 0.25},
        "classes_per_agent": {"data__classes": 3},
    }.items():
        write_run(
            tmp_path / name,
            algorithm="wa",
            data__partition=name,
            partition=by_class([len(name), 0], [0, 9], name=name),
            **fields,
        )
    assert [partition.title for partition in load(tmp_path).partitions] == [
        "dirichlet, alpha 0.25",
        "classes_per_agent, classes 3",
    ]


def test_what_one_agent_has_alone_is_no_partition(tmp_path):
    write_run(tmp_path, algorithm="centralized", partition=by_class([5, 5]))
    assert not load([tmp_path]).partitions


def test_a_seventh_partition_is_mentioned_and_not_drawn(tmp_path, drawn):
    for seed in range(7):
        write_run(
            tmp_path / str(seed),
            algorithm="wa",
            seed=seed,
            partition=by_class([seed, 1], [1, 1]),
        )
    reports.write([tmp_path], tmp_path)
    picture = drawn[-1]
    assert picture.get_suptitle() == "6 of 7 partitions"
    titles = [axis.get_title() for axis in picture.axes]
    assert [t for t in titles if t] == [f"by_class, seed {seed}" for seed in range(6)]


def test_a_small_partition_has_numbers_and_white_where_there_is_nothing(
    tmp_path, drawn
):
    counts = np.zeros((5, 10), int)
    counts[np.arange(10) % 5, np.arange(10)] = np.arange(1, 11)
    path = tmp_path / "small.png"
    names = [f"class {label}" for label in range(10)]
    partition = Partition("by_class", counts.tolist(), names)
    reports.partition_figure([partition], path)
    axis = drawn[0].axes[0]
    assert sorted(int(text.get_text()) for text in axis.texts) == list(range(1, 11))
    assert (axis.images[0].get_array().mask == (counts == 0)).all()
    assert [label.get_text() for label in axis.get_xticklabels()] == names
    assert axis.get_title() == "by_class" and path.stat().st_size > 0


def test_the_names_of_a_runs_classes_reach_its_picture(tmp_path, drawn):
    config = quickstart.get_config("wa")
    config.data.train_size, config.data.test_size, config.rounds = 50, 20, 2
    experiment = Experiment(config)
    names = tuple(f"digit {label}" for label in range(10))
    experiment.dataset = experiment.dataset._replace(class_names=names)
    write_run(tmp_path / "run")
    Workdir(tmp_path / "run").create(experiment)
    reports.partition_figure(load([tmp_path]).partitions, tmp_path / "picture.png")
    labels = drawn[0].axes[0].get_xticklabels()
    assert tuple(label.get_text() for label in labels) == names


def test_a_large_partition_has_neither_numbers_nor_a_hundred_names(tmp_path, drawn):
    counts = np.random.default_rng(0).integers(0, 50, (40, 100))
    names = list(map(str, range(100)))
    partition = Partition("dirichlet", counts.tolist(), names)
    reports.partition_figure([partition], tmp_path / "large.png")
    axis = drawn[0].axes[0]
    assert not axis.texts
    for ticks in (axis.get_xticks(), axis.get_yticks()):
        assert len(ticks) <= 12 and (ticks == ticks.round()).all()


def test_a_class_that_nobody_has_and_a_partition_of_nothing_can_be_drawn(tmp_path):
    path = tmp_path / "empty.png"
    two = [Partition("a", [[0, 0], [0, 0]]), Partition("b", [[1], [0], [2]])]
    reports.partition_figure(two, path)
    assert path.stat().st_size > 0


# --- Accuracy, over rounds and over bytes ---------------------------------------------


def test_who_sends_nothing_is_a_dashed_line_at_its_end(tmp_path, drawn):
    write_run(tmp_path / "wa", algorithm="wa", sent={"params": 3_000_000})
    write_run(tmp_path / "local", algorithm="local", accuracy=0.7, sent={})
    reports.bytes_figure(load([tmp_path]), tmp_path / "bytes.png")
    axis = drawn[0].axes[0]
    wa, local = lines_of(axis)["wa"], lines_of(axis)["local"]
    assert list(wa.get_xdata()) == [3, 6]  # MB; the agents alone sent nothing
    np.testing.assert_allclose(wa.get_ydata(), [50, 50])
    assert wa.get_linestyle() == "-" and local.get_linestyle() == "--"
    np.testing.assert_allclose(local.get_ydata(), 71)
    assert axis.get_xscale() == "log"


def test_a_line_is_the_mean_over_seeds(tmp_path, drawn):
    for seed, size in ((0, 1_000_000), (1, 3_000_000)):
        write_run(
            tmp_path / str(seed),
            algorithm="wa",
            seed=seed,
            accuracy=0.5 + seed / 10,
            sent={"params": size},
        )
    runs = load([tmp_path])
    reports.bytes_figure(runs, tmp_path / "bytes.png")
    reports.accuracy_figure(runs, tmp_path / "accuracy.png")
    over_bytes, over_rounds = (lines_of(figure.axes[0])["wa"] for figure in drawn)
    assert list(over_bytes.get_xdata()) == [2, 4]
    assert list(over_rounds.get_xdata()) == [0, 1, 2]
    np.testing.assert_allclose(over_rounds.get_ydata(), [25, 55, 55])


def test_a_line_looks_the_same_in_every_panel_and_both_figures(tmp_path, drawn):
    for topology, names in (("ring", ("wa", "wm", "dimat")), ("star", ("dimat", "wa"))):
        for name in names:
            write_run(
                tmp_path / f"{topology}-{name}",
                algorithm=name,
                topology=topology,
                sent={"params": 1},
            )
    runs = load([tmp_path])
    reports.accuracy_figure(runs, tmp_path / "accuracy.png")
    reports.bytes_figure(runs, tmp_path / "bytes.png")
    panels = [axis for figure in drawn for axis in figure.axes]
    assert [p.get_title() for p in panels] == ["ring", "star"] * 2
    for name in ("dimat", "wa"):
        assert len({lines_of(panel)[name].get_color() for panel in panels}) == 1


# --- The files ------------------------------------------------------------------------


def test_a_report_has_the_figures_that_there_is_something_to_show_in(tmp_path):
    silent, talking = tmp_path / "silent", tmp_path / "talking"
    write_run(silent, algorithm="local")
    write_run(
        talking,
        algorithm="wa",
        sent={"params": 1},
        partition=by_class([1, 0], [0, 1]),
    )
    texts = {f"report.{ending}" for ending in ("md", "html", "tex", "csv")}
    always = texts | {f"{name}.png" for name in ("accuracy", "seconds", "agents")}
    for folder, names in (
        (silent, always),
        (talking, always | {"bytes.png", "partition.png"}),
    ):
        files = reports.write([folder], folder)
        assert {path.name for path in files} == names
        assert all(path.stat().st_size > 0 for path in files)


def test_runs_without_rounds_have_a_report_of_how_they_start(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / str(seed), algorithm="wa", seed=seed, rounds=0)
    files = reports.write([tmp_path], tmp_path / "report")
    assert "| wa          | 25.00 ± 0.00 (n=2) |" in files[0].read_text()


def test_a_value_that_does_not_speak_for_itself_has_its_name_before_it():
    fields = ["algorithm", "stay", "frame", "flip", "pretrain.partition", "file"]
    values = ["dimat", "0.1", "", "True", "iid", "a/b.json"]
    assert describe(fields, values) == (
        "dimat, stay 0.1, flip True, pretrain.partition iid, file a/b.json"
    )


def test_one_folder_can_be_loaded_without_a_list(tmp_path):
    write_run(tmp_path / "one", algorithm="wa")
    for folder in (tmp_path, str(tmp_path)):
        assert load(folder).evaluations.equals(load([tmp_path]).evaluations)


def test_a_figure_is_returned_and_only_written_where_a_path_is_given(tmp_path, drawn):
    runs = tmp_path / "runs"
    write_run(
        runs,
        algorithm="wa",
        sent={"params": 1},
        partition=by_class([1, 0], [0, 1]),
    )
    loaded = load(runs)
    before = sorted(tmp_path.rglob("*"))
    for figure in (
        reports.accuracy_figure(loaded),
        reports.bytes_figure(loaded),
        reports.partition_figure(loaded.partitions),
    ):
        assert isinstance(figure, Figure)
    assert not drawn and sorted(tmp_path.rglob("*")) == before
    path = tmp_path / "accuracy.png"
    assert reports.accuracy_figure(loaded, str(path)) is drawn[0]
    assert path.stat().st_size > 0


def test_figures_leave_the_backend_of_a_notebook_as_it_is(tmp_path):
    write_run(tmp_path, algorithm="wa")
    code = """
import sys
from dimat_jax import reports
runs = reports.load(sys.argv[1])
assert "matplotlib" not in sys.modules
reports.accuracy_figure(runs, f"{sys.argv[1]}/figure.png")
assert "matplotlib.pyplot" not in sys.modules
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
