"""Tests `derive` on random programs that nobody would write by hand.

The programs consist of a few building blocks. All sizes are 2 or 4, so that sizes do
not tell axes apart. The derived symmetry must hold for the outputs of the programs, and
the taps must show it.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from dimat_jax import permutation
from dimat_jax.permutation import (
    Axis,
    Concat,
    PermutationSpecError,
    PermutationSpecWarning,
    Product,
    derive,
    explain,
    permute_leaf,
)

SIZES = (2, 4)

Weight = Callable[..., Any]
Block = Callable[[Sequence[Any], Weight, np.random.Generator], Any]
"""`block(all values so far, weight, rng)`: the next value; weight(*shape) is one."""


def a_size(rng) -> int:
    return int(rng.choice(SIZES))


def an_axis(x, rng) -> int:
    return int(rng.integers(x.ndim))


def activation(seen, weight, rng):
    functions = (jax.nn.relu, jnp.tanh, jax.nn.gelu, jax.nn.silu, jnp.square)
    return jnp.tanh(functions[rng.integers(len(functions))](seen[-1]))


def bias(seen, weight, rng):
    return seen[-1] + weight(*seen[-1].shape[rng.integers(seen[-1].ndim) :])


def dense(seen, weight, rng):
    return jnp.tanh(seen[-1] @ weight(seen[-1].shape[-1], a_size(rng)))


def dense_elsewhere(seen, weight, rng):
    x, d = seen[-1], an_axis(seen[-1], rng)
    y = jnp.tensordot(x, weight(a_size(rng), x.shape[d]), axes=([d], [1]))
    return jnp.tanh(jnp.moveaxis(y, -1, an_axis(y, rng)))


def dense_of_each(seen, weight, rng):
    x = jnp.atleast_2d(seen[-1])
    kernels = weight(x.shape[0], x.shape[-1], a_size(rng))
    return jnp.tanh(jax.vmap(jnp.matmul)(x, kernels))


def sequence(x):
    """[examples, places, channels]"""
    return x.reshape(1, -1, x.shape[-1]) if x.ndim < 3 else x.reshape(-1, *x.shape[-2:])


def conv(seen, weight, rng):
    x = sequence(seen[-1])
    groups = int(rng.choice([n for n in (1, 2, 4) if x.shape[-1] % n == 0]))
    kernel = weight(a_size(rng), x.shape[-1] // groups, groups * a_size(rng))
    stride, dilation = (int(n) for n in rng.integers(1, 3, 2))
    # With less padding, a dilated kernel may be longer than its input.
    padding = max(2, dilation * (len(kernel) - 1))
    return jnp.tanh(
        lax.conv_general_dilated(
            x,
            kernel,
            [stride],
            [(padding, padding)],
            rhs_dilation=[dilation],
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=groups,
        )
    )


def pool(seen, weight, rng):
    x = seen[-1]
    window = [int(n) for n in rng.integers(1, 3, x.ndim)]
    return lax.reduce_window(x, -jnp.inf, lax.max, window, window, "SAME")


def norm(seen, weight, rng):
    x = seen[-1]
    groups = int(rng.choice([n for n in (1, 2) if x.shape[-1] % n == 0]))
    y = x.reshape(*x.shape[:-1], groups, -1)
    y = jax.nn.standardize(y, axis=-1 if rng.random() < 0.7 else 0, epsilon=0.1)
    return y.reshape(x.shape) * weight(x.shape[-1])


def softmax(seen, weight, rng):
    return jax.nn.softmax(seen[-1], axis=an_axis(seen[-1], rng))


def attention(seen, weight, rng):
    x = sequence(seen[-1])
    heads, width = a_size(rng), a_size(rng)
    y = x @ weight(x.shape[-1], 3 * heads * width)
    if rng.random() < 0.5:
        q, k, v = jnp.moveaxis(y.reshape(*y.shape[:-1], 3, heads, width), -3, 0)
    else:
        q, k, v = jnp.split(y.reshape(*y.shape[:-1], heads, -1), 3, axis=-1)
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    return jnp.einsum("bhqk,bkhd->bqhd", scores, v)


def recurrence(seen, weight, rng):
    x = jnp.atleast_2d(seen[-1])
    units = a_size(rng)
    inward, onward = weight(x.shape[-1], units), weight(units, units)

    def step(h, t):
        h = jnp.tanh(t @ inward + h @ onward)
        return h, h

    zeros = jnp.zeros((*x.shape[1:-1], units))
    last, all_of_them = lax.scan(jax.checkpoint(step), zeros, x)
    return last if rng.random() < 0.5 else all_of_them


def layers(seen, weight, rng):
    x, units = seen[-1], a_size(rng)
    kernels = weight(2, x.shape[-1], units), weight(2, units, x.shape[-1])
    return lax.scan(lambda x, w: (x + jnp.tanh(x @ w[0]) @ w[1], None), x, kernels)[0]


def residual(seen, weight, rng):
    alike = [x for x in seen if x.shape == seen[-1].shape]
    return seen[-1] + alike[rng.integers(len(alike))]


def concatenation(seen, weight, rng):
    x, d = seen[-1], an_axis(seen[-1], rng)
    parts = [x, jnp.ones_like(x), jnp.broadcast_to(weight(x.shape[-1]), x.shape)]
    order = rng.integers(3, size=2)
    return jnp.concatenate([parts[n] for n in (*order, 0)], axis=d)


def gates(seen, weight, rng):
    x = seen[-1]
    even = [d for d, n in enumerate(x.shape) if n % 2 == 0]
    return jax.nn.glu(x, axis=int(rng.choice(even))) if even else x


def part(seen, weight, rng):
    x, d = seen[-1], an_axis(seen[-1], rng)
    start = int(rng.integers(x.shape[d]))
    return lax.slice_in_dim(x, start, None, int(rng.integers(1, 3)), d)


def padding(seen, weight, rng):
    config = rng.integers(0, 2, (seen[-1].ndim, 3)).tolist()
    return lax.pad(seen[-1], jnp.float32(1), [(lo, hi, gap) for lo, hi, gap in config])


def reshape(seen, weight, rng):
    x = seen[-1]
    pairs = [d for d, n in enumerate(x.shape) if n % 2 == 0]
    if x.ndim > 1 and (rng.random() < 0.5 or not pairs):
        d = int(rng.integers(x.ndim - 1))
        shape = (*x.shape[:d], x.shape[d] * x.shape[d + 1], *x.shape[d + 2 :])
    elif pairs:
        d = int(rng.choice(pairs))
        shape = (*x.shape[:d], 2, x.shape[d] // 2, *x.shape[d + 1 :])
    else:
        shape = x.shape
    return x.reshape(shape, order="C" if rng.random() < 0.7 else "F")


def transposition(seen, weight, rng):
    return seen[-1].transpose([int(d) for d in rng.permutation(seen[-1].ndim)])


def more_axes(seen, weight, rng):
    d = an_axis(seen[-1], rng)
    return jnp.repeat(jnp.expand_dims(seen[-1], d), a_size(rng), axis=d)


def reduction(seen, weight, rng):
    x = seen[-1]
    keep = bool(x.ndim == 1 or rng.random() < 0.5)
    return jnp.tanh(x.sum(axis=an_axis(x, rng), keepdims=keep))


def gram(seen, weight, rng):
    x = seen[-1].reshape(-1, seen[-1].shape[-1])
    return jnp.tanh(x @ x.T if rng.random() < 0.5 else x.T @ x)


def order_matters(seen, weight, rng):
    x, d = seen[-1], an_axis(seen[-1], rng)
    ones = jnp.ones_like(x)
    functions = (
        lambda: jnp.flip(x, d),
        lambda: jnp.cumsum(x, d),
        lambda: x * jnp.cumsum(ones, d),
        lambda: x + lax.broadcasted_iota(x.dtype, x.shape, d),
        lambda: jnp.sort(x, d),
        lambda: jnp.roll(x, 1, d),
        lambda: jnp.take(x, np.array([0, 0]), d),
        lambda: x.at[(slice(None),) * d + (0,)].set(1),
        lambda: x * jax.nn.one_hot(x.argmax(d), x.shape[d], axis=d),
        lambda: lax.associative_scan(jnp.add, x, axis=d),
        lambda: x * lax.fori_loop(0, 2, lambda _, c: jnp.cumsum(c, d), ones),
        lambda: x * np.linspace(1, 2, x.shape[-1], dtype=np.float32),
    )
    return jnp.tanh(functions[rng.integers(len(functions))]())


def branches(seen, weight, rng):
    x, scale = seen[-1], weight(seen[-1].shape[-1])
    return lax.cond(x.sum() > 0, lambda: x * scale, lambda: jnp.ones_like(x))


def unknown(seen, weight, rng):
    """Operations for which `derive` has no rule."""
    x, d = seen[-1], an_axis(seen[-1], rng)
    functions = (
        lambda: jnp.fft.fft(x, axis=d).real,
        lambda: x + jnp.fft.fft(jnp.tanh(x), axis=d).imag,
        lambda: lax.fori_loop(0, 2, lambda _, c: jnp.fft.fft(c, axis=d).real, x),
    )
    return jnp.tanh(functions[rng.integers(len(functions))]())


def captured(seen, weight, rng):
    """Arrays that the program captures. Some of them are uniform today."""
    x = seen[-1]
    array = np.ones(x.shape[-1]) if rng.random() < 0.5 else rng.random(x.shape)
    return x * array.astype(np.float32)


def collective(seen, weight, rng):
    """Collectives over a vmapped axis."""
    x, d = seen[-1], an_axis(seen[-1], rng)
    size = x.shape[d]
    ring = [(n, (n + 1) % size) for n in range(size)]
    functions = (
        lambda c: c - lax.pmean(c, "n"),
        lambda c: c * lax.pmax(c, "n"),
        lambda c: c + lax.psum(c * c, "n"),
        lambda c: c + lax.all_gather(c, "n").sum(0),
        lambda c: c * (1 + lax.axis_index("n")),
        lambda c: c + lax.ppermute(c, "n", ring),
        lambda c: c * lax.all_gather(c, "n")[0],
    )
    function = functions[rng.integers(len(functions))]
    return jnp.tanh(jax.vmap(function, d, d, axis_name="n")(x))


def unused(seen, weight, rng):
    """Code on which no output depends. It may do whatever it likes."""
    x = seen[-1]
    order_matters(seen, weight, rng)
    unknown(seen, weight, rng)
    dead = (x @ weight(x.shape[-1], a_size(rng)))[..., ::-1]
    return jnp.tanh(jax.jit(lambda x, dead: (x, dead))(x, dead)[0])


BLOCKS: dict[str, Block] = {
    block.__name__: block
    for block in (
        activation,
        attention,
        bias,
        branches,
        captured,
        collective,
        concatenation,
        conv,
        dense,
        dense_elsewhere,
        dense_of_each,
        gates,
        gram,
        layers,
        more_axes,
        norm,
        order_matters,
        padding,
        part,
        pool,
        recurrence,
        reduction,
        reshape,
        residual,
        softmax,
        transposition,
        unknown,
        unused,
    )
}


Program = Sequence[tuple[str, int]]
"""Blocks, each with a seed for what it does."""


def run(program: Program, variables: dict[str, Any], x: Any) -> Any:
    """Computes the program's output. Draws all weights that the variables lack."""
    given_out: list[str] = []

    def weight(*shape: int) -> Any:
        rng = np.random.default_rng([len(given_out), *shape])
        alike = [name for name in given_out if variables[name].shape == shape]
        # Sometimes the program uses an earlier weight again.
        name = str(rng.choice(alike)) if alike and rng.random() < 0.2 else None
        name = name or f"w{len(given_out)}"
        given_out.append(name)
        return variables.setdefault(name, rng.normal(size=shape).astype(np.float32))

    seen = [x]
    for block, seed in program:
        y = BLOCKS[block](seen, weight, np.random.default_rng(seed))
        if 0 < y.ndim <= 4 and y.size <= 256:
            seen.append(y)
    # The output keeps one axis of the last value if the length of the program is odd.
    head = weight(*seen[-1].shape)
    return (head * seen[-1]).sum(axis=tuple(range(len(program) % 2, head.ndim)))


