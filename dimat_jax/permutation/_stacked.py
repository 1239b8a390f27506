"""Finds the units of which every layer of a stack has a permutation of its own.

Stacked layers are arrays with an axis for the layers, as those of `nn.scan`, of vmapped
ensembles and of experts. The units of one layer may be permuted in another way than
those of the next, if no operation brings units of two layers together. A trace notes
all arrays for this. Units are stacked along an axis if every array that holds them has
that axis, too: an array without it holds the units of all layers in one order.

Within the steps of a scan, the axis of the steps counts as an axis of every array.
An operation passes an axis on to its result if each entry depends on that entry alone.
If it reads several entries for each result, the result has a new axis, or none. Then
units on the other axes of the operand are not stacked along that axis, even if a later
operation finds that the new axis has the same units: `read_together` tells which axes
of an operand are left.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from dimat_jax._jaxprs import Equation
from dimat_jax.permutation._jaxpr import shape_of
from dimat_jax.permutation._units import (
    ArrayUnits,
    AxisUnits,
    Units,
    atoms,
    factors,
    split,
)

__all__ = ["Occurrence", "Stacks", "find_stacks", "read_together"]

Stacks = Mapping[Units, tuple[Units, ...]]
"""For each permutable atom that is stacked, the units along the stacking axes."""


class Occurrence(NamedTuple):
    """An array in which units occur.

    Attributes:
        axes: the units along its axes.
        steps: the steps of the scans around it, from the outermost to the innermost.
    """

    axes: Sequence[AxisUnits]
    steps: tuple[AxisUnits, ...] = ()


def read_together(
    eqn: Equation, inputs: Sequence[ArrayUnits], outputs: Sequence[ArrayUnits]
) -> Iterator[list[AxisUnits]]:
    """Yields the axes of operands that an operation reads together, entry by entry.

    They are those that it passes on to its results. A matrix product sums over all
    entries of its contracted axes, for each entry of its free axes. So units on a
    contracted axis cannot be stacked along a free axis, nor the other way round.
    """
    passed = {part for axes in outputs for axis in axes for part in _parts(axis)}
    for axes in inputs:
        yield [part for axis in axes for part in _parts(axis) if part in passed]
    name = eqn.primitive.name
    if name == "dot_general":
        contracted, batched = eqn.params["dimension_numbers"]
        for side, axes in enumerate(inputs):
            for others in (contracted[side], _rest(axes, contracted, batched, side)):
                yield [axes[d] for d in (*batched[side], *others)]
    elif name == "conv_general_dilated":
        numbers = eqn.params["dimension_numbers"]
        (batch, channels, *space) = numbers.lhs_spec
        (out_channels, inputs_of_group, *_) = numbers.rhs_spec
        lhs, rhs = inputs
        yield [lhs[channels]]
        yield [lhs[d] for d in (batch, *space)]
        yield [rhs[out_channels]]
        # Each group of channels has weights of its own, as the members of an ensemble.
        groups = eqn.params["feature_group_count"]
        sizes = [groups, shape_of(eqn.invars[1])[out_channels] // groups]
        yield [split(rhs[out_channels], sizes)[0], rhs[inputs_of_group]]
    elif name == "rev":
        # The reversed axes have the same units as before, but each entry is another.
        turned = eqn.params["dimensions"]
        yield [axis for d, axis in enumerate(inputs[0]) if d not in turned]
    elif name == "gather":
        operand, numbers = inputs[0], eqn.params["dimension_numbers"]
        shape, sizes = shape_of(eqn.invars[0]), eqn.params["slice_sizes"]
        batching = numbers.operand_batching_dims
        yield [
            axis
            for d, axis in enumerate(operand)
            if d in batching or sizes[d] == shape[d]
        ]


def _rest(axes: ArrayUnits, contracted, batched, side: int) -> list[int]:
    taken = {*contracted[side], *batched[side]}
    return [d for d in range(len(axes)) if d not in taken]


def find_stacks(
    leaves: Iterable[Sequence[AxisUnits]], occurrences: Iterable[Occurrence]
) -> Stacks:
    """Finds the atoms that are stacked, and along which axes.

    A stack's axis is fixed. Units along an axis that is permuted itself are permuted
    alike at all of its entries, as those of attention heads.

    Args:
        leaves: the units along the axes of each leaf.
        occurrences: all arrays that a model has computed with.
    """
    leaves = list(leaves)
    found: dict[Units, frozenset[Units]] = {}
    for axes in leaves:
        # In a leaf, the layers need an axis of their own. A spec has no other notation.
        _narrow(found, axes, [[a.root()] if a is not None else [] for a in axes])
    # Most units are stacked nowhere. They need not be looked at again.
    for axes, steps in occurrences:
        if any(found.values()):
            parts = [_parts(axis) for axis in axes]
            _narrow(found, axes, parts, [_parts(step) for step in steps])
    order = _orders(leaves, found)
    return {atom: order[atom] for atom in found if order.get(atom)}


def _parts(axis: AxisUnits) -> list[Units]:
    return [part.root() for part in factors(axis.root())] if axis is not None else []


def _narrow(
    found: dict[Units, frozenset[Units]],
    axes: Sequence[AxisUnits],
    parts: Sequence[Sequence[Units]],
    steps: Sequence[Sequence[Units]] = (),
) -> None:
    """Keeps for each atom of an array the fixed axes that the array has as well."""
    # If an array has the same layers on two axes, the units cannot be those of both.
    count = Counter(part for own in (*parts, *steps) for part in own)
    stacking = frozenset(p for p, n in count.items() if n == 1 and p.fixed)
    for axis in axes:
        for atom in atoms(axis):
            before = found.get(atom)
            if before is None:
                found[atom] = stacking
            elif before:
                found[atom] = before & stacking


def _orders(
    leaves: Collection[Sequence[AxisUnits]], found: Mapping[Units, frozenset[Units]]
) -> dict[Units, tuple[Units, ...]]:
    """The stacking axes of each atom, in the order in which the leaves have them."""
    orders: dict[Units, tuple[Units, ...]] = {}
    for axes in leaves:
        roots = [axis.root() for axis in axes if axis is not None]
        for atom in {atom for axis in axes for atom in atoms(axis)}:
            order = tuple(root for root in roots if root in found[atom])
            if orders.setdefault(atom, order) != order:
                # The leaves have the axes in different orders. One stack is kept.
                orders[atom] = orders[atom][:1]
    return {
        atom: order for atom, order in orders.items() if found[atom].issuperset(order)
    }
