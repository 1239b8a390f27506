"""A small vision transformer (Dosovitskiy et al., 2021) for small images.

Each block normalises the residual stream of patches and adds an attention, then it
normalises again and adds an MLP (pre-LN). Positions are learnt. The head reads the mean
over the tokens, so there is no class token. The attention is written out, so that its
queries, keys and weights can be taps.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from dimat_jax.models._norm import EPSILON
from dimat_jax.models._record import ModelRecord
from dimat_jax.models._settings import DTYPE, WIDTH, ModelError, scaled
from dimat_jax.models.classifier import tap
from dimat_jax.permutation import PermutationSpec
from dimat_jax.permutation._layers import conv, dense, dense_general, layer_norm

__all__ = ["RECORDS", "ViT", "permutation_spec", "vit"]


class ViT(nn.Module):
    """A vision transformer.

    Attributes:
        n_classes: the number of logits.
        patch: the side of a patch, in pixels. It must divide the sides of images.
        depth: the number of blocks.
        dim: the number of dimensions of the residual stream.
        heads: the number of heads of each attention.
        head_dim: the number of dimensions of each head's queries, keys and values.
        mlp_dim: the number of hidden units of each block's MLP.
        dtype: the dtype of activations. Parameters are float32.
    """

    n_classes: int
    patch: int
    depth: int
    dim: int
    heads: int
    head_dim: int
    mlp_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        *,
        train: bool,
        mask: Bool[Array, " batch"] | None = None,
    ) -> Float[Array, "batch classes"]:
        """Computes logits. `train` and `mask` make no difference.

        Each example is computed by itself, as there are no batch statistics.

        Raises:
            ModelError: the patch size does not divide the sides of the images.
        """
        del train, mask
        height, width = x.shape[1:3]
        if height % self.patch or width % self.patch:
            raise ModelError(
                f"images of {height}x{width} pixels are not made of whole patches of "
                f"{self.patch}x{self.patch}"
            )
        x = nn.Conv(
            self.dim,
            (self.patch, self.patch),
            strides=self.patch,
            padding="VALID",
            dtype=self.dtype,
            name="embed",
        )(x.astype(self.dtype))
        x = x.reshape(len(x), -1, self.dim)
        position = self.param(
            "position", nn.initializers.normal(0.02), (x.shape[1], self.dim)
        )
        x = x + position.astype(self.dtype)[None]
        tap(self, "embedded", x)
        for i in range(self.depth):
            x = _Block(
                self.heads, self.head_dim, self.mlp_dim, self.dtype, name=f"block{i}"
            )(x)
        x = nn.LayerNorm(epsilon=EPSILON, dtype=self.dtype, name="norm")(x)
        x = x.mean(axis=1)
        return nn.Dense(self.n_classes, dtype=self.dtype, name="head")(x).astype(
            jnp.float32
        )


class _Block(nn.Module):
    """An attention and an MLP. Each normalises the stream and adds to it."""

    heads: int
    head_dim: int
    mlp_dim: int
    dtype: DTypeLike

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
        attention = nn.softmax(scores.astype(jnp.float32)).astype(self.dtype)
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


def vit(
    *,
    n_classes: int,
    width: float = WIDTH.default,
    patch: int = 4,
    depth: int = 4,
    dim: int = 128,
    heads: int = 4,
    dtype: Any = None,
) -> ViT:
    """Builds a ViT with a residual stream of `width * dim` dimensions.

    The heads share the dimensions equally. The MLPs are 4 times as wide as the stream.

    Raises:
        ModelError: `width * dim` is not a whole number, or not a multiple of `heads`.
    """
    (stream,) = scaled(width, dim)
    if stream % heads:
        raise ModelError(f"{stream} dimensions cannot be split over {heads} heads")
    return ViT(
        n_classes,
        patch,
        depth,
        stream,
        heads,
        stream // heads,
        4 * stream,
        dtype or jnp.float32,
    )


def permutation_spec(model: ViT) -> PermutationSpec:
    """Declares a group for the residual stream, and four groups in each block.

    `heads` permutes the heads as blocks. `qk` permutes the dimensions of queries and
    keys, and `v` those of values; both permute them alike in all heads. `mlp` permutes
    the hidden units of the MLP. (The full symmetry is larger: each head could permute
    its dimensions differently. The spec does not declare this.)
    """
    axes = conv("embed", None, "stream", bias=True)
    axes["params/position"] = (None, "stream")
    taps = {"embedded": (None, None, "stream")}
    for i in range(model.depth):
        block = f"block{i}"
        heads, qk, v, mlp = (f"{block}/{name}" for name in ("heads", "qk", "v", "mlp"))
        axes |= layer_norm(f"{block}/norm1", "stream")
        axes |= dense_general(f"{block}/query", ["stream"], [heads, qk])
        axes |= dense_general(f"{block}/key", ["stream"], [heads, qk])
        axes |= dense_general(f"{block}/value", ["stream"], [heads, v])
        axes |= dense_general(f"{block}/out", [heads, v], ["stream"])
        axes |= layer_norm(f"{block}/norm2", "stream")
        axes |= dense(f"{block}/mlp_in", "stream", mlp)
        axes |= dense(f"{block}/mlp_out", mlp, "stream")
        taps |= {
            f"{block}/queries": (None, None, heads, qk),
            f"{block}/keys": (None, None, heads, qk),
            f"{block}/attention": (None, heads, None, None),
            f"{block}/attended": (None, None, heads, v),
            f"{block}/mlp": (None, None, mlp),
            f"{block}/stream": (None, None, "stream"),
        }
    axes |= layer_norm("norm", "stream")
    axes |= dense("head", "stream", None)
    return PermutationSpec(axes, taps)


_record = partial(ModelRecord, module=ViT, spec=permutation_spec)

RECORDS = (_record("vit", vit, (WIDTH, DTYPE)),)
