"""Tests that a lost symmetry is explained: by tables, by warnings and by errors."""

import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dimat_jax import permutation
from dimat_jax.permutation import (
    PermutationSpecError,
    PermutationSpecWarning,
    derive,
    explain,
)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


WEIGHTS = {"a": normal(3, 6), "b": normal(6, 6), "c": normal(6, 2), "d": normal(4)}
X = normal(5, 3)


def network(between: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """A network of two hidden layers, with a function between them."""

    def forward(v, x):
        return jnp.tanh(between(jnp.tanh(x @ v["a"])) @ v["b"]) @ v["c"]

    return forward


def announced(forward: Any, variables: Any, inputs: Any, **options: Any) -> str:
    """The text of the one warning that `derive` gives; "" if there is none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        derive(forward, variables, inputs, **options)
    assert len(caught) <= 1
    assert all(issubclass(w.category, PermutationSpecWarning) for w in caught)
    return str(caught[0].message) if caught else ""


# The table ============================================================================


def test_the_table_tells_the_group_or_the_reason_of_each_axis():
    forward = network(lambda h: h[:, ::-1])
    table = explain(forward, WEIGHTS, {"x": X}["x"])
    assert str(table) == (
        "leaf  axis  size  group, or why it is fixed\n"
        "a        0     3  fixed: the input axis 1\n"
        "a        1     6  fixed: the operation 'rev'\n"
        "b        0     6  fixed: the operation 'rev'\n"
        "b        1     6  b:1\n"
        "c        0     6  b:1\n"
        "c        1     2  fixed: the output axis 1\n"
        "d        0     4  fixed: no output depends on it"
    )
    spec_axes = {(r.leaf, r.dimension): r.axis for r in table.rows}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PermutationSpecWarning)
        spec = derive(forward, WEIGHTS, X)
    assert spec_axes == {
        (leaf, d): axis
        for leaf, axes in spec.axes.items()
        for d, axis in enumerate(axes)
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda h: h * np.ones(6, np.float32), "the captured array float32[6]"),
        (lambda h: h + jnp.arange(6), "a constant that counts places"),
        (lambda h: h[:, jnp.array([1, 0, 2, 3, 4, 5])], "the operation 'gather'"),
        (lambda h: h[:, ::-1], "the operation 'rev'"),
        (
            lambda h: jnp.fft.fft(h).real,
            "the operation 'fft', which derive does not know",
        ),
        (lambda h: jnp.cumsum(h, 1), "the operation 'cumsum'"),
    ],
)
def test_the_reason_is_named(change, reason):
    rows = explain(network(change), WEIGHTS, X).rows
    (row,) = [row for row in rows if (row.leaf, row.dimension) == ("a", 1)]
    assert row.axis is None
    assert reason in row.reasons


def test_inputs_and_outputs_are_named_by_their_paths():
    def forward(v, inputs):
        h = jnp.tanh(inputs["image"] @ v["a"])
        return {"logits": h @ v["b"], "features": [h]}

    rows = {r[:2]: r.reasons for r in explain(forward, WEIGHTS, {"image": X}).rows}
    assert rows["a", 0] == "the input 'image' axis 1"
    assert rows["a", 1] == "the output 'features/0' axis 1"
    assert rows["b", 1] == "the output 'logits' axis 1"


def test_an_axis_that_is_fixed_in_part_says_so():
    def forward(v, x):
        h = jnp.tanh(x @ v["a"])
        return jnp.concatenate([h[:, :2][:, ::-1], h[:, 2:]], 1) @ v["c"]

    rows = {r[:2]: str(r) for r in explain(forward, WEIGHTS, X).rows}
    assert rows["a", 1] == (
        "Concat((None, 2), ('a:1', 4)) (fixed in part: the operation 'rev')"
    )


@pytest.mark.parametrize("size", [1, 2])
def test_single_units_are_called_so(size):
    rows = explain(lambda v, x: x * v["w"][0], {"w": normal(size)}, X).rows
    assert [row.reasons for row in rows] == [
        "nothing to permute: every part has a single unit"
    ]


# Operations without a rule ============================================================


class FNet(nn.Module):
    """The FNet's token mixer, which transforms tokens and features."""

    layers: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16)(x)
        for _ in range(self.layers):
            x = nn.LayerNorm()(x + jnp.fft.fft2(x).real)
        return nn.Dense(3)(x.mean(1))


def fft(x):
    return jnp.fft.fft(x).real


