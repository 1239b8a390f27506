"""Pytrees: leaves addressed by path, and agents stacked on a leading axis.

A leaf's path joins the keys that lead to the leaf with "/", for containers of any kind:
`variables["params"]["Conv_0"]["kernel"]` has the path "params/Conv_0/kernel", and
`module.layers[0].weight` has the path "layers/0/weight".
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "PyTree",
    "as_arrays",
    "exact_dtype",
    "flatten",
    "is_inexact",
    "map_with_path",
    "nbytes",
    "stack",
    "take",
    "unstack",
]

PyTree = Any


def _path_string(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of a pytree by path, in the order of the tree.

    Raises:
        ValueError: two leaves have the same path.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    flat = {_path_string(path): leaf for path, leaf in leaves}
    if len(flat) < len(leaves):
        raise ValueError('two leaves have the same path; do keys contain "/"?')
    return flat


def as_arrays(tree: PyTree) -> PyTree:
    """Makes NumPy arrays of the leaves that JAX does not take, as PyTorch's tensors.

    Leaves that no library can turn into an array stay as they are.
    """

    def convert(leaf):
        known = isinstance(leaf, jax.Array | np.ndarray | np.generic)
        if known or not hasattr(leaf, "__array__"):
            return leaf
        return np.asarray(leaf.detach() if hasattr(leaf, "detach") else leaf)

    return jax.tree.map(convert, tree)


def map_with_path(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Maps `fn(path, leaf, *other_leaves)` over a pytree's leaves."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: fn(_path_string(path), *leaves), tree, *rest
    )


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Stacks the leaves of structurally equal trees on a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(tree: PyTree) -> list[PyTree]:
    """Splits stacked leaves: one tree for each index. The inverse of `stack`."""
    (size,) = {leaf.shape[0] for leaf in jax.tree.leaves(tree)}
    return [take(tree, i) for i in range(size)]


def take(tree: PyTree, indices: Any) -> PyTree:
    """Indexes the leading axis of every leaf."""
    return jax.tree.map(lambda leaf: leaf[indices], tree)


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf holds real or complex numbers, so that it can be averaged."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def exact_dtype(dtype: Any) -> np.dtype:
    """The dtype in which arrays of a given inexact dtype are summed.

    float32 for float16 and bfloat16, and otherwise the dtype itself: a complex array
    keeps its imaginary part, and float64 its digits.
    """
    dtype = jnp.dtype(dtype)
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def nbytes(tree: PyTree) -> int:
    """Counts the bytes of a tree of arrays or `jax.ShapeDtypeStruct`s.

    The result is a Python int because int32, JAX's default, overflows at 2 GiB.
    """
    return sum(
        int(np.prod(leaf.shape, dtype=object)) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
