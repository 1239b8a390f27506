"""The runs of a sweep are shown from their files: in a table, or line by line."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from dimat_jax._sweeping._job import PROGRESS
from dimat_jax._sweeping._progress import View
from tests.sweeping.small import jobs, small


def write_row(workdir: Path, number: int, phase: str) -> None:
    row = {"round": number, "phase": phase, "test_accuracy_mean": number / 10}
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def write_epoch(workdir: Path, number: int, phase: str) -> None:
    row = {"round": number, "phase": phase, "epoch": 7, "train_accuracy_mean": 0.5}
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def write_steps(workdir: Path, step: int, rate: float | None) -> None:
    content = {"step": step, "steps": 500, "steps_per_second": rate}
    (workdir / PROGRESS).write_text(json.dumps(content))


@pytest.fixture
def made(tmp_path):
    made = jobs(tmp_path, a=small(), b=small("local"), c=small(seed=1))
    for job in made:
        job.workdir.mkdir()
    return made


def view_of(made, terminal: bool) -> tuple[View, io.StringIO]:
    file = io.StringIO()
    console = Console(
        file=file, force_terminal=terminal, width=100, height=20, color_system=None
    )
    return View(made, console), file


def test_without_a_terminal_every_event_is_a_line(made):
    write_row(made[0].workdir, 1, "merged")  # from before the sweep was killed
    view, file = view_of(made, terminal=False)
    with view:
        view.start("a")
        view.start("b")
        write_row(made[0].workdir, 1, "trained")
        write_epoch(made[0].workdir, 2, "training")
        write_row(made[0].workdir, 2, "merged")
        view.refresh()
        view.refresh()
        view.end("b", "out of memory: 3 GiB")
        view.end("a", None)
    assert file.getvalue().split("\n") == [
        f"[1/3] a: {made[0].workdir / 'run.log'}",
        f"[2/3] b: {made[1].workdir / 'run.log'}",
        "a: round 1 trained: test accuracy 0.1000",
        "a: round 2 merged: test accuracy 0.2000",
        "b: failed: out of memory: 3 GiB",
        "a: finished",
        "",
    ]


def test_on_a_terminal_a_table_shows_what_is_running(made):
    view, file = view_of(made, terminal=True)
    with view:
        view.start("a")
        view.start("b")
        write_steps(made[0].workdir, 20, rate=4.0)
        write_row(made[0].workdir, 3, "merged")
        file.truncate(0)
        view.refresh()
        table = file.getvalue()
        (row,) = (line for line in table.split("\n") if " a " in line)
        cells = [cell.strip() for cell in row.split("│")[1:-1]]
        assert cells == ["a", "round 3 merged", "30.0 %", "20/500", "4", "0:02:00"]
        (row,) = (line for line in table.split("\n") if " b " in line)
        assert row.split("│")[2].strip() == "starting"
        assert " c " not in table
        assert "0 finished, 0 failed, 1 waiting" in table

        view.end("b", "diverged")
        view.end("a", None)
        file.truncate(0)
        view.refresh()
        assert "1 finished, 1 failed, 1 waiting" in file.getvalue()


def test_a_run_that_pretrains_and_one_of_unknown_speed_are_shown(made):
    view, file = view_of(made, terminal=True)
    with view:
        view.start("a")
        write_steps(made[0].workdir, 0, rate=None)
        view.refresh()
        assert "pre-training " in file.getvalue() and "0/500" in file.getvalue()
        write_epoch(made[0].workdir, 0, "pretraining")
        view.refresh()
        assert "pre-training, epoch 7 " in file.getvalue()
        write_row(made[0].workdir, 1, "merged")
        write_epoch(made[0].workdir, 1, "training")
        file.truncate(0)
        view.refresh()
    # The accuracy is that of the last evaluation.
    assert "round 1 training, epoch 7" in file.getvalue()
    assert "10.0 %" in file.getvalue()


def test_half_a_file_is_read_again_later(made):
    view, file = view_of(made, terminal=True)
    with view:
        view.start("a")
        (made[0].workdir / PROGRESS).write_text('{"step": 1')
        view.refresh()
        write_steps(made[0].workdir, 250, rate=None)
        view.refresh()
    assert "starting" in file.getvalue() and "250/500" in file.getvalue()
