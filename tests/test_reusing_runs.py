"""Runs go on with more rounds, start from other runs, and are loaded and exported."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dimat_jax
from dimat_jax import train
from dimat_jax._metrics import read_evaluations, read_rows
from dimat_jax._starting import Start, read_start
from dimat_jax._without_data import ExperimentWithoutData, Form
from dimat_jax.config import ConfigError, drop_unread
from dimat_jax.data._dataset import DataError
from dimat_jax.errors import UserError
from dimat_jax.export import export_model
from dimat_jax.models import MODELS, _saved, classifier, to_torch
from dimat_jax.models._torch_files import save_safetensors
from dimat_jax.tree import flatten, take
from dimat_jax.workdir import Workdir, load_agents
from tests.sweeping.small import small

DIMAT = {"merge__frame": "own", "checkpoint__keep_every": 1}


def run(config: Any, folder: Path) -> list[str]:
    lines: list[str] = []
    train.run(config, folder, lines.append)
    return lines


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A finished run of two rounds, of which every checkpoint is kept."""
    folder = tmp_path_factory.mktemp("runs") / "source"
    run(small("dimat", **DIMAT), folder)
    return folder


@pytest.fixture
def copied(source, tmp_path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copied"))


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    times = ("seconds_total", "merge_seconds")
    return [{k: v for k, v in row.items() if k not in times} for row in rows]


def assert_same(agents: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, agents, expected)


# More rounds


def test_a_finished_run_goes_on_to_more_rounds_as_if_it_had_never_ended(
    tmp_path, copied
):
    longer = small("dimat", rounds=3, **DIMAT)
    whole = tmp_path / "whole"
    run(longer, whole)
    lines = run(longer, copied)
    assert lines[0] == "the run goes on to 3 rounds; it was one of 2"
    assert not [line for line in lines if line.startswith("round   2")]
    assert without_times(read_rows(copied)) == without_times(read_rows(whole))
    assert_same(load_agents(copied)[1], load_agents(whole)[1])
    assert json.loads((copied / "summary.json").read_text())["round"] == 3
    assert run(longer, copied) == [f"{copied} holds this run, finished"]
    # Reports and sweeps read the number of rounds in its config.
    assert dimat_jax.reports.load(copied).left_out.empty


def test_a_crash_while_the_rounds_are_changed_leaves_a_run_that_goes_on(
    copied, monkeypatch
):
    def crash(path: Path, content: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dimat_jax._more_rounds.write_json", crash)
    before = read_rows(copied)
    with pytest.raises(KeyboardInterrupt):
        run(small("dimat", rounds=3, **DIMAT), copied)
    monkeypatch.undo()
    assert not (copied / "summary.json").exists()
    run(small("dimat", **DIMAT), copied)
    assert read_rows(copied) == before
    assert json.loads((copied / "summary.json").read_text())["round"] == 2


def test_fewer_rounds_than_have_begun_are_refused(copied):
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    message = rf"config.rounds is 1, but {copied} holds a run that has begun round 2\."
    with pytest.raises(ConfigError, match=message):
        run(small("dimat", rounds=1, **DIMAT), copied)
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before
    # A run that is within its second round has begun it.
    path = copied / "checkpoints" / "4" / "record" / "metadata"
    record = {**json.loads(path.read_text()), "round": 1, "within": 3}
    path.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="has begun round 2"):
        Workdir(copied).check(small("dimat", rounds=1, **DIMAT))
    # The next one counts if the newest is damaged.
    path.write_text("{")
    Workdir(copied).check(small("dimat", rounds=1, **DIMAT))
    with pytest.raises(ConfigError, match="has begun round 1"):
        Workdir(copied).check(small("dimat", rounds=0, **DIMAT))


def test_a_schedule_that_depends_on_the_number_of_rounds_fixes_it(tmp_path):
    falling = {"optimizer__schedule": "cosine", "pretrain__epochs": 0}
    folder = Workdir(tmp_path)
    config = drop_unread(small("wa", **falling))
    (tmp_path / "config.json").write_text(config.to_json())
    folder.check(config)
    config.rounds = 4
    with pytest.raises(ConfigError, match="optimizer.schedule='cosine' every learning"):
        folder.check(config)
    other = drop_unread(small("wa", seed=1, rounds=4))
    with pytest.raises(ConfigError, match="they differ in optimizer.schedule"):
        folder.check(other)


# Loading


def test_agents_of_earlier_rounds_are_loaded(source):
    rows = {row["round"]: row for row in read_evaluations(source)}
    for number in (0, 1, 2):
        experiment, agents = load_agents(source, round=number)
        placed = experiment.placement.put(jax.tree.map(lambda x: x, agents))
        accuracy = experiment.evaluator(placed).accuracy
        assert accuracy.tolist() == rows[number]["test_accuracy"]
    with pytest.raises(UserError, match="end of round 7; there are these rounds: 0, 1"):
        load_agents(source, round=7)


def test_agents_are_loaded_without_their_data(copied, monkeypatch, caplog):
    _, expected = load_agents(copied)

    def missing(*args: Any) -> Any:
        raise DataError("there are no digits")

    monkeypatch.setattr("dimat_jax._needs.load_data", missing)
    experiment, agents = load_agents(copied)
    assert_same(agents, expected)
    assert "is loaded without its data: there are no digits" in caplog.text
    assert experiment.n_classes == 10 and experiment.input_shape == (8, 8, 1)
    for part in ("dataset", "shards", "evaluator", "local_steps", "train_pool"):
        with pytest.raises(DataError, match="was loaded without its data.*no digits"):
            getattr(experiment, part)
    with pytest.raises(AttributeError):
        getattr(experiment, "something_else")  # noqa: B009
    # A run of an older version does not say enough.
    (copied / "model.json").unlink()
    with pytest.raises(DataError, match="^there are no digits"):
        load_agents(copied)


@pytest.mark.every_nth(4)
@pytest.mark.parametrize("algorithm", sorted(dimat_jax.ALGORITHMS))
def test_the_state_of_every_algorithm_is_known_without_data(tmp_path, algorithm):
    config = small(algorithm)
    experiment = train.Experiment(config)
    folder = Workdir(tmp_path / "run")
    folder.create(experiment)
    form = Form.read(folder.path)
    assert form is not None
    without = ExperimentWithoutData(config, form, "")
    for name in ("algorithm", "pretrain_algorithm"):
        one, other = (
            jax.eval_shape(getattr(e, name).init, e.abstract_variables())
            for e in (experiment, without)
        )
        assert jax.tree.structure(one) == jax.tree.structure(other)
        shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(one)]
        assert shapes == [(x.shape, x.dtype) for x in jax.tree.leaves(other)]


