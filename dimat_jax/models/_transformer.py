"""The block that the vision transformer and the language model consist of."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dimat_jax.models._norm import EPSILON
from dimat_jax.models._settings import ModelError, scaled
from dimat_jax.models.classifier import tap
from dimat_jax.permutation._layers import dense, dense_general, layer_norm
from dimat_jax.permutation._spec import Axes

__all__ = ["Block", "block_spec", "sizes"]


class Block(nn.Module):
    """An attention and an MLP. Each normalises the stream and adds to it.

    Attributes:
        heads: the number of heads of the attention.
        head_dim: the number of dimensions of each head's queries, keys and values.
        mlp_dim: the number of hidden units of the MLP.
        dtype: the dtype of activations. Parameters are float32.
        causal: whether a token attends to itself and to those before it alone.
    """

    heads: int
    head_dim: int
    mlp_dim: int
    dtype: DTypeLike
    causal: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens stream"]):
        norm = partial(nn.LayerNorm, epsilon=EPSILON, dtype=self.dtype)
        project = partial(
            nn.DenseGeneral, (self.heads, self.head_dim), dtype=self.dtype
        )
        y = norm(name="norm1")(x)
        query = project(name="query")(y)
        key = project(name="key")(y)
        value = project(name="value")(y)
        tap(self, "queries", query)
        tap(self, "keys", key)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * self.head_dim**-0.5
        # In bfloat16 the attention weights would not add up to one.
        scores = scores.astype(jnp.float32)
        if self.causal:
            seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
            scores = jnp.where(seen, scores, -jnp.inf)
        attention = nn.softmax(scores).astype(self.dtype)
        tap(self, "attention", attention)
        y = jnp.einsum("bhqk,bkhd->bqhd", attention, value)
        tap(self, "attended", y)
        x = x + nn.DenseGeneral(
            x.shape[-1], axis=(-2, -1), dtype=self.dtype, name="out"
        )(y)
        y = norm(name="norm2")(x)
        y = nn.gelu(nn.Dense(self.mlp_dim, dtype=self.dtype, name="mlp_in")(y))
        tap(self, "mlp", y)
        x = x + nn.Dense(x.shape[-1], dtype=self.dtype, name="mlp_out")(y)
        tap(self, "stream", x)
        return x


def sizes(width: float, dim: int, heads: int) -> tuple[int, int, int, int]:
    """The stream's dimensions, the heads, the dimensions of a head, the MLP's units.

    The heads share `width * dim` dimensions equally. The MLPs are 4 times as wide as
    the stream.

    Raises:
        ModelError: `width * dim` is not a whole number, or not a multiple of `heads`.
    """
    (stream,) = scaled(width, dim)
    if stream % heads:
        raise ModelError(f"{stream} dimensions cannot be split over {heads} heads")
    return stream, heads, stream // heads, 4 * stream


def block_spec(block: str) -> tuple[dict[str, Axes], dict[str, Axes]]:
    """Declares the axes and the taps of a block, by its name in the model.

    Its groups are the residual stream and four of its own; see `vit.permutation_spec`.
    """
    heads, qk, v, mlp = (f"{block}/{name}" for name in ("heads", "qk", "v", "mlp"))
    axes = layer_norm(f"{block}/norm1", "stream")
    axes |= dense_general(f"{block}/query", ["stream"], [heads, qk])
    axes |= dense_general(f"{block}/key", ["stream"], [heads, qk])
    axes |= dense_general(f"{block}/value", ["stream"], [heads, v])
    axes |= dense_general(f"{block}/out", [heads, v], ["stream"])
    axes |= layer_norm(f"{block}/norm2", "stream")
    axes |= dense(f"{block}/mlp_in", "stream", mlp)
    axes |= dense(f"{block}/mlp_out", mlp, "stream")
    taps: dict[str, Axes] = {
        f"{block}/queries": (None, None, heads, qk),
        f"{block}/keys": (None, None, heads, qk),
        f"{block}/attention": (None, heads, None, None),
        f"{block}/attended": (None, None, heads, v),
        f"{block}/mlp": (None, None, mlp),
        f"{block}/stream": (None, None, "stream"),
    }
    return axes, taps
