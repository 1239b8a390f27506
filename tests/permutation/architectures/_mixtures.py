"""Mixtures, ensembles, adapters, generative models, and what has several parts."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.permutation.architectures._model import (
    Architecture,
    linen,
    normal,
    plain,
    tokens,
)

__all__ = ["ARCHITECTURES"]

X = normal(64, 4)
CLASSES = 3


def dense_mixture(w, x):
    """Jacobs et al. 1991: all experts answer, and a softmax weighs them."""
    gates = jax.nn.softmax(x @ w("gate", 4, 3))
    h = jnp.tanh(jnp.einsum("bi,eih->beh", x, w("up", 3, 4, 6)) + w("b", 3, 6))
    answers = jnp.einsum("beh,eho->beo", h, w("down", 3, 6, CLASSES))
    return jnp.einsum("be,beo->bo", gates, answers)


def switch(w, texts):
    """Fedus et al. 2022: each token goes to the expert with the largest gate."""
    x = w("embed", 11, 5)[texts]
    gates = jax.nn.softmax(x @ w("gate", 5, 3))
    chosen = jax.nn.one_hot(gates.argmax(-1), 3) * gates
    h = jax.nn.relu(jnp.einsum("btd,edh->bteh", x, w("up", 3, 5, 6)))
    y = jnp.einsum("bteh,ehd,bte->btd", h, w("down", 3, 6, 5), chosen)
    return (x + y) @ w("head", 5, 11)


def deep_ensemble() -> Architecture:
    """Lakshminarayanan et al. 2017: members that are trained and asked apart."""

    @eqx.filter_vmap
    def make(key):
        return eqx.nn.MLP(4, CLASSES, width_size=6, depth=2, key=key)

    made = make(jax.random.split(jax.random.key(0), 3))
    members, static = eqx.partition(made, eqx.is_array)

    def forward(variables, x):
        def ask(member):
            return jax.vmap(eqx.combine(member, static))(x)

        return jax.vmap(ask)(variables)

    drawn = jax.tree.map(lambda leaf: jnp.asarray(normal(*leaf.shape)) / 2, members)
    return Architecture(forward, drawn, X, [(3, 6), (3, 6)])


def low_rank(w, x):
    """Hu et al. 2022 (LoRA): beside each matrix there is a product of rank 2."""
    h = jax.nn.relu(x @ w("w", 4, 6) + (x @ w("b", 4, 2)) @ w("a", 2, 6))
    return h @ w("out", 6, CLASSES)


def maxout(w, x):
    """Goodfellow et al. 2013: the largest of several linear pieces."""
    h = (jnp.einsum("bi,ihp->bhp", x, w("w", 4, 6, 3)) + w("b", 6, 3)).max(-1)
    return h @ w("out", 6, CLASSES)


def variational(w, x):
    """Kingma and Welling 2014: a code's mean and width, and the reconstruction."""
    h = jnp.tanh(x @ w("encode", 4, 7))
    mean, log_variance = h @ w("mean", 7, 3), h @ w("width", 7, 3)
    distance = (mean**2 + jnp.exp(log_variance) - log_variance - 1).sum(-1)
    return jnp.tanh(mean @ w("decode", 3, 6)) @ w("out", 6, 4), distance


def vector_quantised(w, x):
    """Van den Oord et al. 2017 (VQ-VAE): the nearest entry of a codebook."""
    z = jnp.tanh(x @ w("encode", 4, 7)) @ w("code", 7, 3)
    book = w("book", 5, 3)
    apart = ((z[:, None] - book) ** 2).sum(-1)
    nearest = z + lax.stop_gradient(book[apart.argmin(-1)] - z)
    return jnp.tanh(nearest @ w("decode", 3, 6)) @ w("out", 6, 4)


def real_nvp(w, x):
    """Dinh et al. 2017: halves of the inputs scale and shift each other."""
    one, other = jnp.split(x, 2, axis=-1)
    for n in range(2):
        h = jax.nn.relu(one @ w(f"h{n}", 2, 6))
        scale, shift = jnp.tanh(h @ w(f"s{n}", 6, 2)), h @ w(f"t{n}", 6, 2)
        one, other = other * jnp.exp(scale) + shift, one
    return jnp.concatenate([one, other], axis=-1)


