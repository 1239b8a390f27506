"""What the suite needs of an architecture, whatever library it is written in."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dimat_jax.tree import map_with_path

__all__ = [
    "Architecture",
    "Shapes",
    "drawn",
    "equinox",
    "linen",
    "nnx_model",
    "normal",
    "plain",
    "tokens",
]

KEY = jax.random.key(0)


class Architecture(NamedTuple):
    """A model, and its symmetry as a person counts it.

    Attributes:
        forward: `forward(variables, inputs) -> outputs`.
        variables: variables without constant leaves, as after training.
        inputs: enough examples to tell units apart by their activations.
        shapes: the shape of each group's permutation: `(units,)`, or `(layers, units)`
            for stacked layers.
        doubts: what `derive` warns of, a regular expression; "" if it does not warn.
    """

    forward: Callable[[Any, Any], Any]
    variables: Any
    inputs: Any
    shapes: list[tuple[int, ...]]
    doubts: str = ""


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Random numbers, float32."""
    rng = np.random.default_rng([seed, *shape])
    return rng.normal(size=shape).astype(np.float32)


def tokens(n: int, length: int, vocabulary: int) -> np.ndarray:
    """Random texts, int32[n, length]."""
    rng = np.random.default_rng(0)
    return rng.integers(0, vocabulary, (n, length)).astype(np.int32)


def drawn(abstract: Any) -> Any:
    """Weights of a trained network's size; no leaf is constant."""
    return map_with_path(_draw, abstract)


def _draw(path: str, leaf: Any) -> Any:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    rng = np.random.default_rng(list(path.encode()))
    if leaf.size > max(leaf.shape, default=1):
        fan_in = np.prod(leaf.shape) / max(leaf.shape[0], leaf.shape[-1])
        values = rng.normal(0, max(fan_in, 1) ** -0.5, leaf.shape)
    else:
        values = rng.uniform(0.5, 1.5, leaf.shape)  # a variance stays positive
    return jnp.asarray(values, leaf.dtype)


Shapes = list[tuple[int, ...]]


def linen(
    module: nn.Module, inputs: Any, shapes: Shapes, doubts: str = ""
) -> Architecture:
    """A Flax Linen module that takes the inputs."""
    abstract = jax.eval_shape(module.init, KEY, inputs)
    variables = drawn(abstract)
    return Architecture(module.apply, variables, inputs, shapes, doubts)


def nnx_model(
    make: Callable[[nnx.Rngs], nnx.Module], inputs: Any, shapes: Shapes
) -> Architecture:
    """An NNX module in evaluation mode."""
    model: Any = make(nnx.Rngs(0))
    model.eval()
    graph, state = nnx.split(model)

    def forward(variables, x):
        return nnx.merge(graph, variables)(x)

    variables = drawn(nnx.to_pure_dict(state))
    return Architecture(forward, variables, inputs, shapes)


def equinox(model: Any, inputs: Any, shapes: Shapes, doubts: str = "") -> Architecture:
    """An Equinox module for one example."""
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def forward(variables, x):
        return jax.vmap(eqx.combine(variables, static))(x)

    variables = drawn(params)
    return Architecture(forward, variables, inputs, shapes, doubts)


def plain(
    function: Callable[..., Any], inputs: Any, shapes: Shapes, doubts: str = ""
) -> Architecture:
    """A function `function(w, inputs)` of weights, which `w(name, *shape)` gives."""
    found: dict[str, Any] = {}

    def note(name: str, *shape: int) -> Any:
        found[name] = jax.ShapeDtypeStruct(shape, np.float32)
        return jnp.ones(shape)

    jax.eval_shape(lambda x: function(note, x), inputs)

    def forward(variables, x):
        return function(lambda name, *_: variables[name], x)

    variables = drawn(found)
    return Architecture(forward, variables, inputs, shapes, doubts)
