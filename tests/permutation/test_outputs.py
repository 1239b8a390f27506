"""Tests what forward functions return besides logits: state, features, gradients."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dimat_jax import permutation
from dimat_jax.matching import activation_matching, weight_matching
from dimat_jax.permutation import (
    PermutationSpecError,
    PermutationSpecWarning,
    derive,
    verify,
)

KEY = jax.random.key(0)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


class Net(nn.Module):
    """A convolution with BatchNorm, in training mode."""

    axis_name: str | None = None
    train: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        x = nn.BatchNorm(not self.train, axis_name=self.axis_name)(x)
        self.sow("intermediates", "features", x)
        return nn.Dense(5)(nn.relu(x).mean((-3, -2)))


class Program(NamedTuple):
    """A forward function, and the statistics that must be permuted with its units."""

    forward: Callable[[Any, Any], Any]
    variables: Any
    inputs: Any
    statistics: set[str]


def flax(**options: Any) -> Program:
    x = normal(6, 5, 5, 3)
    variables = Net().init(KEY, x)

    def forward(v, x):
        return Net().apply(v, x, **options)

    return Program(forward, variables, x, FLAX_STATISTICS)


FLAX_STATISTICS = {"batch_stats/BatchNorm_0/mean", "batch_stats/BatchNorm_0/var"}


def haiku_like() -> Program:
    """Params and state apart, as Haiku's functions take and return them."""
    params = {"in": normal(3, 8), "out": normal(8, 2)}
    state = {"mean": jnp.zeros(8), "count": jnp.int32(0)}

    def forward(variables, x):
        params, state = variables
        h = jnp.tanh(x @ params["in"])
        mean = h.mean(0)
        new = {"mean": 0.9 * state["mean"] + 0.1 * mean, "count": state["count"] + 1}
        return (h - mean) @ params["out"], new

    return Program(forward, (params, state), normal(6, 3), {"1/mean"})


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.last = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


def nnx_state() -> Program:
    graph, state = nnx.split(NNXNet(nnx.Rngs(0)))

    def forward(state, x):
        model = nnx.merge(graph, state)
        return model(x), nnx.state(model)

    statistics = {"norm/mean/value", "norm/var/value"}
    return Program(forward, state, normal(6, 3), statistics)


