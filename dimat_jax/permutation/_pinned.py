"""Finds the layers that look permutable, but are fixed, and what may be done about it.

A layer looks permutable if one weight makes its units and another weight reads them.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from dimat_jax._jaxprs import Equation
from dimat_jax.permutation._causes import Cause, Reason, describe
from dimat_jax.permutation._nodes import nodes
from dimat_jax.permutation._trace import Trace, Value
from dimat_jax.permutation._units import ArrayUnits, AxisUnits, Units

__all__ = ["PinnedLayer", "list_axes", "list_layers", "pinned_layers"]

# What may be done, by the kind of the reason. The first kind that applies counts.
_MENDS = {
    "captured": "if the array belongs to the model, pass it as a part of the "
    "variables; if its entries are alike by construction, make it within forward",
    "output": "if that is no output of the network, as updated statistics, captured "
    "intermediates or features, name those that count: outputs=lambda out: out[0]",
    "operation": "it tells units apart by their places",
}


class PinnedLayer(NamedTuple):
    """A layer whose units look permutable, but are fixed.

    Attributes:
        axes: the pairs (leaf, dimension) that hold the units.
        reasons: the reasons why the units are fixed.
    """

    axes: list[tuple[str, int]]
    reasons: frozenset[Reason]

    def surprises(self, n_outputs: int) -> bool:
        """Whether a person may not expect the layer to be fixed.

        It is to be expected if an input or all outputs hold the units, as the ends of
        a residual stream that starts at the inputs. Operations without a rule are
        announced by another message.
        """
        kinds = _kinds(self.reasons)
        if "captured" in kinds:
            return "input" not in kinds
        if "output" in kinds:
            holding = {
                reason.number
                for reason in self.reasons
                if isinstance(reason, Cause) and reason.kind == "output"
            }
            return kinds == {"output"} and len(holding) < n_outputs
        return kinds == {"operation"}

    def __str__(self) -> str:
        kinds = _kinds(self.reasons)
        mend = next((f" ({_MENDS[kind]})" for kind in _MENDS if kind in kinds), "")
        looks = (
            "look permutable, but are"
            if len(self.axes) > 1
            else ("looks permutable, but is")
        )
        return f"{list_axes(self.axes)} {looks} fixed by {describe(self.reasons)}{mend}"


def pinned_layers(
    trace: Trace, axes_of: Mapping[str, Sequence[AxisUnits]], inputs: int
) -> list[PinnedLayer]:
    """The layers that look permutable, but are fixed.

    Args:
        trace: the trace of the model.
        axes_of: by each leaf's path, the units along its axes.
        inputs: the source bit of the model's inputs (see `Value`).
    """
    made: set[Units] = set()
    read: set[Units] = set()
    for eqn, operands, (result,), *_ in trace.contractions:
        for weight, other in ((0, 1), (1, 0)):
            if not operands[weight].sources & inputs and (
                operands[weight].sources and operands[other].sources & inputs
            ):
                axes = _axes_read_and_made(eqn, operands, result.axes, weight)
                for axis, found in zip(axes, (read, made), strict=True):
                    found.update(node for units in axis for node in nodes(units))
    layers: dict[Units, PinnedLayer] = {}
    for path, axes in axes_of.items():
        for d, axis in enumerate(axes):
            for node in nodes(axis):
                if node.fixed and node in made and node in read:
                    new = PinnedLayer([], node.fixed)
                    layers.setdefault(node, new).axes.append((path, d))
    # A layer is listed with the whole of its units, and not once more with a part.
    parts = {part.root() for node in layers for part in node.parts}
    return [layer for node, layer in layers.items() if node not in parts]


def _axes_read_and_made(
    eqn: Equation, operands: Sequence[Value], result: ArrayUnits, weight: int
) -> tuple[ArrayUnits, ArrayUnits]:
    """The axes whose units a contraction with a weight reads, and those that it makes.

    Args:
        eqn: a matrix product or a convolution.
        operands: its operands.
        result: the axes of its result.
        weight: the number of the operand that is the weight.
    """
    numbers = eqn.params["dimension_numbers"]
    if eqn.primitive.name == "conv_general_dilated":
        return [operands[0].axes[numbers.lhs_spec[1]]], [result[numbers.out_spec[1]]]
    contracted, batched = numbers
    axes = operands[weight].axes
    taken = {*contracted[weight], *batched[weight]}
    return (
        [axes[d] for d in contracted[weight]],
        [axis for d, axis in enumerate(axes) if d not in taken],
    )


def list_axes(axes: Collection[tuple[str, int]], at_most: int = 6) -> str:
    """Lists axes of leaves in words."""
    named = [f"{path!r} axis {d}" for path, d in axes]
    more = [f"and {len(named) - at_most} more"] if len(named) > at_most else []
    return ", ".join([*named[:at_most], *more])


def list_layers(layers: Iterable[PinnedLayer], at_most: int = 4) -> str:
    """Lists layers in words; those with the same reasons are listed together."""
    axes: dict[frozenset[Reason], list[tuple[str, int]]] = {}
    for layer in layers:
        axes.setdefault(layer.reasons, []).extend(layer.axes)
    # An axis that is split into factors belongs to a layer for each factor.
    texts = [
        str(PinnedLayer(list(dict.fromkeys(own)), reasons))
        for reasons, own in axes.items()
    ]
    more = [f"and {len(texts) - at_most} more layers"] if len(texts) > at_most else []
    return "; ".join([*texts[:at_most], *more])


def _kinds(reasons: Iterable[Reason]) -> set[str]:
    return set(map(_kind, reasons))


def _kind(reason: Reason) -> str:
    return reason.kind if isinstance(reason, Cause) else "operation"
