"""Tests each operation's rule: the groups that it allows must leave outputs unchanged.

Every row is a network of one hidden layer, `sum(u * op(x @ w, *more))`, with the axes
that its weights must have. A rule that allows more groups would be wrong, and a rule
that allows fewer groups would lose a symmetry.
"""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dimat_jax import permutation
from dimat_jax.permutation import (
    Axis,
    Concat,
    PermutationSpec,
    PermutationSpecWarning,
    Product,
    Stack,
    derive,
)
from dimat_jax.permutation._rules import RULES
from dimat_jax.permutation._spec import Axes
from tests.reference.symmetry import differences

BATCH, INPUTS, UNITS = 4, 3, 6
# The functions of some rows capture this array.
PLACES = np.array([2, 0, 2])
ROW = np.random.default_rng(0).normal(size=UNITS).astype(np.float32)
NWC = ("NWC", "WIO", "NWC")


class Row(NamedTuple):
    """An operation `op(h, *more)` on h `[batch, units]`, and the axes of its weights.

    `more` are the shapes of further weights. They are integers if a dtype is given.
    """

    op: Callable[..., Any]
    u: Axes
    w: Axis
    more: tuple[Any, ...] = ()
    axes_of_more: tuple[Axes, ...] = ()
    sizes: Mapping[str, int] = {}


def one_group(u: Axis = "a") -> tuple[Axes, Axis]:
    """The axes of the weights: group "a" before the operation, axis `u` after it."""
    return (None, u), "a"


def stacked(u: Axis, *groups: str) -> tuple[Axes, Axis]:
    """As `one_group`, for units that the operation makes alike in all examples.

    So `u`, which has a row for each example, may permute them in each row on its own.
    """
    return (Stack(*(groups or ["b"])), u), "a"


STAYS: tuple[Axes, Axis] = (None, None), None
REDUCED: tuple[Axes, Axis] = (None,), "a"


def conv(h, kernel, groups: int = 1, **settings: Any):
    """A convolution along the batch, as if the batch were a sequence."""
    settings = {"window_strides": [1], "padding": "SAME", **settings}
    return lax.conv_general_dilated(
        h[None], kernel, dimension_numbers=NWC, feature_group_count=groups, **settings
    )[0]


def loop(h, step, n: int = 3, start=jnp.zeros_like):
    return lax.scan(lambda c, _: (step(c), None), start(h), None, length=n)[0]


def recurrence(h, kernel):
    def step(state, inputs):
        state = jnp.tanh(state @ kernel + inputs)
        return state, state

    return lax.scan(step, jnp.zeros(UNITS), h)[1]


@jax.custom_vjp
def gate(h):
    return h * jnp.tanh(h)


gate.defvjp(lambda h: (gate(h), h), lambda h, g: (g * h,))


def outer(h):
    return h[:, :, None] * h[:, None, :]


def over_batch(fn, name: str = "n"):
    return jax.vmap(fn, axis_name=name)


def over_units(fn):
    return jax.vmap(fn, in_axes=1, out_axes=1, axis_name="n")


