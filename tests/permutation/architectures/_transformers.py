"""Transformers, and what else mixes tokens.

The groups of a plain attention are its heads, the dimensions of queries and keys, and
those of values. Heads are permuted themselves, so the dimensions of all heads have the
same order. Where something tells heads apart, each head has an order of its own.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from tests.permutation.architectures._model import (
    Architecture,
    equinox,
    linen,
    nnx_model,
    normal,
    plain,
    tokens,
)

__all__ = ["ARCHITECTURES"]

TEXTS = tokens(24, 5, 11)
IMAGES = normal(24, 4, 4, 3)
CLASSES = 3


class ViT(nnx.Module):
    """Dosovitskiy et al. 2021: patches, a class token, learned places."""

    def __init__(self, rngs):
        self.patches = nnx.Conv(3, 6, (2, 2), 2, rngs=rngs)
        self.token = nnx.Param(jnp.ones((1, 1, 6)))
        self.places = nnx.Param(jnp.ones((5, 6)))
        self.norm1 = nnx.LayerNorm(6, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            2, 6, qkv_features=6, decode=False, rngs=rngs
        )
        self.norm2 = nnx.LayerNorm(6, rngs=rngs)
        self.up = nnx.Linear(6, 9, rngs=rngs)
        self.down = nnx.Linear(9, 6, rngs=rngs)
        self.head = nnx.Linear(6, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x)
        x = x.reshape(len(x), -1, 6)
        token = jnp.broadcast_to(self.token[...], (len(x), 1, 6))
        x = jnp.concatenate([token, x], axis=1) + self.places[...]
        x = x + self.attention(self.norm1(x))
        x = x + self.down(nnx.gelu(self.up(self.norm2(x))))
        return self.head(x[:, 0])


class GPT(nn.Module):
    """Radford et al. 2019: causal attention; the head is the embedding."""

    @nn.compact
    def __call__(self, texts):
        embed = nn.Embed(11, 6)
        places = self.param("places", nn.initializers.normal(), (5, 6))
        x = embed(texts) + places
        causal = nn.make_causal_mask(texts)
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=causal)
        x = x + nn.Dense(6)(nn.gelu(nn.Dense(9)(nn.LayerNorm()(x))))
        return embed.attend(nn.LayerNorm()(x))


class BERT(nn.Module):
    """Devlin et al. 2019: norms behind the sums, segments, and a pooler."""

    @nn.compact
    def __call__(self, texts):
        segments = (jnp.arange(5) > 2).astype(jnp.int32)
        x = nn.Embed(11, 6)(texts) + nn.Embed(5, 6)(jnp.arange(5))
        x = nn.LayerNorm()(x + nn.Embed(2, 6)(segments))
        is_text = nn.make_attention_mask(texts > 0, texts > 0)
        attention = nn.MultiHeadDotProductAttention(2)
        x = nn.LayerNorm()(x + attention(x, mask=is_text))
        x = nn.LayerNorm()(x + nn.Dense(6)(nn.gelu(nn.Dense(8)(x))))
        pooled = nn.tanh(nn.Dense(7)(x[:, 0]))
        return nn.Dense(CLASSES)(pooled)


class Llama(eqx.Module):
    """Touvron et al. 2023: RMSNorm, rotary places, gated units; for one text."""

    embed: eqx.nn.Embedding
    norm1: eqx.nn.RMSNorm
    attention: eqx.nn.MultiheadAttention
    rotary: eqx.nn.RotaryPositionalEmbedding
    norm2: eqx.nn.RMSNorm
    gate: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        k = jax.random.split(key, 6)
        self.embed = eqx.nn.Embedding(11, 8, key=k[0])
        self.norm1, self.norm2 = eqx.nn.RMSNorm(8), eqx.nn.RMSNorm(8)
        self.attention = eqx.nn.MultiheadAttention(2, 8, key=k[1])
        self.rotary = eqx.nn.RotaryPositionalEmbedding(4)
        self.gate, self.up = (
            eqx.nn.Linear(8, 9, use_bias=False, key=i) for i in k[2:4]
        )
        self.down = eqx.nn.Linear(9, 8, use_bias=False, key=k[4])
        self.head = eqx.nn.Linear(8, 11, key=k[5])

    def __call__(self, text):
        x = jax.vmap(self.embed)(text)
        h = jax.vmap(self.norm1)(x)

        def turn(q, k, v):
            q, k = (jax.vmap(self.rotary, 1, 1)(y) for y in (q, k))
            return q, k, v

        causal = jnp.tril(jnp.ones((5, 5), bool))
        x = x + self.attention(h, h, h, causal, process_heads=turn)
        h = jax.vmap(self.norm2)(x)
        h = jax.nn.silu(jax.vmap(self.gate)(h)) * jax.vmap(self.up)(h)
        return jax.vmap(self.head)(x + jax.vmap(self.down)(h))


def attend(q, k, v, bias: Any = 0.0):
    """Attention of [texts, places, heads, dimensions]."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores + bias), v)


