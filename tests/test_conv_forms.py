"""All forms of the convolutions of stacked agents compute the same."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat_jax._conv_forms import batched, has_convolution, im2col, kernel_gradients

N_AGENTS = 3
FORMS = {"im2col": im2col, "kernel_gradients": kernel_gradients}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
LAYOUTS = [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("HWCN", "OHWI", "CHWN")]


@st.composite
def convolutions(draw):
    """Draws the keyword arguments of a convolution, and the shapes of its operands."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kind = draw(st.sampled_from(["feature_group_count", "batch_group_count"]))
    per_group, outputs = draw(st.integers(1, 3)), groups * draw(st.integers(1, 2))
    grouped_features = groups if kind == "feature_group_count" else 1
    batch = draw(st.integers(1, 2)) * (groups // grouped_features)
    window = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    space = [draw(st.integers(2 * k + 1, 9)) for k in window]
    pairs = st.tuples(st.integers(1, 2), st.integers(1, 2))
    pad = st.tuples(st.integers(-1, 2), st.integers(0, 2))
    numbers = draw(st.sampled_from(LAYOUTS))
    sizes = {
        "N": batch,
        "C": per_group * grouped_features,
        "H": space[0],
        "W": space[1],
    }
    kernel = {"O": outputs, "I": per_group, "H": window[0], "W": window[1]}
    options = {
        "window_strides": draw(pairs),
        "padding": draw(st.tuples(pad, pad)),
        "lhs_dilation": draw(pairs),
        "rhs_dilation": draw(pairs),
        "dimension_numbers": numbers,
        kind: groups,
    }
    return (
        options,
        tuple(sizes[d] for d in numbers[0]),
        tuple(kernel[d] for d in numbers[1]),
    )


def both(fn, form, *args):
    """Runs a function of one agent in a form, and as `jax.vmap` does."""
    one = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in args]
    closed = jax.make_jaxpr(fn)(*one)
    assert has_convolution(closed.jaxpr)
    axes = (0,) * len(args)
    # The programs run once, so most of the time is for compiling.
    quickly = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    mine = quickly(lambda *a: batched(closed, axes, a, N_AGENTS, form))(*args)
    theirs = quickly(lambda *a: jax.tree.leaves(jax.vmap(fn)(*a)))(*args)
    return mine, theirs


@pytest.mark.every_nth(2)
@every_form
@settings(max_examples=12, derandomize=True)
@given(drawn=convolutions())
def test_a_form_computes_what_vmap_does_with_all_gradients(form, drawn):
    options, inputs, kernel = drawn
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N_AGENTS, *inputs)).astype(np.float32)
    w = rng.normal(size=(N_AGENTS, *kernel)).astype(np.float32)

    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, **options)

    def with_gradients(x, w):
        y, pull = jax.vjp(convolve, x, w)
        # The loss is not linear, so that both gradients depend on both operands.
        return y, *pull(jnp.sin(y))

    mine, theirs = both(with_gradients, form, x, w)
    assert len(mine) == 3
    for own, other in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-4)


def conv(x, w):
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


X = np.random.default_rng(1).normal(size=(N_AGENTS, 2, 5, 5, 2)).astype(np.float32)
W = np.random.default_rng(2).normal(size=(N_AGENTS, 3, 3, 2, 2)).astype(np.float32)


@every_form
def test_convolutions_within_calls_and_loops_are_computed_as_well(form):
    @jax.custom_jvp
    def special(x):
        return jnp.tanh(x)

    special.defjvp(lambda x, t: (special(*x), t[0] * 2))

    def fn(x, w):
        inner = jax.jit(conv)(special(x), w)
        looped, _ = jax.lax.scan(lambda c, _: (conv(c, w), None), inner, None, 2)
        chosen = jax.lax.cond(w.sum() > 0, conv, lambda x, w: x, looped, w)
        return chosen, jax.checkpoint(conv)(x, w), jnp.ones(3)

    mine, theirs = both(fn, form, X, W)
    for own, other in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-4)


@every_form
def test_operands_that_all_agents_share_stay_shared(form):
    closed = jax.make_jaxpr(lambda x, w, k: (conv(x, w), conv(x, k)))(X[0], W[0], W[0])
    outputs = batched(closed, (None, 0, None), (X[0], W, W[0]), N_AGENTS, form)
    for agent in range(N_AGENTS):
        np.testing.assert_allclose(outputs[0][agent], conv(X[0], W[agent]), atol=1e-5)
        np.testing.assert_allclose(outputs[1][agent], conv(X[0], W[0]), atol=1e-5)


def primitives(form, fn, *args) -> str:
    one = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in args]
    closed = jax.make_jaxpr(fn)(*one)
    axes = (0,) * len(args)
    return str(
        jax.make_jaxpr(lambda *a: batched(closed, axes, a, N_AGENTS, form))(*args)
    )


def loss(x, w):
    return (conv(x, w) ** 2).sum()


def test_im2col_has_no_convolution():
    gradients = jax.grad(loss, (0, 1))
    assert "conv_general_dilated" not in primitives(im2col, gradients, X, W)


def test_the_gradient_of_a_kernel_has_batch_groups_and_the_others_have_feature_groups():
    text = primitives(kernel_gradients, jax.grad(loss, (0, 1)), X, W)
    assert text.count(f"batch_group_count={N_AGENTS}") == 1
    assert text.count(f"feature_group_count={N_AGENTS}") == 2
