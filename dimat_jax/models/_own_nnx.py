"""Own models that are Flax NNX modules."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Key

from dimat_jax.models._own import Layout, OwnModel, expect_module, filled
from dimat_jax.tree import PyTree

__all__ = ["NnxModel"]

# The kinds of variables of a module, by the name of their collection. The rest, as
# caches, comes last. Random streams are no variables of agents: each step has a key.
_KINDS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
_REST = "state"


class NnxModel(OwnModel):
    """A Flax NNX module, whose `__call__` takes a batch.

    `module.train()` and `module.eval()` choose its mode. Its BatchNorm layers take no
    mask, so examples that do not count are replaced by others that do.
    """

    def init(self, key: Key[Array, ""], inputs: ArrayLike) -> PyTree:
        del inputs
        return self._abstract[1].variables(_split(self._make(nnx.Rngs(key)))[1])

    def apply(
        self,
        variables: PyTree,
        inputs: ArrayLike,
        mask: Bool[Array, " batch"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Array, PyTree]:
        inputs = jnp.asarray(inputs)
        graph, layout, streams = self._abstract
        states = layout.tree(variables)
        streams = _started(streams, jax.random.key(0) if key is None else key)
        module = nnx.merge(graph, streams, *states.values())
        if key is None:
            module.eval()
            return module(inputs), {}
        module.train()
        logits = module(filled(inputs, mask) if "batch_stats" in variables else inputs)
        updated = layout.variables(_split(module)[1])
        return logits, {name: updated[name] for name in variables if name != "params"}

    def _make(self, rngs: nnx.Rngs) -> nnx.Module:
        made = self.make(rngs=rngs)
        expect_module(self.name, made, nnx.Module, "a Flax NNX module")
        return made

    @functools.cached_property
    def _abstract(self) -> tuple[Any, Layout, Any]:
        """The module's structure, the layout of its variables, and its streams."""
        made = nnx.eval_shape(lambda: self._make(nnx.Rngs(0)))
        graph, states, streams = _split(made)
        return graph, Layout(states, lambda path, leaf: path), streams


def _split(module: nnx.Module) -> tuple[Any, dict[str, Any], Any]:
    """Splits a module: structure, variables by collection, random streams."""
    graph, streams, *states = nnx.split(module, nnx.RngState, *_KINDS.values(), ...)
    return graph, dict(zip([*_KINDS, _REST], states, strict=True)), streams


def _started(streams: Any, key: Key[Array, ""]) -> Any:
    """Random streams at their beginning, each with a key of its own."""
    leaves, structure = jax.tree.flatten(streams)
    keys = jax.random.split(key, len(leaves) + 1)

    def start(leaf, key):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return key if leaf.shape == () else jax.random.split(key, leaf.shape)
        return jnp.zeros(leaf.shape, leaf.dtype)

    started = [start(*each) for each in zip(leaves, keys, strict=False)]
    return jax.tree.unflatten(structure, started)
