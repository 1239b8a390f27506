"""Sending less: what arrives of a message, and how many bytes it takes.

A compressor is lossy; `with_feedback` keeps what a message lost and adds it to the
next, so that nothing is lost for good (error feedback, Stich et al. 2018, arXiv
1809.07599; Karimireddy et al. 2019, arXiv 1901.09847).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from dimat_jax.options import Option, Record, registry
from dimat_jax.tree import PyTree, is_inexact, nbytes

__all__ = ["COMPRESSOR", "COMPRESSORS", "Compressor", "announce", "with_feedback"]

FRACTION = Option(
    "compression.fraction",
    0.1,
    "The share of the numbers of each array that is sent.",
    above=0,
    at_most=1,
)


class Compressor(NamedTuple):
    """Lossy compression of one message, a tree of arrays of one agent.

    Attributes:
        compress: `compress(tree, key) -> tree`: what the receiver makes of what was
            sent, in the shapes and dtypes of the message. Leaves that are no real
            numbers are sent as they are.
        message: `message(tree) -> tree` of `jax.ShapeDtypeStruct`s: what is sent, in
            bytes. Shapes and dtypes of `tree` alone matter.
        lossless: whether everything arrives.
    """

    compress: Callable[[PyTree, Key[Array, ""]], PyTree]
    message: Callable[[PyTree], PyTree]
    lossless: bool = False


def _leafwise(
    compress: Callable[[Array, Key[Array, ""]], Array], size: Callable[[Any], int]
) -> Compressor:
    """A compressor that treats every leaf by itself, in float32.

    A complex leaf is treated as a real one that holds both its parts, with a last axis
    of 2.
    """

    def compress_leaf(leaf, key):
        if jnp.iscomplexobj(leaf):
            parts = compress_leaf(jnp.stack([leaf.real, leaf.imag], axis=-1), key)
            return jax.lax.complex(parts[..., 0], parts[..., 1])
        return compress(leaf.astype(jnp.float32), key).astype(leaf.dtype)

    def real_size(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            return size(jax.ShapeDtypeStruct((*leaf.shape, 2), jnp.float32))
        return size(leaf)

    def compress_tree(tree, key):
        leaves, treedef = jax.tree.flatten(tree)
        keys = jax.random.split(key, max(len(leaves), 1))
        sent = [
            compress_leaf(leaf, leaf_key) if is_inexact(leaf) else leaf
            for leaf, leaf_key in zip(leaves, keys, strict=False)
        ]
        return treedef.unflatten(sent)

    def message(tree):
        total = sum(
            real_size(leaf) if is_inexact(leaf) else nbytes(leaf)
            for leaf in jax.tree.leaves(tree)
        )
        return jax.ShapeDtypeStruct((total,), jnp.uint8)

    return Compressor(compress_tree, message)


def none() -> Compressor:
    """Everything arrives."""
    return Compressor(lambda tree, key: tree, lambda tree: tree, lossless=True)


def float16() -> Compressor:
    """Rounded to half precision: two bytes a number."""
    return _rounded(jnp.float16)


def bfloat16() -> Compressor:
    """Rounded to bfloat16: two bytes a number."""
    return _rounded(jnp.bfloat16)


def _rounded(dtype: Any) -> Compressor:
    def compress(x, key):
        del key
        # What is too large for half precision is sent as its largest number.
        limit = float(jnp.finfo(dtype).max)
        return jnp.clip(x, -limit, limit).astype(dtype)

    return _leafwise(compress, lambda leaf: 2 * math.prod(leaf.shape))


def int8() -> Compressor:
    """Rounded at random to 255 levels, without bias: a byte a number, and a scale.

    QSGD's quantisation (Alistarh et al. 2017, arXiv 1610.02132) with the largest
    absolute value of a leaf for its scale.
    """

    def compress(x, key):
        scale = jnp.abs(x).max(initial=0) / 127
        levels = x / jnp.where(scale > 0, scale, 1)
        rounded = jnp.floor(levels + jax.random.uniform(key, x.shape))
        return jnp.clip(rounded, -127, 127) * scale

    return _leafwise(compress, lambda leaf: math.prod(leaf.shape) + 4)


def sign() -> Compressor:
    """The signs, times the mean absolute value: a bit a number (1-bit SGD)."""

    def compress(x, key):
        del key
        return jnp.where(x >= 0, 1.0, -1.0) * jnp.abs(x).mean()

    return _leafwise(compress, lambda leaf: -(-math.prod(leaf.shape) // 8) + 4)


def top_k(fraction: float = FRACTION.default) -> Compressor:
    """The largest numbers of every leaf: eight bytes each, its place included."""
    FRACTION.check(fraction)

    def compress(x, key):
        del key
        flat = x.ravel()
        places = jax.lax.top_k(jnp.abs(flat), _count(x, fraction))[1]
        kept = jnp.zeros_like(flat).at[places].set(flat[places])
        return kept.reshape(x.shape)

    return _leafwise(compress, lambda leaf: 8 * _count(leaf, fraction))


def random_k(fraction: float = FRACTION.default) -> Compressor:
    """Numbers at random places: four bytes each, and a seed that gives the places."""
    FRACTION.check(fraction)

    def compress(x, key):
        places = jax.random.permutation(key, x.size)[: _count(x, fraction)]
        flat = x.ravel()
        return jnp.zeros_like(flat).at[places].set(flat[places]).reshape(x.shape)

    return _leafwise(compress, lambda leaf: 4 * _count(leaf, fraction) + 8)


def _count(leaf: Any, fraction: float) -> int:
    size = math.prod(leaf.shape)
    return min(max(round(fraction * size), 1), size)


def announce(
    compressor: Compressor, exact: PyTree, known: PyTree, key: Key[Array, ""]
) -> PyTree:
    """The estimate that others have of a tree after one message: x^ + Q(x - x^).

    The sender compresses how its tree x differs from the estimate x^ that the others
    have. What Q loses stays in the difference, and is sent with later messages.

    Args:
        compressor: Q.
        exact: x, the sender's tree.
        known: x^, the estimate that the others have so far, like `exact`.
        key: consumed.
    """
    difference = jax.tree.map(jnp.subtract, exact, known)
    return jax.tree.map(jnp.add, known, compressor.compress(difference, key))


def with_feedback(
    compressor: Compressor, message: PyTree, residual: PyTree, key: Key[Array, ""]
) -> tuple[PyTree, PyTree]:
    """Sends a message and what earlier ones lost.

    Args:
        compressor: of what is sent.
        message: to be sent.
        residual: what was lost so far, like the message; 0 at first.
        key: consumed.

    Returns:
        what arrives, and the new residual.
    """
    meant = jax.tree.map(lambda m, r: m + r if is_inexact(m) else m, message, residual)
    sent = compressor.compress(meant, key)
    lost = jax.tree.map(
        lambda m, s: m - s if is_inexact(m) else jnp.zeros_like(m), meant, sent
    )
    return sent, lost


COMPRESSORS: dict[str, Record[Compressor]] = registry(
    Record("none", none),
    Record("float16", float16),
    Record("bfloat16", bfloat16),
    Record("int8", int8),
    Record("sign", sign),
    Record("top_k", top_k, (FRACTION,)),
    Record("random_k", random_k, (FRACTION,)),
)
"""`COMPRESSORS[name](**options)` builds a `Compressor`."""

COMPRESSOR = Option(
    "compression.name",
    "",
    "How messages are compressed.",
    choices=COMPRESSORS,
    empty="the algorithm's own",
)