ROWS = {
    # Elementwise
    "relu": Row(jax.nn.relu, *one_group()),
    "gelu": Row(jax.nn.gelu, *one_group()),
    "a weight for each unit": Row(
        lambda h, b: jnp.maximum(h + b, -b), *one_group(), ((UNITS,),), (("a",),)
    ),
    "a weight of all": Row(
        lambda h, b: h * b[0] + b[1], *one_group(), ((2, 1),), ((None, None),)
    ),
    "where one is larger": Row(
        lambda h, b: jnp.where(h > b, h, 0), *one_group(), ((UNITS,),), (("a",),)
    ),
    "clamped by scalars": Row(lambda h: lax.clamp(-1.0, h, 1.0), *one_group()),
    "clamped by weights": Row(
        lambda h, b: lax.clamp(h - b**2, h**2, h), *one_group(), ((UNITS,),), (("a",),)
    ),
    "the bits of numbers": Row(
        lambda h: lax.bitcast_convert_type(
            lax.bitcast_convert_type(h, jnp.int16), jnp.float32
        ),
        *one_group(),
    ),
    "captured numbers": Row(lambda h: h * ROW, *STAYS),
    # The numbers that a trained model captures need not be alike.
    "captured numbers, all alike": Row(lambda h: h * np.full(UNITS, 2.0), *STAYS),
    "captured numbers, alike for all units": Row(
        lambda h: h * np.full((BATCH, 1), 2.0), *one_group()
    ),
    "numbers made within, all alike": Row(
        lambda h: h * jnp.full(UNITS, 2.0), *one_group()
    ),
    "counted places": Row(lambda h: h * jnp.arange(UNITS), *STAYS),
    "the identity matrix": Row(lambda h: h @ jnp.eye(UNITS), *STAYS),
    # Reductions
    "sum": Row(lambda h: h.sum(-1), *REDUCED),
    "max": Row(lambda h: h.max(-1), *REDUCED),
    "any": Row(lambda h: (h > 0).any(-1), *REDUCED),
    "softmax": Row(jax.nn.softmax, *one_group()),
    "layer norm": Row(jax.nn.standardize, *one_group()),
    "argmax": Row(lambda h: h.argmax(-1), (None,), None),
    "cumulative sum": Row(lambda h: jnp.cumsum(h, -1), *STAYS),
    "cumulative sum, backwards": Row(
        lambda h: lax.cumsum(h, axis=1, reverse=True), *STAYS
    ),
    "cumulative sum of ones": Row(
        lambda h: h + jnp.cumsum(jnp.ones_like(h), -1), *STAYS
    ),
    "cumulative sum of what is alike": Row(
        lambda h, b: h + jnp.cumsum(jnp.broadcast_to(b, h.shape), -1),
        *STAYS,
        ((1,),),
        ((None,),),
    ),
    # Order
    "reversed": Row(lambda h: h[:, ::-1], *STAYS),
    "sorted": Row(lambda h: jnp.sort(h, -1), (None, None), "a"),
    "sorted, with places": Row(lambda h: jnp.argsort(h, -1), *STAYS),
    "sorted along others": Row(
        # Several keys are 0. The order before decides the order of their values.
        lambda h, b: lax.sort((jax.nn.relu(h), h * b), num_keys=1)[1],
        *STAYS,
        ((UNITS,),),
        ((None,),),
    ),
    "the largest": Row(lambda h: lax.top_k(h, 2)[0], *STAYS),
    # Shapes
    "transposed": Row(lambda h: h.T, ("a", None), "a"),
    "with more axes": Row(lambda h: h[:, None, :, None], (None, None, "a", None), "a"),
    "in two axes": Row(
        lambda h: h.reshape(-1, 2, 3), (None, "a", "b"), Product("a", "b")
    ),
    "in two axes, first one fastest": Row(
        lambda h: h.reshape(-1, 2, 3, order="F"), (None, "b", "a"), Product("a", "b")
    ),
    "flattened": Row(lambda h: h.reshape(-1), (Product(BATCH, "a"),), "a"),
    "flattened, first axis fastest": Row(
        lambda h: h.ravel(order="F"), (Product("a", BATCH),), "a"
    ),
    "channels shuffled": Row(
        lambda h: h.reshape(-1, 2, 3).mT.reshape(h.shape),
        (None, Product("b", "a")),
        Product("a", "b"),
        sizes={"a": 2, "b": 3},
    ),
    "through the middle of pairs": Row(
        lambda h: h.reshape(-1, 3, 2) + h.reshape(-1, 2, 3).mT,
        (None, None, None),
        None,
    ),
    "repeated": Row(lambda h: jnp.tile(h, 2), *stacked(Product("b", "a"))),
    "each repeated": Row(lambda h: jnp.repeat(h, 2, -1), *stacked(Product("a", "b"))),
    "nothing": Row(lambda h: h[:0].reshape(3, 0), ("b", None), "a"),
    # Parts
    "concatenated with itself": Row(
        lambda h: jnp.concatenate([h, -h], -1), *one_group(Concat(("a", 6), ("a", 6)))
    ),
    "concatenated with ones": Row(
        lambda h: jnp.concatenate([jnp.ones((BATCH, 2)), h], -1),
        *stacked(Concat(("b", 2), ("a", 6))),
    ),
    "concatenated with nothing": Row(
        lambda h: lax.concatenate([h[:, :0], h], 1), *one_group()
    ),
    "unstacked": Row(lambda h: sum(jnp.unstack(h, axis=1)), (None,), None),
    "stacked": Row(lambda h: jnp.stack([h, 2 * h]), (None, None, "a"), "a"),
    "ones and twos, stacked": Row(
        lambda h: h * jnp.stack([jnp.full(BATCH, n) for n in range(UNITS)], 1), *STAYS
    ),
    "the first": Row(lambda h: h[:, :2], (None, "a"), Concat(("a", 2), ("b", 4))),
    "all but the ends": Row(
        lambda h: h[:, 1:-1], (None, "a"), Concat((None, 1), ("a", 4), (None, 1))
    ),
    "every second": Row(lambda h: h[:, ::2], *STAYS),
    "gates": Row(jax.nn.glu, (None, "a"), Concat(("a", 3), ("a", 3))),
    "split at the start": Row(
        lambda h: lax.split(h, (0, UNITS), axis=1)[1] + h, *one_group()
    ),
    "halves change places": Row(
        lambda h: jnp.roll(h, 3, -1),
        (None, Concat(("b", 3), ("a", 3))),
        Concat(("a", 3), ("b", 3)),
    ),
    "shifted by one": Row(lambda h: jnp.roll(h, 1, -1) + h, *STAYS),
    "padded": Row(
        lambda h: jnp.pad(h, ((0, 0), (2, 3)), constant_values=1.0),
        *stacked(Concat(("b", 2), ("a", 6), ("c", 3)), "b", "c"),
    ),
    "padded between": Row(
        lambda h: lax.pad(h, jnp.float32(0), [(0, 0, 0), (0, 0, 1)]), *STAYS
    ),
    "padded by less than nothing": Row(
        lambda h: lax.pad(h, jnp.float32(0), [(0, 0, 0), (-1, 1, 0)]), *STAYS
    ),
    # Places
    "taken": Row(lambda h: h[:, PLACES], *STAYS),
    "taken across the batch": Row(lambda h: h[PLACES], *one_group()),
    "taken beyond the end": Row(
        lambda h: jnp.take(h, np.array([0, 9]), 0, mode="fill", fill_value=1),
        *one_group(),
    ),
    "taken where a weight says": Row(
        lambda h, i: h[:, i], (None, "b"), None, ((5, int),), (("b",),)
    ),
    "taken where the largest is": Row(
        lambda h: jnp.take_along_axis(h, h.argmax(-1, keepdims=True), -1), *STAYS
    ),
    "taken for each unit": Row(
        lambda h: jnp.take_along_axis(h, jnp.abs(h).argmax(0, keepdims=True), 0),
        *one_group(),
    ),
    "embedded": Row(
        lambda h, table, i: h @ table[i].T,
        *one_group("b"),
        ((9, UNITS), (5, int)),
        ((None, "a"), ("b",)),
    ),
    "one-hot": Row(
        lambda h, table, i: h @ (jax.nn.one_hot(i, 9) @ table).T,
        *one_group("b"),
        ((9, UNITS), (5, int)),
        ((None, "a"), ("b",)),
    ),
    "sliced where the largest is": Row(
        lambda h: lax.dynamic_slice_in_dim(h, h[0].argmax(), 2, 1), *STAYS
    ),
    "sliced across the batch": Row(
        lambda h: lax.dynamic_slice_in_dim(h, jnp.int32(h[:, :3].sum() > 0), 2, 0),
        (None, Concat(("a", 3), ("b", 3))),
        Concat(("a", 3), ("b", 3)),
    ),
    "a slice replaced": Row(
        lambda h: lax.dynamic_update_slice(h, h[:, :2], (0, 1)), *STAYS
    ),
    "a row replaced": Row(
        lambda h, b: lax.dynamic_update_slice(h, b, (1, 0)),
        *one_group(),
        ((1, UNITS),),
        ((None, "a"),),
    ),
    "a place set": Row(lambda h: h.at[:, 0].set(1), *STAYS),
    "a row set": Row(lambda h, b: h.at[1].set(b), *one_group(), ((UNITS,),), (("a",),)),
    "nodes summed": Row(
        lambda h: jax.ops.segment_sum(h, PLACES[[0, 1, 2, 0]], 3), *one_group()
    ),
    "units summed": Row(
        lambda h, i: jax.ops.segment_sum(h.T, i, 3),
        (None, None),
        "a",
        ((UNITS, int),),
        (("a",),),
    ),
    "units in places that a weight says": Row(
        lambda h, i: jnp.zeros_like(h).at[:, i].set(h),
        *STAYS,
        ((UNITS, int),),
        ((None,),),
    ),
    # Contractions
    "gram matrix": Row(lambda h: h.T @ h, ("a", "a"), "a"),
    "outer product": Row(outer, (None, "a", "a"), "a"),
    "the diagonal of an outer product": Row(
        lambda h: jnp.diagonal(outer(h), axis1=1, axis2=2), *STAYS
    ),
    "once more through itself": Row(
        lambda h, k: jnp.tanh(h @ k) @ k, *one_group(), ((UNITS, UNITS),), (("a", "a"),)
    ),
    "and back through itself": Row(
        lambda h, k: jnp.tanh(h @ k) @ k.T, *one_group(), ((UNITS, 5),), (("a", "b"),)
    ),
    "a matrix for each unit": Row(
        lambda h, k: jnp.einsum("bu,uij->bij", h, jnp.einsum("uik,ujk->uij", k, k)),
        (None, "b", "b"),
        "a",
        ((UNITS, 5, 4),),
        (("a", "b", "c"),),
    ),
    "batched": Row(
        lambda h, k: jax.vmap(jnp.outer, in_axes=(1, 0), out_axes=1)(h, k),
        (None, "a", "b"),
        "a",
        ((UNITS, 5),),
        (("a", "b"),),
    ),
    "normalised weights": Row(
        lambda h, k: h @ (k / jnp.linalg.norm(k, axis=0)),
        *one_group("b"),
        ((UNITS, 5),),
        (("a", "b"),),
    ),
    # Windows
    "convolution": Row(conv, *one_group("b"), ((3, UNITS, 5),), ((None, "a", "b"),)),
    "dilated convolution": Row(
        partial(conv, padding=[(2, 1)], lhs_dilation=[2], rhs_dilation=[2]),
        *one_group("b"),
        ((2, UNITS, 5),),
        ((None, "a", "b"),),
    ),
    "depthwise convolution": Row(
        partial(conv, groups=UNITS),
        *one_group(Product("a", "b")),
        ((3, 1, 2 * UNITS),),
        ((None, None, Product("a", "b")),),
    ),
    "grouped convolution": Row(
        partial(conv, groups=2),
        (None, Product("a", "c")),
        Product("a", "b"),
        ((3, 3, 10),),
        ((None, "b", Product("a", "c")),),
        sizes={"a": 2},
    ),
    "convolution of one pixel": Row(
        partial(conv, padding="VALID"),
        *one_group("b"),
        ((1, UNITS, 5),),
        ((None, "a", "b"),),
    ),
    "convolution over the units": Row(
        lambda h, k: conv(h.T, k)[None],
        (None, None, "b"),
        None,
        ((2, BATCH, 5),),
        ((None, None, "b"),),
    ),
    "convolution over a part of the batch": Row(
        partial(conv, batch_group_count=1, padding=[(0, 3)], window_strides=[2]),
        *one_group("b"),
        ((2, UNITS, 4),),
        ((None, "a", "b"),),
    ),
    "convolution of batch groups": Row(
        lambda h, k: lax.conv_general_dilated(
            h.reshape(2, 2, UNITS), k, [1], "SAME", None, None, NWC, 1, 2
        ),
        (None, None, None),
        None,
        ((2, UNITS, 4),),
        ((None, None, None),),
    ),
    "transposed convolution": Row(
        lambda h, k: lax.conv_transpose(
            h[None], k, [2], "SAME", dimension_numbers=NWC, transpose_kernel=True
        ),
        (None, None, "b"),
        "a",
        ((3, 5, UNITS),),
        ((None, "b", "a"),),
    ),
    "pooled over the batch": Row(
        lambda h: lax.reduce_window(h, -jnp.inf, lax.max, (2, 1), (2, 1), "SAME"),
        *one_group(),
    ),
    "pooled over the units": Row(
        lambda h: lax.reduce_window(h, 0.0, lax.add, (1, 2), (1, 1), "SAME"), *STAYS
    ),
    # Collectives
    "mean over a vmapped axis": Row(
        over_batch(lambda r: r - lax.pmean(r, "n")), *one_group()
    ),
    "maximum over a vmapped axis": Row(
        over_batch(lambda r: r / (1 + lax.pmax(r, "n") - lax.pmin(r, "n"))),
        *one_group(),
    ),
    "sum over two vmapped axes": Row(
        lambda h: over_batch(over_batch(lambda r: r - lax.psum(r, ("n", "m")), "m"))(
            h.reshape(2, 2, UNITS)
        ),
        (None, None, "a"),
        "a",
    ),
    "gathered over a vmapped axis": Row(
        over_batch(lambda r: lax.all_gather(r, "n") - r), (None, None, "a"), "a"
    ),
    "gathered in a row over a vmapped axis": Row(
        over_batch(lambda r: lax.all_gather(r, "n", tiled=True)),
        ("b", Product(BATCH, "a")),
        "a",
    ),
    "scattered over a vmapped axis": Row(
        over_batch(lambda r: r[:, None] * lax.psum_scatter(r[:BATCH], "n")),
        (None, Concat((None, BATCH), ("a", 2)), None),
        Concat((None, BATCH), ("a", 2)),
    ),
    "passed on along a vmapped axis": Row(
        over_batch(lambda r: lax.ppermute(r, "n", [(0, 1), (1, 2), (2, 3), (3, 0)])),
        *one_group(),
    ),
    "numbered along a vmapped axis": Row(
        over_batch(lambda r: r * lax.axis_index("n")), *one_group()
    ),
    "mean over vmapped units": Row(
        over_units(lambda c: c - lax.pmean(c, "n")), *one_group()
    ),
    "gathered over vmapped units": Row(
        over_units(lambda c: lax.all_gather(c, "n").max(0) * c), *one_group()
    ),
    "numbered along vmapped units": Row(
        over_units(lambda c: c * lax.axis_index("n")), *STAYS
    ),
    "passed on along vmapped units": Row(
        over_units(
            lambda c: lax.ppermute(c, "n", [(n, (n + 1) % UNITS) for n in range(UNITS)])
        ),
        *STAYS,
    ),
    # Loops and calls
    "a loop from zeros": Row(
        lambda h, b: loop(h, lambda c: jnp.tanh(c + h) * b),
        *one_group(),
        ((UNITS,),),
        (("a",),),
    ),
    "a loop that counts places": Row(
        lambda h: h + loop(h, lambda c: c + jnp.arange(UNITS)), *STAYS
    ),
    "a loop that shifts": Row(
        lambda h: loop(h, lambda c: jnp.roll(c, 1, -1), start=jnp.tanh), *STAYS
    ),
    "a loop in which carries change places": Row(
        lambda h, b: lax.scan(
            lambda c, _: ((c[1], c[2], c[0] + b), None),
            (h, jnp.ones_like(h), jnp.zeros_like(h)),
            None,
            length=2,
        )[0][0],
        *one_group(),
        ((UNITS,),),
        (("a",),),
    ),
    "a recurrence over the batch": Row(
        recurrence,
        *one_group(),
        ((UNITS, UNITS),),
        (("a", "a"),),
    ),
    "a scan over the units": Row(
        lambda h: lax.scan(lambda c, t: (jnp.tanh(c + t), c), jnp.zeros(BATCH), h.T)[1],
        (None, None),
        None,
    ),
    "a while loop": Row(
        lambda h, b: lax.while_loop(
            lambda c: (c**2).sum() > 1, lambda c: c * jax.nn.sigmoid(b), h
        ),
        *one_group(),
        ((UNITS,),),
        (("a",),),
    ),
    "a branch": Row(
        lambda h, b: lax.cond(h.sum() > 0, lambda: h * b, lambda: jnp.zeros_like(h)),
        *one_group(),
        ((UNITS,),),
        (("a",),),
    ),
    "a branch that turns around": Row(
        lambda h: lax.cond(h.sum() > 0, lambda: h, lambda: h[:, ::-1]), *STAYS
    ),
    "a branch for each unit": Row(
        jax.vmap(lambda t: lax.cond(t.sum() > 0, lambda: t, lambda: 3 * t), 1, 1),
        *one_group(),
    ),
    "an associative scan": Row(
        lambda h: lax.associative_scan(jnp.add, h, axis=1), *STAYS
    ),
    "functions that are called twice": Row(
        lambda h, b: jax.jit(jnp.add)(jax.jit(jnp.add)(h, b[0]), b[1]),
        *one_group(),
        ((2, UNITS),),
        ((None, "a"),),
    ),
    "rematerialised": Row(jax.checkpoint(jnp.tanh), *one_group()),
    "with a derivative of its own": Row(gate, *one_group()),
    "a gradient": Row(jax.grad(lambda h: jnp.tanh(h).sum(-1).prod()), *one_group()),
    "behind a barrier": Row(lax.optimization_barrier, *one_group()),
    "shown": Row(lambda h: [jax.debug.callback(lambda _: None, h), h][1], *one_group()),
}


