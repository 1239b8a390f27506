"""Transformers as people write them: what is symmetric in them, and is it found?"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dimat_jax import permutation
from dimat_jax.matching import activation_matching, weight_matching
from dimat_jax.permutation import (
    Concat,
    derive,
    explain,
    group_shapes,
    validate,
    verify,
)

KEY = jax.random.key(0)
WIDTH, VOCABULARY, LENGTH = 8, 11, 5
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (4, LENGTH))


class Draw:
    """Draws weights of given shapes, and gives them out by name."""

    def __init__(self):
        self.variables: dict[str, Any] = {}
        self._rng = np.random.default_rng(0)

    def __call__(self, name: str, *shape: int) -> Any:
        fan_in = np.prod(shape[:-1]) if len(shape) > 1 else 1
        values = self._rng.normal(1, 1, shape) / np.sqrt(fan_in)
        return self.variables.setdefault(name, jnp.asarray(values, jnp.float32))


def rms_norm(x, scale):
    return x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def rotated(x, n_rotated: int):
    """Rotary embedding (Su et al. 2021) of the first dimensions: [..., T, heads, D]."""
    half = n_rotated // 2
    frequencies = 100.0 ** -(jnp.arange(half) / half)
    angles = jnp.arange(x.shape[-3])[:, None, None] * frequencies
    one, other, rest = jnp.split(x, [half, n_rotated], axis=-1)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    turned = [one * cos - other * sin, one * sin + other * cos]
    return jnp.concatenate([*turned, rest], axis=-1)


def attend(q, k, v):
    """[batch, T, heads, D]; queries may have more heads than keys and values."""
    n = q.shape[-2] // k.shape[-2]
    k, v = (jnp.repeat(x, n, axis=-2) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    causal = jnp.tril(jnp.ones((scores.shape[-1],) * 2, bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def swiglu(w, x, hidden=9):
    gate = jax.nn.silu(x @ w("gate", WIDTH, hidden))
    return (gate * (x @ w("up", WIDTH, hidden))) @ w("down", hidden, WIDTH)


def llama(w, tokens, *, n_rotated: int):
    """Grouped queries (2 heads for each of 2 keys), rotary embedding, RMSNorm."""
    x = w("embed", VOCABULARY, WIDTH)[tokens]
    h = rms_norm(x, w("norm1", WIDTH))
    q = jnp.einsum("btw,whd->bthd", h, w("q", WIDTH, 4, 6))
    k, v = (jnp.einsum("btw,whd->bthd", h, w(n, WIDTH, 2, 6)) for n in "kv")
    q, k = rotated(q, n_rotated), rotated(k, n_rotated)
    x = x + jnp.einsum("bthd,hdw->btw", attend(q, k, v), w("o", 4, 6, WIDTH))
    x = x + swiglu(w, rms_norm(x, w("norm2", WIDTH)))
    return rms_norm(x, w("norm3", WIDTH)) @ w("head", WIDTH, VOCABULARY)


def gpt2(w, tokens):
    """Fused queries, keys and values; learned places; the head is the embedding."""
    embed = w("embed", VOCABULARY, WIDTH)
    x = embed[tokens] + w("places", LENGTH, WIDTH)
    h = jax.nn.standardize(x, epsilon=1e-5) * w("scale1", WIDTH) + w("shift1", WIDTH)
    qkv = h @ w("qkv", WIDTH, 3 * 12) + w("qkv_bias", 3 * 12)
    q, k, v = (y.reshape(*y.shape[:-1], 3, 4) for y in jnp.split(qkv, 3, axis=-1))
    y = attend(q, k, v).reshape(*x.shape[:-1], -1)
    x = x + y @ w("o", 12, WIDTH) + w("o_bias", WIDTH)
    h = jax.nn.standardize(x, epsilon=1e-5) * w("scale2", WIDTH) + w("shift2", WIDTH)
    x = x + jax.nn.gelu(h @ w("up", WIDTH, 10) + w("up_bias", 10)) @ w(
        "down", 10, WIDTH
    )
    return jax.nn.standardize(x, epsilon=1e-5) @ embed.T


def mixture(w, tokens):
    """Each token goes to the two experts with the largest gates."""
    x = w("embed", VOCABULARY, WIDTH)[tokens]
    h = rms_norm(x, w("norm", WIDTH))
    gates, chosen = lax.top_k(jax.nn.softmax(h @ w("gate", WIDTH, 3)), 2)
    shares = (jax.nn.one_hot(chosen, 3) * gates[..., None]).sum(-2)
    hidden = jax.nn.silu(jnp.einsum("btd,edh->bteh", h, w("up", 3, WIDTH, 7)))
    y = jnp.einsum("bteh,ehd->bted", hidden, w("down", 3, 7, WIDTH))
    x = x + jnp.einsum("bted,bte->btd", y, shares)
    return x @ w("head", WIDTH, VOCABULARY)


class Model(NamedTuple):
    forward: Callable[[Any, Any], Any]
    variables: dict[str, Any]


def model(function: Callable[..., Any], **options: Any) -> Model:
    draw = Draw()
    function(draw, TOKENS, **options)

    def forward(variables, tokens):
        return function(lambda name, *_: variables[name], tokens, **options)

    return Model(forward, draw.variables)


# The groups are the stream; the hidden units; then those of the attention: keys, the
# queries of each key, the dimensions of queries and keys, and those of values.
CASES: dict[str, tuple[Callable[[], Model], list[tuple[int, ...]]]] = {
    "grouped queries": (
        lambda: model(llama, n_rotated=0),
        [(2,), (2,), (6,), (6,), (8,), (9,)],
    ),
    "rotary embedding": (
        lambda: model(llama, n_rotated=6),
        [(2,), (2,), (6,), (8,), (9,)],
    ),
    "rotary embedding of some dimensions": (
        lambda: model(llama, n_rotated=4),
        [(2,), (2,), (2,), (6,), (8,), (9,)],
    ),
    "GPT-2": (lambda: model(gpt2), [(3,), (4,), (4,), (8,), (10,)]),
    "mixture of experts": (lambda: model(mixture), [(3, 7), (8,)]),
}


FAST = {"rotary embedding of some dimensions", "mixture of experts"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::dimat_jax.permutation.PermutationSpecWarning")
@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_the_symmetry_of_a_transformer_is_derived_and_found(name):
    make, shapes = CASES[name]
    forward, a = make()
    spec, activations = derive(forward, a, TOKENS, strict=True, with_activations=True)
    assert sorted(group_shapes(spec, a).values()) == sorted(shapes)
    validate(spec, a)
    verify(spec, forward, a, TOKENS, KEY)
    planted = permutation.random(spec, a, jax.random.key(1))
    b = permutation.apply(spec, planted, a)
    inverse = permutation.invert(planted)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (100, LENGTH))
    for found in (
        weight_matching(spec, a, b, key=KEY, restarts=5),
        activation_matching(spec, activations, a, b, [tokens]),
    ):
        for group, perm in inverse.items():
            np.testing.assert_array_equal(found[group], perm, err_msg=group)


def test_explain_tells_which_dimensions_rotary_embedding_fixes():
    forward, variables = model(llama, n_rotated=4)
    spec = derive(forward, variables, TOKENS)
    rows = {(r.leaf, r.dimension): r for r in explain(forward, variables, TOKENS).rows}
    for leaf in "qk":
        row = rows[leaf, 2]
        # Each rotated dimension turns at a speed of its own; the others are alike.
        assert "iota" in row.reasons and row.axis == spec.axes[leaf][2]
        assert isinstance(row.axis, Concat)
        assert [size for _, size in row.axis.parts] == [4, 2]
        assert row.axis.parts[0][0] is None
    assert not rows["v", 2].reasons
