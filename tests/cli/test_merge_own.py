"""Tests of `dimat merge` on models and images of the user's own, and without data."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import flax.serialization
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dimat_jax._merge_models import Options, run
from dimat_jax.errors import UserError
from dimat_jax.models import _saved
from dimat_jax.models.torch_import import from_torch, save_safetensors, to_torch
from dimat_jax.tree import flatten
from tests.cli.test_merge_program import fresh
from tests.promotion import allow

pytest.importorskip("safetensors")

CODE = '''
import jax
import jax.numpy as jnp


def forward(v, x):
    x = jax.nn.relu(x.reshape(len(x), -1) @ v["body.0.weight"].T + v["body.0.bias"])
    return x @ v["head.weight"].T + v["head.bias"]


def normed(v, x, train=False):
    """A hidden layer with BatchNorm; its running statistics have a momentum of 0.9."""
    x = x.reshape(len(x), -1) @ v["params"]["first"]
    old = v["stats"]
    mean, var = (x.mean(0), x.var(0)) if train else (old["mean"], old["var"])
    y = jax.nn.relu((x - mean) * jax.lax.rsqrt(var + 1e-5) * v["params"]["scale"])
    new = {"mean": 0.9 * old["mean"] + 0.1 * mean, "var": 0.9 * old["var"] + 0.1 * var}
    y = y @ v["params"]["last"]
    return (y, {**v, "stats": new}) if train else y


def untrained(v, x):
    return normed(v, x)


def vectors(v, x):
    return x.reshape(len(x), -1) @ v["body.0.weight"].T @ v["head.weight"].T[:, 0]


def broken(v, x):
    return v["missing"]
'''


@pytest.fixture(autouse=True)
def defaults_of_jax():
    """JAX's own defaults, which hold for users' programs."""
    with allow():
        yield


@pytest.fixture
def code(tmp_path) -> str:
    (tmp_path / "net.py").write_text(CODE)
    return str(tmp_path / "net.py")


@pytest.fixture
def images(tmp_path) -> str:
    """Images whose class is told by their brightness."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    noise = rng.integers(40, size=(60, 2, 3, 3))
    pixels = (80 * labels[:, None, None, None] + noise).astype(np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=labels)
    return str(tmp_path / "images.npz")


def numbers(seed: int, hidden: int = 8) -> dict[str, np.ndarray]:
    """The state dict of a model that `forward` computes, on images of 2 x 3 x 3."""
    rng = np.random.default_rng(seed)
    shapes = {
        "body.0.weight": (hidden, 18),
        "body.0.bias": (hidden,),
        "head.weight": (3, hidden),
        "head.bias": (3,),
    }
    return {
        key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()
    }


def shuffled(state_dict: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """The same model with its hidden units in another order."""
    perm = np.random.default_rng(seed).permutation(len(state_dict["body.0.bias"]))
    return {
        key: array[perm]
        if key.startswith("body")
        else array[..., perm]
        if key == "head.weight"
        else array
        for key, array in state_dict.items()
    }


def quiet(line: str) -> None:
    del line


def save(path: Path, state_dict: dict[str, Any], prefix: str = "") -> str:
    save_safetensors(path, {prefix + key: value for key, value in state_dict.items()})
    return str(path)


def test_a_function_of_a_state_dict_is_merged_without_data(tmp_path, code):
    first = numbers(0)
    files = []
    for seed in range(3):
        content = {
            **{f"model.{k}": v for k, v in shuffled(first, seed).items()},
            "metric.count": np.int64(seed),
        }
        files.append(save(tmp_path / f"{seed}.safetensors", content))
    options = Options(
        tuple(files),
        str(tmp_path / "out"),
        model=f"{code}:forward",
        prefix="model.",
        method="weight",
        size=(2, 3, 3),
        weights=(3, 1, 1),
    )
    lines = []
    summary = run(options, lines.append)
    assert summary["merged"] == "aligned average" and summary["barriers"] == []
    assert any("no data: nothing is evaluated" in line for line in lines)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "model.safetensors",
        "report.md",
        "summary.json",
    ]
    # All three are the same model, and the average is the first of them.
    found = from_torch(None, tmp_path / "out" / "model.safetensors")
    expected = shuffled(first, 0)
    assert found.keys() == {f"model.{key}" for key in expected}
    for key, array in expected.items():
        np.testing.assert_allclose(found[f"model.{key}"], array, rtol=1e-5)
    # What has come out can go in again.
    again = (str(tmp_path / "out"), files[1])
    out = str(tmp_path / "again")
    run(dataclasses.replace(options, models=again, out=out, weights=None), quiet)