# Starting from trained weights


def starting(names: Any, **changes: Any) -> Any:
    fields = {"rounds": 1, "pretrain__epochs": 0, "init_from": str(names), **changes}
    return drop_unread(small("wa", **fields))


def start_of(config: Any) -> Start:
    start = read_start(config)
    assert start is not None
    return start


def test_a_run_starts_from_the_agents_of_another_run(tmp_path, source):
    expected = read_evaluations(source)
    run(starting(f"{source}@1"), tmp_path / "one")
    first = read_evaluations(tmp_path / "one")[0]
    assert first["phase"] == "pretrained" and first["step"] == 0
    assert first["test_loss"] == expected[2]["test_loss"]
    # Without a round, agents are those of the newest checkpoint. A run may go on with
    # its rounds, and may pre-train them.
    run(starting(source, pretrain__epochs=1), tmp_path / "two")
    alone, start, *_ = read_rows(tmp_path / "two")
    from_random_weights = read_rows(source)[0]["train_loss_mean"]
    assert alone["train_loss_mean"] < 0.9 * from_random_weights
    _, agents = load_agents(source)
    assert_same(
        [model.variables for model in start_of(starting(source)).models],
        [take(agents, number) for number in range(3)],
    )


def test_a_run_starts_from_models_one_for_each_agent_or_one_for_all(tmp_path, source):
    _, agents = load_agents(source)
    folder = tmp_path / "models"
    for number in (2, 10, 9):
        export_model(source, folder / f"agent{number}", agent=number % 3)
    # The numbers in names are compared as numbers: 2, 9 and 10.
    found = start_of(starting(folder / "agent*"))
    assert [Path(name).name for name in found.names] == ["agent2", "agent9", "agent10"]
    assert_same(
        [model.variables for model in found.models],
        [take(agents, number) for number in (2, 0, 1)],
    )
    one = start_of(starting(f"{source}:1"))
    assert_same([m.variables for m in one.models], [take(agents, 1)] * 3)
    mixed = f"{source}@0:2, {folder / 'agent9'},{source}"
    found = start_of(starting(mixed))
    assert_same(found.models[1].variables, take(agents, 0))
    digests = {start.digest for start in (one, found, start_of(starting(source)))}
    assert len(digests) == 3


def test_a_run_starts_from_pytorch_files(tmp_path):
    module = MODELS["resnet20"](n_classes=10, width=1)
    abstract = jax.eval_shape(
        lambda key: classifier.init(module, key, np.zeros((1, 32, 32, 3), np.float32)),
        jax.random.key(0),
    )
    rng, written = np.random.default_rng(0), []
    for number in range(3):
        variables = jax.tree.map(
            lambda x: rng.uniform(0.5, 1, x.shape).astype(np.float32), abstract
        )
        path = tmp_path / f"agent{number}.safetensors"
        save_safetensors(path, to_torch("resnet20", variables))
        written.append(variables)
    config = drop_unread(starting(f"{tmp_path}/*.safetensors", model__name="resnet20"))
    start = start_of(config)
    assert_same([model.variables for model in start.models], written)
    assert start.models[0].arguments["width"] == 1
    with pytest.raises(ConfigError, match="does not fit vgg11"):
        start_of(starting(f"{tmp_path}/*.safetensors", model__name="vgg11"))


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        ("{there}/nowhere", {}, "there is no such file or folder"),
        ("{there}:3", {}, "there is no agent 3; the run has 0 to 2"),
        ("{there}@9", {}, "no checkpoint of the end of round 9"),
        ("{there},{there}", {}, "has 2 models, but there are 3 agents"),
        ("{there}", {"agents": 4}, "has 3 models, but there are 4 agents"),
        ("{there},,{there}", {}, "has an empty name"),
        ("{there}/*.pth", {}, "no file or folder matches"),
        ("{there}/config.json", {}, "a PyTorch file ends in one of"),
        ("{there}", {"model__width": 2}, r"architectures: hidden is \(256, 256\) and"),
        ("{there}", {"model__name": "vgg11"}, "architectures: model is vgg11 and mlp"),
        ("{there}", {"init": "same"}, "config.init is 'same', but config.init_from is"),
    ],
)
def test_bad_starting_points_are_refused_before_anything_is_written(
    tmp_path, source, names, changes, message
):
    workdir = tmp_path / "run"
    with pytest.raises(ConfigError, match=message) as error:
        run(starting(names.format(there=source), **changes), workdir)
    assert "config.init" in str(error.value)
    assert not workdir.exists()