UNKNOWN: dict[str, Callable[[Any], Any]] = {
    "once": fft,
    "twice in a row": lambda h: fft(fft(h)),
    "beside itself": lambda h: h + fft(h) + fft(jnp.tanh(fft(h))),
    "in a loop": lambda h: lax.fori_loop(0, 3, lambda _, c: jnp.tanh(c + fft(c)), h),
    "in a scan": lambda h: lax.scan(lambda c, _: (c + fft(c), None), h, length=3)[0],
    "in a branch": lambda h: lax.cond(h.sum() > 0, fft, lambda h: h, h),
    "of a part": lambda h: jnp.concatenate([fft(fft(h[:, :2])), h[:, 2:]], 1),
    "after a reshape": lambda h: fft(fft(h.reshape(-1, 2, 3))).reshape(h.shape),
    "of two kinds": lambda h: h + fft(h) * jnp.linalg.eigh(h.T @ h)[0],
}


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_an_unknown_operation_is_announced_however_often_it_occurs(layers):
    model, x = FNet(layers), normal(8, 7, 6)
    variables = model.init(jax.random.key(0), x)
    assert "does not know the operation 'fft'" in announced(model.apply, variables, x)
    with pytest.raises(PermutationSpecError, match="'fft'.*'params/Dense_0/kernel'"):
        derive(model.apply, variables, x, strict=True)


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_operation_that_costs_a_symmetry_is_announced(name):
    forward = network(UNKNOWN[name])
    message = announced(forward, WEIGHTS, X)
    assert "does not know the operation 'fft', and fixes what it touches: " in message
    assert "'a' axis 1" in message
    assert "'b' axis 0" in message
    with pytest.raises(PermutationSpecError, match="'fft'"):
        derive(forward, WEIGHTS, X, strict=True)


@pytest.mark.parametrize(
    "forward",
    [
        lambda v, x: jnp.tanh(fft(fft(x)) @ v["a"]) @ v["b"],
        lambda v, x: jnp.tanh((x + fft(x + fft(x))) @ v["a"]) @ v["b"],
        lambda v, x: [fft(x @ v["a"]), jnp.tanh(x @ v["a"]) @ v["b"]][1],
    ],
    ids=["of the inputs", "of the inputs again and again", "on which nothing depends"],
)
def test_an_unknown_operation_that_costs_nothing_is_not_mentioned(forward):
    assert not announced(forward, WEIGHTS, X, strict=True)
    assert "a:1" in derive(forward, WEIGHTS, X).groups


# Layers that look permutable, but are fixed ===========================================


def test_features_beside_the_logits_are_named_as_what_fixes_a_layer():
    def forward(v, x):
        h = jnp.tanh(jnp.tanh(x @ v["a"]) @ v["b"])
        return h @ v["c"], h

    message = announced(forward, WEIGHTS, X)
    assert message.startswith(
        "'b' axis 1, 'c' axis 0 look permutable, but are fixed by the output '1' axis 1"
    )
    assert "outputs=lambda out: out[0]" in message
    assert not announced(forward, WEIGHTS, X, outputs=lambda out: out[0])
    spec = derive(forward, WEIGHTS, X, outputs=lambda out: out[0])
    assert list(spec.groups) == ["a:1", "b:1"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda h: h * np.ones(6, np.float32), r"captured array float32\[6\] \(if the"),
        (
            lambda h: h + jnp.arange(6),
            r"'iota'\) \(it tells units apart by",
        ),
        (lambda h: h[:, ::-1], r"'rev' \(it tells units apart by their places"),
    ],
)
def test_a_layer_that_looks_permutable_is_announced_with_the_reason(change, reason):
    with pytest.warns(
        PermutationSpecWarning, match=f"'a' axis 1, 'b' axis 0.*{reason}"
    ):
        spec = derive(network(change), WEIGHTS, X, strict=True)
    assert list(spec.groups) == ["b:1"]


def test_a_convolution_that_looks_permutable_is_announced():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3))(x))
            x = nn.Conv(6, (3, 3))(x * np.ones(4, np.float32))
            return nn.Dense(3)(nn.relu(x).mean((1, 2)))

    x = normal(2, 5, 5, 3)
    variables = Net().init(jax.random.key(0), x)
    message = announced(Net().apply, variables, x)
    assert "'params/Conv_0/kernel' axis 3" in message
    assert "'params/Conv_1/kernel' axis 2" in message
    assert "the captured array float32[4]" in message


def test_a_layer_whose_units_are_split_is_listed_once():
    def between(h):
        h = h.reshape(-1, 2, 3)
        return h[:, ::-1, ::-1].reshape(-1, 6)

    message = announced(network(between), WEIGHTS, X)
    assert message.count("'a' axis 1") == message.count("'b' axis 0") == 1