class Subject(NamedTuple):
    """A program as a model, and what `derive` found out about it."""

    forward: Callable[[Any, Any], Any]
    variables: dict[str, Any]
    x: np.ndarray
    spec: permutation.PermutationSpec
    activations: Callable[[Any, Any], dict[str, jax.Array]]


def subject(program: Program, shape: Sequence[int]) -> Subject:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    variables: dict[str, Any] = {}
    jax.eval_shape(partial(run, program, variables), x)
    forward = partial(run, program)
    with warnings.catch_warnings(record=True) as caught:
        # Many programs fix layers that look permutable.
        warnings.simplefilter("always", PermutationSpecWarning)
        spec, activations = derive(forward, variables, x, with_activations=True)
        announced = any("not know the operation" in str(w.message) for w in caught)
        try:
            assert derive(forward, variables, x, strict=True) == replace(spec, taps={})
            raised = False
        except PermutationSpecError:
            raised = True
    assert raised == announced
    for row in explain(forward, variables, x).rows:
        assert row.reasons or permutes_all(row.axis)
        assert not announced or "unknown" in dict(program)
    return Subject(forward, variables, x, spec, activations)


def permutes_all(axis: Axis) -> bool:
    """Whether permutations reach every part of an axis."""
    match axis:
        case Concat(parts):
            return all(permutes_all(part) for part, _ in parts)
        case Product(factors):
            return all(isinstance(factor, str) for factor in factors)
        case _:
            return isinstance(axis, str)


