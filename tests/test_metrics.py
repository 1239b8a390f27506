import contextlib
import gzip
import io
import itertools
import json
import logging
import os
import stat
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2, plugin_hparams_pb2

from dimat_jax import _metrics, _restored
from dimat_jax._checkpoint import Checkpoints
from dimat_jax._events import About
from dimat_jax._metrics import (
    MetricsError,
    MetricsWriter,
    best_rows,
    evaluations,
    read_evaluations,
    read_rows,
    restore_rows,
    write_json,
)
from dimat_jax._partition_picture import partition_picture
from dimat_jax._restored import mend_rows


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
        if value.WhichOneof("value") == "simple_value"
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
        row(1, accuracy=0.5, bytes_sent_total=2**40, test_loss=[0.5, None, 0.25]),
        row(2, accuracy=0.75, name="text", nested={"a": 1.0}),
        {**row(2, accuracy=0.25), "phase": "merged"},
        {**row(3, accuracy=0.125), "phase": "training", "epoch": 2},
        row(4, train_accuracy=[0.5] * 65, by_kind=[1, 2]),
    )
    # A number that is not finite is no point, and many agents have no curves.
    assert scalars(tmp_path) == {
        ("trained/accuracy", 10): 0.5,
        ("trained/bytes_sent_total", 10): 2.0**40,
        ("trained/accuracy", 20): 0.75,
        ("merged/accuracy", 20): 0.25,
        ("training/accuracy", 30): 0.125,
        ("trained_by_agent/test_loss/0", 10): 0.5,
        ("trained_by_agent/test_loss/2", 10): 0.25,
    }


def test_tensorboard_shows_options_and_the_partition_whenever_a_run_goes_on(tmp_path):
    picture = partition_picture(np.array([[30, 0], [0, 10]]))
    about = About({"agents": 2, "optimizer.name": "sgd", "rate": 0.5}, picture)
    for keep_rows in (0, 1):
        writer = MetricsWriter(tmp_path, keep_rows, None, about)
        writer.write(row(1 + keep_rows, loss=1.0))
        writer.close()
        found = {
            value.tag: value
            for event in events(tmp_path)
            for value in event.summary.value
        }
        table = found["config/text_summary"].tensor.string_val[0].decode()
        assert "optimizer.name | 'sgd'" in table.splitlines()
        assert found["partition"].image.encoded_image_string == picture
        plugin = found["_hparams_/session_start_info"].metadata.plugin_data
        proto: Any = plugin_hparams_pb2
        chosen = proto.HParamsPluginData.FromString(plugin.content)
        hparams = chosen.session_start_info.hparams
        assert hparams["agents"].number_value == 2
        assert hparams["optimizer.name"].string_value == "sgd"
    tags = [v.tag for event in events(tmp_path) for v in event.summary.value]
    assert tags.count("partition") == tags.count("config/text_summary") == 1


