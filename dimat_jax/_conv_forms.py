"""Ways to compute the convolutions of many agents that have kernels of their own.

`jax.vmap` turns a convolution whose inputs and kernels are both stacked into one with a
feature group for each agent. The gradient with respect to a kernel is a convolution as
well, and its grouped form is slow: cuDNN has a kernel for the gradient of a grouped
convolution, but XLA recognises it only if it is written with batch groups (JAX issues
13800, 15339 and 26266). XLA:CPU runs every grouped convolution slowly.

A function of one agent is given as a jaxpr, in which the gradients are convolutions
already. So `batched` can run all its equations as `jax.vmap` does, except for the
convolutions, which it writes in another form. No gradient rule is needed. All forms
compute the same up to rounding.

A form that runs each agent's convolution on a stream of its own would need several
streams on one device. PJRT runs all programs of a device in one stream, so there is no
such form.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dimat_jax._jaxprs import (
    ClosedJaxpr,
    Equation,
    Jaxpr,
    called_by,
    equations,
    run_equation,
    run_equations,
)

__all__ = ["ConvForm", "batched", "has_convolution", "im2col", "kernel_gradients"]

ConvForm = Callable[..., Array]
"""`form(lhs, rhs, **params)`: a convolution of stacked inputs with stacked kernels.

