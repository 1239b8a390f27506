"""Permutations as a group that acts on variables.

All functions are pure and work under `jax.jit` and `jax.vmap`; a permutation's length
is static, its values may be traced.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Int32, Key

from dimat_jax.permutation._spec import (
    Axis,
    Concat,
    PermutationSpec,
    PermutationSpecError,
    Product,
    axis_groups,
    group_sizes,
)
from dimat_jax.tree import PyTree, map_with_path

__all__ = [
    "Perms",
    "apply",
    "compose",
    "identity",
    "invert",
    "permute_leaf",
    "random",
]

Perms = dict[str, Int32[Array, " _units"]]
"""A permutation for each group.

`perm[u]` is the permutee's unit that lands on the reference's unit `u`. Groups differ
in size, so the length of one says nothing about that of another.
"""

AnyPerms = Mapping[str, Array | np.ndarray]
"""Permutations as arguments: they may also lie on the host, with any integer dtype."""


def apply(spec: PermutationSpec, perms: AnyPerms, variables: PyTree) -> PyTree:
    """Permutes the units of a network: `jnp.take(w, perm, axis)` on every axis.

    Args:
        spec: covers every leaf of `variables`.
        perms: a permutation for every group of the spec.
        variables: any pytree of arrays.

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

    return map_with_path(permute, variables)


def permute_leaf(axes: tuple[Axis, ...], perms: AnyPerms, leaf: ArrayLike) -> Any:
    """Permutes one array whose dimensions are described by `axes`.

    Raises:
        PermutationSpecError: the array has another number of dimensions than `axes`,
            or a permutation has another length than its axis.
    """
    shape = jnp.shape(leaf)
    if len(axes) != len(shape):
        raise PermutationSpecError(f"shape {shape} does not have the axes {axes}")
    for dimension, (axis, size) in enumerate(zip(axes, shape, strict=True)):
        if any(axis_groups(axis)):
            indices = _axis_indices(axis, perms, size)
            # With another length, take would silently drop, repeat or invent units.
            if len(indices) != size:
                raise PermutationSpecError(
                    f"axis {dimension} has size {size}, but {axis!r} permutes "
                    f"{len(indices)} units"
                )
            leaf = jnp.take(leaf, indices, axis=dimension)
    return leaf


def _axis_indices(axis: Axis, perms: AnyPerms, size: int) -> Array:
    """For each index of an axis, the index that its content comes from: int32[size]."""
    match axis:
        case str():
            return jnp.asarray(perms[axis])
        case Product(factors):
            given = 1  # the product of all factors but the None
            for factor in factors:
                if factor is not None:
                    given *= len(perms[factor]) if isinstance(factor, str) else factor
            indices = jnp.zeros(1, jnp.int32)
            for factor in factors:
                match factor:
                    case str():
                        inner = jnp.asarray(perms[factor])
                    case None:
                        inner = jnp.arange(size // given, dtype=jnp.int32)
                    case _:
                        inner = jnp.arange(factor, dtype=jnp.int32)
                indices = (indices[:, None] * len(inner) + inner[None, :]).reshape(-1)
            return indices
        case Concat(parts):
            pieces, offset = [], 0
            for part, part_size in parts:
                pieces.append(offset + _axis_indices(part, perms, part_size))
                offset += part_size
            return jnp.concatenate(pieces)
        case _:
            return jnp.arange(size, dtype=jnp.int32)


def identity(spec: PermutationSpec, variables: PyTree) -> Perms:
    """The permutations that leave all units in their places."""
    sizes = group_sizes(spec, variables)
    return {group: jnp.arange(size, dtype=jnp.int32) for group, size in sizes.items()}


def random(spec: PermutationSpec, variables: PyTree, key: Key[Array, ""]) -> Perms:
    """Uniformly random permutations, independent over groups. The key is consumed."""
    sizes = group_sizes(spec, variables)
    keys = jax.random.split(key, len(sizes)) if sizes else ()
    return {
        group: jax.random.permutation(group_key, size).astype(jnp.int32)
        for group_key, (group, size) in zip(keys, sizes.items(), strict=True)
    }


def invert(perms: AnyPerms) -> Perms:
    """The permutations that undo `perms`."""
    return {group: jnp.argsort(perm).astype(jnp.int32) for group, perm in perms.items()}


def compose(first: AnyPerms, then: AnyPerms) -> Perms:
    """Composes two permutations: `compose(first, then)[u] = first[then[u]]`.

    `apply(spec, compose(first, then), x)` is
    `apply(spec, then, apply(spec, first, x))`.

    Raises:
        PermutationSpecError: the two do not have the same groups.
    """
    if first.keys() != then.keys():
        raise PermutationSpecError(
            f"cannot compose permutations of groups {sorted(first)} and {sorted(then)}"
        )
    return {
        group: jnp.take(jnp.asarray(perm), jnp.asarray(then[group]))
        for group, perm in first.items()
    }
