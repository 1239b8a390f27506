"""Three models, one of each library, that declare nothing."""

from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from dimat_jax.models import MODELS, ModelRecord
from dimat_jax.options import Option

LEAVES = Option("orchard.leaves", 8, "The units of a hidden layer.", at_least=1)
DROPPED = Option("orchard.dropped", 0.0, "The rate of dropout.", at_least=0, below=1)


class Pear(nn.Module):
    """With BatchNorm and dropout, and told its mode by `train`."""

    n_classes: int
    leaves: int
    dropped: float

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Dense(self.leaves)(x.reshape(len(x), -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(self.dropped, deterministic=not train)(x)
        return nn.Dense(self.n_classes)(nn.relu(nn.Dense(self.leaves)(x)))


class Plum(nnx.Module):
    def __init__(self, n_in: int, n_classes: int, leaves: int, dropped: float, rngs):
        self.first = nnx.Linear(n_in, leaves, rngs=rngs)
        self.norm = nnx.BatchNorm(leaves, rngs=rngs)
        self.drop = nnx.Dropout(dropped, rngs=rngs)
        self.last = nnx.Linear(leaves, n_classes, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.first(x.reshape(len(x), -1)))
        return self.last(self.drop(nnx.relu(x)))


def plum(*, n_classes: int, leaves: int, dropped: float, input_shape, rngs) -> Plum:
    height, width, channels = input_shape
    return Plum(height * width * channels, n_classes, leaves, dropped, rngs)


class Quince(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout
    last: eqx.nn.Linear

    def __init__(self, n_classes: int, leaves: int, dropped: float, key):
        one, two = jax.random.split(key)
        self.first = eqx.nn.Linear(16, leaves, key=one)
        self.norm = eqx.nn.BatchNorm(leaves, "batch", mode="batch")
        self.drop = eqx.nn.Dropout(dropped)
        self.last = eqx.nn.Linear(leaves, n_classes, key=two)

    def __call__(self, x, state, key=None):
        x, state = self.norm(self.first(jnp.ravel(x)), state)
        return self.last(self.drop(jax.nn.relu(x), key=key)), state


def quince(*, n_classes: int, leaves: int, dropped: float, key) -> Any:
    return eqx.nn.make_with_state(Quince)(n_classes, leaves, dropped, key=key)


for name, build in (("pear", Pear), ("plum", plum), ("quince", quince)):
    summary = f"The {name} of the orchard."
    MODELS.add(ModelRecord(name, build, (LEAVES, DROPPED), summary=summary))
