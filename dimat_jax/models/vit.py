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
from dimat_jax.models._settings import DTYPE, WIDTH, ModelError
from dimat_jax.models._transformer import Block, block_spec, sizes
from dimat_jax.models.classifier import tap
from dimat_jax.permutation import PermutationSpec
from dimat_jax.permutation._layers import conv, dense, layer_norm

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
            block = Block(
                self.heads, self.head_dim, self.mlp_dim, self.dtype, name=f"block{i}"
            )
            x = block(x)
        x = nn.LayerNorm(epsilon=EPSILON, dtype=self.dtype, name="norm")(x)
        x = x.mean(axis=1)
        return nn.Dense(self.n_classes, dtype=self.dtype, name="head")(x).astype(
            jnp.float32
        )


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
    dtype = dtype or jnp.float32
    return ViT(n_classes, patch, depth, *sizes(width, dim, heads), dtype)


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
        of_block = block_spec(f"block{i}")
        axes |= of_block[0]
        taps |= of_block[1]
    axes |= layer_norm("norm", "stream")
    axes |= dense("head", "stream", None)
    return PermutationSpec(axes, taps)


_record = partial(ModelRecord, module=ViT, spec=permutation_spec)

RECORDS = (_record("vit", vit, (WIDTH, DTYPE)),)
