"""The record of an architecture says how its models are built, and what is declared."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from dimat_jax.models._own import OwnModel
from dimat_jax.options import Record
from dimat_jax.permutation import PermutationSpec

__all__ = ["ModelRecord"]


@dataclasses.dataclass(frozen=True, eq=False)
class ModelRecord(Record[Any]):
    """An architecture. `record(n_classes=..., **options)` builds a model.

    `build` is a function of `n_classes` and of the `options` by their keywords. It
    returns one of these:

    - a Flax Linen module, whose `__call__(x)` takes a batch of inputs;
    - a Flax NNX module, if the function has an argument `rngs`;
    - an Equinox module, or one with its state, if the function has an argument `key`.
      It takes a single input, and a batch is vmapped under the axis name "batch".

    The last two may have an argument `input_shape`, the shape of one input. Nothing is
    declared: spec and taps are derived from the model, and checked before a run.

    Attributes:
        module: the class of the modules that `build` returns, if a spec is declared.
        spec: `spec(module)` declares the permutation symmetry. Then `build` returns
            Flax Linen modules that are called as the bundled ones: `__call__(x, *,
            train, mask=None)`, with an activation shown for each group by
            `classifier.tap`. None: the spec is derived.
    """

    module: type | None = None
    spec: Callable[[Any], PermutationSpec] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Builds a model: a module if its spec is declared, and an `OwnModel` if not.

        Raises:
            ModelError: a setting has a value that the architecture cannot have.
        """
        if self.spec is not None:
            return self.build(*args, **kwargs)
        return _own_model(self.name, self.build, kwargs)


def _own_model(
    name: str, build: Callable[..., Any], arguments: Mapping[str, Any]
) -> OwnModel:
    """Makes a model of the kind that a function builds; see `ModelRecord`.

    Raises:
        ModelError: the function builds something else.
    """
    # Each kind is imported only if it is used.
    taken = inspect.signature(build).parameters
    if "rngs" in taken:
        from dimat_jax.models._own_nnx import NnxModel as Kind
    elif "key" in taken:
        from dimat_jax.models._own_equinox import EquinoxModel as Kind
    else:
        from dimat_jax.models._own_linen import LinenModel as Kind
    arguments = dict(arguments)
    return Kind(name, build, arguments.pop("n_classes"), arguments)
