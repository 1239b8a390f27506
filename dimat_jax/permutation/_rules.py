"""Rules that tell how each JAX operation relates the units along its arrays' axes.

A rule gets an operation and the axes of its inputs. It relates these axes to each other
(see `_units`) and returns the axes of the outputs. Each rule must ensure this: if all
axes that hold the same units are permuted alike, then the outputs are permuted in the
same way and do not change otherwise. It is safe to fix too many axes. An operation
without a rule fixes all axes that it touches.
"""

import math
from collections.abc import Callable, Iterator, Sequence

from dimat_jax._jaxprs import Atom, Equation
from dimat_jax.permutation import _index_rules
from dimat_jax.permutation._jaxpr import shape_of
from dimat_jax.permutation._units import (
    ArrayUnits,
    AxisUnits,
    concatenate,
    cut,
    fix,
    fixed,
    fixed_axes,
    product,
    same,
    split,
    unknown,
)

__all__ = ["RULES", "Rule"]

Rule = Callable[[Equation, list[ArrayUnits]], list[ArrayUnits]]
"""`rule(eqn, inputs) -> outputs`: from the axes of all inputs to those of all outputs.

`eqn` is an equation of a jaxpr.
"""


def _shapes(atoms: Sequence[Atom]) -> list[tuple[int, ...]]:
    return [shape_of(atom) for atom in atoms]


def _fix_all(axes: ArrayUnits, reason: str) -> None:
    for axis in axes:
        fix(axis, reason)


