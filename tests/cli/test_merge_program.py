"""Tests `dimat merge` as a user calls it, on runs, PyTorch files and earlier merges."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import quickstart
from dimat_jax import _model_files, train
from dimat_jax._merge_models import Options, _files, run
from dimat_jax._metrics import read_evaluations
from dimat_jax.config import default_config
from dimat_jax.errors import UserError
from dimat_jax.models import MODELS, _saved, classifier
from dimat_jax.models._saved import SavedModel
from dimat_jax.models.torch_import import to_torch
from dimat_jax.tree import flatten

ROOT = Path(__file__).parents[2]


def quiet(line: str) -> None:
    del line


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A run of three MLPs, each trained alone on its part of the digits."""
    config = quickstart.get_config("local")
    fields = {"agents": 3, "rounds": 0, "pretrain.epochs": 15}
    config.update_from_flattened_dict(fields)
    path = tmp_path_factory.mktemp("runs") / "digits"
    train.run(config, path, quiet)
    return path


def agents(workdir: Path, *numbers: int) -> tuple[str, ...]:
    return tuple(f"{workdir}:{number}" for number in numbers)


@pytest.fixture(scope="module")
def merged(workdir) -> Path:
    """The folder of a merge of two of these models."""
    out = workdir.parent / "merged"
    run(Options(agents(workdir, 0, 1), str(out), points=3), quiet)
    return out


def test_the_agents_of_a_run_are_those_that_it_evaluated(workdir):
    experiment, variables = train.load_agents(workdir)
    accuracy = experiment.evaluator(experiment.placement.put(variables)).accuracy
    assert accuracy.tolist() == read_evaluations(workdir)[-1]["test_accuracy"]


def test_a_run_without_a_checkpoint_has_no_agents_yet(tmp_path, workdir):
    (tmp_path / "config.json").write_bytes((workdir / "config.json").read_bytes())
    with pytest.raises(UserError, match="has no checkpoint yet"):
        train.load_agents(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.slow
def test_two_runs_merge_better_aligned(workdir, merged):
    summary = json.loads((merged / "summary.json").read_text())
    trained = read_evaluations(workdir)[-1]["test_accuracy"]
    accuracy, loss = summary["accuracy"], summary["loss"]
    assert list(accuracy) == [
        "digits:0",
        "digits:1",
        "plain average",
        "plain average, repaired",
        "aligned average",
        "aligned average, repaired",
    ]
    assert [accuracy["digits:0"], accuracy["digits:1"]] == trained[:2]
    assert loss["aligned average, repaired"] < loss["plain average"] / 2
    assert accuracy["aligned average, repaired"] > accuracy["plain average"]
    (line,) = summary["barriers"]
    assert (line["from"], line["to"]) == ("digits:0", "digits:1")
    assert 0 <= line["aligned, repaired"] < line["aligned"] < line["plain"] / 2
    assert summary["moved_units"] > 0.9
    assert summary["options"]["method"] == "activation"


def test_the_lines_are_written_with_all_their_points(merged):
    summary = json.loads((merged / "summary.json").read_text())
    (line,) = json.loads((merged / "barrier.json").read_text())
    for name, curve in line["curves"].items():
        assert curve["ts"] == [0, 0.5, 1]
        ends, middle = (curve["losses"][0], curve["losses"][2]), curve["losses"][1]
        assert curve["barrier"] == pytest.approx(middle - sum(ends) / 2)
        # Every line has the same ends: alignment changes no function.
        assert ends[0] == pytest.approx(summary["loss"]["digits:0"], rel=1e-3)
        assert ends[1] == pytest.approx(summary["loss"]["digits:1"], rel=1e-3)
        # With equal weights the average is the line's middle.
        form, _, mended = name.partition(", ")
        average = f"{form} average" + (f", {mended}" if mended else "")
        assert middle == pytest.approx(summary["loss"][average], rel=1e-3)
    assert (merged / "barrier.png").stat().st_size > 10_000
    report = (merged / "report.md").read_text()
    assert "aligned average, repaired" in report and "loss barrier" in report


def test_a_merged_model_can_be_merged_again(tmp_path, workdir, merged):
    models = (str(merged), *agents(workdir, 2))
    out = tmp_path / "again"
    # A model without any weight leaves the other one as it is.
    options = Options(models, str(out), weights=(1, 0), points=2)
    again = run(options, quiet)["accuracy"]
    first = json.loads((merged / "summary.json").read_text())["accuracy"]
    assert again[str(merged.relative_to(workdir.parent))] == pytest.approx(
        first["aligned average, repaired"]
    )
    before, after = _saved.load(merged / "model"), _saved.load(out / "model")
    assert (before.name, before.data, before.input_shape) == (
        "mlp",
        "digits",
        (8, 8, 1),
    )
    assert after.arguments == before.arguments and after.module == before.module
    leaves = flatten(after.variables)
    for path, leaf in flatten(before.variables).items():
        np.testing.assert_allclose(leaves[path], leaf, atol=1e-4, err_msg=path)


@pytest.mark.every_nth(2)
@pytest.mark.parametrize("method", ["activation", "weight"])
@pytest.mark.parametrize("frame", ["reference", "joint"])
def test_three_models_merge_in_one_frame(tmp_path, workdir, method, frame):
    out = tmp_path / "three"
    models = agents(workdir, 0, 1, 2)
    options = Options(models, str(out), method=method, frame=frame, points=2)
    summary = run(options, quiet)
    assert [line["to"] for line in summary["barriers"]] == ["digits:1", "digits:2"]
    loss = summary["loss"]
    assert loss["aligned average, repaired"] < loss["plain average"] / 2


def test_without_matching_the_plain_average_is_saved(tmp_path, workdir):
    out = tmp_path / "plain"
    summary = run(
        Options(agents(workdir, 0, 1), str(out), method="none", points=2), quiet
    )
    assert summary["merged"] == "plain average, repaired"
    assert not any("aligned" in name for name in summary["accuracy"])


# Other models =========================================================================


def fresh(name: str, seed: int = 0, n_classes: int = 10, **arguments) -> SavedModel:
    arguments = {"n_classes": n_classes, **arguments}
    module = _saved.build(name, arguments)
    shapes = jax.eval_shape(
        lambda key, images: classifier.init(module, key, images),
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, 8, 8, 1), np.float32),
    )
    rng = np.random.default_rng(seed)
    # The numbers are positive, because some of them are variances.
    variables = jax.tree.map(
        lambda x: rng.uniform(0.01, 0.1, x.shape).astype(np.float32), shapes
    )
    return SavedModel(name, arguments, (8, 8, 1), "digits", variables)