def test_weights_that_are_not_finite_are_refused(tmp_path, source):
    export_model(source, tmp_path / "model", agent=0)
    model = _saved.load(tmp_path / "model" / "model")
    bad = jax.tree.map(lambda x: np.full_like(x, np.nan), model.variables)
    shutil.rmtree(tmp_path / "model" / "model")
    _saved.save(tmp_path / "model" / "model", model._replace(variables=bad))
    with pytest.raises(ConfigError, match="NaN or infinite"):
        run(starting(tmp_path / "model"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_weights_are_a_part_of_what_a_run_depends_on(tmp_path, source, copied):
    folder = tmp_path / "run"
    run(starting(copied), folder)
    # The same weights may have another name, or be gone.
    more = {"rounds": 2}
    run(starting(f"{source}@2", **more), folder)
    content = json.loads((folder / "inputs.json").read_text())["init_from"]
    assert content["from"] == str(copied)
    # The agents that the folder holds now are others.
    longer = small("dimat", rounds=3, **DIMAT)
    run(longer, copied)
    with pytest.raises(ConfigError, match=r"a run from other weights.*\(DIR@10\)"):
        run(starting(copied, rounds=3), folder)
    with pytest.raises(ConfigError, match="they differ in .*init_from"):
        run(starting("", rounds=3), folder)
    shutil.rmtree(copied)
    run(starting(copied, rounds=3), folder)
    assert read_rows(folder)[-1]["round"] == 3


# Export


def test_the_average_that_is_exported_is_the_one_that_the_run_measures(
    tmp_path, source
):
    experiment, _ = load_agents(source)
    rows = [row for row in read_evaluations(source) if row["phase"] != "merged"]
    for number, row in zip((None, 0), (rows[-1], rows[0]), strict=True):
        out = export_model(source, tmp_path / f"average-{number}", round=number)
        model = _saved.load(out / "model")
        test = experiment.dataset.test
        inputs = (test.images.astype(np.float32) - experiment.dataset.mean) / (
            experiment.dataset.std
        )
        logits = classifier.forward(model.module)(model.variables, jnp.asarray(inputs))
        accuracy = float(np.mean(logits.argmax(axis=-1) == test.labels))
        assert accuracy == pytest.approx(row["test_accuracy_average_model"])
    # A run may start from it.
    found = start_of(starting(tmp_path / "average-None"))
    assert len(found.models) == 3


def test_an_agent_is_exported_without_the_data_and_by_the_names_of_its_leaves(
    tmp_path, source, monkeypatch
):
    safetensors = pytest.importorskip("safetensors.numpy")
    _, agents = load_agents(source, round=1)

    def missing(*args: Any) -> Any:
        raise DataError("there are no digits")

    monkeypatch.setattr("dimat_jax._needs.load_data", missing)
    out = tmp_path / "new" / "agent.safetensors"
    assert dimat_jax.export_model(source, out, agent=2, round=1) == out
    expected = flatten(take(agents, 2))
    arrays = safetensors.load_file(out)
    assert arrays.keys() == {path.replace("/", ".") for path in expected}
    for path, leaf in expected.items():
        np.testing.assert_array_equal(arrays[path.replace("/", ".")], leaf)
    # The average of agents that have merged along a ring needs no images.
    with pytest.raises(DataError, match="without its data"):
        export_model(source, tmp_path / "average")
    assert not (tmp_path / "average").exists()


@pytest.mark.parametrize(
    ("out", "given", "message"),
    [
        ("taken", {}, "exists already"),
        ("taken/file.txt/x", {}, "cannot be a folder"),
        ("model.pth", {}, "must end in .safetensors, or be a folder"),
        ("new", {"agent": 3}, "there is no agent 3; the run has 0 to 2"),
        ("new", {"agent": 0, "round": 9}, "no checkpoint of the end of round 9"),
    ],
)
def test_bad_exports_write_nothing(tmp_path, source, out, given, message):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        export_model(source, tmp_path / out, **given)
    assert sorted(tmp_path.rglob("*")) == before
