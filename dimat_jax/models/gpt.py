"""A small decoder-only transformer (Radford et al., 2019), a model of texts.

Each block normalises the residual stream of tokens and adds a causal attention, then it
normalises again and adds an MLP (pre-LN). Positions are learnt. Every place of a text
has logits for the token that follows it. The attention is written out, so that its
queries, keys and weights can be taps.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dimat_jax.models._norm import EPSILON
from dimat_jax.models._record import ModelRecord
from dimat_jax.models._settings import DTYPE, WIDTH, ModelError
from dimat_jax.models._transformer import Block, block_spec, sizes
from dimat_jax.models.classifier import tap
from dimat_jax.options import Option
from dimat_jax.permutation import PermutationSpec
from dimat_jax.permutation._layers import dense, layer_norm

__all__ = ["DEPTH", "GPT", "RECORDS", "TIED", "gpt", "permutation_spec"]

DEPTH = Option(
    "model.depth", 4, "The number of blocks.", at_least=1, at_most=1000, unit="blocks"
)
TIED = Option(
    "model.tied",
    False,
    "Whether the head that computes logits has the weights of the token embedding.",
)


class GPT(nn.Module):
    """A decoder-only transformer.

    Attributes:
        n_classes: the number of different tokens.
        depth: the number of blocks.
        dim: the number of dimensions of the residual stream.
        heads: the number of heads of each attention.
        head_dim: the number of dimensions of each head's queries, keys and values.
        mlp_dim: the number of hidden units of each block's MLP.
        tied: whether the head has the weights of the token embedding.
        dtype: the dtype of activations. Parameters are float32.
    """

    n_classes: int
    depth: int
    dim: int
    heads: int
    head_dim: int
    mlp_dim: int
    tied: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Int[Array, "batch length"],
        *,
        train: bool,
        mask: Bool[Array, " batch"] | None = None,
    ) -> Float[Array, "batch length tokens"]:
        """Computes logits. `train` and `mask` make no difference.

        Each example is computed by itself, as there are no batch statistics.

        Raises:
            ModelError: the inputs are no texts.
        """
        del train, mask
        if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ModelError(
                "it reads texts, which are whole numbers [batch, length]; got "
                f"{x.dtype}{list(x.shape)}"
            )
        embed = nn.Embed(self.n_classes, self.dim, dtype=self.dtype, name="embed")
        position = self.param(
            "position", nn.initializers.normal(0.02), (x.shape[1], self.dim)
        )
        x = embed(x) + position.astype(self.dtype)[None]
        tap(self, "embedded", x)
        for i in range(self.depth):
            block = Block(
                self.heads,
                self.head_dim,
                self.mlp_dim,
                self.dtype,
                causal=True,
                name=f"block{i}",
            )
            x = block(x)
        x = nn.LayerNorm(epsilon=EPSILON, dtype=self.dtype, name="norm")(x)
        if self.tied:
            return embed.attend(x).astype(jnp.float32)
        head = nn.Dense(self.n_classes, dtype=self.dtype, name="head")
        return head(x).astype(jnp.float32)


def gpt(
    *,
    n_classes: int,
    width: float = WIDTH.default,
    depth: int = DEPTH.default,
    tied: bool = TIED.default,
    dim: int = 64,
    heads: int = 4,
    dtype: Any = None,
) -> GPT:
    """Builds a GPT with a residual stream of `width * dim` dimensions.

    The heads share the dimensions equally. The MLPs are 4 times as wide as the stream.

    Raises:
        ModelError: `width * dim` is not a whole number, or not a multiple of `heads`.
        OptionError: `depth` is not allowed.
    """
    DEPTH.check(depth)
    dtype = dtype or jnp.float32
    return GPT(n_classes, depth, *sizes(width, dim, heads), tied=tied, dtype=dtype)


def permutation_spec(model: GPT) -> PermutationSpec:
    """Declares a group for the residual stream, and four groups in each block.

    `heads` permutes the heads as blocks. `qk` permutes the dimensions of queries and
    keys, and `v` those of values; both permute them alike in all heads. `mlp` permutes
    the hidden units of the MLP. Tokens are never permuted.
    """
    axes = {
        "params/embed/embedding": (None, "stream"),
        "params/position": (None, "stream"),
    }
    taps = {"embedded": (None, None, "stream")}
    for i in range(model.depth):
        of_block = block_spec(f"block{i}")
        axes |= of_block[0]
        taps |= of_block[1]
    axes |= layer_norm("norm", "stream")
    if not model.tied:
        axes |= dense("head", "stream", None)
    return PermutationSpec(axes, taps)


RECORDS = (
    ModelRecord(
        "gpt", gpt, (WIDTH, DEPTH, TIED, DTYPE), module=GPT, spec=permutation_spec
    ),
)
