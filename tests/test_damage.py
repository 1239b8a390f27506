"""Damaged checkpoints are named and skipped, and never used."""

import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dimat_jax import _checkpoint, reports, train
from dimat_jax._checkpoint import CheckpointError, Checkpoints
from dimat_jax._digests import DIGESTS, damage, write_digests
from dimat_jax._inputs import Inputs
from dimat_jax._metrics import read_evaluations
from dimat_jax._pretrain import SharedAgents
from dimat_jax.errors import UserError
from dimat_jax.experiment import Experiment
from dimat_jax.workdir import Workdir
from tests.sweeping.small import rows, small

LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")


def tree(number: int) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    return {"w": rng.normal(size=(3, 40)), "count": np.array([number] * 3)}


def like(record: dict[str, Any]) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree(0))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A directory with the checkpoints 1 and 2."""
    directory = tmp_path_factory.mktemp("whole") / "checkpoints"
    checkpoints = Checkpoints(directory)
    for number in (1, 2):
        attached = {"rows.jsonl": b"row\n" * number}
        checkpoints.save(number, tree(number), {"number": number}, attached)
    checkpoints.close()
    return directory


@pytest.fixture
def directory(tmp_path, whole) -> Path:
    return shutil.copytree(whole, tmp_path / "checkpoints")


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def restored(directory: Path) -> tuple[Any, Any]:
    """The record and the tree that are read from a directory."""
    checkpoints = Checkpoints(directory, create=False)
    try:
        found = checkpoints.restore(like)
        assert found is not None
        assert checkpoints.read_record() == found[1]
        assert checkpoints.read_attached("rows.jsonl") == b"row\n" * found[1]["number"]
        assert checkpoints.read_attached("no such file") is None
    finally:
        checkpoints.close()
    return found[1]["number"], found[0]


def assert_is(number: int, found: Any) -> None:
    for name, leaf in tree(number).items():
        np.testing.assert_array_equal(found[name], leaf)


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path, random.Random], object]] = {
    "flipped": flip,
    "truncated": lambda path, rng: path.write_bytes(path.read_bytes()[:-1]),
    "extended": lambda path, rng: path.write_bytes(path.read_bytes() + b"\n"),
    "emptied": lambda path, rng: path.write_bytes(b""),
    "zeroed": lambda path, rng: path.write_bytes(bytes(path.stat().st_size)),
    "removed": lambda path, rng: path.unlink(),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_no_damage_to_any_file_is_used(directory, whole, caplog, kind):
    """The files that Orbax writes after the digests are read by nothing."""
    rng = random.Random(kind)
    names = list(files(directory / "2"))
    assert len(names) > 8 and {"rows.jsonl", DIGESTS, *LATER} < set(names)
    for name in names:
        DAMAGES[kind](directory / "2" / name, rng)
        with caplog.at_level(logging.WARNING):
            number, found = restored(directory)
        assert_is(number, found)
        if name in LATER:
            assert number == 2 and not caplog.records
        else:
            assert number == 1
            (message,) = caplog.messages
            assert f"Checkpoint 2 in {directory} is skipped: " in message
            assert name in message
        caplog.clear()
        shutil.rmtree(directory / "2")
        shutil.copytree(whole / "2", directory / "2")


def foreign_folder(path: Path) -> None:
    path.mkdir()
    (path / "photo.png").write_bytes(b"a photo")


def half_made(path: Path) -> None:
    shutil.copytree(path.with_name("2"), path)
    (path / DIGESTS).unlink()
    shutil.rmtree(path / "tree")


def without_digests(path: Path) -> None:
    shutil.copytree(path.with_name("2"), path)
    (path / DIGESTS).unlink()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Path.mkdir, "it is no checkpoint, or only a part of one"),
        (Path.touch, "it is no checkpoint, or only a part of one"),
        (foreign_folder, "it is no checkpoint, or only a part of one"),
        (half_made, "it is no checkpoint, or only a part of one"),
        (without_digests, "digests.json is missing"),
    ],
)
def test_what_is_no_checkpoint_is_skipped(directory, caplog, make, reason):
    make(directory / "99")
    with caplog.at_level(logging.WARNING):
        number, found = restored(directory)
    assert number == 2
    assert_is(2, found)
    assert caplog.messages == [f"Checkpoint 99 in {directory} is skipped: {reason}"]
    # A run goes on all the same, and the folder stays where it is.
    before = files(directory / "99") if (directory / "99").is_dir() else {}
    checkpoints = Checkpoints(directory)
    assert checkpoints.newest() == 2
    checkpoints.save(3, tree(3), {"number": 3}, {"rows.jsonl": b"row\n" * 3})
    checkpoints.close()
    assert {path.name for path in directory.iterdir()} == {"2", "3", "99"}
    assert before == (files(directory / "99") if before else {})
    assert restored(directory)[0] == 3


def test_a_name_that_is_no_number_is_no_checkpoint(directory, caplog):
    for name in ("02", "-3", "2.5", "three", "\u0663"):
        shutil.copytree(directory / "2", directory / name)
    shutil.rmtree(directory / "2")
    with caplog.at_level(logging.WARNING):
        assert restored(directory)[0] == 1
    assert not caplog.messages


def test_a_damaged_checkpoint_is_kept_aside_when_its_number_comes_again(directory):
    flip(directory / "2" / "record" / "metadata", random.Random(0))
    damaged = files(directory / "2")
    checkpoints = Checkpoints(directory)
    assert checkpoints.newest() == 1
    for number in (2, 3):
        attached = {"rows.jsonl": b"row\n" * number}
        checkpoints.save(number, tree(number), {"number": number}, attached)
    checkpoints.close()
    assert {path.name for path in directory.iterdir()} == {"2", "3", "2.damaged"}
    assert files(directory / "2.damaged") == damaged
    number, found = restored(directory)
    assert number == 3
    assert_is(3, found)


def test_if_none_is_good_one_message_says_so_and_nothing_is_deleted(directory):
    rng = random.Random(0)
    flip(directory / "1" / DIGESTS, rng)
    (directory / "2" / "record" / "metadata").unlink()
    before = files(directory)
    for create in (True, False):
        checkpoints = Checkpoints(directory, create=create)
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(like)
        checkpoints.close()
        assert str(error.value) == (
            f"none of the checkpoints in {directory} can be used: 2: record/metadata "
            "is missing; 1: digests.json is damaged. Nothing was deleted. Put back a "
            "copy of a checkpoint, or move the folder away to begin anew"
        )
    assert files(directory) == before


def older(directory: Path) -> None:
    """Makes checkpoints what older versions have written."""
    for folder in directory.iterdir():
        (folder / DIGESTS).unlink()
        path = folder / "record" / "metadata"
        record = json.loads(path.read_text())
        del record["has_digests"]
        path.write_text(json.dumps(record))


def test_a_checkpoint_of_an_older_version_is_used_with_one_warning(directory, caplog):
    older(directory)
    with caplog.at_level(logging.WARNING):
        number, found = restored(directory)
    assert number == 2
    assert_is(2, found)
    (message,) = caplog.messages
    assert "Checkpoint 2" in message and "older version and has no digests" in message


def test_a_damaged_checkpoint_of_an_older_version_is_one_message(directory):
    older(directory)
    for path in (directory / "2" / "tree").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(CheckpointError, match="checkpoint 2 in .* cannot be read: "):
        restored(directory)


def test_the_older_checkpoint_stays_until_the_next_one_is_complete(
    directory, monkeypatch
):
    """Even if only one is kept, and digests cannot be written."""

    def disk_full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(directory, keep=1)
    assert checkpoints.newest() == 2
    monkeypatch.setattr(_checkpoint, "write_digests", disk_full)
    checkpoints.save(3, tree(3), {"number": 3})
    with pytest.raises(OSError, match="No space left"):
        checkpoints.wait()
    assert restored(directory)[0] == 2
    monkeypatch.undo()
    checkpoints.save(3, tree(3), {"number": 3}, {"rows.jsonl": b"row\n" * 3})
    checkpoints.close()
    # What the failure has left is gone, too.
    assert [path.name for path in directory.iterdir()] == ["3"]
    assert restored(directory)[0] == 3


@pytest.mark.parametrize("n_parts", [1, 2, 3, 50])
def test_one_of_the_parts_of_the_work_finds_the_damage(directory, n_parts):
    for name in files(directory / "2"):
        if name in (*LATER, DIGESTS):
            continue
        content = (directory / "2" / name).read_bytes()
        (directory / "2" / name).write_bytes(content[:-1] + b"?" + content[-1:])
        found = [damage(directory / "2", part, n_parts) for part in range(n_parts)]
        assert sum(reason is not None for reason in found) == 1
        (directory / "2" / name).write_bytes(content)
    assert damage(directory / "2") is None


def test_digests_are_of_names_sizes_and_contents(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"one")
    write_digests(tmp_path)
    facts = json.loads((tmp_path / DIGESTS).read_text())["files"]
    assert facts["a/b"]["bytes"] == 3 and len(facts["a/b"]["blake2b"]) == 64
    (tmp_path / "a" / "b").write_bytes(b"two")
    assert damage(tmp_path) == "a/b has changed since it was written"
    (tmp_path / "a" / "b").write_bytes(b"three")
    assert damage(tmp_path) == "a/b has 5 bytes instead of 3"


# Whole runs


class _Killed(Exception):
    pass


def killed_in(round_number: int, workdir: Path, config: Any) -> None:
    def die(line: str) -> None:
        if line.startswith(f"round {round_number:3d}") and "trained" in line:
            raise _Killed

    with pytest.raises(_Killed):
        train.run(config, workdir, die)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flipped", "truncated", "removed"])
def test_a_run_goes_on_from_an_older_checkpoint_with_the_same_results(
    tmp_path, caplog, kind
):
    config = small(rounds=4)
    train.run(config, tmp_path / "whole", lambda line: None)
    killed_in(4, tmp_path / "killed", config)
    newest = tmp_path / "killed" / "checkpoints" / "5"
    largest = max(newest.rglob("*"), key=lambda path: path.stat().st_size)
    DAMAGES[kind](largest, random.Random(1))
    lines: list[str] = []
    with caplog.at_level(logging.WARNING):
        train.run(config, tmp_path / "killed", lines.append)
    assert any("Checkpoint 5" in message for message in caplog.messages)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    # Round 3 was done again.
    assert sum(line.startswith("round   3") for line in lines) == 2


@pytest.mark.slow
def test_damaged_shared_agents_are_set_aside_and_trained_again(tmp_path, caplog):
    cache = str(tmp_path / "agents")
    config = small(pretrain__cache_dir=cache)
    train.run(config, tmp_path / "first", lambda line: None)
    path = SharedAgents(Experiment(config)).path
    assert path is not None
    largest = max(path.rglob("*"), key=lambda path: path.stat().st_size)
    flip(largest, random.Random(2))
    with caplog.at_level(logging.WARNING):
        train.run(config, tmp_path / "second", lambda line: None)
    assert "has changed since it was written" in caplog.text
    assert "pre-trains them again; what was there is now in" in caplog.text
    assert rows(tmp_path / "second") == rows(tmp_path / "first")
    assert len(list(path.parent.glob(f"{path.name}.damaged-*"))) == 1
    # The agents that were trained again are good.
    lines: list[str] = []
    train.run(config, tmp_path / "third", lines.append)
    assert f"pre-trained agents come from {path}" in lines
    assert rows(tmp_path / "third") == rows(tmp_path / "first")


def test_a_foreign_folder_in_the_place_of_shared_agents_is_set_aside(tmp_path):
    config = small(pretrain__cache_dir=str(tmp_path / "agents"), rounds=0)
    path = SharedAgents(Experiment(config)).path
    assert path is not None
    path.parent.mkdir()
    foreign_folder(path)
    train.run(config, tmp_path / "run", lambda line: None)
    assert len(read_evaluations(tmp_path / "run")) == 1
    (aside,) = path.parent.glob(f"{path.name}.damaged-*")
    assert (aside / "photo.png").read_bytes() == b"a photo"
    assert SharedAgents(Experiment(config)).read() is not None


# The JSON files of a run


def _change(path: Path) -> None:
    """Changes a digit, so that the file is JSON as before."""
    text = path.read_text()
    place = max(text.rfind(digit) for digit in "012345678")
    path.write_text(text[:place] + str(int(text[place]) + 1) + text[place + 1 :])
    json.loads(path.read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train.run(small(rounds=1, pretrain__epochs=1), workdir, lambda line: None)
    return workdir


READERS: dict[str, list[Callable[[Path], object]]] = {
    "config.json": [
        lambda path: train.run(small(rounds=1, pretrain__epochs=1), path),
        lambda path: train.load_agents(path),
        lambda path: reports.write([str(path)], path.parent / "report"),
    ],
    "layout.json": [lambda path: Workdir(path).read_layout()],
    "inputs.json": [lambda path: Inputs(path).check_data("any data")],
    "summary.json": [lambda path: train.run(small(rounds=1, pretrain__epochs=1), path)],
    "partition.json": [lambda path: reports.write([str(path)], path.parent / "report")],
}


@pytest.mark.parametrize("name", READERS)
def test_a_changed_file_of_a_run_is_named_by_all_who_read_it(tmp_path, finished, name):
    for number, read in enumerate(READERS[name]):
        workdir = shutil.copytree(finished, tmp_path / f"run-{number}")
        _change(workdir / name)
        with pytest.raises(UserError) as error:
            read(workdir)
        assert f"{name}" in str(error.value)
        assert "it has changed since it was written. Put back" in str(error.value)
        assert f"remove {workdir / DIGESTS}" in str(error.value)
        assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("name", ["partition.json", "model.json"])
def test_a_run_goes_on_with_a_warning_of_what_others_need(
    tmp_path, finished, caplog, name
):
    workdir = shutil.copytree(finished, tmp_path / "run")
    (workdir / name).write_bytes(b"{")
    with caplog.at_level(logging.WARNING):
        Workdir(workdir).check(Workdir(workdir).read_config())
    (message,) = caplog.messages
    assert f"{workdir / name} cannot be used: it has changed" in message


@pytest.mark.parametrize("name", ["inputs.json", "layout.json", "model.json"])
def test_a_run_goes_on_with_a_warning_of_a_file_that_is_gone(
    tmp_path, finished, caplog, name
):
    workdir = shutil.copytree(finished, tmp_path / "run")
    (workdir / name).unlink()
    with caplog.at_level(logging.WARNING):
        Workdir(workdir).check(Workdir(workdir).read_config())
    (message,) = caplog.messages
    assert f"{workdir / name} is missing. The run has written it" in message


def test_a_folder_in_the_place_of_digests_is_refused_at_once(tmp_path, finished):
    workdir = shutil.copytree(finished, tmp_path / "run")
    (workdir / DIGESTS).unlink()
    (workdir / DIGESTS).mkdir()
    with pytest.raises(UserError, match=f"{DIGESTS} is no file. Move it away"):
        Workdir(workdir).check(Workdir(workdir).read_config())


def test_a_run_that_is_no_longer_finished_lacks_nothing(tmp_path, finished, caplog):
    workdir = shutil.copytree(finished, tmp_path / "run")
    (workdir / "summary.json").unlink()
    with caplog.at_level(logging.WARNING):
        Workdir(workdir).check(Workdir(workdir).read_config())
    assert not caplog.messages


def test_damaged_digests_are_named_and_the_files_are_read(tmp_path, finished, caplog):
    workdir = shutil.copytree(finished, tmp_path / "run")
    flip(workdir / DIGESTS, random.Random(0))
    with caplog.at_level(logging.WARNING):
        Workdir(workdir).read_config()
        Workdir(workdir).read_layout()
    (message,) = caplog.messages
    assert f"{workdir / DIGESTS} is damaged" in message
    (workdir / DIGESTS).unlink()
    _change(workdir / "config.json")
    Workdir(workdir).read_config()  # As a person who has changed it on purpose.
