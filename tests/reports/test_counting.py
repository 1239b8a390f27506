"""Tests which runs a report counts: finished ones, each once, like with like."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from absl import flags

from dimat_jax import reports
from dimat_jax.cli import _report, _train
from dimat_jax.errors import UserError
from tests.reports.made_up import write_run

OVERVIEW = "Mean test accuracy of the agents (%)"
LEFT_OUT = "Runs that are not counted"


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
    ]


def set_rows(run: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (run / "metrics.jsonl").write_text(text)


def cut(n_rows: int) -> Callable[[Path], object]:
    return lambda run: set_rows(run, rows_of(run)[:n_rows])


def changed(number: int, **values: Any) -> Callable[[Path], object]:
    """Changes values of one row."""

    def change(run: Path) -> None:
        rows = rows_of(run)
        rows[number] |= values
        set_rows(run, rows)

    return change


def torn(end: str) -> Callable[[Path], object]:
    """Cuts off the second half of the last row, as a crash does."""

    def tear(run: Path) -> None:
        metrics = run / "metrics.jsonl"
        metrics.write_text(metrics.read_text()[:-60] + end)

    return tear


def without_a_round(run: Path) -> None:
    set_rows(run, [row for row in rows_of(run) if row["round"] != 1])


def written_twice(run: Path) -> None:
    rows = rows_of(run)
    set_rows(run, rows + rows[-2:])


def failed(run: Path) -> None:
    content = {"message": "the loss of agent(s) [1] is not finite"}
    (run / "failure.json").write_text(json.dumps(content))


FAULTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "cut to two rows": (cut(2), "unfinished", "round 1 of 2"),
    "cut after a merge": (cut(4), "unfinished", "round 2 of 2"),
    "torn last row": (torn(""), "unfinished", "round 2 of 2"),
    "torn row in a full line": (torn("\n"), "damaged", "is damaged, or not"),
    "no row": (cut(0), "unfinished", "no evaluation"),
    "diverged while training": (failed, "diverged", "agent(s) [1] is not finite"),
    "no mean accuracy": (
        changed(-1, test_accuracy_mean=None),
        "diverged",
        "test_accuracy_mean is not finite in round 2 (phase 'trained')",
    ),
    "one agent without accuracy": (
        changed(2, test_accuracy=[0.5, None]),
        "diverged",
        "test_accuracy is not finite in round 1",
    ),
    "no loss": (changed(1, test_loss_mean=None), "diverged", "not finite in round 1"),
    "huge loss": (changed(-1, test_loss_mean=3.2e5), "diverged", "3.2e+05 in round 2"),
    "a round is missing": (without_a_round, "damaged", "evaluations of round 1"),
    "rows twice": (written_twice, "damaged", "is there twice"),
    "no phase": (changed(1, phase=None), "damaged", ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_that_is_not_whole_is_listed_and_leaves_no_trace_in_a_mean(
    tmp_path, fault
):
    spoil, state, reason = FAULTS[fault]
    for seed, accuracy in enumerate((0.5, 0.6, 0.1)):
        folder = tmp_path / f"seed{seed}"
        write_run(folder, algorithm="wa", seed=seed, accuracy=accuracy)
    spoil(tmp_path / "seed2")
    runs = reports.load(tmp_path)
    tables = reports.tables(runs)
    cell = tables[OVERVIEW].loc["wa", "trained (last round)"]
    assert cell == "56.00 ± 7.07 (n=2 of 3)"
    assert set(runs.evaluations.seed) == {"0", "1"}
    (row,) = tables[LEFT_OUT].reset_index().to_dict("records")
    assert row["run"] == str(tmp_path / "seed2") and row["state"] == state
    assert reason in row["reason"]
    assert row["algorithm"] == "wa" and row["seed"] == "2"


@pytest.mark.parametrize("content", [None, "{", '{"algorithm": "wa", "rounds": "x"}'])
def test_a_run_whose_config_cannot_be_read_is_listed(tmp_path, content):
    write_run(tmp_path / "good", algorithm="wa")
    write_run(tmp_path / "bad", algorithm="wa", seed=1)
    config = tmp_path / "bad" / "config.json"
    config.unlink()
    if content is not None:
        config.write_text(content)
    runs = reports.load(tmp_path)
    assert set(runs.evaluations.run) == {str(tmp_path / "good")}
    assert list(runs.left_out.state) == ["damaged"]
    assert list(runs.left_out.run) == [str(tmp_path / "bad")]


def test_a_run_that_has_only_begun_is_listed(tmp_path):
    write_run(tmp_path / "good", algorithm="wa")
    partition = {"partition": "iid", "classes": None, "counts": [[1], [1]]}
    write_run(tmp_path / "begun", algorithm="wa", seed=1, partition=partition)
    (tmp_path / "begun" / "metrics.jsonl").unlink()
    runs = reports.load(tmp_path)
    assert list(runs.left_out.run) == [str(tmp_path / "begun")]
    assert not runs.partitions


def test_a_line_of_which_no_run_has_finished_is_in_the_tables(tmp_path):
    for algorithm in ("wa", "dimat"):
        for topology in ("ring", "star"):
            for seed in (0, 1):
                folder = tmp_path / f"{algorithm}-{topology}-{seed}"
                write_run(folder, algorithm=algorithm, topology=topology, seed=seed)
                if algorithm == "dimat":
                    cut(3)(folder)
    tables = reports.tables(reports.load(tmp_path))
    assert set(tables[OVERVIEW].loc[("ring", "dimat")].iloc[:3]) == {"none (n=0 of 2)"}
    grid = tables["Mean test accuracy at the end (%), and MB sent"]
    assert grid.loc["dimat", "star"] == "none (n=0 of 2)"
    assert grid.loc["wa", "star"] == "51.0 ± 0.0 (n=2; 0 MB)"
    assert len(tables[LEFT_OUT]) == 4


def test_where_no_run_has_finished_there_is_no_report(tmp_path):
    write_run(tmp_path / "one", algorithm="wa")
    cut(2)(tmp_path / "one")
    with pytest.raises(
        UserError, match="no run has finished\n.*one is unfinished: .*1"
    ):
        reports.write([tmp_path], tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_a_run_that_ends_with_a_huge_loss_ends_without_a_report(tmp_path, capsys):
    write_run(tmp_path, algorithm="wa")
    changed(-1, test_loss_mean=3.2e5)(tmp_path)
    _train._report_on(str(tmp_path))
    printed = capsys.readouterr().out
    assert printed.startswith("there is no report: no run has finished")
    assert "the mean test loss is 3.2e+05 in round 2" in printed
    assert not (tmp_path / "report.md").exists()


def test_the_evaluations_of_a_file_are_those_of_the_runs_that_count(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / str(seed), algorithm="wa", seed=seed)
    cut(3)(tmp_path / "1")
    reports.write([tmp_path], tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert f"{tmp_path / '1'} | unfinished" in text
    assert str(tmp_path / "1") not in (tmp_path / "report" / "report.csv").read_text()


# --- Each run once --------------------------------------------------------------------


def test_a_run_counts_once_by_whichever_paths_it_is_found(tmp_path, monkeypatch):
    sweep = tmp_path / "sweep"
    write_run(sweep / "a", algorithm="wa", seed=0, accuracy=0.5)
    write_run(sweep / "b", algorithm="wa", seed=1, accuracy=0.6)
    (tmp_path / "link").symlink_to(sweep / "a")
    monkeypatch.chdir(tmp_path)
    paths = ["sweep", sweep, "sweep/../sweep/a", tmp_path / "link", "sweep/a"]
    runs = reports.load(paths)
    once = reports.load("sweep")
    assert runs.evaluations.equals(once.evaluations)
    assert runs.started.equals(once.started) and runs.left_out.empty


def test_a_copy_of_a_folder_counts_once_also_one_made_while_the_run_went_on(tmp_path):
    write_run(tmp_path / "a", algorithm="wa", rounds=3)
    write_run(tmp_path / "b", algorithm="wa", rounds=3, seed=1)
    shutil.copytree(tmp_path / "a", tmp_path / "whole")
    shutil.copytree(tmp_path / "a", tmp_path / "0-early")
    cut(3)(tmp_path / "0-early")
    os.utime(tmp_path / "0-early" / "config.json", (1, 1))  # it is found first
    runs = reports.load(tmp_path)
    cell = reports.tables(runs)[OVERVIEW].loc["wa", "trained (last round)"]
    assert cell == "51.00 ± 0.00 (n=2)"
    assert set(runs.left_out.state) == {"copy"} and len(runs.left_out) == 2
    assert not runs.left_out.run.isin(runs.evaluations.run).any()


def test_two_runs_of_the_same_config_and_seed_are_refused_by_name(tmp_path):
    for name, accuracy in (("first", 0.5), ("again", 0.6), ("other", 0.7)):
        seed = int(name == "other")
        write_run(tmp_path / name, algorithm="wa", seed=seed, accuracy=accuracy)
    both = f"{tmp_path / 'first'} and {tmp_path / 'again'} are different runs"
    with pytest.raises(UserError, match="the same seed") as error:
        reports.load(tmp_path)
    assert both in str(error.value)
    assert len(reports.load([tmp_path / "first", tmp_path / "other"]).started) == 2


def test_options_that_change_no_result_make_no_other_config(tmp_path):
    for name, accuracy in (("unroll", 0.5), ("vmap", 0.6)):
        fields: dict[str, Any] = {"placement__batching": name}
        write_run(tmp_path / name, algorithm="wa", accuracy=accuracy, **fields)
    with pytest.raises(UserError, match="unroll and .*vmap are different runs"):
        reports.load(tmp_path)


def test_a_failed_attempt_beside_the_finished_run_is_listed_and_not_refused(tmp_path):
    write_run(tmp_path / "attempt", algorithm="wa", accuracy=0.4)
    write_run(tmp_path / "finished", algorithm="wa", accuracy=0.5)
    cut(3)(tmp_path / "attempt")
    runs = reports.load(tmp_path)
    assert list(runs.left_out.run) == [str(tmp_path / "attempt")]
    cell = reports.tables(runs)[OVERVIEW].loc["wa", "trained (last round)"]
    assert cell == "51.00 (n=1)"


# --- Like with like -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "values", "panels"),
    [
        ("data.name", ("digits", "cifar10"), ["digits", "cifar10"]),
        ("data.train_size", (100, 200), ["train_size 100", "train_size 200"]),
        ("data.test_size", (100, 200), ["test_size 100", "test_size 200"]),
        ("eval.samples", (100, 0), ["samples 100", "samples 0"]),
    ],
)
def test_different_data_never_share_a_panel(tmp_path, field, values, panels):
    for number, value in enumerate(values):
        fields: dict[str, Any] = {field.replace(".", "__"): value}
        write_run(tmp_path / str(number), algorithm="wa", **fields)
        # It varies with the algorithm alone, so it could be taken for its setting.
        write_run(tmp_path / f"wm{number}", algorithm=("wm", "sgp")[number], **fields)
    figure = reports.accuracy_figure(reports.load(tmp_path))
    shown = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert sorted(shown) == sorted(panels)
    for axis in figure.axes:
        named = [
            line for line in axis.lines if not str(line.get_label()).startswith("_")
        ]
        assert len(named) <= 2


def test_runs_of_different_lengths_are_not_averaged(tmp_path):
    for seed, rounds, accuracy in ((0, 4, 0.5), (1, 4, 0.6), (2, 2, 0.1)):
        folder = tmp_path / str(seed)
        write_run(folder, algorithm="wa", seed=seed, rounds=rounds, accuracy=accuracy)
    runs = reports.load(tmp_path)
    assert runs.lines == ["algorithm", "rounds"]
    cells = reports.tables(runs)[OVERVIEW]["trained (last round)"]
    assert cells.to_dict() == {
        ("wa", "4"): "56.00 ± 7.07 (n=2)",
        ("wa", "2"): "11.00 (n=1)",
    }


def test_deviations_over_agents_and_over_seeds_have_the_same_convention(tmp_path):
    # The made-up agents are 0.125 above and below their mean.
    for seed, accuracy in ((0, 0.375), (1, 0.625)):
        write_run(tmp_path / str(seed), algorithm="wa", seed=seed, accuracy=accuracy)
    tables = reports.tables(reports.load(tmp_path))
    over_seeds = tables[OVERVIEW].loc["wa", "trained (last round)"]
    assert over_seeds == "51.00 ± 17.68 (n=2)"
    agents = tables["The agents at the end"].loc["wa"]
    assert agents["deviation over the agents (%)"] == 17.68
    files = reports.write([tmp_path], tmp_path / "report")
    assert "over agents, are sample deviations" in files[0].read_text()


# --- Where a report goes --------------------------------------------------------------


@pytest.fixture
def report(monkeypatch, capsys):
    """`dimat report`, with its flags, in this process."""

    def call(*directories: Any, out: Any = None) -> str:
        values = flags.FlagValues()
        monkeypatch.setattr(flags, "FLAGS", values)
        flags.DEFINE_string("out", None, "", flag_values=values)
        values(["report", *([f"--out={out}"] if out else [])])
        _report.main([str(directory) for directory in directories])
        return capsys.readouterr().out

    return call


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_comparison_goes_into_a_new_folder_and_no_run_loses_its_own_report(
    tmp_path, monkeypatch, report
):
    for name in ("a", "b"):
        write_run(tmp_path / name, algorithm="wa", seed=ord(name))
        reports.write([tmp_path / name], tmp_path / name)
    before = contents(tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    assert "wrote report/report.md" in report(tmp_path / "a", tmp_path / "b")
    first = contents(work / "report")
    assert "wrote report-2/report.md" in report(tmp_path / "b")
    assert contents(work / "report") == first
    assert {path: path.read_bytes() for path in before} == before


def test_the_folder_of_a_report_must_be_new_or_empty(tmp_path, report):
    write_run(tmp_path / "a", algorithm="wa")
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new/below"):
        report(tmp_path / "a", out=tmp_path / name)
        assert (tmp_path / name / "report.md").is_file()
        before = contents(tmp_path)
        with pytest.raises(UserError, match="must be a new or an empty folder"):
            report(tmp_path / "a", out=tmp_path / name)
        assert contents(tmp_path) == before


def test_a_report_that_is_refused_leaves_no_folder(tmp_path, monkeypatch, report):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="no run"):
        report("nothing")
    with pytest.raises(UserError, match="no run"):
        report("nothing", out="here")
    assert [path.name for path in tmp_path.iterdir()] == ["nothing"]