@pytest.fixture(scope="module")
def x() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (BATCH, INPUTS))


def network(row: Row, x: jax.Array):
    """The network of a row, and weights for it."""
    rng = np.random.default_rng(0)

    def weight(*shape: Any) -> np.ndarray:
        if shape and shape[-1] is int:
            return rng.integers(0, 3, shape[:-1])
        return rng.normal(size=shape).astype(np.float32)

    variables: dict[str, Any] = {"w": weight(INPUTS, UNITS)}
    variables |= {f"more{n}": weight(*shape) for n, shape in enumerate(row.more)}

    def hidden(variables, x):
        more = [variables[f"more{n}"] for n in range(len(row.more))]
        return row.op(x @ variables["w"], *more)

    seen = jax.eval_shape(hidden, variables, x)
    variables["u"] = weight(*seen.shape)
    return lambda v, x: (v["u"] * hidden(v, x)).sum(), variables


@pytest.mark.every_nth(3)
@pytest.mark.parametrize("name", ROWS)
def test_an_operation_allows_just_what_leaves_the_outputs_alone(name, x):
    row = ROWS[name]
    forward, variables = network(row, x)
    with warnings.catch_warnings():
        # Many rows fix all units on purpose.
        warnings.simplefilter("ignore", PermutationSpecWarning)
        spec = derive(forward, variables, x, strict=True)
    axes = {"w": (None, row.w), "u": row.u}
    axes |= {f"more{n}": axes for n, axes in enumerate(row.axes_of_more)}
    expected = PermutationSpec(axes, sizes=row.sizes)
    assert not differences(spec, expected, variables)

    permutation.validate(spec, variables)

    @jax.jit
    def permuted_output(perms):
        return forward(permutation.apply(spec, perms, variables), x)

    identity = jax.tree.map(np.array, permutation.identity(spec, variables))
    before = permuted_output(identity)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        perms = {g: rng.permuted(perm, axis=-1) for g, perm in identity.items()}
        after = permuted_output(perms)
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)


def operations(jaxpr: Any) -> set[str]:
    """The names of all operations of a program, without those of loops and branches."""
    names = {eqn.primitive.name for eqn in jaxpr.eqns}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "jit":
            names |= operations(eqn.params["jaxpr"].jaxpr)
    return names


def test_every_rule_is_in_the_table(x):
    seen = set()
    for row in ROWS.values():
        forward, variables = network(row, x)
        seen |= operations(jax.make_jaxpr(forward)(variables, x).jaxpr)
    rules = {RULES[name] for name in seen & RULES.keys()}
    assert not {rule.__name__ for rule in RULES.values() if rule not in rules}
