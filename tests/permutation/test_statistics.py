"""Tests that running statistics are told from weights by what they do, not by names."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from dimat_jax import permutation
from dimat_jax.matching import joint_weight_matching, weight_matching
from dimat_jax.permutation import (
    PermutationSpec,
    PermutationSpecError,
    derive,
    validate,
)
from dimat_jax.tree import flatten, map_with_path

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (6, 16))

Program = tuple[Callable[[Any, Any], Any], Any, set[str]]
"""A forward function, its variables, and which of them are running statistics."""


class LinenNet(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(not self.train)(nn.Dense(32)(x))
        x = nn.LayerNorm()(nn.Dense(32)(nn.relu(x)))
        return nn.Dense(3)(nn.relu(x))


def linen(train: bool) -> Program:
    model = LinenNet(train)
    variables = model.init(KEY, X)

    def forward(v, x):
        return model.apply(v, x, mutable=["batch_stats"])

    names = ("mean", "var")
    return forward, variables, {f"batch_stats/BatchNorm_0/{n}" for n in names}


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(16, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.b = nnx.Linear(32, 3, rngs=rngs)

    def __call__(self, x):
        return self.b(nnx.relu(self.norm(self.a(x))))


def nnx_net(train: bool) -> Program:
    model = NNXNet(nnx.Rngs(0))
    if not train:
        model.eval()
    graph, state = nnx.split(model)

    def forward(v, x):
        model = nnx.merge(graph, v)
        return model(x), nnx.to_pure_dict(nnx.state(model))

    return forward, nnx.to_pure_dict(state), {"norm/mean", "norm/var"}


class EquinoxNet(eqx.Module):
    a: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    b: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.a = eqx.nn.Linear(16, 32, key=keys[0])
        self.norm = eqx.nn.BatchNorm(32, "batch", mode="ema")
        self.b = eqx.nn.Linear(32, 3, key=keys[1])

    def __call__(self, x, state):
        x, state = self.norm(self.a(x), state)
        return self.b(jax.nn.relu(x)), state


def equinox_net(train: bool) -> Program:
    made = eqx.nn.make_with_state(EquinoxNet)(KEY)
    variables, static = eqx.partition(made, eqx.is_array)

    def forward(variables, x):
        model, state = eqx.combine(variables, static)
        model = model if train else eqx.nn.inference_mode(model)
        run = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return run(x, state)

    of_state = {f"1/{path}" for path, leaf in flatten(variables[1]).items()}
    arrays = {path for path in of_state if flatten(variables)[path].shape == (32,)}
    return forward, variables, arrays


PLAIN = {
    "in": np.asarray(jax.random.normal(KEY, (16, 32))),
    "scale": np.ones(32, np.float32),
    "shift": np.ones(32, np.float32),
    "mu": np.zeros(32, np.float32),
    "sigma": np.ones(32, np.float32),
    "out": np.asarray(jax.random.normal(KEY, (32, 3))),
}


def plain(norm: Callable[[Any, Any], Any], statistics: set[str]) -> Program:
    def forward(v, x):
        h = norm(v, x @ v["in"]) + v["shift"]
        return jnp.tanh(h) @ v["out"]

    return forward, PLAIN, statistics


def folded(v, h, factor):
    return h * factor + (v["shift"] - v["mu"] * factor)


BOTH = {"mu", "sigma"}
PROGRAMS: dict[str, Callable[[], Program]] = {
    "linen, training": lambda: linen(True),
    "linen, evaluation": lambda: linen(False),
    "nnx, training": lambda: nnx_net(True),
    "nnx, evaluation": lambda: nnx_net(False),
    "equinox, training": lambda: equinox_net(True),
    "equinox, evaluation": lambda: equinox_net(False),
    "divided by the root": lambda: plain(
        lambda v, h: (h - v["mu"]) / jnp.sqrt(v["sigma"] + 0.1) * v["scale"], BOTH
    ),
    "scaled first": lambda: plain(
        lambda v, h: (h - v["mu"]) * (v["scale"] * (1 / jnp.sqrt(v["sigma"]))), BOTH
    ),
    "corrected for its bias": lambda: plain(
        lambda v, h: (
            (h - v["mu"] / 0.9) * lax.rsqrt(jnp.maximum(v["sigma"] / 0.9, 0.1))
        ),
        BOTH,
    ),
    "with a factor and an offset": lambda: plain(
        lambda v, h: folded(v, h, v["scale"] * lax.rsqrt(v["sigma"] + 0.1)), BOTH
    ),
    "with an offset, without a scale": lambda: plain(
        lambda v, h: folded(v, h, 1 / jnp.sqrt(v["sigma"] + 0.1)), BOTH
    ),
    "in a function that is called": lambda: plain(
        jax.jit(lambda v, h: (h - v["mu"][None]) * lax.rsqrt(v["sigma"] + 0.1)), BOTH
    ),
    # Weights, though some of them look a little like statistics.
    "a shift and a scale": lambda: plain(
        lambda v, h: (h - v["mu"]) * v["sigma"] * v["scale"], set()
    ),
    "a norm over the units": lambda: plain(
        lambda v, h: jax.nn.standardize(h - v["mu"]) * v["scale"] * v["sigma"], set()
    ),
    "a norm of the weights": lambda: plain(
        lambda v, h: (
            (h - v["mu"]) * lax.rsqrt(0.1 + (v["scale"] ** 2).sum()) * v["sigma"]
        ),
        set(),
    ),
}

programs = pytest.mark.parametrize("name", PROGRAMS)


@programs
def test_the_running_statistics_are_told(name):
    forward, variables, statistics = PROGRAMS[name]()
    spec = derive(forward, variables, X, strict=True)
    leaves = flatten(variables)
    assert {p for p in spec.statistics if leaves[p].ndim} == statistics
    assert spec.groups


def test_they_are_told_within_a_scan_over_layers():
    layers = {name: np.stack([PLAIN[name]] * 2) for name in ("scale", "mu", "sigma")}

    def forward(v, x):
        def layer(h, v):
            return (h - v["mu"]) * lax.rsqrt(v["sigma"] + 0.1) * v["scale"], None

        return lax.scan(layer, x @ v["in"], v["layers"])[0] @ v["out"]

    spec = derive(forward, PLAIN | {"layers": layers}, X, strict=True)
    assert spec.statistics == {"layers/mu", "layers/sigma"}


def test_a_function_of_ones_own_says_which_leaves_are_statistics():
    forward, variables, _ = PROGRAMS["nnx, evaluation"]()
    for function, expected in (
        (lambda path: path.endswith("bias"), {"a/bias", "b/bias", "norm/bias"}),
        (lambda path: False, set()),
    ):
        spec, activations = derive(
            forward, variables, X, is_statistic=function, with_activations=True
        )
        assert spec.statistics == expected
        assert activations(variables, X).keys() == spec.taps.keys()


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(
    "name", ["linen, evaluation", "nnx, evaluation", "equinox, evaluation"]
)
def test_statistics_that_differ_do_not_mislead_matching_by_weights(name, joint):
    forward, a, statistics = PROGRAMS[name]()
    spec = derive(forward, a, X)
    planted = permutation.random(spec, a, jax.random.key(1))
    b = permutation.apply(spec, planted, a)
    rng = np.random.default_rng(0)

    def other_data(path, leaf):
        new = rng.uniform(50, 150, leaf.shape).astype(np.float32)
        return jnp.asarray(new) if path in statistics else leaf

    a, b = (map_with_path(other_data, v) for v in (a, b))
    inverse = permutation.invert(planted)
    if joint:
        _, found = joint_weight_matching(spec, [a, b], key=jax.random.key(2))
    else:
        found = weight_matching(spec, a, b, key=jax.random.key(2))
    for group, perm in inverse.items():
        np.testing.assert_array_equal(found[group], perm)


def test_a_statistic_that_the_variables_do_not_have_is_named():
    spec = PermutationSpec({"w": (None,)}, statistics={"v"})
    with pytest.raises(PermutationSpecError, match="statistic 'v'.*allowed: w"):
        validate(spec, {"w": np.ones(3)})
