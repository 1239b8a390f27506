"""Permutations as a group that acts on variables.

All functions are pure and work under `jax.jit` and `jax.vmap`; a permutation's length
is static, its values may be traced.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Int32, Key

from dimat_jax.permutation._sizes import group_shapes
from dimat_jax.permutation._spec import (
    Axis,
    Concat,
    PermutationSpec,
    PermutationSpecError,
    Product,
    axis_groups,
    stack_dimensions,
)
from dimat_jax.tree import PyTree, as_arrays, map_with_path

__all__ = [
    "Perms",
    "apply",
    "compose",
    "identity",
    "invert",
    "permute_leaf",
    "random",
    "take_of_layers",
]

Perms = dict[str, Int32[Array, "*_layers _units"]]
"""A permutation for each group.

`perm[u]` is the permutee's unit that lands on the reference's unit `u`. Groups differ
in size, so the length of one says nothing about that of another. The permutation of a
stacked group (see `Stack`) is int32[layers, units]: it has one row for each layer.
"""

AnyPerms = Mapping[str, Array | np.ndarray]
"""Permutations as arguments: they may also lie on the host, with any integer dtype."""


def apply(spec: PermutationSpec, perms: AnyPerms, variables: PyTree) -> PyTree:
    """Permutes the units of a network: `jnp.take(w, perm, axis)` on every axis.

    Args:
        spec: covers every leaf of `variables`.
        perms: a permutation for every group of the spec.
        variables: any pytree of arrays. PyTorch's tensors become arrays.

    Returns:
        Variables of the same structure, shapes and dtypes.

    Raises:
        PermutationSpecError: the spec does not cover a leaf, a group has no
            permutation, or a permutation has a length that does not fit.
    """
    for group in spec.groups:
        if group not in perms:
            raise PermutationSpecError(f"no permutation for group {group!r}")

    def permute(path, leaf):
        if path not in spec.axes:
            raise PermutationSpecError(f"the spec does not cover the leaf {path!r}")
        try:
            return permute_leaf(spec.axes[path], perms, leaf)
        except PermutationSpecError as error:
            raise PermutationSpecError(f"{path!r}: {error}") from None

    return map_with_path(permute, as_arrays(variables))


def permute_leaf(axes: tuple[Axis, ...], perms: AnyPerms, leaf: ArrayLike) -> Any:
    """Permutes one array whose dimensions are described by `axes`.

    Raises:
        PermutationSpecError: the array has another number of dimensions than `axes`,
            or a permutation has another length, or other layers, than its axis.
    """
    shape = jnp.shape(leaf)
    if len(axes) != len(shape):
        raise PermutationSpecError(f"shape {shape} does not have the axes {axes}")
    stacks = stack_dimensions(axes)
    _check_layers(stacks, perms, shape)
    for dimension, (axis, size) in enumerate(zip(axes, shape, strict=True)):
        groups = list(axis_groups(axis))
        if not groups:
            continue
        over = sorted({d for group in groups for d in stacks[group]})
        own = {group: _spread(perms[group], stacks[group], over) for group in groups}
        indices = _axis_indices(axis, own, size)
        # With another length, take would silently drop, repeat or invent units.
        if indices.shape[-1] != size:
            raise PermutationSpecError(
                f"axis {dimension} has size {size}, but {axis!r} permutes "
                f"{indices.shape[-1]} units"
            )
        if over:
            leaf = take_of_layers(leaf, indices, over, dimension)
        else:
            leaf = jnp.take(leaf, indices, axis=dimension)
    return leaf


def take_of_layers(
    array: ArrayLike, indices: Array, stack_dims: Sequence[int], dimension: int
) -> Array:
    """Takes entries along a dimension, in each layer of a stack by its own indices.

    Args:
        array: the array.
        indices: int32[*layers, units].
        stack_dims: the dimensions of the array along which layers are stacked,
            increasing.
        dimension: the dimension from which entries are taken.
    """
    shape = [1] * jnp.ndim(array)
    for d, size in zip(stack_dims, indices.shape[:-1], strict=True):
        shape[d] = size
    # The units come last in `indices`, but they may come first in the array.
    place = sum(d < dimension for d in stack_dims)
    indices = jnp.moveaxis(indices, -1, place)
    shape[dimension] = indices.shape[place]
    return jnp.take_along_axis(
        jnp.asarray(array), indices.reshape(shape), axis=dimension, mode="clip"
    )


def _check_layers(
    stacks: Mapping[str, tuple[int, ...]], perms: AnyPerms, shape: tuple[int, ...]
) -> None:
    for group, dims in stacks.items():
        layers = tuple(shape[d] for d in dims)
        if jnp.shape(perms[group])[:-1] != layers:
            raise PermutationSpecError(
                f"the permutation of group {group!r} has the shape "
                f"{jnp.shape(perms[group])}, but it needs "
                + (f"one row for each of {layers} layers" if dims else "one axis")
            )


def _spread(perm: ArrayLike, dims: Sequence[int], over: Sequence[int]) -> Array:
    """Adds axes of length 1 to a permutation for the stacks that it does not have."""
    missing = [n for n, d in enumerate(over) if d not in dims]
    return jnp.expand_dims(jnp.asarray(perm), missing)


def _axis_indices(axis: Axis, perms: AnyPerms, size: int) -> Array:
    """For each index of an axis, the index that its content comes from.

    The result is int32[size], or int32[*layers, size] for permutations with layers.
    """
    match axis:
        case str():
            return jnp.asarray(perms[axis])
        case Product(factors):
            given = 1  # the product of all factors but the None
            for factor in factors:
                if factor is not None:
                    is_group = isinstance(factor, str)
                    given *= perms[factor].shape[-1] if is_group else factor
            indices = jnp.zeros(1, jnp.int32)
            for factor in factors:
                match factor:
                    case str():
                        inner = jnp.asarray(perms[factor])
                    case None:
                        inner = jnp.arange(size // given, dtype=jnp.int32)
                    case _:
                        inner = jnp.arange(factor, dtype=jnp.int32)
                n_inner = inner.shape[-1]
                indices = indices[..., :, None] * n_inner + inner[..., None, :]
                indices = indices.reshape(*indices.shape[:-2], -1)
            return indices
        case Concat(parts):
            pieces, offset = [], 0
            for part, part_size in parts:
                pieces.append(offset + _axis_indices(part, perms, part_size))
                offset += part_size
            layers = jnp.broadcast_shapes(*(piece.shape[:-1] for piece in pieces))
            return jnp.concatenate(
                [jnp.broadcast_to(p, (*layers, p.shape[-1])) for p in pieces], axis=-1
            )
        case _:
            return jnp.arange(size, dtype=jnp.int32)


def identity(spec: PermutationSpec, variables: PyTree) -> Perms:
    """The permutations that leave all units in their places."""
    return {
        group: jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape)
        for group, shape in group_shapes(spec, variables).items()
    }


def random(spec: PermutationSpec, variables: PyTree, key: Key[Array, ""]) -> Perms:
    """Uniformly random permutations, independent over groups and over their layers.

    The key is consumed.
    """
    shapes = group_shapes(spec, variables)
    keys = jax.random.split(key, len(shapes)) if shapes else ()

    def draw(group_key, shape):
        if len(shape) == 1:
            return jax.random.permutation(group_key, shape[0]).astype(jnp.int32)
        places = jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape)
        return jax.random.permutation(group_key, places, axis=-1, independent=True)

    return {
        group: draw(group_key, shape)
        for group_key, (group, shape) in zip(keys, shapes.items(), strict=True)
    }


def invert(perms: AnyPerms) -> Perms:
    """The permutations that undo `perms`."""
    return {group: jnp.argsort(perm).astype(jnp.int32) for group, perm in perms.items()}


def compose(first: AnyPerms, then: AnyPerms) -> Perms:
    """Composes two permutations: `compose(first, then)[u] = first[then[u]]`.

    The layers of stacked groups are composed each with its own.

    `apply(spec, compose(first, then), x)` is
    `apply(spec, then, apply(spec, first, x))`.

    Raises:
        PermutationSpecError: the two do not have the same groups.
    """
    if first.keys() != then.keys():
        raise PermutationSpecError(
            f"cannot compose permutations of groups {sorted(first)} and {sorted(then)}"
        )

    def composed(perm, after):
        perm, after = jnp.asarray(perm), jnp.asarray(after)
        if perm.ndim == 1:
            return jnp.take(perm, after)
        return jnp.take_along_axis(perm, after, axis=-1)

    return {group: composed(perm, then[group]) for group, perm in first.items()}