@pytest.mark.parametrize("shape", [(2, 3), (100, 1000)])
def test_the_picture_of_a_partition_has_a_cell_for_each_agent_and_class(shape):
    counts = np.zeros(shape, int)
    counts[0, 0], counts[1, 2] = 100, 50
    content = partition_picture(counts)
    picture = np.array(Image.open(io.BytesIO(content)), int)
    height, width = ((n - 44) // m for n, m in zip(picture.shape, shape, strict=False))
    cells = picture[44::height, 44::width].sum(axis=2)[: shape[0], : shape[1]]
    darkness = cells.max() - cells
    assert darkness[0, 0] == darkness.max() > 0
    assert darkness[1, 2] == pytest.approx(darkness.max() / 2, abs=2)
    assert np.count_nonzero(darkness) == 2


@pytest.mark.parametrize("value", [2**63, 2**70 + 3, -(2**2000)])
def test_tensorboard_shows_options_of_any_size(tmp_path, value):
    """A seed may have any number of digits."""
    MetricsWriter(tmp_path, 0, None, About({"seed": value}, None)).close()
    found = {v.tag: v for event in events(tmp_path) for v in event.summary.value}
    table = found["config/text_summary"].tensor.string_val[0].decode()
    assert f"seed | {value}" in table.splitlines()


@pytest.mark.parametrize(
    "number", [np.float32(0.5), np.float64(0.5), np.int64(3), 2**70]
)
def test_numbers_of_any_type_reach_tensorboard(tmp_path, number):
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


def points(workdir: Path) -> list[tuple[str, int, float]]:
    """Every scalar as often as it is in the files, whatever TensorBoard drops."""
    return sorted(
        (value.tag, event.step, value.simple_value)
        for event in events(workdir)
        for value in event.summary.value
        if value.WhichOneof("value") == "simple_value"
    )


def test_each_point_is_there_once_after_any_number_of_kills(tmp_path):
    """The row after a merge has the step of the row before it."""
    before = row(1, loss=1.0, seconds_total=5.0)
    merged = {**row(1, loss=0.5, seconds_total=9.0), "phase": "merged"}
    write(tmp_path, before, merged)
    for _ in range(4):
        # The files are not closed, and their ends are lost.
        writer = MetricsWriter(tmp_path, keep_rows=1)
        writer.write(merged)
        for path in tmp_path.glob("events.out.tfevents.*"):
            path.write_bytes(path.read_bytes()[:-3])
    write(tmp_path, merged, row(2, loss=0.25, seconds_total=11.0), keep_rows=1)
    expected = [
        ("merged/loss", 10, 0.5),
        ("merged/seconds_total", 10, 9.0),
        ("trained/loss", 10, 1.0),
        ("trained/loss", 20, 0.25),
        ("trained/seconds_total", 10, 5.0),
        ("trained/seconds_total", 20, 11.0),
    ]
    assert points(tmp_path) == expected
    # A TensorBoard that has shown the older files begins anew, and only once.
    proto: Any = event_pb2
    starts = [
        event.step
        for event in events(tmp_path)
        if event.session_log.status == proto.SessionLog.START
    ]
    assert starts == [0]
    write(tmp_path, keep_rows=3)
    assert points(tmp_path) == expected


def test_events_that_are_written_again_keep_their_distances_in_time(tmp_path):
    rows = [row(n, loss=0.5, seconds_total=100.0 * n) for n in (1, 2, 3)]
    write(tmp_path, *rows)
    write(tmp_path, keep_rows=3)
    times = [event.wall_time for event in events(tmp_path) if event.summary.value]
    assert np.unique(np.round(times, 3)).tolist() == pytest.approx(
        [times[-1] - 200, times[-1] - 100, times[-1]], abs=0.01
    )


# Damage


def changed(lines: list[bytes]) -> None:
    lines[1] = lines[1].replace(b"0.5", b"0.7")


def removed(lines: list[bytes]) -> None:
    del lines[1]


def doubled(lines: list[bytes]) -> None:
    lines.insert(2, lines[1])


def doubled_at_the_end(lines: list[bytes]) -> None:
    lines.append(lines[-1])


def swapped(lines: list[bytes]) -> None:
    lines[1:3] = lines[2], lines[1]


def cut_off(lines: list[bytes]) -> None:
    del lines[2:]


def emptied(lines: list[bytes]) -> None:
    lines.clear()


def zeroed(lines: list[bytes]) -> None:
    lines[:] = [bytes(sum(map(len, lines)))]


def zeroed_within(lines: list[bytes]) -> None:
    lines[1] = bytes(len(lines[1]) - 1) + b"\n"


DAMAGES = [
    (changed, "row 2 is damaged, or not in its place"),
    (removed, "row 2 is damaged, or not in its place"),
    (doubled, "row 3 is damaged, or not in its place"),
    (doubled_at_the_end, "row 4 is there twice"),
    (swapped, "row 2 is damaged, or not in its place"),
    (cut_off, "the file has 2 rows instead of 3"),
    (emptied, "the file has 0 rows instead of 3"),
    (zeroed, "the file has 0 rows instead of 3"),
    (zeroed_within, "row 2 is damaged, or not in its place"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_rows_are_noticed_and_restored_from_a_checkpoint(
    tmp_path, caplog, damage, message
):
    rows = [row(number, loss=1 / number) for number in (1, 2, 3)]
    writer = write(tmp_path, *rows)
    path, saved = tmp_path / "metrics.jsonl", writer.packed()
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    damage(lines)
    path.write_bytes(b"".join(lines))
    with pytest.raises(MetricsError) as error:
        read_rows(tmp_path)
    assert f"{path}: {message}. " in str(error.value)
    with caplog.at_level(logging.WARNING):
        writer = MetricsWriter(tmp_path, 3, saved)
    # A row that is there once more behind the others is removed like any later row.
    n_notes = 0 if damage is doubled_at_the_end else 1
    assert [f"{path} did not hold the rows" in m for m in caplog.messages] == (
        [True] * n_notes
    )
    writer.write(row(4))
    writer.close()
    assert read_rows(tmp_path) == [*rows, row(4)]
    # A run that has finished gets its rows back as well.
    path.write_bytes(b"".join(lines))
    restore_rows(tmp_path, saved)
    assert path.read_bytes() == whole and read_rows(tmp_path) == rows


def test_rows_of_epochs_are_no_evaluations_and_may_share_a_round_and_a_phase(tmp_path):
    epochs = [{**row(1), "phase": "training", "epoch": n} for n in (1, 2)]
    write(tmp_path, *epochs, row(1))
    (tmp_path / "metrics.digests").unlink()
    assert read_rows(tmp_path) == [*epochs, row(1)]
    assert evaluations([*epochs, row(1)]) == read_evaluations(tmp_path) == [row(1)]
    write(tmp_path, *epochs, epochs[0])
    (tmp_path / "metrics.digests").unlink()
    with pytest.raises(MetricsError, match="row 3 is there twice"):
        read_rows(tmp_path)


def test_damaged_digests_are_noticed_too(tmp_path):
    write(tmp_path, row(1), row(2))
    path = tmp_path / "metrics.digests"
    path.write_bytes(path.read_bytes().replace(b"a", b"b"))
    with pytest.raises(MetricsError, match="is damaged"):
        read_rows(tmp_path)


def test_rows_of_older_versions_have_no_digests(tmp_path):
    rows = [row(1), row(2), row(3)]
    write(tmp_path, *rows)
    (tmp_path / "metrics.digests").unlink()
    assert read_rows(tmp_path) == rows
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b"{", b"[", 1))
    with pytest.raises(MetricsError, match="row 1 is damaged"):
        read_rows(tmp_path)


@pytest.fixture
def damaged(tmp_path, monkeypatch) -> tuple[Path, dict[str, Any]]:
    """A finished run with damaged rows, and its summary. A checkpoint has the rows."""
    rows = [row(1), row(2)]
    saved = write(tmp_path, *rows).packed()
    (tmp_path / "metrics.jsonl").write_text("[]\n")

    def read_attached(self: Checkpoints, name: str) -> bytes:
        return saved

    monkeypatch.setattr(Checkpoints, "read_attached", read_attached)
    return tmp_path, rows[-1]


def test_the_rows_of_a_finished_run_are_restored_under_its_lock(damaged, monkeypatch):
    workdir, summary = damaged
    restore = _restored.restore_rows

    def restore_under_lock(*args: Any) -> None:
        assert (workdir / ".running.json").exists()
        restore(*args)

    monkeypatch.setattr(_restored, "restore_rows", restore_under_lock)
    assert mend_rows(workdir, summary, print)
    assert read_rows(workdir) == [row(1), row(2)]
    assert not mend_rows(workdir, summary, print)


def test_rows_that_another_process_has_just_restored_stay(damaged, monkeypatch):
    workdir, summary = damaged
    enter, restore = _restored.held, _restored.restore_rows
    times: list[Path] = []

    @contextlib.contextmanager
    def held_later(folder: Path, log: Any) -> Iterator[None]:
        saved = Checkpoints(folder).read_attached("rows")
        assert saved is not None
        restore(folder, saved)
        with enter(folder, log):
            yield

    monkeypatch.setattr(_restored, "held", held_later)
    monkeypatch.setattr(_restored, "restore_rows", lambda *args: times.append(args[0]))
    assert mend_rows(workdir, summary, print)
    assert read_rows(workdir) == [row(1), row(2)] and not times


def test_rows_of_an_older_checkpoint_do_not_replace_those_of_a_finished_run(damaged):
    workdir, _ = damaged
    with pytest.raises(MetricsError, match="row 1 is damaged"):
        mend_rows(workdir, row(3), print)
    assert (workdir / "metrics.jsonl").read_text() == "[]\n"


def test_rows_are_packed_bit_by_bit_and_only_once(tmp_path):
    writer = MetricsWriter(tmp_path)
    parts = []
    for number in range(4):
        writer.write(row(number, loss=number / 3))
        parts.append(writer.packed())
    assert writer.packed() == parts[-1]
    writer.close()
    assert gzip.decompress(parts[-1]) == (tmp_path / "metrics.jsonl").read_bytes()
    for shorter, longer in itertools.pairwise(parts):
        assert longer.startswith(shorter)
    # A run that goes on packs the rows before and after.
    writer = MetricsWriter(tmp_path, 2, parts[1])
    writer.write(row(9))
    writer.close()
    path = tmp_path / "metrics.jsonl"
    assert gzip.decompress(writer.packed()) == path.read_bytes()
    assert [r["round"] for r in read_rows(tmp_path)] == [0, 1, 9]


def test_rows_can_be_read_while_they_are_written_and_replaced(tmp_path):
    """No reader may take the moment between two files for damage."""
    saved = write(tmp_path, *(row(n) for n in range(20))).packed()
    failures, over = [], threading.Event()

    def read_on() -> None:
        while not over.is_set():
            try:
                read_rows(tmp_path)
            except Exception as error:
                failures.append(error)

    thread = threading.Thread(target=read_on)
    thread.start()
    for _ in range(5):
        writer = MetricsWriter(tmp_path, 20, saved)
        for number in range(20, 60):
            writer.write(row(number))
        writer.close()
    over.set()
    thread.join()
    assert not failures


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

    def disk_full(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(_metrics.os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["summary.json"]


def test_two_processes_may_write_the_same_file_at_once(tmp_path, monkeypatch):
    path, fsync = tmp_path / "layout.json", os.fsync

    def write_too(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        write_json(path, {"by": "the other"})
        assert json.loads(path.read_text()) == {"by": "the other"}
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", write_too)
    write_json(path, {"by": "this one"})
    assert json.loads(path.read_text()) == {"by": "this one"}
    assert [each.name for each in tmp_path.iterdir()] == ["layout.json"]


@pytest.mark.parametrize("lasting", [True, False])
def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch, lasting):
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        calls.append("sync folder" if is_folder else "sync file")
        fsync(descriptor)

    def note_replace(source: Any, target: Any) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_json(tmp_path / "summary.json", {}, lasting)
    expected = ["sync file", "rename", "sync folder"]
    assert calls == (expected if lasting else ["rename"])


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


def test_the_best_row_is_that_of_the_agents_that_a_server_has_drawn():
    rows = [
        row(1, validation_accuracy_mean=0.5, validation_accuracy_of_sampled=0.6),
        row(2, validation_accuracy_mean=0.4, validation_accuracy_of_sampled=0.7),
    ]
    assert best_rows(rows, "validation") == {"best_trained": rows[1]}


def test_without_its_split_there_is_no_best_row():
    assert best_rows([row(1, test_accuracy_mean=0.8)], "validation") == {}
    # An accuracy that is not finite is null in a file.
    assert best_rows([row(1, validation_accuracy_mean=None)], "validation") == {}