def check(program: Program, shape: Sequence[int]) -> None:
    forward, variables, x, spec, activations = subject(program, shape)
    permutation.validate(spec, variables)

    # The programs are tiny: compiling them takes longer than running them.
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def outputs_and_taps(perms):
        permuted = permutation.apply(spec, perms, variables)
        with jax.default_matmul_precision("highest"):
            return forward(permuted, x), activations(permuted, x)

    identity = jax.tree.map(np.array, permutation.identity(spec, variables))
    outputs, taps = outputs_and_taps(identity)
    for seed in range(2):
        rng = np.random.default_rng(seed)
        perms = {g: rng.permuted(perm, axis=-1) for g, perm in identity.items()}
        permuted_outputs, permuted_taps = outputs_and_taps(perms)
        assert_close(permuted_outputs, outputs)
        for tap, units in taps.items():
            expected = permute_leaf(spec.tap_axes(tap, units.ndim), perms, units)
            assert_close(permuted_taps[tap], expected)


def assert_close(found: Any, expected: Any) -> None:
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * scale)


# Without dense layers between the other blocks there would be few hidden units.
NAMES = [*sorted(BLOCKS), *["dense"] * len(BLOCKS)]
steps = st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 99)), max_size=5)
programs = steps.map(lambda steps: [("dense", 1), *steps])
shapes = st.lists(st.sampled_from(SIZES), min_size=1, max_size=3)


@settings(max_examples=15, derandomize=True)
@given(programs, shapes)
def test_what_is_derived_of_random_programs_holds(program, shape):
    check(program, shape)


@pytest.mark.slow
@settings(max_examples=300, derandomize=True)
@given(programs, shapes)
def test_what_is_derived_of_many_random_programs_holds(program, shape):
    check(program, shape)


def test_random_programs_have_groups():
    # Programs without groups would make the tests above worthless.
    rng = np.random.default_rng(0)
    n_groups = []
    for _ in range(30):
        blocks = ["dense", *map(str, rng.choice(NAMES, 3))]
        program = [(block, int(rng.integers(99))) for block in blocks]
        n_groups.append(len(subject(program, [4, 2]).spec.groups))
    assert np.count_nonzero(n_groups) > 20
