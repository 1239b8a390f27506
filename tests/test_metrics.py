import json
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from dimat_jax._metrics import MetricsWriter, best_rows, read_rows, write_json


def row(number: int, **more: Any) -> dict[str, Any]:
    return {"round": number, "step": 10 * number, "phase": "trained", **more}


def write(workdir: Path, *rows: dict[str, Any], keep_rows: int = 0) -> MetricsWriter:
    writer = MetricsWriter(workdir, keep_rows)
    for one in rows:
        writer.write(one)
    writer.close()
    return writer


def events(workdir: Path) -> list[Any]:
    """Reads all TensorBoard events, each with its length before and two checksums."""
    found = []
    for path in sorted(workdir.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while len(data) > 8:
            (length,) = struct.unpack("<Q", data[:8])
            if len(data) < 12 + length + 4:
                break  # is being written
            proto: Any = event_pb2  # whose messages are made at import time
            found.append(proto.Event.FromString(data[12 : 12 + length]))
            data = data[12 + length + 4 :]
    return found


def scalars(workdir: Path) -> dict[tuple[str, int], float]:
    return {
        (value.tag, event.step): value.simple_value
        for event in events(workdir)
        for value in event.summary.value
    }


# metrics.jsonl


def test_rows_are_appended_as_lines_of_json(tmp_path):
    writer = MetricsWriter(tmp_path)
    path = tmp_path / "metrics.jsonl"
    assert path.read_text() == ""
    writer.write(row(1, accuracy=np.array([0.25, 0.5])))
    first = path.read_text()
    writer.write(row(2, accuracy=[0.5, 0.75]))
    assert path.read_text().startswith(first)
    writer.close()
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == read_rows(tmp_path)
    assert read_rows(tmp_path) == [
        row(1, accuracy=[0.25, 0.5]),
        row(2, accuracy=[0.5, 0.75]),
    ]
    assert writer.rows == 2


def test_numpy_values_become_numbers_and_lists(tmp_path):
    values = {
        "single": np.float32(0.5),
        "double": np.float64(0.25),
        "integer": np.int64(2**40),
        "truth": np.bool_(True),
        "array": np.arange(4, dtype=np.int32).reshape(2, 2),
        "nested": {"seconds": {"match": np.float32(1.5)}},
        "path": Path("some") / "where",
    }
    write(tmp_path, row(1, **values))
    assert read_rows(tmp_path) == [
        row(
            1,
            single=0.5,
            double=0.25,
            integer=2**40,
            truth=True,
            array=[[0, 1], [2, 3]],
            nested={"seconds": {"match": 1.5}},
            path="some/where",
        )
    ]


def test_nan_in_an_array_is_null_and_a_scalar_array_is_a_number(tmp_path):
    losses = np.array([[0.5, np.nan]], np.float32)
    write(tmp_path, row(1, losses=losses, loss=np.array(0.25)))
    assert read_rows(tmp_path) == [row(1, losses=[[0.5, None]], loss=0.25)]


def test_bytes_beyond_two_gib_are_exact(tmp_path):
    write(tmp_path, row(1, bytes_sent_total=2**53 + 1))
    assert read_rows(tmp_path)[0]["bytes_sent_total"] == 2**53 + 1


def test_what_json_does_not_know_is_refused(tmp_path):
    with pytest.raises(TypeError, match="type set is not JSON"):
        write(tmp_path, row(1, classes={1, 2}))


def test_there_are_no_rows_without_a_file(tmp_path):
    assert read_rows(tmp_path) == []


@pytest.mark.parametrize("end", ['{"round": 3, "st', "{", '{"round": 3}'])
def test_a_half_written_last_line_is_ignored(tmp_path, end):
    write(tmp_path, row(1), row(2))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(end)
    assert read_rows(tmp_path) == [row(1), row(2)]
    # The cut line does not damage the rows that a resumed run writes.
    write(tmp_path, row(3), keep_rows=2)
    assert read_rows(tmp_path) == [row(1), row(2), row(3)]


@pytest.mark.parametrize("keep_rows", [0, 1, 3, 5])
def test_a_resumed_run_keeps_as_many_rows_as_it_is_told(tmp_path, keep_rows):
    rows = [row(number, loss=1 / number) for number in (1, 2, 3)]
    write(tmp_path, *rows)
    kept = rows[:keep_rows]
    writer = MetricsWriter(tmp_path, keep_rows)
    assert writer.rows == len(kept)
    assert read_rows(tmp_path) == kept
    writer.write(row(9))
    writer.close()
    assert read_rows(tmp_path) == [*kept, row(9)]
    assert writer.rows == len(kept) + 1
    assert not list(tmp_path.glob(".*"))  # nothing temporary is left


# TensorBoard


def test_numbers_reach_tensorboard_by_phase_and_step(tmp_path):
    write(
        tmp_path,
        row(1, accuracy=0.5, bytes_sent_total=2**40, test_accuracy=np.zeros(3)),
        row(2, accuracy=0.75, name="text", nested={"a": 1.0}),
        {**row(2, accuracy=0.25), "phase": "merged"},
    )
    assert scalars(tmp_path) == {
        ("trained/accuracy", 10): 0.5,
        ("trained/bytes_sent_total", 10): 2.0**40,
        ("trained/accuracy", 20): 0.75,
        ("merged/accuracy", 20): 0.25,
    }


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.int64(3)])
def test_numpy_numbers_reach_tensorboard_too(tmp_path, number):
    write(tmp_path, row(1, value=number))
    assert scalars(tmp_path) == {("trained/value", 10): number}


