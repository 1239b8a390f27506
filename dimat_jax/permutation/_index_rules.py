"""What operations that index, sort and update arrays say of their units; see `rules`.

What an index names are places along an axis, so that axis is fixed. All else may move.
"""

from typing import Any

from dimat_jax.permutation._units import Axes, fix, fixed, same

__all__ = [
    "dynamic_slice",
    "dynamic_update_slice",
    "gather",
    "scatter",
    "sort",
    "top_k",
]


def gather(eqn: Any, inputs: list[Axes]) -> list[Axes]:
    """Slices of an operand, one for each index."""
    operand, indices = inputs
    shape, out_shape = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    collapsed, offset_dims = numbers.collapsed_slice_dims, numbers.offset_dims
    batching = _batching(
        numbers.operand_batching_dims, numbers.start_indices_batching_dims
    )
    axes: Axes = [None] * len(out_shape)
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


def scatter(eqn: Any, inputs: list[Axes]) -> list[Axes]:
    """Slices of an operand are replaced, increased, ...: the inverse of `gather`."""
    operand, indices, updates = inputs
    name, numbers = eqn.primitive.name, eqn.params["dimension_numbers"]
    shape, update_shape = (eqn.invars[n].aval.shape for n in (0, 2))
    window_dims = numbers.update_window_dims
    batching = _batching(
        numbers.operand_batching_dims, numbers.scatter_indices_batching_dims
    )
    others = [d for d in range(len(update_shape)) if d not in window_dims]
    for d, axis in zip(others, indices[:-1], strict=True):
        updates[d] = same(axis, updates[d])
        # Where two updates meet, the last one wins; but the order of a sum is free.
        if name == "scatter" and not eqn.params["unique_indices"]:
            fix(updates[d], name)
    fix(indices[-1], name)
    axes: Axes = []
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


def dynamic_slice(eqn: Any, inputs: list[Axes]) -> list[Axes]:
    """A slice that starts where scalars say."""
    shape, sizes = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    return [
        [
            axis if size == whole else fixed(size, "dynamic_slice", axis)
            for axis, whole, size in zip(inputs[0], shape, sizes, strict=True)
        ]
    ]


def dynamic_update_slice(eqn: Any, inputs: list[Axes]) -> list[Axes]:
    """Such a slice is replaced."""
    shape, sizes = (eqn.invars[n].aval.shape for n in (0, 1))
    return [
        [
            same(axis, update)
            if size == whole
            else fixed(whole, "dynamic_update_slice", axis, update)
            for axis, update, whole, size in zip(*inputs[:2], shape, sizes, strict=True)
        ]
    ]


def sort(eqn: Any, inputs: list[Axes]) -> list[Axes]:
    """What is sorted has no order of its own, unless something is sorted along."""
    sorted_d = eqn.params["dimension"]
    axes = [same(*column) for column in zip(*inputs, strict=True)]
    size = eqn.outvars[0].aval.shape[sorted_d]
    # Among equals, the order is the one before.
    along = axes[sorted_d] if len(inputs) > 1 else None
    axes[sorted_d] = fixed(size, "sort", along)
    return [list(axes) for _ in inputs]


def top_k(eqn: Any, inputs: list[Axes]) -> list[Axes]:
    """The largest, and at which places they are."""
    (axes,), d = inputs, eqn.params["axis"]
    axes[d] = fixed(eqn.params["k"], "top_k", axes[d])
    return [list(axes), list(axes)]


def _batching(operand_dims: Any, index_dims: Any) -> dict[int, int]:
    """For a batched dimension of the operand that of the indices."""
    return dict(zip(operand_dims, index_dims, strict=True))
