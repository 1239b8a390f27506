"""Recurrent networks, state spaces, and convolutions over time."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

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

SERIES = normal(24, 6, 4)
CLASSES = 3


class StackedGRU(nnx.Module):
    """Cho et al. 2014: two layers of gated recurrent units."""

    def __init__(self, rngs):
        self.one = nnx.RNN(nnx.GRUCell(4, 5, rngs=rngs))
        self.two = nnx.RNN(nnx.GRUCell(5, 6, rngs=rngs))
        self.head = nnx.Linear(6, CLASSES, rngs=rngs)

    def __call__(self, x):
        sequence: Any = self.one(x)
        sequence = self.two(sequence)
        return self.head(sequence)


class LSTM(eqx.Module):
    """Hochreiter and Schmidhuber 1997, for one sequence; the gates are one array."""

    cell: eqx.nn.LSTMCell
    head: eqx.nn.Linear

    def __init__(self, key):
        k = jax.random.split(key)
        self.cell = eqx.nn.LSTMCell(4, 6, key=k[0])
        self.head = eqx.nn.Linear(6, CLASSES, key=k[1])

    def __call__(self, x):
        start = (jnp.zeros(6), jnp.zeros(6))
        (h, _), _ = lax.scan(lambda c, t: (self.cell(t, c), None), start, x)
        return self.head(h)


class ConvLSTM(nn.Module):
    """Shi et al. 2015: an LSTM over maps."""

    @nn.compact
    def __call__(self, x):
        sequence: Any = nn.RNN(nn.ConvLSTMCell(4, (3, 3)))(x)
        return nn.Conv(1, (1, 1))(sequence[:, -1])


def translation(w, texts):
    """Bahdanau et al. 2015: a decoder attends to an encoder's states."""

    def cell(name, h, x, size):
        return jnp.tanh(
            x @ w(f"{name}/in", x.shape[-1], size) + h @ w(name, size, size)
        )

    x = w("embed", 11, 4)[texts]
    states, h = [], jnp.zeros((len(texts), 5))
    for t in range(3):
        h = cell("encoder", h, x[:, t], 5)
        states.append(h)
    encoded = jnp.stack(states, axis=1)
    h = jnp.tanh(h @ w("bridge", 5, 6))
    outputs = []
    for t in range(2):
        energy = jnp.tanh((h @ w("query", 6, 7))[:, None] + encoded @ w("key", 5, 7))
        context = jnp.einsum("bt,bth->bh", jax.nn.softmax(energy @ w("v", 7)), encoded)
        h = cell("decoder", h, jnp.concatenate([context, x[:, t]], axis=-1), 6)
        outputs.append(h @ w("out", 6, 11))
    return jnp.stack(outputs, axis=1)


def state_space(w, x):
    """Orvieto et al. 2023 (LRU): a diagonal recurrence of complex states."""
    x = x @ w("encode", 4, 5)
    rotation = jnp.exp(-jnp.exp(w("decay", 7)) + 1j * w("phase", 7))
    made = w("real", 5, 7) + 1j * w("imaginary", 5, 7)

    def step(state, u):
        state = rotation * state + u @ made
        return state, state

    _, states = lax.scan(step, jnp.zeros((len(x), 7), complex), x.swapaxes(0, 1))
    y = (states @ (w("c", 7, 5) + 0j)).real.swapaxes(0, 1) + x * w("d", 5)
    return jax.nn.gelu(y) @ w("decode", 5, CLASSES)


class WaveNet(nn.Module):
    """Van den Oord et al. 2016b: gated convolutions, a stream, and skip sums."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(5, (1,))(x)
        skips = 0
        for dilation in (1, 2):
            gate, value = (
                nn.Conv(6, (2,), kernel_dilation=dilation, padding="CAUSAL")(x)
                for _ in range(2)
            )
            h = nn.tanh(value) * nn.sigmoid(gate)
            skips = skips + nn.Conv(7, (1,))(h)
            x = x + nn.Conv(5, (1,))(h)
        return nn.Conv(CLASSES, (1,))(nn.relu(skips))


def neural_ode(w, x):
    """Chen et al. 2018: Euler steps of a learned differential equation."""
    h = x.reshape(len(x), -1) @ w("in", 24, 5)
    up, down = w("up", 5, 7), w("down", 7, 5)

    def step(_, h):
        return h + 0.1 * jnp.tanh(h @ up) @ down

    return lax.fori_loop(0, 4, step, h) @ w("out", 5, CLASSES)


ARCHITECTURES: dict[str, Callable[[], Architecture]] = {
    "LSTM, Equinox": lambda: equinox(LSTM(jax.random.key(0)), SERIES, [(6,)]),
    "stacked GRU, NNX": lambda: nnx_model(StackedGRU, SERIES, [(5,), (6,)]),
    "ConvLSTM": lambda: linen(ConvLSTM(), normal(12, 3, 4, 4, 2), [(4,)]),
    # The embedding, the encoder's states, the decoder's, and the attention's units.
    "translation with attention": lambda: plain(
        translation, tokens(24, 3, 11), [(4,), (5,), (6,), (7,)]
    ),
    # The stream, and the states, each with its own decay and phase.
    "LRU": lambda: plain(state_space, SERIES, [(5,), (7,)]),
    # The stream, the sum of the skips, and the gated units of two layers.
    "WaveNet": lambda: linen(WaveNet(), SERIES, [(5,), (7,), (6,), (6,)]),
    "neural ODE": lambda: plain(neural_ode, SERIES, [(5,), (7,)]),
}
