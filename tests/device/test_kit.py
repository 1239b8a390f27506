"""The kit that measures the project on a GPU: packing, running parts, reporting."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dimat_jax.data import sources
from dimat_jax.data._dataset import Dataset, make_split, mean_std
from experiments.device import _cells, _images, measure, pack, report, unpack
from experiments.device._cells import Cell
from experiments.device.parts import PARTS, Settings, cells_of
from experiments.device.parts.tests import read_outcome

ROOT = Path(__file__).parents[2]
# Natural images differ little from pixel to pixel.
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (600, 32, 32, 3), np.uint8) // 16 * 16

# A worker whose cells are given as Python source.
WORKER = """
import pathlib, sys, time
from experiments.device._cells import Cell, LeftOut, work

def quick(log):
    log.note(answer=42)

def hang(log):
    log.note(before=1)
    time.sleep(60)

def fail(log):
    raise RuntimeError("no memory")

def die(log):
    import os
    os._exit(9)

def leave_out(log):
    assert log.figures["quick"] == {"answer": 42}
    raise LeftOut("too large")

cells = [eval(source) for source in sys.argv[2:]]
work(pathlib.Path(sys.argv[1]), "example", cells)
"""


def watch(path, seconds, *cells):
    command = [sys.executable, "-c", WORKER, str(path), *cells]
    return _cells.watch(command, path, seconds), json.loads(path.read_text())


@pytest.mark.parametrize("n", [1, 249, 251, 600])
def test_coded_images_are_the_same_bit_by_bit(n):
    blocks = _images.encode(IMAGES[:n])
    np.testing.assert_array_equal(_images.decode(blocks, 32), IMAGES[:n])


def test_only_colour_images_are_coded():
    with pytest.raises(ValueError, match="expected uint8 images with 3 channels"):
        _images.encode(IMAGES[..., :1])


def dataset() -> Dataset:
    labels = np.arange(600) % 7
    train = make_split(IMAGES[:500].copy(), labels[:500])
    test = make_split(IMAGES[500:].copy(), labels[500:])
    names = tuple("abcdefg")
    return Dataset("cifar100", train, test, 7, *mean_std(train.images), names)


def test_packed_data_are_loaded_as_they_were(tmp_path):
    original = dataset()
    parts = pack.pack_data(original, tmp_path / "packed", part_bytes=300_000)
    assert len(parts) > 1
    unpack.unpack(tmp_path / "packed", tmp_path / "data")
    loaded = sources.load("cifar100", directory=str(tmp_path / "data"))
    pairs = zip(
        (*original.train, *original.test), (*loaded.train, *loaded.test), strict=True
    )
    for x, y in pairs:
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(loaded.mean, original.mean)
    assert loaded.class_names == original.class_names
    assert loaded.n_classes == original.n_classes


def test_a_missing_part_is_named(tmp_path):
    *_, last = pack.pack_data(dataset(), tmp_path / "packed", part_bytes=300_000)
    for file in last.iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match="no part in .* holds t.*webp"):
        unpack.unpack(tmp_path / "packed", tmp_path / "data")


def test_a_hanging_cell_is_killed_and_the_others_run(tmp_path):
    started = time.time()
    status, record = watch(
        tmp_path / "example.json",
        50,
        "Cell('hang', 1, hang)",
        "Cell('die', 9, die)",
        "Cell('fail', 9, fail)",
        "Cell('quick', 9, quick)",
        "Cell('out', 9, leave_out)",
    )
    assert time.time() - started < 40
    assert status == record["status"] == "done"
    cells = record["cells"]
    assert {name: cell["status"] for name, cell in cells.items()} == {
        "hang": "over time",
        "die": "died",
        "fail": "failed",
        "quick": "done",
        "out": "left out",
    }
    assert cells["hang"]["figures"] == {"before": 1}
    assert "no memory" in cells["fail"]["error"]
    assert "ended with 9" in cells["die"]["error"]
    assert cells["out"]["error"] == "too large"


@pytest.mark.slow
def test_a_part_ends_at_its_limit_with_what_it_has(tmp_path):
    status, record = watch(
        tmp_path / "example.json",
        12,
        "Cell('quick', 9, quick)",
        "Cell('hang', 60, hang)",
    )
    assert status == "out of time"
    assert record["cells"]["quick"]["figures"] == {"answer": 42}
    assert record["cells"]["hang"]["status"] == "out of time"
    assert record["planned"] == ["quick", "hang"]


def test_a_worker_that_cannot_start_is_not_started_again(tmp_path):
    status, record = watch(tmp_path / "example.json", 60, "no such cell")
    assert "SyntaxError" in status and record["cells"] == {}


def test_every_figure_is_in_the_file_at_once(tmp_path):
    path = tmp_path / "example.json"

    def measure_two(log):
        log.note(first=1)
        assert json.loads(path.read_text())["cells"]["a"]["figures"] == {"first": 1}
        log.note(second=2)

    _cells.work(path, "example", [Cell("a", 9, measure_two)])
    assert json.loads(path.read_text())["cells"]["a"]["status"] == "done"
    # What has been measured is not measured again.
    _cells.work(path, "example", [Cell("a", 9, lambda log: pytest.fail("again"))])
    assert json.loads(path.read_text())["cells"]["a"]["status"] == "done"


def test_the_budget_is_twelve_minutes():
    limits = [max(part.seconds for part in g) for g in measure.groups(PARTS)]
    assert sum(limits) <= 12 * 60
    grouped = [part.name for group in measure.groups(PARTS) for part in group]
    assert grouped == [part.name for part in PARTS]


@pytest.mark.parametrize("name", [part.name for part in PARTS])
@pytest.mark.parametrize("tiny", [False, True])
def test_every_part_has_cells_of_different_names(name, tiny, tmp_path):
    settings = Settings(tmp_path, tmp_path, None, 60, tiny)
    names = [cell.name for cell in cells_of(name, settings)]
    assert names and len(set(names)) == len(names)


@pytest.mark.parametrize(
    "line, outcome",
    [
        ("tests/device/test_a.py::test_b[mlp-vmap] PASSED   [ 7%]", "passed"),
        ("[gw1] [ 14%] FAILED tests/device/test_a.py::test_b[mlp-vmap] ", "failed"),
    ],
)
def test_outcomes_are_read_from_the_lines_of_pytest(line, outcome):
    assert read_outcome(line) == ("test_b[mlp-vmap]", outcome)
    assert read_outcome("tests/device/test_a.py::test_b[mlp-vmap] ") is None


def measure_here(*arguments):
    command = [sys.executable, "-m", "experiments.device.measure", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_a_part_is_measured_and_reported(tmp_path):
    folders = [f"--out={tmp_path / 'out'}", f"--work={tmp_path / 'work'}"]
    done = measure_here(*folders, "--tiny", "--parts=facts", "--minutes=2")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"facts +\d+ s  done: 5 done\n", done.stdout)
    text = report.render(tmp_path / "out")
    assert "This was a rehearsal" in text and "product bfloat16, 256 x 256" in text
    assert "5 of 5 done" in text


def test_workers_end_with_the_program(tmp_path):
    command = [sys.executable, "-m", "experiments.device.measure", "--tiny"]
    command += ["--parts=tests", f"--out={tmp_path}", f"--work={tmp_path / 'work'}"]
    program = subprocess.Popen(command, cwd=ROOT)
    path = tmp_path / "tests.json"
    while not path.exists() and program.poll() is None:
        time.sleep(0.1)
    worker = json.loads(path.read_text())["process"]
    os.kill(worker, 0)  # It is running.
    program.terminate()
    assert program.wait(20) == 128 + 15
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--parts=facts,speed", "--parts: ['speed'] are none of ['facts', "),
        ("--minutes=0", "--minutes: expected more than 0, got 0.0"),
    ],
)
def test_bad_arguments_are_refused(argument, message, tmp_path):
    done = measure_here(f"--out={tmp_path}", argument)
    assert done.returncode == 2 and message in done.stderr
    assert not any(tmp_path.iterdir())


def test_the_report_shows_figures_and_gaps(tmp_path):
    subject = {"model": "resnet20", "width": 1, "spread": 0.01, "first_seconds": 3.0}
    alone = {**subject, "agents": 1, "layout": "unroll", "step_seconds": 0.002}
    five = {**subject, "agents": 5, "layout": "vmap", "step_seconds": 0.005}
    cells = {
        "one": {"status": "done", "figures": {**alone, "images_per_second": 5e4}},
        "five": {"status": "done", "figures": {**five, "images_per_second": 1e5}},
        "many": {"status": "failed", "error": "x\nOutOfMemory: 3 GiB", "figures": {}},
    }
    record = {"planned": [*cells, "never"], "cells": cells, "seconds": 12.0}
    (tmp_path / "layouts.json").write_text(json.dumps(record))
    torch = {"width": 1, "step_seconds": 0.001, "images_per_second": 1e5}
    cells = {"float32": {"status": "done", "figures": torch}}
    record = {"planned": [*cells], "cells": cells}
    (tmp_path / "pytorch.json").write_text(json.dumps(record))
    record = {"cells": {}, "status": "the worker ended with 1: x\nImportError: no y"}
    (tmp_path / "merges.json").write_text(json.dumps(record))
    text = report.render(tmp_path)
    assert "0 of 0 done. ImportError: no y." in text
    rows = [line.replace(" ", "") for line in text.splitlines()]
    assert "|resnet20,width1|5|vmap|5|1|100,000|0.5||3||" in rows
    assert "12 s; 2 of 4 done. failed: many (OutOfMemory: 3 GiB)" in text
    assert "not reached: never." in text
    assert "|float32|1|100,000|2|" in rows