def test_own_images_and_a_function_without_batch_norm_are_repaired(
    tmp_path, code, images
):
    first = numbers(1)
    files = tuple(
        save(tmp_path / f"{name}.safetensors", state_dict)
        for name, state_dict in {"a": first, "b": shuffled(first, 5)}.items()
    )
    options = Options(
        files,
        str(tmp_path / "out"),
        model=f"{code}:forward",
        data=images,
        mean=(0.4,),
        std=(0.3,),
        points=3,
    )
    summary = run(options, quiet)
    assert summary["merged"] == "aligned average, repaired"
    assert (tmp_path / "out" / "barrier.png").exists()
    # Both are the same network: its average with itself, once it is aligned.
    loss, (line,) = summary["loss"], summary["barriers"]
    assert loss["a.safetensors"] == pytest.approx(loss["b.safetensors"], rel=1e-4)
    assert line["aligned, repaired"] < 1e-3
    assert loss[summary["merged"]] == pytest.approx(loss["a.safetensors"], rel=1e-3)
    assert loss["plain average"] != pytest.approx(loss["a.safetensors"], rel=0.05)


def normed(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.uniform(0.1, 1, shape).astype(np.float32)

    params = {"first": draw(18, 8), "scale": draw(8), "last": draw(8, 3)}
    return {"params": params, "stats": {"mean": draw(8), "var": draw(8)}}


def save_flax(kind: str, path: Path, tree: dict[str, Any]) -> str:
    tree = {"state": tree, "step": 3}
    if kind == "msgpack":
        path = path.with_suffix(".msgpack")
        path.write_bytes(flax.serialization.msgpack_serialize(tree))
    elif kind == "npz":
        path = path.with_suffix(".npz")
        np.savez(path, **flatten(tree))
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path.absolute(), tree)
    return str(path)


def read_flax(kind: str, folder: Path) -> dict[str, np.ndarray]:
    if kind == "msgpack":
        content = (folder / "model.msgpack").read_bytes()
        return flatten(flax.serialization.msgpack_restore(content))
    if kind == "npz":
        return dict(np.load(folder / "model.npz"))
    return flatten(ocp.PyTreeCheckpointer().restore((folder / "model").absolute()))


@pytest.mark.every_nth(3)
@pytest.mark.parametrize("kind", ["msgpack", "npz", "orbax"])
def test_batch_norm_of_a_function_is_recalibrated(tmp_path, code, images, kind):
    models = [normed(seed) for seed in (1, 2)]
    files = tuple(
        save_flax(kind, tmp_path / f"model{i}", model) for i, model in enumerate(models)
    )
    options = Options(
        files,
        str(tmp_path / "out"),
        model=f"{code}:normed",
        data=images,
        entry="state",
        method="none",
        points=2,
    )
    summary = run(options, quiet)
    assert summary["merged"] == "plain average, recalibrated"
    found = read_flax(kind, tmp_path / "out")
    first, second = map(flatten, models)
    assert found.keys() == first.keys()
    for path in ("params/first", "params/scale", "params/last"):
        average = (first[path] + second[path]) / 2
        np.testing.assert_allclose(found[path], average, rtol=1e-5)
    pixels = np.load(images)["images"].reshape(60, -1, 3)
    is_train = np.arange(60) // 3 % 5 != 0
    x = (pixels - pixels[is_train].mean((0, 1))) / pixels[is_train].std((0, 1))
    units = x[is_train].reshape(is_train.sum(), -1) @ found["params/first"]
    np.testing.assert_allclose(found["stats/mean"], units.mean(0), atol=1e-3)


def test_pytorch_files_of_a_bundled_model_are_merged_without_data(tmp_path):
    models = [fresh("vgg11", seed, width=1 / 16) for seed in range(2)]
    files = []
    for seed, model in enumerate(models):
        state_dict = to_torch("vgg11", model.variables)
        renamed = {
            f"net.{key.replace('classifier', 'classifier.1')}": value
            for key, value in state_dict.items()
        }
        renamed["net.features.1.num_batches_tracked"] = np.int64(5)
        files.append(save(tmp_path / f"{seed}.safetensors", renamed))
    out = tmp_path / "out"
    options = Options(tuple(files), str(out), model="vgg11", method="none")
    summary = run(options, quiet)
    assert summary["merged"] == "plain average"
    merged = from_torch(None, out / "model.safetensors")
    assert "net.classifier.1.weight" in merged
    assert from_torch("vgg11", out / "model.safetensors").keys() == {
        "params",
        "batch_stats",
    }
    assert _saved.load(out / "model").input_shape == (32, 32, 1)
    written = json.loads((out / "summary.json").read_text())
    assert written["accuracy"] == {}


