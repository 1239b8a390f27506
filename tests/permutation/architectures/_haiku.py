"""Models that are written in Haiku, whose weights and states are dicts by module."""

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from tests.permutation.architectures._model import (
    Architecture,
    Shapes,
    drawn,
    normal,
    tokens,
)

__all__ = ["ARCHITECTURES"]

CLASSES = 3


def haiku(net: Callable[[Any], Any], inputs: Any, shapes: Shapes) -> Architecture:
    """A function of Haiku modules, in evaluation mode, with its running statistics."""
    model = hk.transform_with_state(net)
    variables = drawn(model.init(jax.random.key(0), inputs))

    def forward(variables, x):
        return model.apply(*variables, None, x)[0]

    return Architecture(forward, variables, inputs, shapes)


def convolutions(x):
    """Two convolutions with BatchNorm, and a dense layer."""
    for channels in (5, 6):
        x = hk.Conv2D(channels, 3, with_bias=False)(x)
        x = hk.BatchNorm(True, True, 0.9)(x, is_training=hk.running_init())
        x = jax.nn.relu(x)
    return hk.Linear(CLASSES)(x.mean((1, 2)))


def perceptron(x):
    """Dense layers with layer norm, and a branch that is added."""
    x = hk.nets.MLP([7, 5])(x)
    y = jax.nn.gelu(hk.Linear(6)(hk.LayerNorm(-1, True, True)(x)))
    return hk.Linear(CLASSES)(x + hk.Linear(5)(y))


def recurrent(x):
    """An LSTM (Hochreiter and Schmidhuber 1997) that is unrolled over 6 steps."""
    core = hk.LSTM(5)
    start = core.initial_state(x.shape[0])
    outputs: Any = hk.dynamic_unroll(core, x, start, time_major=False)[0]
    return hk.Linear(CLASSES)(outputs[:, -1])


def attention(x):
    """A block of a transformer with two heads (Vaswani et al. 2017)."""
    x = hk.Embed(9, 8)(x)
    heads = hk.MultiHeadAttention(2, 4, w_init=hk.initializers.Constant(1.0))
    y = hk.LayerNorm(-1, True, True)(x)
    x = x + heads(y, y, y)
    y = hk.LayerNorm(-1, True, True)(x)
    x = x + hk.Linear(8)(jax.nn.gelu(hk.Linear(12)(y)))
    return hk.Linear(CLASSES)(jnp.mean(x, 1))


ARCHITECTURES: dict[str, Callable[[], Architecture]] = {
    "haiku: convolutions": lambda: haiku(
        convolutions, normal(64, 6, 6, 3), [(5,), (6,)]
    ),
    "haiku: perceptron": lambda: haiku(perceptron, normal(64, 4), [(7,), (5,), (6,)]),
    "haiku: LSTM": lambda: haiku(recurrent, normal(64, 6, 4), [(5,)]),
    # The heads, the values within them and the keys within them, the hidden units, and
    # the stream.
    "haiku: attention": lambda: haiku(
        attention, tokens(64, 7, 9), [(8,), (2,), (4,), (4,), (12,)]
    ),
}
