"""Models of users: modules of Flax Linen, Flax NNX or Equinox, nothing declared.

`OwnModel` is the one form in which all other code sees such a model: `init` and `apply`
on variables {"params": ..., other collections}. Each kind of module implements these
two, in a file of its own. What merging needs is derived from them.
"""

import dataclasses
import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Key

from dimat_jax import merge, permutation
from dimat_jax._jaxprs import equations
from dimat_jax.models._settings import ModelError
from dimat_jax.permutation import PermutationSpec
from dimat_jax.tree import PyTree, flatten, map_with_path

__all__ = ["Layout", "OwnModel", "expect_module", "filled"]

# Derived symmetries are read off batches of this size; an axis of size 1 tells little.
_BATCH = 4

Activations = Callable[[PyTree, Array], dict[str, Array]]


@dataclasses.dataclass(frozen=True, eq=False)
class OwnModel(ABC):
    """A model of a user.

    Attributes:
        name: the model's name, for messages.
        build: the function that makes a module.
        n_classes: the number of logits.
        arguments: the further arguments of `build` that the config gives.
        input_shape: the shape of one input; () if it is not known yet.
        input_dtype: the dtype of the inputs: "float32", or "int32" for tokens.
        permutes: whether the model's symmetry is wanted. If not, `symmetry` is one that
            permutes nothing.
    """

    name: str
    build: Callable[..., Any]
    n_classes: int
    arguments: Mapping[str, Any]
    input_shape: tuple[int, ...] = ()
    input_dtype: str = "float32"
    permutes: bool = True

    def make(self, **further: Any) -> Any:
        """Calls `build`, with `input_shape` too if it takes this argument."""
        given = {"n_classes": self.n_classes, **self.arguments, **further}
        if "input_shape" in inspect.signature(self.build).parameters:
            given["input_shape"] = self.input_shape
        return self.build(**given)

    @abstractmethod
    def init(self, key: Key[Array, ""], inputs: ArrayLike) -> PyTree:
        """Makes new variables: {"params": ..., "batch_stats": ..., ...}.

        "batch_stats" holds running statistics, and is missing if there are none.
        """

    @abstractmethod
    def apply(
        self,
        variables: PyTree,
        inputs: ArrayLike,
        mask: Bool[Array, " batch"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Array, PyTree]:
        """Computes logits, and the new values of collections other than "params".

        Args:
            variables: the variables.
            inputs: a batch of inputs.
            mask: the examples that count for batch statistics; None: all.
            key: the key of dropout and the like in training mode; None: evaluation
                mode, in which there are no new values.
        """

    def forward(self, variables: PyTree, inputs: ArrayLike) -> Array:
        """Computes logits in evaluation mode, in float32."""
        return self.apply(variables, inputs)[0].astype(jnp.float32)

    def train_forward(
        self,
        variables: PyTree,
        inputs: ArrayLike,
        mask: Bool[Array, " batch"] | None,
        key: Key[Array, ""],
    ) -> tuple[Array, PyTree]:
        """Computes logits in training mode, in float32, and the updated collections."""
        logits, updated = self.apply(variables, inputs, mask, key)
        return logits.astype(jnp.float32), updated

    @functools.cached_property
    def abstract_variables(self) -> PyTree:
        """The shapes and dtypes of the variables. Finding them does not start JAX."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0), self._zeros(1)))

    @property
    def has_statistics(self) -> bool:
        """Whether the model has running statistics, as BatchNorm has."""
        return "batch_stats" in self.abstract_variables

    @functools.cached_property
    def symmetry(self) -> tuple[PermutationSpec, Activations]:
        """The permutation symmetry, and the activations that matching compares.

        Raises:
            PermutationSpecError: the model cannot be traced.
        """
        if not self.permutes:
            leaves = flatten(self.abstract_variables)
            axes = {path: (None,) * len(leaf.shape) for path, leaf in leaves.items()}
            return PermutationSpec(axes, taps={}), lambda variables, inputs: {}
        return permutation.derive(
            self.forward,
            self.abstract_variables,
            self._zeros(_BATCH),
            is_statistic=lambda path: path.startswith("batch_stats/"),
            with_activations=True,
        )

    def both_modes(self) -> Callable[[PyTree, Array], dict[str, Array]]:
        """Returns a function that computes logits in both modes, in float32.

        Dropout drops other units of permuted layers, so the training mode of a model
        with dropout is left out.
        """
        exact = self.in_float32()

        def compute_outputs(variables, inputs):
            outputs = {"eval": exact.forward(variables, inputs)}
            train = partial(exact.train_forward, mask=None)

            def of_key(key):
                return train(variables, inputs, key=key)[0]

            if not _is_random(of_key):
                outputs["train"] = of_key(jax.random.key(0))
            return outputs

        return compute_outputs

    def batch_statistics(
        self,
    ) -> Callable[[PyTree, Array, Array], PyTree] | None:
        """Returns a function that measures the statistics of a batch.

        See `classifier.batch_statistics`. None if the model has no running statistics.

        Raises:
            MergeError: the statistics are not updated as moving averages.
        """
        if not self.has_statistics:
            return None
        key = jax.random.key(0)

        def forward(variables, given):
            inputs, mask = given
            return self.train_forward(variables, inputs, mask, key)

        inputs = jax.random.normal(key, (_BATCH, *self.input_shape))
        # Tokens are all 0 here, because other numbers may be out of a vocabulary.
        inputs = inputs if self.input_dtype == "float32" else self._zeros(_BATCH)
        variables = jax.jit(self.init)(key, inputs[:1])
        given = inputs, jnp.ones(_BATCH, bool)
        measure = merge.batch_statistics(forward, variables, given)

        def statistics(variables, inputs, mask):
            found = measure(variables, (inputs, mask), mask)

            def new(path, leaf):
                return found.get(f"batch_stats/{path}", leaf)

            return map_with_path(new, variables["batch_stats"])

        return statistics

    def unit_moments(self) -> Callable[..., Any]:
        """Returns the function that `merge.repair` needs; see `merge.unit_moments`."""
        exact = self.in_float32()
        variables = exact.abstract_variables
        return merge.unit_moments(exact.forward, variables, self._zeros(_BATCH))

    def in_float32(self) -> "OwnModel":
        """The same model, computing in float32 if it has an argument `dtype`."""
        if "dtype" not in self.arguments:
            return self
        arguments = {**self.arguments, "dtype": jnp.dtype(jnp.float32)}
        return dataclasses.replace(self, arguments=arguments)

    def _zeros(self, n: int) -> Array:
        return jnp.zeros((n, *self.input_shape), self.input_dtype)


def expect_module(name: str, module: Any, kind: type, called: str) -> None:
    """Checks that a user's function has built a module of the expected kind.

    Raises:
        ModelError: it has built something else.
    """
    if not isinstance(module, kind):
        raise ModelError(
            f"the function of the model {name!r} returns a {type(module).__name__}, "
            f"and not {called}. A function without the arguments rngs and key builds a "
            "Flax Linen module, one with rngs a Flax NNX module, one with key an "
            "Equinox module"
        )


def filled(inputs: Array, mask: Bool[Array, " batch"] | None) -> Array:
    """Replaces the masked examples of a batch by unmasked ones, in turn.

    BatchNorm of modules that take no mask then sees nothing but examples that count.
    """
    if mask is None:
        return inputs
    counting = jnp.argsort(~mask, stable=True)
    return inputs[counting[jnp.arange(len(mask)) % jnp.maximum(mask.sum(), 1)]]


class Layout:
    """Turns a tree of arrays into variables of nested dicts, and back.

    Checkpoints, sums and digests then see the same simple trees for all kinds of
    modules.

    Args:
        tree: the tree, of arrays or of their shapes.
        place: `place(path, leaf)` returns the path of a leaf among the variables, which
            begins with its collection.
    """

    def __init__(self, tree: PyTree, place: Callable[[str, Any], str]):
        leaves = flatten(tree)
        self._structure = jax.tree.structure(tree)
        self._places = [place(path, leaf).split("/") for path, leaf in leaves.items()]

    def variables(self, tree: PyTree) -> dict[str, Any]:
        """Returns the variables of a tree."""
        found: dict[str, Any] = {"params": {}}
        for (*parents, name), leaf in zip(
            self._places, jax.tree.leaves(tree), strict=True
        ):
            place = found
            for parent in parents:
                place = place.setdefault(parent, {})
            place[name] = leaf
        return found

    def tree(self, variables: Mapping[str, Any]) -> PyTree:
        """Returns the tree of variables."""
        leaves = []
        for names in self._places:
            place: Any = variables
            for name in names:
                place = place[name]
            leaves.append(place)
        return jax.tree.unflatten(self._structure, leaves)


def _is_random(of_key: Callable[[Array], Array]) -> bool:
    """Whether a function draws random numbers."""
    traced = jax.make_jaxpr(of_key)(jax.random.key(0))
    names = {equation.primitive.name for equation in equations(*traced.jaxpr.eqns)}
    return bool(names & {"random_bits", "threefry2x32"})
