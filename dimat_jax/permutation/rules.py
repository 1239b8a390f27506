"""What each JAX operation says about the units along its arrays' axes.

A rule gets the operation and the axes of what it reads, relates them (see `units`), and
returns the axes of what it writes. It must make sure of this: if all axes that hold the
same units are permuted alike, then what the operation writes is permuted so, too, and
not changed otherwise. Fixing too much is safe; what has no rule is fixed altogether.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from dimat_jax.permutation.units import (
    Known,
    concatenate,
    cut,
    fix,
    product,
    same,
    split,
    unknown,
)

__all__ = ["RULES", "Rule", "fixed_axes", "fresh_axes"]

Axes = list[Known]
Rule = Callable[[Any, list[Axes]], list[Axes]]
"""`rule(eqn, axes of its inputs) -> axes of its outputs`; eqn as in a jaxpr."""


def fixed_axes(shape: Sequence[int], reason: str) -> Axes:
    """Axes none of which may be permuted."""
    axes = [unknown(size) for size in shape]
    for axis in axes:
        fix(axis, reason)
    return axes


def fresh_axes(axes: Axes, shape: Sequence[int]) -> Axes:
    """As `axes`, but where an array is uniform it need not stay so."""
    return [
        unknown(size) if axis is None else axis
        for axis, size in zip(axes, shape, strict=True)
    ]


def _shapes(atoms) -> list[tuple[int, ...]]:
    return [atom.aval.shape for atom in atoms]


def _fix_all(axes: Axes, reason: str) -> None:
    for axis in axes:
        fix(axis, reason)


def _elementwise(eqn, inputs: list[Axes]) -> list[Axes]:
    # Scalars go with any shape; axes of size 1 (None) are broadcast.
    rank = len(eqn.outvars[0].aval.shape)
    full = [axes for axes in inputs if len(axes) == rank]
    axes = [same(*column) for column in zip(*full, strict=True)]
    return [list(axes) for _ in eqn.outvars]


def _passes_each(eqn, inputs: list[Axes]) -> list[Axes]:
    del eqn
    return inputs


def _transpose(eqn, inputs: list[Axes]) -> list[Axes]:
    return [[inputs[0][d] for d in eqn.params["permutation"]]]


def _squeeze(eqn, inputs: list[Axes]) -> list[Axes]:
    dropped = eqn.params["dimensions"]
    return [[axis for d, axis in enumerate(inputs[0]) if d not in dropped]]


def _broadcast_in_dim(eqn, inputs: list[Axes]) -> list[Axes]:
    axes: Axes = [None] * len(eqn.params["shape"])
    for axis, d in zip(inputs[0], eqn.params["broadcast_dimensions"], strict=True):
        axes[d] = axis
    return [axes]


def _reduce(eqn, inputs: list[Axes]) -> list[Axes]:
    # The sum (or the largest) of some units does not depend on their order.
    reduced = eqn.params["axes"]
    return [[axis for d, axis in enumerate(inputs[0]) if d not in reduced]]


def _arg_reduce(eqn, inputs: list[Axes]) -> list[Axes]:
    for d in eqn.params["axes"]:
        fix(inputs[0][d], eqn.primitive.name)
    return _reduce(eqn, inputs)


def _along_axis(eqn, inputs: list[Axes]) -> list[Axes]:
    """Cumulative sums and the like: order matters along one axis."""
    fix(inputs[0][eqn.params["axis"]], eqn.primitive.name)
    return inputs


def _rev(eqn, inputs: list[Axes]) -> list[Axes]:
    for d in eqn.params["dimensions"]:
        fix(inputs[0][d], "rev")
    return inputs


def _iota(eqn, inputs: list[Axes]) -> list[Axes]:
    axes: Axes = [None] * len(eqn.params["shape"])
    d = eqn.params["dimension"]
    axes[d] = fixed_axes([eqn.params["shape"][d]], "iota")[0]
    return [axes]


def _reshape(eqn, inputs: list[Axes]) -> list[Axes]:
    (old,), (new,) = _shapes(eqn.invars[:1]), _shapes(eqn.outvars)
    axes: Axes = []
    for old_dims, new_dims in _aligned_blocks(old, new):
        old_sizes, new_sizes = [old[d] for d in old_dims], [new[d] for d in new_dims]
        whole = product([inputs[0][d] for d in old_dims], old_sizes)
        axes += split(whole, new_sizes) if new_sizes else []
    return [axes]


def _aligned_blocks(old: Sequence[int], new: Sequence[int]):
    """The shortest runs of dimensions that a reshape takes to each other."""
    if 0 in old or 0 in new:
        yield range(len(old)), range(len(new))
        return
    i = j = 0
    while i < len(old) or j < len(new):
        start_i, start_j = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while math.prod(old[start_i:i]) != math.prod(new[start_j:j]):
            if math.prod(old[start_i:i]) < math.prod(new[start_j:j]):
                i += 1
            else:
                j += 1
        yield range(start_i, i), range(start_j, j)


def _concatenate(eqn, inputs: list[Axes]) -> list[Axes]:
    dimension = eqn.params["dimension"]
    sizes = [shape[dimension] for shape in _shapes(eqn.invars)]
    columns = zip(*inputs, strict=True)
    return [
        [
            concatenate(column, sizes) if d == dimension else same(*column)
            for d, column in enumerate(columns)
        ]
    ]


def _split(eqn, inputs: list[Axes]) -> list[Axes]:
    dimension = eqn.params["axis"]
    parts = cut(inputs[0][dimension], [int(size) for size in eqn.params["sizes"]])
    return [
        [part if d == dimension else axis for d, axis in enumerate(inputs[0])]
        for part in parts
    ]


def _slice(eqn, inputs: list[Axes]) -> list[Axes]:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    (shape,) = _shapes(eqn.invars)
    strides = eqn.params["strides"] or [1] * len(shape)
    axes: Axes = []
    for axis, size, start, limit, stride in zip(
        inputs[0], shape, starts, limits, strides, strict=True
    ):
        if (start, limit, stride) == (0, size, 1):
            axes.append(axis)
        elif stride == 1:
            axes.append(_segment(axis, size, start, limit))
        elif axis is None:
            axes.append(None)
        else:
            fix(axis, "a slice with strides")
            axes += fixed_axes([len(range(start, limit, stride))], "a slice")
    return [axes]


def _segment(axis: Known, size: int, start: int, limit: int) -> Known:
    before, sizes = [start] if start else [], [start, limit - start, size - limit]
    if start == limit:
        return None
    return cut(axis, [part for part in sizes if part])[len(before)]


def _pad(eqn, inputs: list[Axes]) -> list[Axes]:
    (shape,) = _shapes(eqn.invars[:1])
    (padded,) = _shapes(eqn.outvars)
    axes: Axes = []
    for d, (low, high, interior) in enumerate(eqn.params["padding_config"]):
        if low == high == interior == 0:
            axes.append(inputs[0][d])
        elif interior == 0 and low >= 0 and high >= 0:
            # All of the padding is one value, so its units may be permuted, too.
            parts = [None, inputs[0][d], None]
            axes.append(concatenate(parts, [low, shape[d], high]))
        else:
            fix(inputs[0][d], "pad")
            axes += fixed_axes([padded[d]], "pad")
    return [axes]


def _dot_general(eqn, inputs: list[Axes]) -> list[Axes]:
    contracted, batched = eqn.params["dimension_numbers"]
    lhs, rhs = inputs
    for left, right in zip(*contracted, strict=True):
        same(lhs[left], rhs[right])
    axes = [same(lhs[left], rhs[right]) for left, right in zip(*batched, strict=True)]
    for side, operand in enumerate(inputs):
        taken = {*contracted[side], *batched[side]}
        axes += [axis for d, axis in enumerate(operand) if d not in taken]
    return [axes]


def _convolution(eqn, inputs: list[Axes]) -> list[Axes]:
    lhs, rhs = inputs
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    (shape,) = _shapes(eqn.outvars)
    _, kernel = _shapes(eqn.invars)
    (batch, channels, *space) = numbers.lhs_spec
    (outputs, inputs_of_group, *kernel_space) = numbers.rhs_spec
    if eqn.params["batch_group_count"] > 1:  # gradients have those
        _fix_all([*lhs, *rhs], "a convolution of batch groups")
        return [fixed_axes(shape, "a convolution of batch groups")]
    # Each group of output channels sees its own group of input channels: groups move
    # as blocks, and the channels within are permuted alike in all groups.
    sizes = [groups, kernel[inputs_of_group]]
    group, within = split(lhs[channels], sizes)
    same(within, rhs[inputs_of_group])
    sizes = [groups, kernel[outputs] // groups]
    out_group, out_within = split(rhs[outputs], sizes)
    if group is not None or out_group is not None:
        group = same(group or unknown(groups), out_group)
    axes: Axes = [None] * len(shape)
    axes[numbers.out_spec[0]] = lhs[batch]
    axes[numbers.out_spec[1]] = product([group, out_within], sizes)
    for i, (d, kernel_d, out_d) in enumerate(
        zip(space, kernel_space, numbers.out_spec[2:], strict=True)
    ):
        fix(rhs[kernel_d], "a convolution's window")
        pointwise = kernel[kernel_d] == 1 and (
            eqn.params["window_strides"][i] == eqn.params["lhs_dilation"][i] == 1
            and tuple(eqn.params["padding"][i]) == (0, 0)
        )
        axes[out_d] = _windowed(lhs[d], shape[out_d], pointwise)
    return [axes]


def _reduce_window(eqn, inputs: list[Axes]) -> list[Axes]:
    (shape,) = _shapes(eqn.outvars)
    params = eqn.params
    return [
        [
            _windowed(
                axis,
                shape[d],
                params["window_dimensions"][d] == params["window_strides"][d] == 1
                and params["base_dilation"][d] == 1
                and tuple(params["padding"][d]) == (0, 0),
            )
            for d, axis in enumerate(inputs[0])
        ]
    ]


def _windowed(axis: Known, size: int, pointwise: bool) -> Known:
    """The axis that a window slides along; it sees neighbours, unless pointwise."""
    if pointwise:
        return axis
    fix(axis, "a window")
    return fixed_axes([size], "a window")[0]


def _gather(eqn, inputs: list[Axes]) -> list[Axes]:
    operand, indices = inputs
    (shape, _), (out_shape,) = _shapes(eqn.invars), _shapes(eqn.outvars)
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    batching = dict(
        zip(
            numbers.operand_batching_dims,
            numbers.start_indices_batching_dims,
            strict=True,
        )
    )
    axes: Axes = [None] * len(out_shape)
    offsets = iter(numbers.offset_dims)
    for d, axis in enumerate(operand):
        if d in batching:
            indices[batching[d]] = same(axis, indices[batching[d]])
            continue
        whole = sizes[d] == shape[d] and d not in numbers.collapsed_slice_dims
        if not whole:  # the indices name places along it
            fix(axis, "gather")
        if d not in numbers.collapsed_slice_dims:
            out_d = next(offsets)
            axes[out_d] = axis if whole else fixed_axes([out_shape[out_d]], "gather")[0]
    fix(indices[-1], "gather")
    others = (d for d in range(len(out_shape)) if d not in numbers.offset_dims)
    for out_d, axis in zip(others, indices[:-1], strict=True):
        axes[out_d] = axis
    return [axes]


def _dynamic_slice(eqn, inputs: list[Axes]) -> list[Axes]:
    (shape, *_), (out_shape,) = _shapes(eqn.invars), _shapes(eqn.outvars)
    axes: Axes = []
    for axis, size, out_size in zip(inputs[0], shape, out_shape, strict=True):
        if size == out_size:
            axes.append(axis)
        else:
            fix(axis, "dynamic_slice")
            axes += fixed_axes([out_size], "dynamic_slice")
    return [axes]


def _dynamic_update_slice(eqn, inputs: list[Axes]) -> list[Axes]:
    (shape, update_shape, *_) = _shapes(eqn.invars)
    axes: Axes = []
    for axis, update, size, update_size in zip(
        *inputs[:2], shape, update_shape, strict=True
    ):
        if size == update_size:
            axes.append(same(axis, update))
        else:
            fix(axis, "dynamic_update_slice")
            fix(update, "dynamic_update_slice")
            axes += fixed_axes([size], "dynamic_update_slice")
    return [axes]


_ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt
ceil clamp clz complex conj convert_element_type copy cos cosh digamma div eq erf
erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac imag integer_pow is_finite le
lgamma log log1p logistic lt max min mul name ne neg nextafter not or polygamma
population_count pow real reduce_precision regularized_incomplete_beta rem round rsqrt
select_n sharding_constraint shift_left shift_right_arithmetic shift_right_logical
sign sin sinh sqrt square stop_gradient sub tan tanh xor
""".split()

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(["optimization_barrier", "device_put"], _passes_each),
    **dict.fromkeys(
        [
            f"reduce_{kind}"
            for kind in ("sum", "max", "min", "prod", "and", "or", "xor")
        ],
        _reduce,
    ),
    **dict.fromkeys(["argmax", "argmin"], _arg_reduce),
    **dict.fromkeys(
        ["cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"], _along_axis
    ),
    **dict.fromkeys(
        ["reduce_window_sum", "reduce_window_max", "reduce_window_min"], _reduce_window
    ),
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "iota": _iota,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "transpose": _transpose,
}
"""By the name of JAX's primitive. Operations that call others are `derive`'s."""