def heads_of(w, name: str, x, width: int, heads: int = 2, size: int = 3):
    return jnp.einsum("btw,whd->bthd", x, w(name, width, heads, size))


def rms_norm(x, scale):
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def distances(length: int):
    return jnp.arange(length)[:, None] - jnp.arange(length)


def t5(w, texts):
    """Raffel et al. 2020: an encoder and a decoder, biases for relative places."""
    embed = w("embed", 11, 6)

    def block(name, x, context):
        h = rms_norm(x, w(f"{name}/norm", 6))
        q = heads_of(w, f"{name}/q", h, 6)
        k, v = (
            heads_of(w, f"{name}/{n}", h if context is None else context, 6)
            for n in "kv"
        )
        relative = w(f"{name}/relative", 9, 2)[distances(5) + 4]
        y = attend(q, k, v, jnp.moveaxis(relative, -1, 0))
        return x + jnp.einsum("bthd,hdw->btw", y, w(f"{name}/o", 2, 3, 6))

    def gated(name, x):
        h = rms_norm(x, w(f"{name}/norm", 6))
        h = jax.nn.gelu(h @ w(f"{name}/gate", 6, 7)) * (h @ w(f"{name}/up", 6, 7))
        return x + h @ w(f"{name}/down", 7, 6)

    encoded = gated("mlp", block("encoder", embed[texts], None))
    decoded = block("decoder", embed[texts[:, ::-1]], None)
    decoded = gated("mlp2", block("cross", decoded, encoded))
    return decoded @ w("head", 6, 11)


def alibi(w, texts):
    """Press et al. 2022: each head has a slope of its own, which tells it apart."""
    x = w("embed", 11, 6)[texts]
    slopes = 2.0 ** -jnp.arange(1, 3)
    q, k, v = (heads_of(w, n, x, 6) for n in "qkv")
    y = attend(q, k, v, -slopes[:, None, None] * jnp.abs(distances(5)))
    x = x + jnp.einsum("bthd,hdw->btw", y, w("o", 2, 3, 6))
    return x @ w("head", 6, 11)


def multi_query(w, texts):
    """Shazeer 2019: all heads share their keys and values; fused projection."""
    x = w("embed", 11, 6)[texts]
    made = x @ w("qkv", 6, 2 * 3 + 3 + 3)
    q, k, v = jnp.split(made, [6, 9], axis=-1)
    q = q.reshape(*q.shape[:-1], 2, 3)
    k, v = (jnp.broadcast_to(y[:, :, None], q.shape) for y in (k, v))
    y = attend(q, k, v).reshape(*x.shape[:-1], 6)
    return (x + y @ w("o", 6, 6)) @ w("head", 6, 11)


def perceiver(w, images):
    """Jaegle et al. 2021: a few latent tokens read the image, and are averaged."""
    x = images.reshape(len(images), -1, 3)
    latents = jnp.broadcast_to(w("latents", 4, 6), (len(x), 4, 6))
    q = latents @ w("q", 6, 5)
    k, v = x @ w("k", 3, 5), x @ w("v", 3, 7)
    scores = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", q, k))
    h = latents + jnp.einsum("bqk,bkd->bqd", scores, v) @ w("o", 7, 6)
    return h.mean(1) @ w("head", 6, CLASSES)