def save_torch(path: Path, model: SavedModel) -> str:
    from safetensors.numpy import save_file

    save_file(to_torch(model.name, model.variables), path)
    return str(path)


def test_pytorch_files_are_merged_and_batch_norm_is_recalibrated(tmp_path):
    models = [fresh("vgg11", seed, width=1 / 16) for seed in range(2)]
    files = tuple(
        save_torch(tmp_path / f"{seed}.safetensors", model)
        for seed, model in enumerate(models)
    )
    options = Options(
        files,
        str(tmp_path / "out"),
        model="vgg11",
        data="digits",
        test_size=50,
        samples=50,
        points=2,
        method="none",
    )
    summary = run(options, quiet)
    assert summary["merged"] == "plain average, recalibrated"
    result = _saved.load(tmp_path / "out" / "model")
    assert result.module == models[0].module
    for path, leaf in flatten(result.variables["params"]).items():
        a, b = (flatten(model.variables["params"])[path] for model in models)
        np.testing.assert_allclose(leaf, (a + b) / 2, rtol=1e-5, atol=1e-7)
    for path, leaf in flatten(result.variables["batch_stats"]).items():
        a, b = (flatten(model.variables["batch_stats"])[path] for model in models)
        assert not np.allclose(leaf, (a + b) / 2, rtol=0.01), path


# Bad input ============================================================================


class Files:
    """The names that may stand on the command line."""

    def __init__(self, folder: Path, workdir: Path, merged: Path):
        self.folder, self.run, self.merged = folder, workdir, merged
        self.out = folder / "out"

    def save(self, name: str, model: SavedModel) -> str:
        _saved.save(self.folder / name / "model", model)
        return str(self.folder / name)

    def write(self, name: str, content: bytes) -> str:
        (self.folder / name).write_bytes(content)
        return str(self.folder / name)


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def with_nan(model: SavedModel) -> SavedModel:
    variables = jax.tree.map(np.array, model.variables)
    variables["params"]["hidden1"]["bias"][3] = np.nan
    return model._replace(variables=variables)


