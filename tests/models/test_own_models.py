"""Models of users, of Flax Linen, NNX and Equinox, do all that bundled models do."""

import sys
from collections.abc import Iterator
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dimat_jax import (
    ALGORITHMS,
    CALLBACKS,
    MODELS,
    SOURCES,
    TOPOLOGIES,
    permutation,
)
from dimat_jax._needs import check_model
from dimat_jax.algorithms import BETWEEN_MERGES
from dimat_jax.config import (
    ConfigError,
    check,
    default_config,
    fields_of,
    resolved,
)
from dimat_jax.data.pipeline import Batch
from dimat_jax.models import ModelError, ModelRecord, classifier, permutation_spec

REGISTRIES = (ALGORITHMS, BETWEEN_MERGES, CALLBACKS, MODELS, SOURCES, TOPOLOGIES)
PACKAGE = Path(__file__).parents[1] / "plugin" / "source"
SHAPE = (4, 4, 1)
X = np.random.default_rng(0).normal(size=(8, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def orchard() -> Iterator[None]:
    sys.path.insert(0, str(PACKAGE))
    import orchard.models  # type: ignore  # noqa: F401

    yield
    sys.path.remove(str(PACKAGE))
    for registry in REGISTRIES:
        for name in list(registry):
            if registry.origin(name).startswith("orchard"):
                del registry[name]
    for name in [n for n in sys.modules if n.partition(".")[0] == "orchard"]:
        del sys.modules[name]


def model_of(name: str, dropped: float = 0.0):
    model = MODELS[name](n_classes=3, leaves=5, dropped=dropped)
    return classifier.for_inputs(model, SHAPE)


def variables_of(model):
    return jax.jit(lambda key: classifier.init(model, key, X[:1]))(jax.random.key(0))


every_kind = pytest.mark.parametrize(
    "name",
    [
        "pear",
        pytest.param("plum", marks=pytest.mark.slow),
        pytest.param("quince", marks=pytest.mark.slow),
    ],
)


@every_kind
def test_the_symmetry_is_derived_and_holds_in_both_modes(orchard, name):
    model = model_of(name)
    variables, spec = variables_of(model), permutation_spec(model)
    assert spec.groups and spec.statistics
    assert all(path.startswith("batch_stats/") for path in spec.statistics)
    outputs = classifier.both_modes(model)
    assert set(jax.eval_shape(outputs, variables, X)) == {"eval", "train"}
    permutation.verify(spec, outputs, variables, X, jax.random.key(1))
    units = classifier.activations(model)(variables, jnp.asarray(X))
    assert units.keys() == spec.taps.keys()
    assert all(array.shape == (8, 5) for array in units.values())
    # Dropout drops single units, so the training mode shows no symmetry.
    dropping = classifier.both_modes(model_of(name, 0.5))
    assert set(jax.eval_shape(dropping, variables, X)) == {"eval"}
    assert not permutation_spec(
        classifier.for_inputs(model, SHAPE, permutes=False)
    ).groups


@every_kind
def test_masked_examples_do_not_count(orchard, name):
    """Neither for the loss nor for what BatchNorm measures."""
    model = model_of(name)
    variables, labels = variables_of(model), np.arange(8) % 3
    mask = np.arange(8) < 4
    batch = Batch(*map(jnp.asarray, (X, labels.astype(np.int32), mask)))
    half = jax.tree.map(lambda x: x[:4], batch)
    loss = jax.jit(classifier.loss(model))
    measure = classifier.batch_statistics(model)
    assert measure is not None and classifier.has_statistics(model)
    results = [
        (loss(variables, each, jax.random.key(2)), measure(variables, *each[::2]))
        for each in (batch, half)
    ]
    for found, expected in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    (_, (updated, _)), measured = results[0]
    assert jax.tree.structure(measured) == jax.tree.structure(variables["batch_stats"])
    # The statistics of the first normalised layer are those of its inputs.
    first = variables["params"]
    layer = {
        "pear": lambda: first["Dense_0"],
        "plum": lambda: first["first"],
        "quince": lambda: first["0"]["first"],
    }[name]()
    weights, bias = sorted(jax.tree.leaves(layer), key=lambda x: -x.ndim)
    weights = weights.T if name == "quince" else weights
    inputs = X[:4].reshape(4, -1) @ np.asarray(weights) + np.asarray(bias)
    means = [x for x in jax.tree.leaves(measured) if np.allclose(x, inputs.mean(0))]
    assert means and updated["batch_stats"].keys() == measured.keys()


@every_kind
def test_dropout_depends_on_the_key_alone(orchard, name):
    model = model_of(name, 0.5)
    variables = variables_of(model)
    mask, labels = jnp.ones(8, bool), jnp.zeros(8, jnp.int32)
    loss = jax.jit(classifier.loss(model))
    batch = Batch(jnp.asarray(X), labels, mask)
    one, same, other = (
        float(loss(variables, batch, jax.random.key(seed))[0]) for seed in (0, 0, 1)
    )
    assert one == same != other


# Mistakes -----------------------------------------------------------------------------


class Wide(nn.Module):
    """Returns twice as many logits as there are classes."""

    n_classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2 * self.n_classes)(x.reshape(len(x), -1))


class Broken(nn.Module):
    n_classes: int

    @nn.compact
    def __call__(self, x):
        raise RuntimeError("it is broken")


def no_module(n_classes):
    return lambda x: x


@pytest.mark.parametrize(
    "build, message",
    [
        (Broken, "config.model: 'mine' cannot be used: RuntimeError: it is broken"),
        (
            no_module,
            "config.model: the function of the model 'mine' returns a function",
        ),
    ],
)
def test_a_model_that_cannot_be_used_is_refused(monkeypatch, build, message):
    monkeypatch.setitem(MODELS, "mine", ModelRecord("mine", build))
    config = default_config()
    config.data.name, config.model.name = "digits", "mine"
    with pytest.raises(ConfigError, match=message):
        check(config)


def test_a_model_with_another_number_of_logits_is_refused(monkeypatch):
    monkeypatch.setitem(MODELS, "mine", ModelRecord("mine", Wide))
    config = default_config()
    config.data.name, config.model.name = "digits", "mine"
    check(config)
    with pytest.raises(
        ConfigError, match=r"shape \(1, 20\) for one image; .*\(1, 10\)"
    ):
        digits = SOURCES["digits"].signature
        assert digits is not None
        check_model(resolved(fields_of(config)), digits)


def test_a_module_of_the_wrong_kind_is_named():
    model = ModelRecord("mine", no_module)(n_classes=3)
    with pytest.raises(ModelError, match="and not a Flax Linen module"):
        classifier.init(classifier.for_inputs(model, SHAPE), jax.random.key(0), X)
