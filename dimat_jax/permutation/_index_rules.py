"""Rules of the operations that index, sort and update arrays; see `_rules`.

An index names a place along an axis, so that axis is fixed. The other axes may be
permuted.
"""

from collections.abc import Sequence

from dimat_jax._jaxprs import Equation
from dimat_jax.permutation._jaxpr import shape_of
from dimat_jax.permutation._units import ArrayUnits, fix, fixed, same

__all__ = [
    "dynamic_slice",
    "dynamic_update_slice",
    "gather",
    "scatter",
    "sort",
    "top_k",
]


def gather(eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
    """Relates slices of an operand, one for each index, to the operand."""
    operand, indices = inputs
    shape, out_shape = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    collapsed, offset_dims = numbers.collapsed_slice_dims, numbers.offset_dims
    batching = _batching(
        numbers.operand_batching_dims, numbers.start_indices_batching_dims
    )
    axes: ArrayUnits = [None] * len(out_shape)
    offsets = iter(offset_dims)
    for d, axis in enumerate(operand):
        if d in batching:
            indices[batching[d]] = same(axis, indices[batching[d]])
        elif d in collapsed:
            fix(axis, "gather")
        else:
            out_d, whole = next(offsets), sizes[d] == shape[d]
            axes[out_d] = axis if whole else fixed(sizes[d], "gather", axis)
    fix(indices[-1], "gather")
    others = (d for d in range(len(out_shape)) if d not in offset_dims)
    for out_d, axis in zip(others, indices[:-1], strict=True):
        axes[out_d] = axis
    return [axes]


def scatter(eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
    """Relates an operand to updates that replace or increase slices of it.

    This is the inverse of `gather`.
    """
    operand, indices, updates = inputs
    name, numbers = eqn.primitive.name, eqn.params["dimension_numbers"]
    shape, update_shape = (shape_of(eqn.invars[n]) for n in (0, 2))
    window_dims = numbers.update_window_dims
    batching = _batching(
        numbers.operand_batching_dims, numbers.scatter_indices_batching_dims
    )
    others = [d for d in range(len(update_shape)) if d not in window_dims]
    for d, axis in zip(others, indices[:-1], strict=True):
        updates[d] = same(axis, updates[d])
        # If two updates replace the same entry, the last one counts, so their order
        # matters. The order of a sum does not matter.
        if name == "scatter" and not eqn.params["unique_indices"]:
            fix(updates[d], name)
    fix(indices[-1], name)
    axes: ArrayUnits = []
    windows = iter(window_dims)
    for d, axis in enumerate(operand):
        if d in batching:
            axes.append(same(axis, updates[others[batching[d]]]))
        elif d in numbers.inserted_window_dims:
            axes.append(fixed(shape[d], name, axis))
        else:
            update_d = next(windows)
            if update_shape[update_d] == shape[d]:
                axes.append(same(axis, updates[update_d]))
            else:
                axes.append(fixed(shape[d], name, axis, updates[update_d]))
    return [axes]


def dynamic_slice(eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
    """Relates a slice whose start is given by scalars to the whole array."""
    shape, sizes = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    return [
        [
            axis if size == whole else fixed(size, "dynamic_slice", axis)
            for axis, whole, size in zip(inputs[0], shape, sizes, strict=True)
        ]
    ]


def dynamic_update_slice(eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
    """Relates an array to an update that replaces a slice; see `dynamic_slice`."""
    shape, sizes = (shape_of(eqn.invars[n]) for n in (0, 1))
    return [
        [
            same(axis, update)
            if size == whole
            else fixed(whole, "dynamic_update_slice", axis, update)
            for axis, update, whole, size in zip(*inputs[:2], shape, sizes, strict=True)
        ]
    ]


def sort(eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
    """Relates arrays to their sorted versions.

    The result of sorting one array does not depend on the order before. If other
    arrays are sorted along with it, their order among equal keys does depend on it.
    """
    sorted_d = eqn.params["dimension"]
    axes = [same(*column) for column in zip(*inputs, strict=True)]
    size = shape_of(eqn.outvars[0])[sorted_d]
    order_before = axes[sorted_d] if len(inputs) > 1 else None
    axes[sorted_d] = fixed(size, "sort", order_before)
    return [list(axes) for _ in inputs]


def top_k(eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
    """Relates an array to its largest entries and their indices."""
    (axes,), d = inputs, eqn.params["axis"]
    axes[d] = fixed(eqn.params["k"], "top_k", axes[d])
    return [list(axes), list(axes)]


def _batching(operand_dims: Sequence[int], index_dims: Sequence[int]) -> dict[int, int]:
    """For each batched dimension of the operand, the dimension of the indices."""
    return dict(zip(operand_dims, index_dims, strict=True))