class EquinoxNet(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    last: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.first = eqx.nn.Linear(3, 8, key=keys[0])
        self.norm = eqx.nn.BatchNorm(8, "batch", mode="batch")
        self.last = eqx.nn.Linear(8, 2, key=keys[1])

    def __call__(self, x, state):
        x, state = self.norm(self.first(x), state)
        return self.last(jax.nn.relu(x)), state


def equinox() -> Program:
    model, state = eqx.nn.make_with_state(EquinoxNet)(KEY)
    variables, static = eqx.partition((model, state), eqx.is_array)

    def forward(variables, x):
        model, state = eqx.combine(variables, static)
        run = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        logits, state = run(x, state)
        return logits, eqx.filter(state, eqx.is_array)

    return Program(forward, variables, normal(6, 3), set())


PROGRAMS: dict[str, Callable[[], Program]] = {
    "flax, statistics": lambda: flax(mutable=["batch_stats"]),
    "flax, intermediates": lambda: flax(
        mutable=["batch_stats", "intermediates"], capture_intermediates=True
    ),
    "params and state": haiku_like,
    "nnx, all of the state": nnx_state,
    "equinox, over a vmapped axis": equinox,
}

programs = pytest.mark.parametrize("name", PROGRAMS)


@pytest.mark.every_nth(9)
@programs
def test_updated_variables_are_permuted_like_the_variables(name):
    forward, variables, x, statistics = PROGRAMS[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec = derive(forward, variables, x, strict=True)
    (group,) = spec.groups
    held = {leaf for leaf, _ in spec.groups[group]}
    assert statistics <= held
    verify(spec, forward, variables, x, KEY)


@programs
def test_a_spec_that_forgets_an_updated_variable_is_refused(name):
    forward, variables, x, statistics = PROGRAMS[name]()
    spec = derive(forward, variables, x)
    for leaf in statistics:
        axes = {**spec.axes, leaf: (None,)}
        wrong = permutation.PermutationSpec(axes)
        with pytest.raises(PermutationSpecError, match=f"'{leaf}' axis 0"):
            verify(wrong, forward, variables, x, KEY)


@programs
def test_outputs_that_are_chosen_lead_to_the_same_groups(name):
    forward, variables, x, _ = PROGRAMS[name]()

    def choose(out):
        return out[0]

    spec = derive(forward, variables, x, outputs=choose, strict=True)
    assert spec == derive(forward, variables, x)
    verify(spec, forward, variables, x, KEY, outputs=choose)


def test_both_matchings_work_from_a_forward_in_training_mode():
    forward, a, x, _ = PROGRAMS["flax, statistics"]()
    spec, activations = derive(forward, a, x, with_activations=True)
    planted = permutation.random(spec, a, jax.random.key(3))
    b = permutation.apply(spec, planted, a)
    inverse = permutation.invert(planted)
    batches = [normal(64, 5, 5, 3, seed=1)]
    for found in (
        activation_matching(spec, activations, a, b, batches),
        weight_matching(spec, a, b, key=KEY),
    ):
        for group, perm in inverse.items():
            np.testing.assert_array_equal(found[group], perm)


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_over_a_vmapped_axis(train):
    model = Net(axis_name="n", train=train)
    x = normal(6, 5, 5, 3)
    variables = Net().init(KEY, x)
    variables = jax.tree.map(lambda leaf: leaf + normal(*leaf.shape) ** 2, variables)

    def forward(v, x):
        run = jax.vmap(
            lambda x: model.apply(v, x, mutable=["batch_stats"]),
            axis_name="n",
            out_axes=(0, None),
        )
        return run(x)

    spec = derive(forward, variables, x, strict=True)
    (group,) = spec.groups
    assert FLAX_STATISTICS <= {leaf for leaf, _ in spec.groups[group]}
    verify(spec, forward, variables, x, KEY)


def test_random_keys_and_counters_may_be_updated():
    def forward(variables, x):
        params, state = variables
        new = {"key": jax.random.split(state["key"])[0], "count": state["count"] + 1}
        return layers(params, x)[0], new

    variables = (WEIGHTS, {"key": jax.random.key(0), "count": jnp.int32(0)})
    spec = derive(forward, variables, X, strict=True)
    assert list(spec.groups) == ["0/a:1", "0/b:1"]
    verify(spec, forward, variables, X, KEY)


# What counts as an output =============================================================


WEIGHTS = {"a": normal(3, 6), "b": normal(6, 4), "c": normal(4, 2)}
X = normal(5, 3)


def layers(v, x):
    h = jnp.tanh(x @ v["a"])
    g = jnp.tanh(h @ v["b"])
    return g @ v["c"], h, g


def test_features_count_unless_they_are_left_out():
    def pair(v, x):
        y, h, _ = layers(v, x)
        return y, {"h": h}

    with pytest.warns(PermutationSpecWarning, match="the output '1/h' axis 1"):
        spec = derive(pair, WEIGHTS, X)
    assert list(spec.groups) == ["b:1"]
    spec = derive(pair, WEIGHTS, X, outputs=lambda out: out[0])
    assert list(spec.groups) == ["a:1", "b:1"]
    verify(spec, pair, WEIGHTS, X, KEY, outputs=lambda out: out[0])
    with pytest.raises(PermutationSpecError, match="moves the outputs"):
        verify(spec, pair, WEIGHTS, X, KEY)


def test_gradients_are_no_updated_variables():
    # They have the variables' structure, but they are what the function is called for.
    def loss_and_gradients(v, x):
        return jax.value_and_grad(lambda v: (layers(v, x)[0] ** 2).sum())(v)

    for variables, forward in (
        (WEIGHTS, loss_and_gradients),
        (
            {"params": WEIGHTS},
            lambda v, x: (1.0, {"params": loss_and_gradients(v["params"], x)[1]}),
        ),
        (
            (WEIGHTS, {"state": jnp.ones(2)}),
            lambda v, x: loss_and_gradients(v[0], x),
        ),
        (
            (WEIGHTS, jax.tree.map(jnp.copy, WEIGHTS)),
            lambda v, x: loss_and_gradients(v[1], x),
        ),
    ):
        with pytest.warns(PermutationSpecWarning, match="no units"):
            assert not derive(forward, variables, X).groups


def test_a_variable_that_is_only_updated_has_no_group_of_its_own():
    def forward(v, x):
        new = {"count": v["batch_stats"]["count"] + 1}
        return layers(v["params"], x)[0], {"batch_stats": new}

    variables = {"params": WEIGHTS, "batch_stats": {"count": jnp.zeros(7)}}
    spec = derive(forward, variables, X)
    assert spec.axes["batch_stats/count"] == (None,)
    assert list(spec.groups) == ["params/a:1", "params/b:1"]
    reasons = {
        r.leaf: r.reasons for r in permutation.explain(forward, variables, X).rows
    }
    assert reasons["batch_stats/count"] == "no output depends on it"


@pytest.mark.parametrize("function", [derive, permutation.explain])
@pytest.mark.parametrize("choose", [lambda out: out[7], lambda out: out["logits"]])
def test_outputs_that_cannot_be_chosen_are_refused(function, choose):
    with pytest.raises(PermutationSpecError, match=r"outputs= cannot choose.*float32"):
        function(layers, WEIGHTS, X, outputs=choose)