`lhs` and `rhs` have a leading axis of agents. `params` are those of JAX's primitive
`conv_general_dilated` for one agent. The result is stacked as well.
"""


def has_convolution(jaxpr: Jaxpr) -> bool:
    """Whether a jaxpr convolves, in inner jaxprs as well."""
    return any(map(_is_convolution, equations(*jaxpr.eqns)))


def _is_convolution(eqn: Equation) -> bool:
    return eqn.primitive.name == "conv_general_dilated"


# The interpreter ======================================================================


def batched(
    closed: ClosedJaxpr,
    in_axes: Sequence[int | None],
    arguments: Sequence[Any],
    size: int,
    form: ConvForm,
) -> list[Any]:
    """Runs a jaxpr of one agent on stacked agents, as `jax.vmap` does.

    Args:
        closed: the jaxpr of one agent.
        in_axes: for each argument 0 if it is stacked, and None if agents share it.
        arguments: the arguments.
        size: the number of agents.
        form: the function that computes a convolution whose operands are both stacked.

    Returns:
        the results, all stacked.
    """
    # Each value comes with its axis of agents: 0, or None if all agents share it.
    inputs = list(zip(arguments, in_axes, strict=True))
    outputs = _run_jaxpr(closed, inputs, form)
    return [
        value if axis == 0 else jnp.broadcast_to(value, (size, *jnp.shape(value)))
        for value, axis in outputs
    ]


def _run_jaxpr(closed: ClosedJaxpr, inputs: Sequence[Any], form: ConvForm) -> list[Any]:
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.invars, inputs, strict=True))
    values |= {
        var: (const, None)
        for var, const in zip(jaxpr.constvars, closed.consts, strict=True)
    }

    def run(eqn: Equation, operands: list[Any]) -> list[Any]:
        # The value of a literal comes without an axis.
        pairs = [x if isinstance(x, tuple) else (x, None) for x in operands]
        return _run_one(eqn, pairs, form)

    outputs = run_equations(jaxpr.eqns, values, jaxpr.outvars, run)
    return [x if isinstance(x, tuple) else (x, None) for x in outputs]


def _run_one(eqn: Equation, inputs: list[Any], form: ConvForm) -> list[Any]:
    operands, axes = [x for x, _ in inputs], tuple(axis for _, axis in inputs)
    if all(axis is None for axis in axes):
        return [(output, None) for output in run_equation(eqn, operands)]
    if _is_convolution(eqn) and axes == (0, 0):
        return [(form(*operands, **eqn.params), 0)]
    called = called_by(eqn)
    if called is not None and has_convolution(called.jaxpr):
        return _run_jaxpr(called, inputs, form)
    # A convolution within a loop has XLA's own form.
    outputs = jax.vmap(lambda *one: run_equation(eqn, one), in_axes=axes)(*operands)
    return [(output, 0) for output in outputs]


# The forms ============================================================================


def kernel_gradients(lhs: Array, rhs: Array, **params: Any) -> Array:
    """Writes gradients of kernels with batch groups, and other convolutions as usual.

    A convolution of stacked agents can have a group of features or a group of batches
    for each agent. XLA:GPU maps a kernel's gradient to cuDNN's kernel for it only if it
    has batch groups.
    """
    numbers, n_agents = params["dimension_numbers"], len(lhs)
    # JAX writes the gradient of a kernel as a convolution that contracts over the
    # examples. So the examples, on the leading axis, are its features.
    contracts_examples = numbers.lhs_spec[1] == 0 and numbers.lhs_spec[0] != 0
    if not contracts_examples or params["feature_group_count"] > 1:
        convolve = partial(jax.lax.conv_general_dilated_p.bind, **params)
        return jax.vmap(convolve)(lhs, rhs)
    n_groups = n_agents * params["batch_group_count"]
    grouped = jax.lax.conv_general_dilated_p.bind(
        _merge_agents(lhs, numbers.lhs_spec[0]),
        _merge_agents(rhs, numbers.rhs_spec[0]),
        **{**params, "batch_group_count": n_groups},
    )
    return _split_agents(grouped, numbers.out_spec[1], n_agents)


def _merge_agents(x: Array, axis: int) -> Array:
    """Merges the leading axis of agents into an axis of one agent's array."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _split_agents(x: Array, axis: int, n_agents: int) -> Array:
    """Splits the agents off an axis, onto a leading axis: undoes `_merge_agents`."""
    x = x.reshape(*x.shape[:axis], n_agents, -1, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def im2col(lhs: Array, rhs: Array, **params: Any) -> Array:
    """Writes convolutions as products of matrices, one for each agent."""
    return jax.vmap(partial(_im2col_one, **params))(lhs, rhs)


def _im2col_one(
    lhs: Array,
    rhs: Array,
    *,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    dimension_numbers: Any,
    feature_group_count: int,
    batch_group_count: int,
    precision: Any,
    preferred_element_type: Any,
    **unused: Any,
) -> Array:
    """Computes one agent's convolution as a product of matrices.

    Output position p reads the input at p * stride + k * dilation for each position k
    of the window. One slice of the input serves all p of one k, or all k of one p.
    There is a slice for each position of the window or of the output, whichever are
    fewer: a layer's window is small, and a kernel's gradient has a small output.
    """
    lhs = lhs.transpose(dimension_numbers.lhs_spec)  # [batch, features, *space]
    rhs = rhs.transpose(dimension_numbers.rhs_spec)  # [outputs, features, *window]
    spatial = [
        (low, high, dilation - 1)
        for (low, high), dilation in zip(padding, lhs_dilation, strict=True)
    ]
    zero = np.zeros((), lhs.dtype)
    lhs = jax.lax.pad(lhs, zero, [(0, 0, 0), (0, 0, 0), *spatial])
    window = rhs.shape[2:]
    extents = zip(lhs.shape[2:], window, rhs_dilation, window_strides, strict=True)
    positions = [(n - (k - 1) * d - 1) // s + 1 for n, k, d, s in extents]

    # Groups of features, or of batches, are a further axis of independent products.
    groups = max(feature_group_count, batch_group_count)
    if feature_group_count > 1:
        lhs = jnp.moveaxis(lhs.reshape(len(lhs), groups, -1, *lhs.shape[2:]), 1, 0)
    else:
        lhs = lhs.reshape(groups, -1, *lhs.shape[1:])
    rhs = rhs.reshape(groups, -1, rhs.shape[1], math.prod(window))

    over_window = math.prod(window) <= math.prod(positions)
    if over_window:
        slices = _slices(lhs, window, rhs_dilation, positions, window_strides)
        subscripts = "kgbcp,gock->bgop"
    else:
        slices = _slices(lhs, positions, window_strides, window, rhs_dilation)
        subscripts = "pgbck,gock->bgop"
    out = jnp.einsum(
        subscripts,
        slices,
        rhs,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    out = out.reshape(len(out), -1, *positions)  # [batch, outputs, *space]
    return out.transpose(np.argsort(dimension_numbers.out_spec))


def _slices(
    x: Array,
    starts: Sequence[int],
    start_steps: Sequence[int],
    counts: Sequence[int],
    steps: Sequence[int],
) -> Array:
    """Slices the spatial axes of `x`: `counts` entries, `steps` apart, for each start.

    Args:
        x: an array `[groups, batch, features, *space]`.
        starts: the number of starts along each spatial axis.
        start_steps: the distance between two starts.
        counts: the number of entries of a slice along each spatial axis.
        steps: the distance between two entries.

    Returns:
        the slices, `[starts, groups, batch, features, entries]`.
    """
    slices = []
    for start in product(*map(range, starts)):
        first = np.multiply(start, start_steps)
        last = first + (np.array(counts) - 1) * steps + 1
        piece = jax.lax.slice(
            x, (0, 0, 0, *first), (*x.shape[:3], *last), (1, 1, 1, *steps)
        )
        slices.append(piece.reshape(*x.shape[:3], -1))
    return jnp.stack(slices)