@pytest.mark.parametrize(
    "forward",
    [
        lambda v, x: x + jnp.tanh(x @ v["a"]) @ v["b"][:, :3],
        lambda v, x: (jnp.tanh(x @ v["a"]) @ v["c"], (x @ v["a"] + 1) @ v["c"]),
        lambda v, x: jnp.tanh(jnp.tanh(x @ v["a"]) @ v["b"]),
    ],
    ids=["a residual stream from the inputs", "two heads", "features alone"],
)
def test_layers_that_nobody_would_permute_are_not_mentioned(forward):
    assert not announced(forward, WEIGHTS, X)
    assert derive(forward, WEIGHTS, X).groups


def test_a_spec_without_groups_is_announced():
    message = announced(lambda v, x: x @ v["a"], {"a": WEIGHTS["a"]}, X)
    assert message == (
        "derive finds no units that may be permuted, so that nothing can be aligned: "
        "the reasons are: the input axis 1, the output axis 1 (permutation.explain "
        "tells the reason for each axis)"
    )


# Captured arrays ======================================================================


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.BatchNorm(use_running_average=True)(nn.Dense(16)(x))
        return nn.Dense(3)(nn.relu(h))


def test_captured_statistics_are_fixed_while_they_are_fresh_and_when_trained():
    model, x = Normalised(), normal(32, 6)
    variables = model.init(jax.random.key(1), x)
    fresh = variables["batch_stats"]
    trained = jax.tree.map(lambda s: s + normal(*s.shape) ** 2, fresh)
    for statistics in (fresh, trained):

        def forward(params, x, statistics=statistics):
            return model.apply({"params": params, "batch_stats": statistics}, x)

        with pytest.warns(
            PermutationSpecWarning, match=r"captured array float32\[16\]"
        ):
            assert not derive(forward, variables["params"], x, strict=True).groups
    # As a part of the variables they are permuted.
    assert derive(model.apply, variables, x, strict=True).groups


ONES = jnp.ones(6)
CAPTURING: dict[str, Callable[[Any], Any]] = {
    "a NumPy array": lambda h: h * np.ones(6, np.float32),
    "a JAX array": lambda h: h * ONES,
    "within a compiled function": jax.jit(lambda h: h * ONES),
    "within a scan": lambda h: lax.scan(lambda c, _: (c * ONES, 0), h, length=2)[0],
    "within a branch": lambda h: lax.cond(h.sum() > 0, lambda: h * ONES, lambda: h),
    "a mask": lambda h: jnp.where(ONES > 0, h, 0),
    "a matrix": lambda h: h @ jnp.broadcast_to(ONES, (6, 6)) + h * ONES[None],
    "an index": lambda h: h * h[:, np.zeros(6, int)],
}


@pytest.mark.parametrize("name", CAPTURING)
def test_a_captured_array_is_never_trusted_because_it_is_uniform_today(name):
    with pytest.warns(PermutationSpecWarning, match="'a' axis 1, 'b' axis 0"):
        spec = derive(network(CAPTURING[name]), WEIGHTS, X, strict=True)
    assert spec.axes["a"] == (None, None)


def test_what_the_forward_function_makes_itself_is_uniform():
    forward = network(lambda h: h * jnp.ones(6) + jnp.zeros_like(h) + 2.0)
    assert list(derive(forward, WEIGHTS, X, strict=True).groups) == ["a:1", "b:1"]


# Dead code ============================================================================


@pytest.mark.parametrize(
    "forward",
    [
        lambda v, x: [network(lambda h: h)(v, x), (x @ v["a"])[:, ::-1]][0],
        lambda v, x: network(
            lambda h: jax.jit(lambda h: (h, h[:, ::-1], h * ONES))(h)[0]
        )(v, x),
        lambda v, x: network(
            lambda h: lax.scan(lambda c, _: (jnp.tanh(c), c[:, ::-1]), h, length=2)[0]
        )(v, x),
        lambda v, x: network(
            lambda h: lax.cond(
                h.sum() > 0, lambda: (h, h[:, ::-1]), lambda: (2 * h, h * ONES)
            )[0]
        )(v, x),
    ],
    ids=["in the open", "in a call", "in a scan", "in a branch"],
)
def test_code_on_which_no_output_depends_fixes_nothing(forward):
    spec, activations = derive(forward, WEIGHTS, X, strict=True, with_activations=True)
    assert list(spec.groups) == ["a:1", "b:1"]
    permutation.verify(spec, forward, WEIGHTS, X, jax.random.key(0))
    shown = activations(WEIGHTS, X)
    assert shown.keys() == spec.taps.keys()
