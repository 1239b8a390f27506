"""Own models that are Equinox modules."""

import functools
import inspect
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Key

from dimat_jax.models._own import Layout, OwnModel, expect_module, filled
from dimat_jax.tree import PyTree, is_inexact

__all__ = ["EquinoxModel"]


class EquinoxModel(OwnModel):
    """An Equinox module that takes one input, or a pair of such a module and its state.

    A batch is vmapped under the axis name "batch", which BatchNorm layers have to name.
    A module that takes a `key` gets one in training mode. With state, it is called with
    the state and returns `(logits, new state)`. Its BatchNorm layers take no mask, so
    examples that do not count are replaced by others that do.
    """

    def init(self, key: Key[Array, ""], inputs: ArrayLike) -> PyTree:
        del inputs
        arrays, _ = eqx.partition(self._make(key), eqx.is_array)
        return self._abstract[1].variables(arrays)

    def apply(
        self,
        variables: PyTree,
        inputs: ArrayLike,
        mask: Bool[Array, " batch"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Array, PyTree]:
        inputs = jnp.asarray(inputs)
        static, layout = self._abstract
        made = eqx.combine(layout.tree(variables), static)
        module, *state = made if isinstance(made, tuple) else (made,)
        module = eqx.nn.inference_mode(module, value=key is None)
        taken = inspect.signature(type(module).__call__).parameters
        keys = None if key is None else jax.random.split(key, len(inputs))

        def call(x, key, *state):
            given = {"key": key} if "key" in taken else {}
            result = module(x, *state, **given)
            return result if state else (result, None)

        if key is not None and "batch_stats" in variables:
            inputs = filled(inputs, mask)
        axes = (0, None if keys is None else 0, *[None] * len(state))
        lifted = jax.vmap(call, axes, (0, None), axis_name="batch")
        logits, new = lifted(inputs, keys, *state)
        if key is None:
            return logits, {}
        after = (module, new) if state else module
        updated = layout.variables(eqx.filter(after, eqx.is_array))
        return logits, {name: updated[name] for name in variables if name != "params"}

    def _make(self, key: Key[Array, ""]) -> Any:
        made = self.make(key=key)
        module = made[0] if isinstance(made, tuple) else made
        expect_module(self.name, module, eqx.Module, "an Equinox module")
        return made

    @functools.cached_property
    def _abstract(self) -> tuple[Any, Layout]:
        """What is no array in the module, and the layout of its variables."""
        made = eqx.filter_eval_shape(lambda: self._make(jax.random.key(0)))
        shapes, static = eqx.partition(
            made, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
        )
        has_state = isinstance(made, tuple)

        def place(path: str, leaf: Any) -> str:
            is_state = has_state and path.startswith("1/")
            if not is_inexact(leaf):
                return f"state/{path}"
            return f"batch_stats/{path}" if is_state else f"params/{path}"

        return static, Layout(shapes, place)