def _elementwise(eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
    # Scalars are broadcast to any shape, and axes of size 1 (None) to any size.
    rank = len(shape_of(eqn.outvars[0]))
    full = [axes for axes in inputs if len(axes) == rank]
    axes = [same(*column) for column in zip(*full, strict=True)]
    return [list(axes) for _ in eqn.outvars]


def _passes_each(eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
    del eqn
    return inputs


def _passes_nothing(eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
    del eqn, inputs
    return []


def _transpose(eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
    return [[inputs[0][d] for d in eqn.params["permutation"]]]


def _squeeze(eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
    dropped = eqn.params["dimensions"]
    return [[axis for d, axis in enumerate(inputs[0]) if d not in dropped]]


def _broadcast_in_dim(eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
    axes: ArrayUnits = [None] * len(eqn.params["shape"])
    for axis, d in zip(inputs[0], eqn.params["broadcast_dimensions"], strict=True):
        axes[d] = axis
    return [axes]


def _reduce(eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
    # The sum (or the maximum) over some units does not depend on their order.
    reduced = eqn.params["axes"]
    return [[axis for d, axis in enumerate(inputs[0]) if d not in reduced]]


def _arg_reduce(eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
    for d in eqn.params["axes"]:
        fix(inputs[0][d], eqn.primitive.name)
    return _reduce(eqn, inputs)


def _along_axis(eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
    """The rule of cumulative sums and the like: the order along one axis matters."""
    (axes,), d = inputs, eqn.params["axis"]
    # The result is fixed even for a uniform axis: cumulative sums of ones differ.
    axes[d] = fixed(shape_of(eqn.outvars[0])[d], eqn.primitive.name, axes[d])
    return [axes]


def _rev(eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
    for d in eqn.params["dimensions"]:
        fix(inputs[0][d], "rev")
    return inputs


def _iota(eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
    shape, d = eqn.params["shape"], eqn.params["dimension"]
    axes: ArrayUnits = [None] * len(shape)
    axes[d] = fixed(shape[d], "iota")
    return [axes]


def _bitcast(eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
    """The rule of bitcasts: the parts of a wider number lie along a last axis."""
    (axes,), (shape,), name = inputs, _shapes(eqn.outvars), eqn.primitive.name
    for axis in axes[len(shape) :]:
        fix(axis, name)
    return [[*axes[: len(shape)], *fixed_axes(shape[len(axes) :], name)]]


def _reshape(eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
    (old,), (new,) = _shapes(eqn.invars[:1]), _shapes(eqn.outvars)
    if 0 in new:
        return [[None] * len(new)]
    # A reshape in Fortran's order has `dimensions`: it transposes first.
    order = eqn.params["dimensions"] or range(len(old))
    old, units = [old[d] for d in order], [inputs[0][d] for d in order]
    axes: ArrayUnits = []
    for old_dims, new_dims in _aligned_blocks(old, new):
        whole = product([units[d] for d in old_dims], [old[d] for d in old_dims])
        axes += split(whole, [new[d] for d in new_dims])
    return [axes]


def _aligned_blocks(
    old: Sequence[int], new: Sequence[int]
) -> Iterator[tuple[range, range]]:
    """Yields the shortest runs of old and new dimensions that have equal sizes."""
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


def _concatenate(eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
    dimension = eqn.params["dimension"]
    sizes = [shape[dimension] for shape in _shapes(eqn.invars)]
    columns = zip(*inputs, strict=True)
    return [
        [
            concatenate(column, sizes) if d == dimension else same(*column)
            for d, column in enumerate(columns)
        ]
    ]


def _stack(eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
    axes = [same(*column) for column in zip(*inputs, strict=True)]
    axes.insert(eqn.params["axis"], fixed(len(inputs), "stack"))
    return [axes]


def _unstack(eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
    fix(inputs[0].pop(eqn.params["axis"]), "unstack")
    return [list(inputs[0]) for _ in eqn.outvars]


def _tile(eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
    (shape,), repetitions = _shapes(eqn.invars), eqn.params["reps"]
    return [
        [
            product([None, axis], [n_times, size])
            for axis, n_times, size in zip(inputs[0], repetitions, shape, strict=True)
        ]
    ]


def _split(eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
    dimension = eqn.params["axis"]
    parts = cut(inputs[0][dimension], [int(size) for size in eqn.params["sizes"]])
    return [
        [part if d == dimension else axis for d, axis in enumerate(inputs[0])]
        for part in parts
    ]


def _slice(eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    (shape,) = _shapes(eqn.invars)
    strides = eqn.params["strides"] or [1] * len(shape)
    axes: ArrayUnits = []
    for axis, size, start, limit, stride in zip(
        inputs[0], shape, starts, limits, strides, strict=True
    ):
        if (start, limit, stride) == (0, size, 1):
            axes.append(axis)
        elif stride == 1:
            axes.append(cut(axis, [start, limit - start, size - limit])[1])
        elif axis is None:
            axes.append(None)
        else:
            n_places = len(range(start, limit, stride))
            axes.append(fixed(n_places, "a slice with strides", axis))
    return [axes]


def _pad(eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
    (shape,) = _shapes(eqn.invars[:1])
    (padded,) = _shapes(eqn.outvars)
    axes: ArrayUnits = []
    for d, (low, high, interior) in enumerate(eqn.params["padding_config"]):
        if low == high == interior == 0:
            axes.append(inputs[0][d])
        elif interior == 0 and low >= 0 and high >= 0:
            # All of the padding has one value, so it is uniform.
            parts = [None, inputs[0][d], None]
            axes.append(concatenate(parts, [int(low), shape[d], int(high)]))
        else:
            axes.append(fixed(padded[d], "pad", inputs[0][d]))
    return [axes]


def _dot_general(eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
    contracted, batched = eqn.params["dimension_numbers"]
    lhs, rhs = inputs
    for left, right in zip(*contracted, strict=True):
        same(lhs[left], rhs[right])
    axes = [same(lhs[left], rhs[right]) for left, right in zip(*batched, strict=True)]
    for side, operand in enumerate(inputs):
        taken = {*contracted[side], *batched[side]}
        axes += [axis for d, axis in enumerate(operand) if d not in taken]
    return [axes]


def _convolution(eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
    lhs, rhs = inputs
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    (shape,) = _shapes(eqn.outvars)
    _, kernel = _shapes(eqn.invars)
    (batch, channels, *space) = numbers.lhs_spec
    (outputs, inputs_of_group, *kernel_space) = numbers.rhs_spec
    # The gradients of grouped convolutions have batch groups.
    if eqn.params["batch_group_count"] > 1:
        _fix_all([*lhs, *rhs], "a convolution of batch groups")
        return [fixed_axes(shape, "a convolution of batch groups")]
    # Each group of output channels reads its own group of input channels. So groups
    # are permuted as blocks, and the channels within are permuted alike in all groups.
    sizes = [groups, kernel[inputs_of_group]]
    group, within = split(lhs[channels], sizes)
    same(within, rhs[inputs_of_group])
    sizes = [groups, kernel[outputs] // groups]
    out_group, out_within = split(rhs[outputs], sizes)
    if group is not None or out_group is not None:
        group = same(group or unknown(groups), out_group)
    axes: ArrayUnits = [None] * len(shape)
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


def _reduce_window(eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
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


def _windowed(axis: AxisUnits, size: int, pointwise: bool) -> AxisUnits:
    """The axis along which a window slides.

    The axis is fixed, because a window reads neighbours, unless it is pointwise.
    """
    return axis if pointwise else fixed(size, "a window", axis)


_ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt
ceil clamp clz complex conj convert_element_type copy cos cosh digamma div eq erf
erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac imag integer_pow is_finite le
lgamma log log1p logistic lt max min mul mulhi name ne neg nextafter not or polygamma
population_count pow real reduce_precision regularized_incomplete_beta rem round rsqrt
select_n sharding_constraint shift_left shift_right_arithmetic shift_right_logical
sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta
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
    # `vmap` turns a collective over its named axis into a reduction of a dimension. (It
    # turns other collectives into slices, reshapes and broadcasts.)
    **dict.fromkeys(["psum", "psum_invariant", "pmax", "pmin"], _reduce),
    **dict.fromkeys(["argmax", "argmin"], _arg_reduce),
    **dict.fromkeys(
        ["cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"], _along_axis
    ),
    **dict.fromkeys(
        ["reduce_window_sum", "reduce_window_max", "reduce_window_min"], _reduce_window
    ),
    **dict.fromkeys(
        [f"scatter{kind}" for kind in ("", "-add", "-sub", "-mul", "-min", "-max")],
        _index_rules.scatter,
    ),
    # Prints and callbacks for debugging have no outputs that the model reads.
    **dict.fromkeys(["debug_callback", "debug_print"], _passes_nothing),
    "bitcast_convert_type": _bitcast,
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "dot_general": _dot_general,
    "dynamic_slice": _index_rules.dynamic_slice,
    "dynamic_update_slice": _index_rules.dynamic_update_slice,
    "gather": _index_rules.gather,
    "iota": _iota,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "sort": _index_rules.sort,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "top_k": _index_rules.top_k,
    "transpose": _transpose,
    "unstack": _unstack,
}
"""The rules by the names of JAX's primitives.

Calls, loops and branches are not here: `_trace` follows them into their jaxprs.
"""
