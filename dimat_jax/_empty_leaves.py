"""Arrays without elements are left out of files, because Orbax does not write them."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dimat_jax.tree import PyTree

__all__ = ["with_empty", "without_empty"]


def without_empty(tree: PyTree) -> PyTree:
    """Puts `None`, a tree without leaves, in the place of each array of size 0."""
    return jax.tree.map(lambda leaf: None if _is_empty(leaf) else leaf, tree)


def with_empty(tree: PyTree, like: PyTree) -> PyTree:
    """Puts back the arrays that `without_empty` has left out.

    Args:
        tree: `without_empty(like)`, with arrays as leaves.
        like: The whole tree. Its leaves are `jax.ShapeDtypeStruct`s. Those with a
            sharding become JAX arrays, the others NumPy arrays.
    """
    found = iter(jax.tree.leaves(tree))
    return jax.tree.map(
        lambda leaf: _make(leaf) if _is_empty(leaf) else next(found), like
    )


def _is_empty(leaf) -> bool:
    return math.prod(jnp.shape(leaf)) == 0


def _make(leaf: jax.ShapeDtypeStruct) -> jax.Array | np.ndarray:
    if leaf.sharding is None:
        return np.zeros(leaf.shape, leaf.dtype)
    return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
