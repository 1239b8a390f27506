"""What `merge.repair` needs: the moments of hidden units, in any pytree.

A person may write the function that measures them, or have it made here from the
model's own function.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dimat_jax.errors import UserError
from dimat_jax.permutation._hidden import HiddenLayer, hidden_layers
from dimat_jax.permutation._outputs import ChooseOutputs, Forward
from dimat_jax.permutation._reading import read_model
from dimat_jax.permutation._run_jaxpr import run_edited
from dimat_jax.permutation._spec import PermutationSpecError
from dimat_jax.tree import PyTree, flatten, is_inexact, map_with_path

__all__ = [
    "LayerMoments",
    "MergeError",
    "UnitMoments",
    "correct_layers",
    "correction",
    "over_last_axes",
    "parts_of_layers",
    "unit_moments",
]


class MergeError(UserError):
    """Models cannot be merged, or not with these options. The message tells why."""


class UnitMoments(NamedTuple):
    """Moments of the pre-activations of a layer's units, over examples and positions.

    Attributes:
        mean: the mean of each unit.
        variance: the variance of each unit.
    """

    mean: Float[Array, "*units"]
    variance: Float[Array, "*units"]


def correction(
    measured: UnitMoments, target: UnitMoments
) -> tuple[Float[Array, "*units"], Float[Array, "*units"]]:
    """Computes the `(scale, shift)` that give units the moments of a target.

    Units that do not vary are only shifted, because no scale would make them vary.
    """
    # The measured variance of a constant unit is not quite 0, because of rounding.
    floor = 1e-10 * (measured.mean**2 + target.mean**2 + target.variance)
    varies = measured.variance > floor
    ratio = target.variance / jnp.where(varies, measured.variance, 1)
    scale = jnp.where(varies, jnp.sqrt(ratio), 1)
    return scale, target.mean - scale * measured.mean


def over_last_axes(units: Float[Array, "*units"], n_axes: int) -> Array:
    """Adds leading axes of length 1 to an array of units: `n_axes` axes in all."""
    return units.reshape((1,) * (n_axes - units.ndim) + units.shape)


def _on_axes(units: Array, dims: tuple[int, ...], n_axes: int) -> Array:
    """Puts the axes of an array of units onto some of `n_axes` axes."""
    shape = [1] * n_axes
    for d, size in zip(dims, units.shape, strict=True):
        shape[d] = size
    return units.transpose(np.argsort(dims).tolist()).reshape(shape)


# The leaves of a layer ================================================================


class _Part(NamedTuple):
    """A leaf of a layer.

    Attributes:
        path: the path of the leaf.
        dims: the dimensions that hold the layer's units.
        shifted: whether the leaf is a bias, which is shifted as well as scaled.
    """

    path: str
    dims: tuple[int, ...]
    shifted: bool


Parts = tuple[tuple[str, tuple[_Part, ...]], ...]
"""For each layer by name the leaves that hold its weights. It can be hashed."""


def parts_of_layers(
    measure: Callable[..., Any],
    variables: PyTree,
    moments: Mapping[str, UnitMoments],
) -> Parts:
    """Tells which leaves hold the weights of layers, and on which axes their units lie.

    Functions that `unit_moments` has made tell it. For other functions a layer's name
    is the path of its leaves. Leaves that are called "kernel" and "bias", as in Flax,
    hold the units last. In other leaves, the units are on the axes that have as many
    entries as there are units.

    Raises:
        MergeError: a layer has no leaves, or a leaf's shape does not tell which axes
            hold the units.
    """
    if isinstance(measure, LayerMoments):
        return measure.parts
    leaves = {path: jnp.shape(leaf) for path, leaf in flatten(variables).items()}
    parts = []
    for layer, (mean, _) in moments.items():
        names = [
            p.removeprefix(f"{layer}/") for p in leaves if p.startswith(f"{layer}/")
        ]
        if not names:
            raise MergeError(
                f"unit_moments tells of a layer {layer!r}, but no leaf's path begins "
                "so; name layers by the paths of their leaves, or let "
                "merge.unit_moments(forward, variables, inputs) make the function"
            )
        own = [_part(layer, n, leaves[f"{layer}/{n}"], jnp.shape(mean)) for n in names]
        parts.append((layer, tuple(own)))
    return tuple(parts)


def _part(
    layer: str, name: str, shape: tuple[int, ...], units: tuple[int, ...]
) -> _Part:
    path, n = f"{layer}/{name}", len(units)
    if name in ("kernel", "bias"):
        places = [len(shape) - n]
    else:
        places = [
            d for d in range(len(shape) - n + 1) if shape[d : d + n] == tuple(units)
        ]
    if len(places) != 1 or shape[places[0] : places[0] + n] != tuple(units):
        raise MergeError(
            f"{path!r}, of shape {shape}, does not tell which of its axes hold the "
            f"units of layer {layer!r}, of which there are {units}; let "
            "merge.unit_moments(forward, variables, inputs) make the function that "
            "measures them"
        )
    start = places[0]
    shifted = name == "bias" or np.prod(shape) == np.prod(units)
    return _Part(path, tuple(range(start, start + n)), bool(shifted))


def correct_layers(
    variables: PyTree,
    measured: Mapping[str, UnitMoments],
    targets: Mapping[str, UnitMoments],
    parts: Parts,
) -> PyTree:
    """Puts the corrections of all layers into their weights and biases. Pure."""
    layer_of = {part.path: (name, part) for name, own in parts for part in own}

    def correct(path, leaf):
        if path not in layer_of:
            return leaf
        name, part = layer_of[path]
        scale, shift = (
            _on_axes(x, part.dims, leaf.ndim)
            for x in correction(measured[name], targets[name])
        )
        exact = leaf * scale
        return (exact + shift if part.shifted else exact).astype(leaf.dtype)

    return map_with_path(correct, variables)


# Functions that measure, made from the model ==========================================


class LayerMoments:
    """Measures the moments of hidden units; see `unit_moments`.

    Attributes:
        parts: for each layer the leaves that hold its weights.
    """

    def __init__(
        self,
        forward: Forward,
        outputs: ChooseOutputs | None,
        layers: list[HiddenLayer],
    ):
        self._forward, self._outputs = forward, outputs
        self.parts: Parts = tuple((layer.weight, _parts(layer)) for layer in layers)

    def __call__(
        self,
        variables: PyTree,
        inputs: PyTree,
        targets: Mapping[str, UnitMoments] | None = None,
    ) -> dict[str, UnitMoments]:
        reading = read_model(self._forward, variables, inputs, self._outputs)
        measured: dict[str, UnitMoments] = {}

        def measure(layer: HiddenLayer, value: Array) -> Array:
            dims = layer.value_dims
            units = jnp.moveaxis(value.astype(jnp.float32), dims, range(len(dims)))
            flat = units.reshape(*units.shape[: len(dims)], -1)
            measured[layer.weight] = own = UnitMoments(flat.mean(-1), flat.var(-1))
            if targets is None:
                return value
            scale, shift = (
                _on_axes(x, dims, value.ndim)
                for x in correction(own, targets[layer.weight])
            )
            shift = shift if layer.bias is not None else 0
            return (value * scale + shift).astype(value.dtype)

        edits = {
            layer.place: lambda value, layer=layer: measure(layer, value)
            for layer in hidden_layers(reading)
        }
        run_edited(reading.jaxpr, jax.tree.leaves((variables, inputs)), edits)
        return measured


def _parts(layer: HiddenLayer) -> tuple[_Part, ...]:
    weight = _Part(layer.weight, layer.weight_dims, shifted=False)
    if layer.bias is None:
        return (weight,)
    return weight, _Part(layer.bias, layer.bias_dims, shifted=True)


def unit_moments(
    forward: Forward,
    variables: PyTree,
    inputs: PyTree,
    *,
    outputs: ChooseOutputs | None = None,
) -> LayerMoments:
    """Makes the function that `repair` needs, from any model without BatchNorm.

    The hidden layers are those whose units `permutation.derive` allows to be permuted.
    A layer is named after its weight.

    Args:
        forward: `forward(variables, inputs) -> outputs`, in evaluation mode.
        variables: one network's variables.
        inputs: a batch of inputs; only shapes matter.
        outputs: the outputs that count, as for `permutation.derive`.

    Returns:
        `measure(variables, inputs, targets=None) -> {layer: UnitMoments}`.

    Raises:
        MergeError: the network has running statistics, or no hidden layers, or the
            pre-activations of some hidden units cannot be told (as those of layers
            within a scan).
    """
    reading = read_model(forward, variables, inputs, outputs)
    leaves = flatten(variables)
    statistics = sorted(p for p in reading.statistics if is_inexact(leaves[p]))
    if statistics:
        raise MergeError(
            "repair is for networks without BatchNorm, but this one has running "
            f"statistics, {', '.join(statistics[:4])}; recalibrate it"
        )
    try:
        layers = hidden_layers(reading)
    except PermutationSpecError as error:
        raise MergeError(str(error)) from error
    if not layers:
        raise MergeError("the network has no hidden units that could be repaired")
    return LayerMoments(forward, outputs, layers)
