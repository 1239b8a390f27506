"""Averages of any library's models are mended: repair and recalibrate."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dimat_jax import merge
from dimat_jax.tree import flatten, map_with_path
from tests import promotion

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(64, 4)) + 1, jnp.float32)


@pytest.fixture(autouse=True, scope="module")
def promotion_as_users_have_it():
    with promotion.allow():
        yield


class Program(NamedTuple):
    """A model: `forward(variables, x, train)`; in training mode, with its new state."""

    forward: Callable[[Any, Any, bool], Any]
    variables: Any


class Linen(nn.Module):
    norm: bool

    @nn.compact
    def __call__(self, x, train):
        for features in (6, 6):
            x = nn.Dense(features)(x)
            if self.norm:
                x = nn.BatchNorm(not train, momentum=0.9)(x)
            x = nn.relu(x)
        return nn.Dense(3)(x)


def linen(norm: bool) -> Program:
    model = Linen(norm)

    def forward(v, x, train):
        return model.apply(v, x, train, mutable=["batch_stats"] if train else False)

    return Program(forward, model.init(KEY, X, False))


class NNX(nnx.Module):
    def __init__(self, norm, rngs):
        sizes = ((4, 6), (6, 6))
        self.layers = nnx.List([nnx.Linear(i, o, rngs=rngs) for i, o in sizes])
        norms = [nnx.BatchNorm(o, rngs=rngs) for _, o in sizes if norm]
        self.norms = nnx.List(norms or [lambda x: x] * 2)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = nnx.relu(norm(layer(x)))
        return self.head(x)


def nnx_model(norm: bool) -> Program:
    graph, state = nnx.split(NNX(norm, nnx.Rngs(0)))

    def forward(v, x, train):
        model = nnx.merge(graph, v)
        model.train() if train else model.eval()
        y = model(x)
        return (y, nnx.to_pure_dict(nnx.state(model))) if train else y

    return Program(forward, nnx.to_pure_dict(state))


class Equinox(eqx.Module):
    layers: list
    norms: list
    head: eqx.nn.Linear

    def __init__(self, mode, key):
        keys = jax.random.split(key, 3)
        self.layers = [
            eqx.nn.Linear(i, 6, key=k) for i, k in zip((4, 6), keys, strict=False)
        ]
        norm = eqx.nn.BatchNorm if mode else None
        self.norms = [norm(6, "batch", mode=mode) for _ in range(2)] if norm else []
        self.head = eqx.nn.Linear(6, 3, key=keys[2])

    def __call__(self, x, state):
        for n, layer in enumerate(self.layers):
            x = layer(x)
            if self.norms:
                x, state = self.norms[n](x, state)
            x = jax.nn.relu(x)
        return self.head(x), state


def equinox(mode: str | None) -> Program:
    made = eqx.nn.make_with_state(Equinox)(mode, KEY)
    variables, static = eqx.partition(made, eqx.is_array)

    def forward(v, x, train):
        model, state = eqx.combine(v, static)
        model = model if train else eqx.nn.inference_mode(model)
        run = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        y, state = run(x, state)
        return (y, eqx.filter(state, eqx.is_array)) if train else y

    return Program(forward, variables)


def haiku(norm: bool) -> Program:
    def net(x, train):
        for _ in range(2):
            x = hk.Linear(6)(x)
            if norm:
                x = hk.BatchNorm(True, True, decay_rate=0.9)(x, train)
            x = jax.nn.relu(x)
        return hk.Linear(3)(x)

    model = hk.transform_with_state(net)

    def forward(v, x, train):
        params, state = v
        y, state = model.apply(params, state, None, x, train)
        return (y, state) if train else y

    return Program(forward, model.init(KEY, X, True))


def redrawn(variables: Any, seed: int) -> Any:
    """Other weights; statistics and counters stay."""

    def draw(path, leaf):
        # The state of Equinox's and Haiku's models is the second of two trees.
        is_state = path.startswith("1/") or path.split("/")[-1] in ("mean", "var")
        if leaf.ndim == 0 or is_state:
            return leaf
        rng = np.random.default_rng([seed, *path.encode()])
        return jnp.asarray(rng.normal(0.2, 0.7, leaf.shape), leaf.dtype)

    return map_with_path(draw, variables)


WITHOUT_NORM = {
    "linen": lambda: linen(False),
    "nnx": lambda: nnx_model(False),
    "equinox": lambda: equinox(None),
    "haiku": lambda: haiku(False),
}
WITH_NORM = {
    "linen": lambda: linen(True),
    "nnx": lambda: nnx_model(True),
    "equinox": lambda: equinox("batch"),
    "equinox, normed by its averages": lambda: equinox("ema"),
    "haiku": lambda: haiku(True),
}


def fast_or_slow(names, fast):
    slow = [pytest.param(n, marks=pytest.mark.slow) for n in names if n not in fast]
    return pytest.mark.parametrize("name", [*fast, *slow])


@pytest.mark.every_nth(2)
@fast_or_slow(WITHOUT_NORM, ["equinox", "haiku"])
def test_repaired_units_have_the_models_means_and_deviations(name):
    forward, variables = WITHOUT_NORM[name]()

    def evaluate(v, x):
        return forward(v, x, False)

    moments = merge.unit_moments(evaluate, variables, X)
    models = [redrawn(variables, seed) for seed in (1, 2)]
    average = merge.average(models)
    repaired = merge.repair(moments, average, models, [X])
    *seen, before, after = (moments(m, X) for m in (*models, average, repaired))
    assert len(after) == 2
    for layer, (mean, variance) in after.items():
        deviation = np.mean([np.sqrt(m[layer].variance) for m in seen], axis=0)
        assert np.abs(np.sqrt(before[layer].variance) - deviation).max() > 0.1
        np.testing.assert_allclose(np.sqrt(variance), deviation, rtol=1e-3, atol=1e-4)
        expected = np.mean([m[layer].mean for m in seen], axis=0)
        np.testing.assert_allclose(mean, expected, rtol=1e-3, atol=1e-3)
    plain = flatten(average)
    changed = [p for p, leaf in flatten(repaired).items() if (leaf != plain[p]).any()]
    assert len(changed) == 4


def test_the_moments_of_a_model_are_of_its_pre_activations():
    forward, (params, state) = haiku(False)
    moments = merge.unit_moments(lambda v, x: forward(v, x, False), (params, state), X)
    params = redrawn(params, 1)
    layer = params["linear"]
    units = np.asarray(X) @ np.asarray(layer["w"]) + np.asarray(layer["b"])
    seen = moments((params, state), X)["0/linear/w"]
    np.testing.assert_allclose(seen.mean, units.mean(0), rtol=1e-4)
    np.testing.assert_allclose(seen.variance, units.var(0), rtol=1e-4)


@fast_or_slow(WITH_NORM, ["linen", "haiku"])
def test_recalibrated_models_evaluate_as_they_train(name):
    forward, variables = WITH_NORM[name]()
    statistics = merge.batch_statistics(lambda v, x: forward(v, x, True), variables, X)
    model = redrawn(variables, 1)
    recalibrated = merge.recalibrate(statistics, model, [X])
    evaluated = forward(recalibrated, X, False)
    again = forward(recalibrated, X, True)[0]
    np.testing.assert_allclose(evaluated, again, atol=2e-3 * np.abs(again).max())
    assert np.abs(forward(model, X, False) - again).max() > 0.05 * np.abs(again).max()
    with pytest.raises(merge.MergeError, match="running statistics.*recalibrate"):
        merge.unit_moments(lambda v, x: forward(v, x, False), variables, X)


def test_statistics_are_averaged_over_batches():
    forward, variables = linen(True)
    statistics = merge.batch_statistics(lambda v, x: forward(v, x, True), variables, X)
    batches = [X[:48], X[48:]]
    mean = flatten(merge.recalibrate(statistics, variables, batches))
    parts = [flatten(merge.recalibrate(statistics, variables, [b])) for b in batches]
    path = "batch_stats/BatchNorm_0/mean"
    expected = 0.75 * parts[0][path] + 0.25 * parts[1][path]
    np.testing.assert_allclose(mean[path], expected, rtol=1e-3, atol=1e-5)


# What cannot be mended is told ========================================================


def test_a_layer_whose_leaves_do_not_tell_their_units_is_refused():
    model = {"layer": {"weight": jnp.ones((3, 3)), "bias": jnp.ones(3)}}

    def moments(v, x, targets=None):
        del targets
        h = x @ v["layer"]["weight"]
        return {"layer": merge.UnitMoments(h.mean(0), h.var(0))}

    with pytest.raises(merge.MergeError, match="'layer/weight'.*which of its axes"):
        merge.repair(moments, model, [model] * 2, [X[:, :3]])
    with pytest.raises(merge.MergeError, match="'layer', but no leaf's path begins"):
        elsewhere = {"other": model["layer"]}
        merge.repair(lambda *a: moments(model, X[:, :3]), elsewhere, [model], [X])


def test_units_that_lie_first_are_told_by_their_number():
    rng = np.random.default_rng(0)

    def model():
        weight, bias = rng.normal(size=(5, 4)), rng.normal(size=5)
        return {"layer": {"weight": weight, "bias": bias}}

    def moments(v, x, targets=None):
        del targets
        h = x @ v["layer"]["weight"].T + v["layer"]["bias"]
        return {"layer": merge.UnitMoments(h.mean(0), h.var(0))}

    models = [model(), model()]
    repaired = merge.repair(moments, merge.average(models), models, [X])
    seen = [np.sqrt(moments(m, X)["layer"].variance) for m in (*models, repaired)]
    np.testing.assert_allclose(seen[2], (seen[0] + seen[1]) / 2, rtol=1e-4)


def scanned(v, x):
    def step(h, w):
        return jnp.tanh(h @ w[0]) @ w[1], None

    return jax.lax.scan(step, x, (v["up"], v["down"]))[0]


def shared(v, x):
    return (jnp.tanh(x @ v["in"]) + jnp.tanh(2 * x @ v["in"])).sum(-1)


def recurrent(v, x):
    return jnp.tanh(jnp.tanh(x @ v["in"]) @ v["w"] @ v["w"]) @ v["in"].T


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (scanned, "'up' makes.*within a loop"),
        (shared, "'in' makes.*used twice"),
        (recurrent, "'w' makes.*not on axes of their own"),
        (lambda v, x: x @ v["in"], "no hidden units"),
    ],
)
def test_layers_that_cannot_be_measured_are_named(forward, message):
    shapes = {"up": (2, 4, 6), "down": (2, 6, 4), "w": (6, 6), "in": (4, 6)}
    variables = {name: jnp.ones(shape) for name, shape in shapes.items()}
    with pytest.raises(merge.MergeError, match=message):
        merge.unit_moments(forward, variables, X)


def test_a_model_that_returns_no_statistics_is_refused():
    forward, variables = linen(True)
    with pytest.raises(merge.MergeError, match="no updated statistics.*training mode"):
        merge.batch_statistics(lambda v, x: forward(v, x, False), variables, X)


def test_statistics_that_are_no_moving_average_are_refused():
    variables = {"params": {"w": jnp.ones(4)}, "state": {"most": jnp.zeros(4)}}

    def forward(v, x):
        most = jnp.maximum(v["state"]["most"], x.max(0))
        return x * v["params"]["w"], {"state": {"most": most}}

    with pytest.raises(merge.MergeError, match="'state/most'.*moving average"):
        merge.batch_statistics(forward, variables, X)


def test_statistics_that_the_model_does_not_have_are_named():
    with pytest.raises(merge.MergeError, match="'mean', which the model does not have"):
        merge.recalibrate(lambda v, x, m: {"mean": x.mean(0)}, {"w": jnp.ones(4)}, [X])
