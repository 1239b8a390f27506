"""What a run depends on is in its folder, and nothing else is used when it goes on."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from dimat_jax import _inputs, train
from dimat_jax._digests import DIGESTS
from dimat_jax._inputs import INPUTS, Inputs
from dimat_jax._metrics import write_bytes
from dimat_jax.config import ConfigError
from dimat_jax.data import sources
from dimat_jax.experiment import Experiment
from dimat_jax.workdir import Workdir, load_agents
from tests.sweeping.small import rows
from tests.test_long_runs import tiny

GRAPH = "[[0, 1], [1, 0]]"
OTHER = "[[0, 2], [2, 0]]"


def config_of(graph: Path):
    return tiny(1, topology="file", graph__file=str(graph))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with a run, and with the graph that it names."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "graph.json").write_text(GRAPH)
    train.run(config_of(folder / "graph.json"), folder / "run", lambda line: None)
    return folder


@pytest.fixture
def half(tmp_path, finished) -> Path:
    """The same, as if the run had been interrupted after its last checkpoint."""
    shutil.copytree(finished, tmp_path / "half")
    (tmp_path / "half" / "run" / "summary.json").unlink()
    return tmp_path / "half"


def go_on(folder: Path, graph: str = "graph.json") -> None:
    train.run(config_of(folder / graph), folder / "run", lambda line: None)


def test_the_folder_holds_the_graph_the_digest_of_the_data_and_the_versions(finished):
    found = json.loads((finished / "run" / INPUTS).read_text())
    assert (finished / "run" / "graph.file.json").read_text() == GRAPH
    assert found["files"]["graph.file"]["copy"] == "graph.file.json"
    assert len(found["data"]["blake2b"]) == 64
    assert found["versions"].keys() >= {"dimat_jax", "jax", "jaxlib", "flax", "python"}


def test_a_changed_graph_is_refused_by_name(half):
    (half / "graph.json").write_text(OTHER)
    with pytest.raises(ConfigError, match=r"graph\.json has changed since the run beg"):
        go_on(half)
    (half / "graph.json").write_text(GRAPH)
    (half / "run" / "graph.file.json").write_text(OTHER)
    with pytest.raises(ConfigError, match=r"graph\.file\.json has changed since"):
        go_on(half)


def test_a_graph_that_was_moved_or_removed_is_not_needed(half, finished):
    (half / "graph.json").rename(half / "moved.json")
    go_on(half, "moved.json")
    (half / "run" / "summary.json").unlink()
    (half / "moved.json").unlink()
    go_on(half)
    assert rows(half / "run") == rows(finished / "run")
    experiment, _ = load_agents(half / "run")
    assert experiment.config.graph.file == str(half / "run" / "graph.file.json")


def test_other_data_are_refused(half, monkeypatch):
    dataset = sources.read("digits")
    labels = (dataset.train.labels + 1) % 10
    changed = dataset._replace(train=dataset.train._replace(labels=labels))
    monkeypatch.setitem(
        sources.SOURCES,
        "digits",
        sources.Source(
            "digits", lambda *given: changed, image_shape=(8, 8, 1), n_classes=10
        ),
    )
    with pytest.raises(ConfigError, match="holds a run on other data: the images, lab"):
        go_on(half)


def test_the_digest_differs_if_one_pixel_or_one_label_does():
    digests = {Experiment(tiny(1)).data_digest}
    for field in ("images", "labels"):
        experiment = Experiment(tiny(1))
        array = getattr(experiment.dataset.train, field).copy()
        array[0] += 1
        split = experiment.dataset.train._replace(**{field: array})
        experiment.dataset = experiment.dataset._replace(train=split)
        digests.add(experiment.data_digest)
    assert len(digests) == 3


def test_other_versions_are_warned_of(half, caplog):
    path = half / "run" / INPUTS
    content = json.loads(path.read_text())
    now = content["versions"]["jax"]
    content["versions"]["jax"] = "0.0.1"
    (half / "run" / "digests.json").unlink()
    path.write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        Inputs(half / "run").check_data(content["data"]["blake2b"])
    (message,) = caplog.messages
    assert f"began with jax 0.0.1 (now {now}); " in message


def test_a_run_of_an_older_version_has_no_inputs_and_goes_on(half, finished):
    (half / "run" / INPUTS).unlink()
    Workdir(half / "run").check(config_of(finished / "graph.json"))
    Inputs(half / "run").check_data("any")
    with pytest.raises(ConfigError, match=r"they differ in graph\.file"):
        Workdir(half / "run").check(config_of(half / "elsewhere.json"))


def _die(*_):
    raise SystemExit


def test_a_run_that_was_killed_before_its_config_was_written_begins_anew(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "graph.json").write_text(GRAPH)
    names = ("layout.json", "partition.json", INPUTS, "graph.file.json", ".running")
    for name in (*names, "slurm-12.out", "run.log"):
        (folder / name).touch()
    for name in (DIGESTS, INPUTS, "config.json"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", _die)
            patch.setattr(Path, "unlink", lambda path: None)
            with pytest.raises(SystemExit):
                write_bytes(folder / name, b"{}")
    assert len(list(folder.glob(".*.tmp"))) == 3
    Workdir(folder).check(config_of(tmp_path / "graph.json"))
    (folder / "other").touch()
    with pytest.raises(ConfigError, match="no fresh folder: .*, and holds other. Choo"):
        Workdir(folder).check(config_of(tmp_path / "graph.json"))


def test_seeds_of_any_size_differ():
    import jax
    import numpy as np

    from dimat_jax import _randomness

    seeds = [0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**63, 2**64, 2**64 + 1, 10**400]
    keys = {
        tuple(jax.random.key_data(_randomness.key(seed, "init")).tolist())
        for seed in seeds
    }
    on_host = {
        tuple(
            np.random.default_rng(_randomness.seeds(seed, "order")).integers(99, size=9)
        )
        for seed in seeds
    }
    assert len(keys) == len(on_host) == len(seeds)
    # Seeds below 2**32 give what they have always given.
    plain = jax.random.fold_in(jax.random.key(7), 0)
    assert (
        jax.random.key_data(_randomness.key(7, "init")) == (jax.random.key_data(plain))
    ).all()
    assert _randomness.seeds(7, "order") == [7, 5]


def test_every_option_that_names_a_file_is_copied():
    config = tiny(1, topology="file", graph__file="some/graph.npy")
    assert _inputs.files_named(config) == {"graph.file": Path("some/graph.npy")}
    assert _inputs.files_named(tiny(1)) == {}