@pytest.fixture
def pair(tmp_path) -> tuple[str, str]:
    first, second = (
        save(tmp_path / f"{seed}.safetensors", numbers(seed)) for seed in (1, 2)
    )
    return first, second


BAD = {
    "no size": ({}, "without data, --size must tell the size of the images that"),
    "no data": (
        {"method": "activation", "size": (2, 3, 3)},
        "--data must name it, unl",
    ),
    "points": (
        {"points": 5, "size": (2, 3, 3)},
        "--points is 5, but there are no data",
    ),
    "two numbers": ({"size": (2, 3)}, "--size is 2,3; it must be SIDE or HEIGHT,WIDTH"),
    "four channels": ({"size": (2, 3, 4)}, "--size has 4 channels; images have 1 or 3"),
    "mean of nothing": ({"mean": (0.5,)}, "--mean is for images of your own"),
    "mean of digits": ({"mean": (0.5,), "data": "digits"}, "got --data=digits"),
    "deviation": ({"std": (0.0,), "data": "IMAGES"}, "--std must be above 0"),
    "no function": ({"model": "CODE:foward", "size": (2, 3, 3)}, "defines no foward("),
    "no file": ({"model": "gone.py:forward", "size": (2, 3, 3)}, "gone.py"),
    "another size": ({"size": (4, 4, 3)}, "for inputs of shape (8, 4, 4, 3): "),
    "an error": ({"model": "CODE:broken", "size": (2, 3, 3)}, "raises KeyError for in"),
    "no logits": ({"model": "CODE:vectors", "size": (2, 3, 3)}, "got (8,)"),
    "no such entry": ({"entry": "state", "size": (2, 3, 3)}, "has no entry 'state'"),
    "no such prefix": ({"prefix": "model", "size": (2, 3, 3)}, "no key begins with"),
    "classes": ({"data": "digits", "model": "CODE:forward"}, "for inputs of shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_leaves_no_files(tmp_path, code, images, pair, case):
    changes, message = BAD[case]
    fields = {"model": "CODE:forward", "method": "weight", **changes}
    fields: dict[str, Any] = {
        name: value.replace("CODE", code).replace("IMAGES", images)
        if isinstance(value, str)
        else value
        for name, value in fields.items()
    }
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as error:
        run(Options(pair, str(tmp_path / "out"), **fields), quiet)
    assert message in str(error.value)
    assert [p for p in sorted(tmp_path.iterdir()) if p.name != "__pycache__"] == before


def test_statistics_without_a_training_mode_are_refused(tmp_path, code, images):
    files = tuple(
        save_flax("msgpack", tmp_path / f"m{seed}", normed(seed)) for seed in (1, 2)
    )
    options = Options(
        files,
        str(tmp_path / "out"),
        model=f"{code}:untrained",
        data=images,
        entry="state",
    )
    with pytest.raises(UserError, match="let the function take train=False"):
        run(options, quiet)


def test_models_of_other_shapes_are_named(tmp_path, code, pair):
    wide = save(tmp_path / "wide.safetensors", numbers(3, hidden=9))
    options = Options(
        (pair[0], wide),
        str(tmp_path / "out"),
        model=f"{code}:forward",
        method="weight",
        size=(2, 3, 3),
    )
    with pytest.raises(UserError, match=r"'body.0.bias' is of shape \(8,\) in "):
        run(options, quiet)


@pytest.mark.slow
def test_data_from_a_function(tmp_path, code, pair):
    (tmp_path / "data.py").write_text(
        "import numpy as np\n"
        "from dimat_jax.data.sources import Dataset, make_split, mean_std\n"
        "def read(directory, cache_dir):\n"
        "    rng = np.random.default_rng(0)\n"
        "    images = rng.integers(256, size=(30, 2, 3, 3))\n"
        "    split = make_split(images, np.arange(30) % 3)\n"
        "    return Dataset('own', split, split, 3, *mean_std(split.images))\n"
        "def nothing(directory, cache_dir):\n"
        "    return 3\n"
    )
    options: dict[str, Any] = {
        "models": pair,
        "model": f"{code}:forward",
        "method": "none",
        "points": 2,
        "samples": 20,
    }
    data = f"{tmp_path / 'data.py'}:read"
    summary = run(Options(out=str(tmp_path / "out"), data=data, **options), quiet)
    assert len(summary["accuracy"]) == 4
    with pytest.raises(UserError, match="nothing returns a int, expected a dimat_jax"):
        data = data.replace(":read", ":nothing")
        run(Options(out=str(tmp_path / "o"), data=data, **options), quiet)
