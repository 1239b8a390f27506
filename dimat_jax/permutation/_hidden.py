"""Finds a model's hidden layers: the weights that make units, and their biases.

A layer is a matrix product or a convolution of what depends on the inputs with one
leaf. Its pre-activations are the result, with the bias if one is added to it.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from dimat_jax.permutation._jaxpr import Place
from dimat_jax.permutation._reading import Reading
from dimat_jax.permutation._spec import PermutationSpecError
from dimat_jax.permutation._trace import Operation, Value
from dimat_jax.permutation._units import AxisUnits, Units, atoms, factors

__all__ = ["HiddenLayer", "hidden_layers"]

# These operations leave the numbers of a layer's result as they are.
_PASSING = (
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "reshape",
    "squeeze",
    "transpose",
)

_Key = tuple[Units, ...]
"""The units along an axis, in a form that can be compared: the factors."""


class HiddenLayer(NamedTuple):
    """A layer whose units may be permuted.

    Attributes:
        weight: the path of the weight.
        weight_dims: the dimensions of the weight that hold the units.
        bias: the path of the bias; None if the layer has none.
        bias_dims: the dimensions of the bias, in the order of `weight_dims`.
        place: the place of the pre-activations in the model's jaxpr.
        value_dims: their dimensions that hold the units, in the order of `weight_dims`.
    """

    weight: str
    weight_dims: tuple[int, ...]
    bias: str | None
    bias_dims: tuple[int, ...]
    place: Place
    value_dims: tuple[int, ...]


class _Found(NamedTuple):
    """A layer while it is followed: its weight, and the units in order."""

    leaf: int
    units: tuple[_Key, ...]


def hidden_layers(reading: Reading) -> list[HiddenLayer]:
    """The hidden layers of a model, in the order of its operations.

    Raises:
        PermutationSpecError: the pre-activations of some hidden units cannot be told,
            because a layer is within a loop, its weight is used twice, or its units are
            not on axes of their own. The message names the weight.
    """
    return _Finder(reading).layers()


class _Finder:
    """Follows the operations of a trace from weights to pre-activations."""

    def __init__(self, reading: Reading):
        self._paths = list(reading.axes)
        self._axes = list(reading.axes.values())
        self._inputs = 1 << len(self._paths)
        self._operations = reading.trace.operations
        self._layers: dict[int, HiddenLayer] = {}
        # By the ids of values, which the operations keep alive.
        self._results: dict[int, _Found] = {}

    def layers(self) -> list[HiddenLayer]:
        for operation in self._operations:
            if operation.name in ("dot_general", "conv_general_dilated"):
                self._add_layer(operation)
            elif operation.name in _PASSING:
                found = self._results.get(id(operation.operands[0]))
                if found is not None and _find(found.units, operation.results[0].axes):
                    self._results[id(operation.results[0])] = found
            elif operation.name in ("add", "add_any"):
                self._add_bias(operation)
        return list(self._layers.values())

    def _leaf_of(self, value: Value) -> int | None:
        """The number of the only leaf on which a value depends."""
        sources = value.sources
        if sources.bit_count() == 1 and sources < self._inputs:
            return sources.bit_length() - 1
        return None

    def _add_layer(self, operation: Operation) -> None:
        for weight, other in ((0, 1), (1, 0)):
            operand = operation.operands[weight]
            if not operation.operands[other].sources & self._inputs:
                continue
            if operand.sources & self._inputs:
                continue
            keys = self._made(operation, weight)
            if not any(atom for axis in keys for unit in axis for atom in atoms(unit)):
                continue
            leaf = self._leaf_of(operand)
            if leaf is None:
                names = [
                    p for n, p in enumerate(self._paths) if operand.sources >> n & 1
                ]
                self._refuse(" and ".join(map(repr, names)), "several leaves make them")
            elif leaf in self._layers:
                self._refuse(repr(self._paths[leaf]), "the weight is used twice")
            else:
                self._note(leaf, keys, operation)

    def _note(self, leaf: int, keys: tuple[_Key, ...], operation: Operation) -> None:
        path, (result,) = self._paths[leaf], operation.results
        weight_dims = _find(keys, self._axes[leaf])
        value_dims = _find(keys, result.axes)
        if weight_dims is None or value_dims is None:
            self._refuse(repr(path), "its units are not on axes of their own")
        order = sorted(range(len(keys)), key=weight_dims.__getitem__)
        found = _Found(leaf, tuple(keys[n] for n in order))
        if operation.place is None or operation.steps:
            self._refuse(repr(path), "the layer is within a loop or a branch")
        self._layers[leaf] = HiddenLayer(
            path,
            tuple(weight_dims[n] for n in order),
            None,
            (),
            (*operation.place, ~0),
            tuple(value_dims[n] for n in order),
        )
        self._results[id(result)] = found

    def _made(self, operation: Operation, weight: int) -> tuple[_Key, ...]:
        """The units that a layer makes: those on its weight's axes without the inputs.

        The members of a vmapped ensemble, on a batched axis, have units of their own.
        """
        numbers = operation.eqn.params["dimension_numbers"]
        axes = operation.operands[weight].axes
        if operation.name == "conv_general_dilated":
            free = [numbers.rhs_spec[0]] if weight == 1 else []
        else:
            contracted, _ = numbers
            free = [d for d in range(len(axes)) if d not in contracted[weight]]
        return tuple(_key(axes[d]) for d in free if axes[d] is not None)

    def _add_bias(self, operation: Operation) -> None:
        for layer, other in ((0, 1), (1, 0)):
            found = self._results.get(id(operation.operands[layer]))
            if found is None or self._layers[found.leaf].bias is not None:
                continue
            bias = self._leaf_of(operation.operands[other])
            (result,) = operation.results
            if bias is None or operation.place is None:
                continue
            bias_dims = _find(found.units, self._axes[bias])
            value_dims = _find(found.units, result.axes)
            n_axes = sum(axis is not None for axis in self._axes[bias])
            # A bias has one number for each unit. Other leaves, as those that tell
            # places, are no biases.
            if bias_dims and value_dims and n_axes == len(bias_dims):
                self._layers[found.leaf] = self._layers[found.leaf]._replace(
                    bias=self._paths[bias],
                    bias_dims=bias_dims,
                    place=(*operation.place, ~0),
                    value_dims=value_dims,
                )

    def _refuse(self, weights: str, why: str) -> NoReturn:
        raise PermutationSpecError(
            f"the pre-activations of the hidden units that {weights} makes cannot be "
            f"told: {why}"
        )


def _key(axis: AxisUnits) -> _Key:
    return () if axis is None else tuple(f.root() for f in factors(axis.root()))


def _find(keys: Sequence[_Key], axes: Sequence[AxisUnits]) -> tuple[int, ...] | None:
    """The dimensions of an array that hold units; None if they are not told apart."""
    of_dims = [_key(axis) for axis in axes]
    count = Counter(of_dims)
    if any(count[key] != 1 for key in keys):
        return None
    return tuple(map(of_dims.index, keys))
