"""What a spec says of units: the names of groups, products and concatenations."""

import math
from collections.abc import Iterable, Mapping, Sequence

from dimat_jax.permutation._spec import Axis, Concat, Product
from dimat_jax.permutation._units import Known, Units, atoms, factors, fix, product

__all__ = ["declare", "fix_what_cannot_be_declared", "name_groups"]


def fix_what_cannot_be_declared(units: Known) -> None:
    """A concatenation as the inner factor of units that are permuted, too."""
    if units is None:
        return
    moving = False
    for factor in factors(units.root()):
        if factor.kind == "concat":
            if moving:
                fix(factor, "a structure that no spec can declare")
            for part in factor.parts:
                fix_what_cannot_be_declared(part)
        moving = moving or any(atoms(factor))


def name_groups(axes_of: Mapping[str, Sequence[Known]]) -> dict[Units, str]:
    """Names every group after the first leaf, and its last axis, that it permutes."""
    names: dict[Units, str] = {}
    for path, axes in axes_of.items():
        for d, axis in reversed(list(enumerate(axes))):
            new = [a for a in dict.fromkeys(atoms(axis)) if a not in names]
            for n, atom in enumerate(new):
                names[atom] = f"{path}:{d}" + (f".{n}" if len(new) > 1 else "")
    return names


def declare(units: Known, names: Mapping[Units, str]) -> Axis:
    """What a spec says of an axis."""
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
    """A concatenation that is not nested, and has no fixed parts side by side."""
    flat: list[tuple[Axis, int]] = []
    for part in parts:
        axis, size = declare(part, names), part.root().size
        for inner in axis.parts if isinstance(axis, Concat) else [(axis, size)]:
            if inner[0] is None and flat and flat[-1][0] is None:
                inner = (None, flat.pop()[1] + inner[1])
            flat.append(inner)
    return Concat(*flat)


def _product_axis(parts: list[Units], names: Mapping[Units, str]) -> Axis:
    """A product; one with a concatenation inside is a concatenation of products."""
    outer: list[int | str] = []
    for n, factor in enumerate(parts):
        axis = declare(factor, names)
        if isinstance(axis, Concat):
            # What is further out is fixed, so every repetition is spelt out.
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