def clip(w, inputs):
    """Radford et al. 2021: two towers meet in the cosine of their embeddings."""
    images, texts = inputs
    seen = jax.nn.relu(images.reshape(len(images), -1) @ w("see", 48, 8))
    read = jax.nn.relu(w("embed", 11, 6)[texts].mean(1) @ w("read", 6, 7))

    def embedded(x, name, width):
        y = x @ w(name, width, 5)
        return y / jnp.linalg.norm(y, axis=-1, keepdims=True)

    one, other = embedded(seen, "image", 8), embedded(read, "text", 7)
    return jnp.exp(w("temperature")) * one @ other.T


class MLPMixer(nn.Module):
    """Tolstikhin et al. 2021: one MLP over places, one over channels."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (2, 2), 2)(x).reshape(len(x), 4, 6)
        y = nn.LayerNorm()(x).swapaxes(1, 2)
        x = x + nn.Dense(4)(nn.gelu(nn.Dense(7)(y))).swapaxes(1, 2)
        x = x + nn.Dense(6)(nn.gelu(nn.Dense(8)(nn.LayerNorm()(x))))
        return nn.Dense(CLASSES)(x.mean(1))


class GatedMLP(nn.Module):
    """Liu et al. 2021 (gMLP): half of the units gate the other half across places."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(5, (2, 2), 2)(x).reshape(len(x), 4, 5)
        y = nn.gelu(nn.Dense(2 * 6)(nn.LayerNorm()(x)))
        kept, gate = jnp.split(y, 2, axis=-1)
        gate = nn.Dense(4)(nn.LayerNorm()(gate).swapaxes(1, 2)).swapaxes(1, 2)
        x = x + nn.Dense(5)(kept * gate)
        return nn.Dense(CLASSES)(x.mean(1))


# The heads, the dimensions of queries and keys, and those of values.
ATTENTION: list[tuple[int, ...]] = [(2,), (3,), (3,)]

ARCHITECTURES: dict[str, Callable[[], Architecture]] = {
    "ViT, NNX": lambda: nnx_model(ViT, IMAGES, [(6,), *ATTENTION, (9,)]),
    "GPT, tied": lambda: linen(GPT(), TEXTS, [(6,), *ATTENTION, (9,)]),
    # The last 7 are the pooler's.
    "BERT": lambda: linen(BERT(), TEXTS, [(6,), *ATTENTION, (8,), (7,)]),
    # Rotary places tell the dimensions of queries and keys apart.
    "LLaMA, Equinox": lambda: equinox(
        Llama(jax.random.key(0)), TEXTS, [(8,), (2,), (4,), (9,)]
    ),
    # The encoder and the decoder have one stream, as they share the embedding, and
    # through the cross attention's keys. There are three attentions and two MLPs.
    "T5": lambda: plain(t5, TEXTS, [(6,), *3 * ATTENTION, (7,), (7,)]),
    # The slopes fix the heads, so the dimensions of each head have their own order.
    "ALiBi": lambda: plain(alibi, TEXTS, [(6,), (2, 3), (2, 3)], "iota"),
    # Queries of all heads meet the same keys.
    "multi-query attention": lambda: plain(
        multi_query, TEXTS, [(6,), (2,), (3,), (3,)]
    ),
    # The order of the latent tokens is a symmetry as well, as their mean counts.
    "Perceiver": lambda: plain(perceiver, IMAGES, [(4,), (6,), (5,), (7,)]),
    # The embeddings that both towers share are one group.
    "CLIP": lambda: plain(clip, (IMAGES, TEXTS), [(8,), (6,), (7,), (5,)]),
    # The weights that mix places are fixed by them.
    "MLP-Mixer": lambda: linen(MLPMixer(), IMAGES, [(6,), (7,), (8,)], "a window"),
    # A unit and the unit that gates it are permuted together.
    "gMLP": lambda: linen(GatedMLP(), IMAGES, [(5,), (6,)], "a window"),
}