def test_a_row_reaches_tensorboard_while_the_run_goes_on(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(row(1, accuracy=0.5))
    deadline = time.monotonic() + 30
    while not scalars(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert scalars(tmp_path) == {("trained/accuracy", 10): 0.5}
    writer.close()


def test_a_resumed_run_takes_back_what_it_will_write_again(tmp_path):
    write(tmp_path, row(1, loss=1.0), row(2, loss=0.5), row(3, loss=0.25))
    write(tmp_path, keep_rows=2)
    proto: Any = event_pb2
    starts = [
        event.step
        for event in events(tmp_path)
        if event.session_log.status == proto.SessionLog.START
    ]
    assert starts[-1] == 21  # everything after row 2, at step 20


# Other files


def test_json_is_written_for_people_too(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"mean": np.float64(0.5), "agents": np.arange(2)})
    assert path.read_text() == (
        '{\n  "mean": 0.5,\n  "agents": [\n    0,\n    1\n  ]\n}\n'
    )
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_a_failure_while_dumping_leaves_the_old_file(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError, match="type object is not JSON"):
        write_json(path, {"new": 2, "bad": object()})
    assert json.loads(path.read_text()) == {"old": 1}


def test_a_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"old": 1})
    write_text = Path.write_text

    def disk_full(self, text):
        write_text(self, text[:5])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}


def test_the_best_rows_are_chosen_by_the_named_split_for_each_phase_of_a_round():
    rows = [
        row(0, test_accuracy_mean=0.9, validation_accuracy_mean=0.9),
        row(1, test_accuracy_mean=0.8, validation_accuracy_mean=0.2),
        row(1, test_accuracy_mean=0.7, validation_accuracy_mean=0.5),
        row(2, test_accuracy_mean=0.3, validation_accuracy_mean=0.4),
        row(2, test_accuracy_mean=0.2, validation_accuracy_mean=0.5),
    ]
    phases = ("pretrained", "merged", "trained", "merged", "trained")
    rows = [{**one, "phase": phase} for one, phase in zip(rows, phases, strict=True)]
    # The first of equally good rounds counts, and pre-training is no round.
    expected = {"best_merged": rows[3], "best_trained": rows[2]}
    assert best_rows(rows, "validation") == expected
    expected = {"best_merged": rows[1], "best_trained": rows[2]}
    assert best_rows(rows, "test") == expected


def test_without_its_split_there_is_no_best_row():
    assert best_rows([row(1, test_accuracy_mean=0.8)], "validation") == {}
    # An accuracy that is not finite is null in a file.
    assert best_rows([row(1, validation_accuracy_mean=None)], "validation") == {}