def recommender(w, inputs):
    """Naumov et al. 2019 (DLRM): products of embeddings with each other."""
    numbers, kinds = inputs
    dense = jax.nn.relu(numbers @ w("dense1", 4, 7)) @ w("dense2", 7, 5)
    tables = [w(f"table{n}", 11, 5)[kinds[:, n]] for n in range(2)]
    features = jnp.stack([dense, *tables], axis=1)
    products = jnp.einsum("bid,bjd->bij", features, features)
    pairs = jnp.stack([products[:, 0, 1], products[:, 0, 2], products[:, 1, 2]], -1)
    top = jax.nn.relu(jnp.concatenate([dense, pairs], -1) @ w("top1", 8, 6))
    return top @ w("top2", 6, 1)


def factors(w, kinds):
    """Rendle 2010: a factorisation machine."""
    v = w("factors", 11, 5)[kinds]
    pairs = (v.sum(1) ** 2 - (v**2).sum(1)).sum(-1) / 2
    return w("bias") + w("linear", 11)[kinds].sum(-1) + pairs


def twins(w, pairs):
    """Bromley et al. 1993: one network sees two inputs; their cosine counts."""

    def embed(x):
        y = jnp.tanh(x @ w("one", 4, 6)) @ w("two", 6, 5)
        return y / jnp.linalg.norm(y, axis=-1, keepdims=True)

    return (embed(pairs[:, 0]) * embed(pairs[:, 1])).sum(-1)


def modulated(w, inputs):
    """Perez et al. 2018 (FiLM): another input scales and shifts the units."""
    x, condition = inputs
    made = jax.nn.relu(condition @ w("read", 4, 7)) @ w("film", 7, 2 * 6)
    scale, shift = jnp.split(made, 2, axis=-1)
    return jax.nn.relu((x @ w("in", 4, 6)) * scale + shift) @ w("out", 6, CLASSES)


class WeightNormed(nn.Module):
    """Salimans and Kingma 2016: each unit's weights have a length of their own."""

    @nn.compact
    def __call__(self, x):
        for units in (6, 5):
            x = nn.tanh(nn.WeightNorm(nn.Dense(units))(x))
        return nn.Dense(CLASSES)(x)


def _kinds(n: int) -> Any:
    return np.asarray(tokens(64, n, 11))


TEXTS = tokens(24, 5, 11)

ARCHITECTURES: dict[str, Callable[[], Architecture]] = {
    # Experts may trade places, so the units of all experts have one order.
    "mixture of experts": lambda: plain(dense_mixture, X, [(3,), (6,)]),
    # A choice of the largest gate tells the experts apart by their places.
    "switch transformer": lambda: plain(switch, TEXTS, [(5,), (3, 6)], "arg"),
    "deep ensemble, Equinox": deep_ensemble,
    # The units, and the columns of the product of low rank.
    "LoRA": lambda: plain(low_rank, X, [(6,), (2,)]),
    # The units, and the pieces, which have the same order in every unit.
    "maxout": lambda: plain(maxout, X, [(6,), (3,)]),
    "VAE": lambda: plain(variational, X, [(7,), (3,), (6,)]),
    # A choice of the nearest entry fixes the order of the codebook.
    "VQ-VAE": lambda: plain(vector_quantised, X, [(7,), (3,), (6,)]),
    "RealNVP": lambda: plain(real_nvp, X, [(6,), (6,)]),
    "DLRM": lambda: plain(recommender, (X, _kinds(2)), [(7,), (5,), (6,)]),
    "factorisation machine": lambda: plain(factors, _kinds(4), [(5,)]),
    "Siamese network": lambda: plain(twins, normal(64, 2, 4), [(6,), (5,)]),
    "FiLM": lambda: plain(modulated, (X, normal(64, 4, seed=1)), [(7,), (6,)]),
    "weight norm": lambda: linen(WeightNormed(), X, [(6,), (5,)]),
}
