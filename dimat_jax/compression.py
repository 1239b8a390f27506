"""Compressors make messages smaller, and lose a part of their content.

`with_feedback` keeps what a message has lost and adds it to the next message, so that
nothing is lost for good (error feedback, Stich et al. 2018, arXiv 1809.07599;
Karimireddy et al. 2019, arXiv 1901.09847).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from dimat_jax.options import Option, Record, Registry, registry
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
        compress: `compress(tree, key) -> tree` returns what the receiver decompresses,
            in the shapes and dtypes of the message. Leaves that do not hold real or
            complex numbers are sent as they are.
        message: `message(tree) -> tree` returns the compressed message as
            `jax.ShapeDtypeStruct`s, which give its size. Only the shapes and dtypes of
            `tree` matter.
        lossless: whether the receiver gets exactly the message.
        kept: the share omega of a message that arrives, above 0 and at most 1: the mean
            of |x - Q(x)|^2 is (1 - omega) |x|^2. For top_k omega is a rule of thumb: it
            holds for a long message of evenly spread numbers, and differences of which
            the largest ones are sent again and again become evenly spread. For the
            others omega is that of a long message of independent normal numbers.
        random_places: whether the places that are sent are random, whatever the
            message. On average, the same share of every message arrives then.
    """

    compress: Callable[[PyTree, Key[Array, ""]], PyTree]
    message: Callable[[PyTree], PyTree]
    lossless: bool = False
    kept: float = 1.0
    random_places: bool = False


def _leafwise(
    compress: Callable[[Array, Key[Array, ""]], Array],
    size: Callable[[Any], int],
    kept: float,
) -> Compressor:
    """Makes a compressor that treats every leaf by itself, in float32.

    A complex leaf is treated as a real leaf whose last axis, of length 2, holds the
    real and the imaginary part.

    Args:
        compress: `compress(leaf, key)` for one real float32 leaf.
        size: `size(leaf)` is the number of bytes of a compressed leaf.
        kept: the share of a message that arrives; see `Compressor.kept`.
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

    return Compressor(compress_tree, message, kept=kept)


def none() -> Compressor:
    """Messages are sent as they are."""
    return Compressor(lambda tree, key: tree, lambda tree: tree, lossless=True)


def float16() -> Compressor:
    """Numbers are rounded to half precision, two bytes each."""
    return _rounded(jnp.float16)


def bfloat16() -> Compressor:
    """Numbers are rounded to bfloat16, two bytes each."""
    return _rounded(jnp.bfloat16)


def _rounded(dtype: Any) -> Compressor:
    def compress(x, key):
        del key
        # Numbers that are too large for the dtype are sent as its largest number.
        limit = float(jnp.finfo(dtype).max)
        return jnp.clip(x, -limit, limit).astype(dtype)

    # Rounding changes a number by half a unit in its last place at most.
    kept = 1 - (float(jnp.finfo(dtype).eps) / 2) ** 2
    return _leafwise(compress, lambda leaf: 2 * math.prod(leaf.shape), kept)


def int8() -> Compressor:
    """Numbers are rounded to one of 255 levels, at random and without bias.

    A number takes one byte, and each leaf a scale of four bytes. This is QSGD's
    quantisation (Alistarh et al. 2017, arXiv 1610.02132), with the largest absolute
    value of a leaf as its scale.
    """

    def compress(x, key):
        scale = jnp.abs(x).max(initial=0) / 127
        levels = x / jnp.where(scale > 0, scale, 1)
        rounded = jnp.floor(levels + jax.random.uniform(key, x.shape))
        return jnp.clip(rounded, -127, 127) * scale

    # The largest of a hundred thousand normal numbers is about 4.5 standard deviations.
    # A number is at a random place between two levels, so the mean squared error of
    # rounding it is a sixth of the squared distance of the levels.
    kept = 1 - (4.5 / 127) ** 2 / 6
    return _leafwise(compress, lambda leaf: math.prod(leaf.shape) + 4, kept)


def sign() -> Compressor:
    """Only the signs are sent, one bit each, and each array's mean absolute value.

    1-bit SGD is compressed like this.
    """

    def compress(x, key):
        del key
        return jnp.where(x >= 0, 1.0, -1.0) * jnp.abs(x).mean()

    kept = 2 / math.pi  # the squared mean of |x| for a normal number x of variance 1
    return _leafwise(compress, lambda leaf: -(-math.prod(leaf.shape) // 8) + 4, kept)


def top_k(fraction: float = FRACTION.default) -> Compressor:
    """Only the numbers of largest absolute value are sent, from each array.

    A number takes eight bytes: four are for its place.
    """
    FRACTION.check(fraction)

    def compress(x, key):
        del key
        flat = x.ravel()
        places = jax.lax.top_k(jnp.abs(flat), _count(x, fraction))[1]
        return jnp.zeros_like(flat).at[places].set(flat[places]).reshape(x.shape)

    return _leafwise(
        compress,
        lambda leaf: 8 * _count(leaf, fraction),
        1 - (1 - fraction) ** 3,
    )


def random_k(fraction: float = FRACTION.default) -> Compressor:
    """Only numbers at random places are sent, from each array.

    A number takes four bytes. The seed that gives the places takes eight.
    """
    FRACTION.check(fraction)

    def compress(x, key):
        places = jax.random.permutation(key, x.size)[: _count(x, fraction)]
        flat = x.ravel()
        return jnp.zeros_like(flat).at[places].set(flat[places]).reshape(x.shape)

    compressor = _leafwise(
        compress, lambda leaf: 4 * _count(leaf, fraction) + 8, fraction
    )
    return compressor._replace(random_places=True)


def _count(leaf: Any, fraction: float) -> int:
    """The number of a leaf's entries that are sent: at least one, if there are any."""
    size = math.prod(leaf.shape)
    return min(max(round(fraction * size), 1), size)


def announce(
    compressor: Compressor, exact: PyTree, known: PyTree, key: Key[Array, ""]
) -> PyTree:
    """Computes the estimate that others have of a tree after a message: x^ + Q(x - x^).

    The sender compresses the difference between its tree x and the estimate x^ that the
    others have. What Q loses stays in the difference, and is sent with later messages.

    Args:
        compressor: the compressor Q.
        exact: the sender's tree x.
        known: the estimate x^ that the others have so far, shaped like `exact`.
        key: the randomness of Q; the key is consumed.
    """
    difference = jax.tree.map(jnp.subtract, exact, known)
    return jax.tree.map(jnp.add, known, compressor.compress(difference, key))


def with_feedback(
    compressor: Compressor, message: PyTree, residual: PyTree, key: Key[Array, ""]
) -> tuple[PyTree, PyTree]:
    """Sends a message together with what earlier messages have lost.

    Args:
        compressor: the compressor of the messages.
        message: the message to send.
        residual: what earlier messages have lost, shaped like the message; 0 at first.
        key: the randomness of the compressor; the key is consumed.

    Returns:
        what the receiver gets, and the new residual.
    """
    total = jax.tree.map(lambda m, r: m + r if is_inexact(m) else m, message, residual)
    received = compressor.compress(total, key)
    lost = jax.tree.map(
        lambda t, r: t - r if is_inexact(t) else jnp.zeros_like(t), total, received
    )
    return received, lost


COMPRESSORS: Registry[Record[Compressor]] = registry(
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
