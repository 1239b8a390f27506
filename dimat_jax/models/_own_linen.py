"""Own models that are Flax Linen modules."""

import functools
import inspect
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Key

from dimat_jax.models._own import OwnModel, expect_module
from dimat_jax.tree import PyTree

__all__ = ["LinenModel"]

# The names by which modules are told their mode, and the value in training mode.
_MODES = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}


class LinenModel(OwnModel):
    """A Flax Linen module, whose `__call__` takes a batch.

    It may take its mode as an argument of one of the names in `_MODES`, and an argument
    `mask`, the examples that count. `nn.BatchNorm` layers get the mask in any case.
    """

    @functools.cached_property
    def module(self) -> nn.Module:
        """The module, which holds no weights."""
        module = self.make()
        expect_module(self.name, module, nn.Module, "a Flax Linen module")
        return module

    @property
    def _taken(self) -> list[str]:
        """The names of the arguments of the module's `__call__`."""
        return list(inspect.signature(type(self.module).__call__).parameters)

    def init(self, key: Key[Array, ""], inputs: ArrayLike) -> PyTree:
        module: Any = self.module
        made = module.init(key, jnp.asarray(inputs), **self._mode(False))
        return {name: tree for name, tree in made.items() if name != "intermediates"}

    def apply(
        self,
        variables: PyTree,
        inputs: ArrayLike,
        mask: Bool[Array, " batch"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Array, PyTree]:
        inputs = jnp.asarray(inputs)
        module: Any = self.module
        if key is None:
            return module.apply(variables, inputs, **self._mode(False)), {}
        given = {"mask": mask} if "mask" in self._taken else {}
        # A module may draw from streams of any names.
        rngs = {"dropout": key, "params": key}
        mutable = [name for name in variables if name != "params"]

        def with_mask(call, args, kwargs, context):
            is_norm = isinstance(context.module, nn.BatchNorm)
            if is_norm and context.method_name == "__call__" and mask is not None:
                x = args[0] if args else kwargs["x"]
                shaped = mask.reshape(-1, *[1] * (x.ndim - 1))
                kwargs = {"mask": shaped, **kwargs}
            return call(*args, **kwargs)

        with nn.intercept_methods(with_mask):
            return module.apply(
                variables,
                inputs,
                **self._mode(True),
                **given,
                mutable=mutable,
                rngs=rngs,
            )

    def _mode(self, train: bool) -> dict[str, bool]:
        known = [mode for mode in self._taken if mode in _MODES]
        return {mode: train == _MODES[mode] for mode in known}
