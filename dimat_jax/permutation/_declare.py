"""Turns the units that a trace has found into what a spec declares of each axis."""

import math
from collections.abc import Iterable, Mapping, Sequence

from dimat_jax.permutation._spec import Axes, Axis, Concat, Product, Stack
from dimat_jax.permutation._stacked import Stacks
from dimat_jax.permutation._units import AxisUnits, Units, atoms, factors, fix, product

__all__ = ["declare", "declare_array", "fix_undeclarable", "name_groups"]


def fix_undeclarable(units: AxisUnits) -> None:
    """Fixes the units for which a spec has no notation.

    These are concatenations inside of a product of which an outer factor is permuted.
    """
    if units is None:
        return
    outer_is_permuted = False
    for factor in factors(units.root()):
        if factor.kind == "concat":
            if outer_is_permuted:
                fix(factor, "a structure that no spec can declare")
            for part in factor.parts:
                fix_undeclarable(part)
        outer_is_permuted = outer_is_permuted or any(atoms(factor))


def name_groups(axes_of: Mapping[str, Sequence[AxisUnits]]) -> dict[Units, str]:
    """Names every group after the first leaf that it permutes.

    The name ends in the number of the last axis of that leaf which the group permutes.

    Args:
        axes_of: by each leaf's path, the units along its axes.

    Returns:
        the name of each permutable atom.
    """
    names: dict[Units, str] = {}
    for path, axes in axes_of.items():
        for d, axis in reversed(list(enumerate(axes))):
            new = [a for a in dict.fromkeys(atoms(axis)) if a not in names]
            for n, atom in enumerate(new):
                names[atom] = f"{path}:{d}" + (f".{n}" if len(new) > 1 else "")
    return names


def declare_array(
    axes: Sequence[AxisUnits], names: Mapping[Units, str], stacks: Stacks
) -> Axes:
    """The notation of a spec for an array, with a `Stack` where layers are stacked."""
    shown = dict.fromkeys(atom for axis in axes for atom in atoms(axis))

    def declared(units: AxisUnits) -> Axis:
        if units is not None:
            root = units.root()
            stacked = [names[a] for a in shown if root in stacks.get(a, ())]
            if stacked:
                return Stack(*stacked)
        return declare(units, names)

    return tuple(map(declared, axes))


def declare(units: AxisUnits, names: Mapping[Units, str]) -> Axis:
    """The notation of a spec for an axis with these units."""
    if units is None or not any(atom in names for atom in atoms(units)):
        return None
    node = units.root()
    match node.kind:
        case "atom":
            return names[node]
        case "concat":
            return _concat_axis(node.parts, names)
        case _:
            return _product_axis(factors(node), names)


def _concat_axis(parts: Iterable[Units], names: Mapping[Units, str]) -> Concat:
    """A `Concat` that is not nested, with neighbouring fixed parts joined to one."""
    flat: list[tuple[Axis, int]] = []
    for part in parts:
        axis, size = declare(part, names), part.root().size
        for inner in axis.parts if isinstance(axis, Concat) else [(axis, size)]:
            if inner[0] is None and flat and flat[-1][0] is None:
                inner = (None, flat.pop()[1] + inner[1])
            flat.append(inner)
    return Concat(*flat)


def _product_axis(parts: list[Units], names: Mapping[Units, str]) -> Axis:
    """A `Product`, or a `Concat` of products where a factor is a concatenation."""
    outer: list[int | str] = []
    for n, factor in enumerate(parts):
        axis = declare(factor, names)
        if isinstance(axis, Concat):
            # The outer factors are fixed (see `fix_undeclarable`). So the parts can be
            # written out as often as the outer factors repeat them.
            inner = parts[n + 1 :]
            inner_sizes = [f.size for f in inner]
            once = [
                product([part, *inner], [part.root().size, *inner_sizes])
                for part in factor.parts
            ]
            n_times = math.prod(f.size for f in parts[:n])
            return _concat_axis([p for p in once if p is not None] * n_times, names)
        assert axis is None or isinstance(axis, str)
        if axis is None and outer and isinstance(outer[-1], int):
            outer[-1] *= factor.size
        else:
            outer.append(axis or factor.size)
    return Product(*outer)
