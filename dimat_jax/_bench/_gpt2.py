"""GPT-2 in plain JAX, as far as permutations need it (Radford et al. 2019).

The names and shapes of the weights are those of the published checkpoints. With the
default sizes these are the 124 million parameters of the smallest model.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

__all__ = ["GPT2", "forward", "shapes", "weights"]


class GPT2(NamedTuple):
    """The sizes of a GPT-2.

    Attributes:
        layers: the number of blocks.
        width: the width of the stream.
        heads: the number of heads. They divide the width.
        vocabulary: the number of tokens.
        places: the largest number of tokens in a text.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50257
    places: int = 1024


def shapes(sizes: GPT2) -> dict[str, tuple[int, ...]]:
    """The shape of each weight, by its name."""
    width, hidden = sizes.width, 4 * sizes.width
    found = {"wte": (sizes.vocabulary, width), "wpe": (sizes.places, width)}
    for n in range(sizes.layers):
        layers = {
            "ln_1": (width,),
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "ln_2": (width,),
            "mlp.c_fc": (width, hidden),
            "mlp.c_proj": (hidden, width),
        }
        for name, shape in layers.items():
            found[f"h.{n}.{name}.weight"] = shape
            found[f"h.{n}.{name}.bias"] = shape[-1:]
    return found | {"ln_f.weight": (width,), "ln_f.bias": (width,)}


def weights(sizes: GPT2, seed: int) -> dict[str, np.ndarray]:
    """Random weights, float32. No scale and no bias is constant."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        drawn = rng.standard_normal(shape, np.float32)
        if len(shape) == 1:
            return 1 + np.float32(0.1) * drawn
        # Weights of this size keep activations at about 1 whatever the width is.
        return drawn * np.float32(shape[-1 if shape[0] > shape[1] else 0] ** -0.5)

    return {name: draw(shape) for name, shape in shapes(sizes).items()}


def forward(
    sizes: GPT2,
) -> Callable[[Any, Any], Any]:
    """Returns `forward(weights, tokens) -> logits`.

    Tokens are int32[texts, places], logits are float32[texts, places, vocabulary]. The
    matrix that reads tokens also makes the logits.
    """

    def compute_logits(
        w: Mapping[str, Any], tokens: Int[Array, "texts places"]
    ) -> Float[Array, "texts places vocabulary"]:
        def norm(name: str, x: Any) -> Any:
            scaled = jax.nn.standardize(x, epsilon=1e-5) * w[f"{name}.weight"]
            return scaled + w[f"{name}.bias"]

        def dense(name: str, x: Any) -> Any:
            return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

        def attention(name: str, x: Any) -> Any:
            made = jnp.split(dense(f"{name}.c_attn", x), 3, axis=-1)
            heads = [y.reshape(*y.shape[:-1], sizes.heads, -1) for y in made]
            mixed = jax.nn.dot_product_attention(*heads, is_causal=True)
            return dense(f"{name}.c_proj", mixed.reshape(x.shape))

        def mlp(name: str, x: Any) -> Any:
            return dense(f"{name}.c_proj", jax.nn.gelu(dense(f"{name}.c_fc", x)))

        x = w["wte"][tokens] + w["wpe"][: tokens.shape[1]]
        for n in range(sizes.layers):
            x = x + attention(f"h.{n}.attn", norm(f"h.{n}.ln_1", x))
            x = x + mlp(f"h.{n}.mlp", norm(f"h.{n}.ln_2", x))
        return norm("ln_f", x) @ w["wte"].T

    return compute_logits