BAD = {
    "one model": (lambda f: [f.merged], {}, "two different models or more"),
    "the same twice": (lambda f: [f.merged] * 2, {}, "two different models or more"),
    "a method": ([], {"method": "weights"}, "did you mean 'weight'"),
    "a frame": ([], {"frame": "own"}, "--frame is 'own'; allowed: joint, reference"),
    "a model": ([], {"model": "mpl"}, "did you mean 'mlp'"),
    "points": ([], {"points": 1}, "--points is 1; it must be at least 2"),
    "stay": ([], {"stay": -1.0}, "--stay is -1.0; it must be at least 0"),
    "no data set": ([], {"data": "digit"}, "did you mean 'digits'"),
    "restarts of activations": (
        [],
        {"restarts": 3},
        "--restarts is 3, but --method=activation does not read it; it is read where "
        "method is 'weight'",
    ),
    "a frame without matching": (
        [],
        {"method": "none", "frame": "joint", "stay": 0.5},
        "--frame is 'joint', but --method=none does not read it; it is read where "
        "method is one of 'activation', 'weight'; --stay is 0.5, but --method=none",
    ),
    "weights": ([], {"weights": (1, 1, 1)}, "3 weights for 2 models"),
    "negative weights": ([], {"weights": (2, -1)}, "at least 0"),
    "samples": ([], {"samples": 5000}, "--samples is 5000, but there are only 1433"),
    "test_size": ([], {"test_size": 5000}, "digits: test_size"),
    "another model": ([], {"model": "resnet20"}, "is a mlp, but --model=resnet20"),
    "another data set": ([], {"data": "cifar10"}, "was trained on 'digits'"),
    "no data": (
        lambda f: [
            save_torch(
                f.folder / f"{i}.pth.safetensors", fresh("vgg11", i, width=0.125)
            )
            for i in (0, 1)
        ],
        {"model": "vgg11"},
        "--data must",
    ),
    "nothing there": (lambda f: [f.run, f.folder / "x"], {}, "x: there is no such"),
    "some folder": (lambda f: [f.run, f.folder], {}, "neither the workdir of a run"),
    "no such agent": (lambda f: [f.run, f"{f.run}:3"], {}, "there is no agent 3; the "),
    "an agent of a merge": (
        lambda f: [f.run, f"{f.merged}:0"],
        {},
        "only runs have agents",
    ),
    "some file": (
        lambda f: [f.run, f.write("x.txt", b"")],
        {"model": "resnet20"},
        "ends in one of .pth",
    ),
    "a PyTorch file of what": (
        lambda f: [f.run, f.write("x.pth", b"")],
        {},
        "--model must say",
    ),
    "a pickle": (
        lambda f: [f.run, f.write("x.pth", pickle.dumps({"a": Evil()}))],
        {"model": "resnet20"},
        "x.pth",
    ),
    "a broken config": (
        lambda f: [f.run, Path(f.write("config.json", b"{")).parent],
        {},
        "config.json cannot be used",
    ),
    "another width": (
        lambda f: [f.run, f.save("wide", fresh("mlp", width=2))],
        {},
        "different architectures: hidden is (128, 128) and (256, 256)",
    ),
    "other classes": (
        lambda f: [
            f.save(str(i), fresh("mlp", i, n_classes=7, hidden=[9])) for i in (0, 1)
        ],
        {},
        "is for 7 classes, but digits has 10",
    ),
    "NaN": (
        lambda f: [f.run, f.save("nan", with_nan(fresh("mlp")))],
        {},
        "nan: 'params/hidden1/bias' holds 1 value(s) that are NaN",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_leaves_no_files(
    tmp_path, monkeypatch, workdir, merged, case
):
    monkeypatch.chdir(tmp_path)
    files = Files(tmp_path, workdir, merged)
    make, changes, message = BAD[case]
    models = make(files) if make else [merged, f"{workdir}:1"]
    models = tuple(map(str, models))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        run(Options(models, str(files.out), **changes), quiet)
    assert message in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_holds_something_is_not_written_to(tmp_path, workdir):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        run(Options(agents(workdir, 0, 1), str(tmp_path)), quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_fails_while_it_is_written_leaves_nothing(tmp_path, workdir, monkeypatch):
    def fail(lines, path, metric):
        raise OSError("no space left")

    monkeypatch.setattr("dimat_jax._merge_models._report.figure", fail)
    out = tmp_path / "out"
    options = Options(agents(workdir, 0, 1), str(out), method="none", points=2)
    with pytest.raises(OSError, match="no space"):
        run(options, quiet)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "folders", "data_dir", "is_refused"),
    [
        ("npz", ("a.npz", "b.npz"), None, True),
        ("text", ("", "b.txt"), None, True),
        ("npz", ("a.npz", "b.npz"), "a.npz", False),
        ("npz", ("a.npz", "./a.npz"), None, False),
        ("cifar10", ("a", "b"), None, False),  # It is the same data set in all folders.
    ],
)
def test_runs_on_different_own_data_are_not_merged_by_their_name_alone(
    tmp_path, monkeypatch, name, folders, data_dir, is_refused
):
    def load_weights(workdir, given, round):
        config = default_config()
        config.data.name = name
        config.data.dir = given or folders[int(workdir.name)]
        return SimpleNamespace(config=config), None

    monkeypatch.setattr(_model_files, "load_weights", load_weights)
    model = SavedModel("mlp", {}, (1,), name, {})
    monkeypatch.setattr(_model_files, "agent_of", lambda *given: model)
    for number in ("0", "1"):
        (tmp_path / number).mkdir()
        (tmp_path / number / "config.json").touch()
    workdirs = tuple(str(tmp_path / number) for number in ("0", "1"))
    options = Options(workdirs, "out", data_dir=data_dir)
    if not is_refused:
        assert _files.read(options)[1] == folders[0]
        return
    with pytest.raises(UserError, match=r"/0 was .* and \S*/1 on .* with --data_dir"):
        _files.read(options)


# Models on disk =======================================================================


def test_a_model_on_disk_is_what_it_was(tmp_path):
    model = fresh("mlp", hidden=[9, 7], dtype="bfloat16")
    _saved.save(tmp_path / "model", model)
    loaded = _saved.load(tmp_path / "model")
    assert loaded._replace(variables=None) == model._replace(variables=None)
    assert loaded.module == MODELS["mlp"](
        n_classes=10, hidden=(9, 7), dtype=jax.numpy.bfloat16
    )
    for path, leaf in flatten(model.variables).items():
        np.testing.assert_array_equal(flatten(loaded.variables)[path], leaf)


def test_leaves_that_are_not_the_architectures_are_named():
    model = fresh("mlp", hidden=[9])
    params = dict(model.variables["params"])
    del params["head"]
    with pytest.raises(_saved.SavedModelError, match="here lacks 'params/head/"):
        _saved.check(model._replace(variables={"params": params}), "here")
    params = {**model.variables["params"], "extra": np.zeros(2)}
    with pytest.raises(_saved.SavedModelError, match="'params/extra', which mlp"):
        _saved.check(model._replace(variables={"params": params}), "here")
    with pytest.raises(_saved.SavedModelError, match=r"is of shape \(64, 9\), but mlp"):
        _saved.check(model._replace(input_shape=(16, 16, 3)), "here")


def test_a_folder_without_a_model_is_refused(tmp_path, workdir):
    with pytest.raises(_saved.SavedModelError, match="holds no model"):
        _saved.load(tmp_path)
    with pytest.raises(_saved.SavedModelError, match="holds no model"):
        _saved.load(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())
    with pytest.raises(_saved.SavedModelError, match="but not of a model"):
        _saved.load(workdir / "checkpoints")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("mpl", {}, "did you mean 'mlp'"),
        ("mlp", {"n_classes": 2, "depth": 3}, "mlp does not take"),
        ("mlp", {}, "mlp does not take"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(name, arguments, message):
    with pytest.raises(_saved.SavedModelError, match=message):
        _saved.build(name, arguments)


# The command ==========================================================================


def command(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    return subprocess.run(
        [sys.executable, "-m", "experiments.merge", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_command_prints_its_tables_and_names_its_folder(tmp_path, workdir):
    out = tmp_path / "out"
    result = command(
        tmp_path,
        *agents(workdir, 0, 1),
        f"--out={out}",
        "--weights=3,1",
        "--points=2",
        "--method=none",
    )
    assert result.returncode == 0, result.stderr
    assert "| plain average, repaired |" in result.stdout
    assert f"wrote {out}" in result.stdout
    options = json.loads((out / "summary.json").read_text())["options"]
    assert options["weights"] == [3, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights=1,x"], "error: --weights: "),
        (["--restarts=3"], "error: --restarts is 3, but --method=activation does not "),
    ],
)
def test_the_command_ends_bad_input_with_one_message_and_exit_code_2(
    tmp_path, arguments, message
):
    result = command(tmp_path, "a", "b", f"--out={tmp_path / 'out'}", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(message)
    assert not (tmp_path / "out").exists()
