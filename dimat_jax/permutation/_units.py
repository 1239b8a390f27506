"""The units along the axes of arrays, as far as a trace knows them.

At first nothing is known of an axis but its size. Operations then tell which axes hold
the same units (`same`), which axes are products of others (`split`, `product`), which
are concatenations (`cut`, `concatenate`), and which cannot be permuted (`fix`). A fact
is never taken back, so operations may come in any order. The algorithm is unification
on top of union-find.

An axis along which an array is uniform, as broadcasting makes it, may be permuted in
any way. It is None here, and so is an axis of size 1.
"""

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Optional

from dimat_jax.permutation._causes import Reason

__all__ = [
    "ArrayUnits",
    "AxisUnits",
    "Units",
    "atoms",
    "concatenate",
    "cut",
    "factors",
    "fix",
    "fixed",
    "fixed_axes",
    "product",
    "same",
    "split",
    "unknown",
]

AxisUnits = Optional["Units"]
"""The units along one axis, or None if the array is uniform along that axis."""

ArrayUnits = list[AxisUnits]
"""The units along each axis of an array."""


class Units:
    """The units along one axis: a node of the union-find forest.

    Attributes:
        size: the number of units.
        kind: "product" or "concat" if the units have a known inner structure, "atom" if
            they do not.
        parts: the factors of a product (row-major), or the parts of a concatenation.
        fixed: the reasons why the units cannot be permuted. It is empty if they can.
    """

    __slots__ = ("_parent", "fixed", "kind", "parts", "size")

    def __init__(
        self,
        size: int,
        kind: Literal["atom", "product", "concat"] = "atom",
        parts: tuple["Units", ...] = (),
        fixed: frozenset[Reason] = frozenset(),
    ):
        self.size = size
        self.kind = kind
        self.parts = parts
        self.fixed = fixed
        self._parent: Units | None = None

    def root(self) -> "Units":
        """The node that represents all nodes that hold the same units as this one."""
        node = self
        while node._parent is not None:
            if node._parent._parent is not None:
                node._parent = node._parent._parent
            node = node._parent
        return node

    def become(self, other: "Units") -> None:
        """Makes `other` represent this root, too."""
        self._parent = other


def unknown(size: int) -> AxisUnits:
    """New units of which nothing but the number is known."""
    return Units(size) if size > 1 else None


def atoms(units: AxisUnits) -> Iterator[Units]:
    """Yields the permutable atoms that units consist of."""
    if units is not None:
        node = units.root()
        if node.fixed:
            return
        if node.kind == "atom" and node.size > 1:
            yield node
        for part in node.parts:
            yield from atoms(part)


def fix(units: AxisUnits, reason: Reason) -> None:
    """Marks units as units that cannot be permuted."""
    if units is not None:
        _fix(units.root(), frozenset([reason]))


def _fix(node: Units, reasons: frozenset[Reason]) -> None:
    node.fixed |= reasons
    for part in node.parts:
        _fix(part.root(), reasons)


def fixed(size: int, reason: Reason, *touched: AxisUnits) -> AxisUnits:
    """New units that cannot be permuted. Fixes all `touched` units as well."""
    units = unknown(size)
    for axis in (units, *touched):
        fix(axis, reason)
    return units


def fixed_axes(shape: Sequence[int], reason: Reason) -> ArrayUnits:
    """The axes of an array none of whose axes can be permuted."""
    return [fixed(size, reason) for size in shape]


def same(*axes: AxisUnits) -> AxisUnits:
    """Unites units: from now on they are permuted alike, or all of them are fixed.

    Uniform axes are ignored.
    """
    present = [axis for axis in axes if axis is not None]
    for one, other in itertools.pairwise(present):
        _unify(one.root(), other.root())
    return present[0].root() if present else None


def split(units: AxisUnits, sizes: Sequence[int]) -> list[AxisUnits]:
    """Splits units into the factors of a product, row-major, the last one fastest.

    If the units already have a structure that does not fit, everything is fixed.
    """
    return _split(units, sizes) or _fixed_parts(units, sizes)


def cut(units: AxisUnits, sizes: Sequence[int]) -> list[AxisUnits]:
    """Cuts units into the parts of a concatenation.

    If a boundary does not fit the units' structure, everything is fixed.
    """
    # Empty parts are left out. With them, units could become a part of themselves.
    sizes_present = [size for size in sizes if size > 0]
    parts = iter(_cut(units, sizes_present) or _fixed_parts(units, sizes_present))
    return [next(parts) if size > 0 else None for size in sizes]


def product(factors: Sequence[AxisUnits], sizes: Sequence[int]) -> AxisUnits:
    """Multiplies factors to one axis: the inverse of `split`."""
    if all(factor is None for factor in factors):
        return None
    parts = tuple(
        Units(size) if factor is None else factor.root()
        for factor, size in zip(factors, sizes, strict=True)
        if size > 1
    )
    return parts[0] if len(parts) == 1 else Units(math.prod(sizes), "product", parts)


def concatenate(parts: Sequence[AxisUnits], sizes: Sequence[int]) -> AxisUnits:
    """Joins parts to one axis: the inverse of `cut`.

    A uniform part may be permuted within itself.
    """
    present = [(p, size) for p, size in zip(parts, sizes, strict=True) if size > 0]
    if len(present) < 2:
        return present[0][0] if present else None
    nodes = tuple(Units(size) if p is None else p.root() for p, size in present)
    return Units(sum(sizes), "concat", nodes)


def _unify(a: Units, b: Units) -> None:
    if a is b:
        return
    # Parts are smaller than the whole, so equal sizes rule out that units become a
    # part of themselves.
    assert a.size == b.size, f"{a.size} units cannot be {b.size} others"
    if a.fixed or b.fixed:
        reasons = a.fixed | b.fixed
        _fix(a, reasons)
        _fix(b, reasons)
        a.become(b)
    elif a.kind == "atom" or b.kind == "atom":
        if a.kind != "atom":
            a, b = b, a
        a.become(b)
    elif a.kind == b.kind == "product":
        sizes = _common_factors(_sizes(factors(a)), _sizes(factors(b)))
        _unify_parts(a, b, sizes and (_split(a, sizes), _split(b, sizes)))
    else:
        # A product can be cut along its first factor, so a product and a concatenation
        # are compared as two concatenations.
        if a.kind == "concat":
            a, b = b, a
        sizes = _common_segments(_sizes(_segments(a)), _sizes(_segments(b)))
        _unify_parts(a, b, (_cut(a, sizes), _cut(b, sizes)))


def _unify_parts(a: Units, b: Units, parts) -> None:
    if not parts or None in parts:
        _give_up(a, b)
        return
    for one, other in zip(*parts, strict=True):
        same(one, other)
    a, b = a.root(), b.root()
    if a is not b:
        a.become(b)


def _give_up(*units: Units) -> None:
    for node in units:
        fix(node, "a structure that does not fit")


def _fixed_parts(units: AxisUnits, sizes: Sequence[int]) -> list[AxisUnits]:
    parts = [unknown(size) for size in sizes]
    if units is not None:
        _give_up(units)
        for part in parts:
            fix(part, "a structure that does not fit")
    return parts


def _split(units: AxisUnits, sizes: Sequence[int]) -> list[AxisUnits] | None:
    """Splits units as `split` does; returns None if that is not possible."""
    if units is None:
        return [None for _ in sizes]
    node = units.root()
    large = [size for size in sizes if size > 1]
    if node.fixed and len(large) > 1:
        return [Units(s, fixed=node.fixed) if s > 1 else None for s in sizes]
    pieces: list[AxisUnits] | None = None
    match node.kind:
        case _ if len(large) == 1:
            pieces = [node]
        case "atom":
            node.kind, node.parts = "product", tuple(map(Units, large))
            pieces = list(node.parts)
        case "product":
            pieces = _split_product(node, large)
        case "concat":
            pieces = _split_concat(node, large)
    if pieces is None:
        return None
    rest = iter(pieces)
    return [next(rest) if size > 1 else None for size in sizes]


def _split_product(node: Units, sizes: list[int]) -> list[AxisUnits] | None:
    old = factors(node)
    common = _common_factors(_sizes(old), sizes)
    if common is None:
        return None
    finer: list[AxisUnits] = []
    rest = list(common)
    for factor in old:
        part_sizes = _take(rest, factor.size, math.prod)
        parts = _split(factor, part_sizes)
        if parts is None:
            return None
        finer += parts
    pieces, rest = [], list(common)
    for size in sizes:
        part_sizes = _take(rest, size, math.prod)
        parts, finer = finer[: len(part_sizes)], finer[len(part_sizes) :]
        pieces.append(product(parts, part_sizes))
    return pieces


def _split_concat(node: Units, sizes: list[int]) -> list[AxisUnits] | None:
    """Splits a concatenation of products whose inner factors are the same."""
    inner = math.prod(sizes[1:])
    segments = _segments(node)
    if any(segment.size % inner for segment in segments):
        return None
    outer_sizes = [segment.size // inner for segment in segments]
    parts = [
        _split(segment, [outer, *sizes[1:]])
        for segment, outer in zip(segments, outer_sizes, strict=True)
    ]
    if None in parts:
        return None
    outer, *inners = zip(*parts, strict=True)  # pyright: ignore[reportArgumentType]
    return [concatenate(outer, outer_sizes), *itertools.starmap(same, inners)]


def _cut(units: AxisUnits, sizes: Sequence[int]) -> list[AxisUnits] | None:
    """Cuts units as `cut` does; returns None if that is not possible."""
    if units is None:
        return [None for _ in sizes]
    node = units.root()
    if node.fixed and len(sizes) > 1:
        return [Units(s, fixed=node.fixed) if s > 1 else None for s in sizes]
    pieces: list[AxisUnits] | None = None
    match node.kind:
        case _ if len(sizes) == 1:
            pieces = [node]
        case "atom":
            node.kind, node.parts = "concat", tuple(map(Units, sizes))
            pieces = list(node.parts)
        case "product":
            pieces = _cut_product(node, sizes)
        case "concat":
            pieces = _cut_concat(node, sizes)
    return pieces and [p if s > 1 else None for p, s in zip(pieces, sizes, strict=True)]


def _cut_product(node: Units, sizes: Sequence[int]) -> list[AxisUnits] | None:
    first, *rest = factors(node)
    inner = node.size // first.size
    if any(size % inner for size in sizes):
        return None
    outer_sizes = [size // inner for size in sizes]
    parts = _cut(first, outer_sizes)
    return parts and [
        product([part, *rest], [outer, *_sizes(rest)])
        for part, outer in zip(parts, outer_sizes, strict=True)
    ]


def _cut_concat(node: Units, sizes: Sequence[int]) -> list[AxisUnits] | None:
    segments = _segments(node)
    common = _common_segments(_sizes(segments), sizes)
    finer: list[AxisUnits] = []
    rest = list(common)
    for segment in segments:
        parts = _cut(segment, _take(rest, segment.size, sum))
        if parts is None:
            return None
        finer += parts
    pieces, rest = [], list(common)
    for size in sizes:
        part_sizes = _take(rest, size, sum)
        parts, finer = finer[: len(part_sizes)], finer[len(part_sizes) :]
        pieces.append(concatenate(parts, part_sizes))
    return pieces


def factors(node: Units) -> list[Units]:
    """The factors of (nested) products, or the node itself if it is not a product."""
    if node.kind != "product":
        return [node]
    return [f for part in node.parts for f in factors(part.root())]


def _segments(node: Units) -> list[Units]:
    """The parts of (nested) concatenations, or the node itself if it is not one."""
    if node.kind != "concat":
        return [node]
    return [s for part in node.parts for s in _segments(part.root())]


def _sizes(nodes: Sequence[Units]) -> list[int]:
    return [node.size for node in nodes]


def _common_factors(a: Sequence[int], b: Sequence[int]) -> list[int] | None:
    """The coarsest factors of which both `a` and `b` are made, if there are any."""
    times = operator.mul
    bounds = sorted({*itertools.accumulate(a, times), *itertools.accumulate(b, times)})
    pairs = list(itertools.pairwise([1, *bounds]))
    if any(larger % smaller for smaller, larger in pairs):
        return None
    return [larger // smaller for smaller, larger in pairs if larger > smaller]


def _common_segments(a: Sequence[int], b: Sequence[int]) -> list[int]:
    """The longest segments of which both `a` and `b` are made."""
    bounds = sorted({*itertools.accumulate(a), *itertools.accumulate(b)})
    return [end - start for start, end in itertools.pairwise([0, *bounds])]


def _take(
    sizes: list[int], total: int, combine: Callable[[list[int]], int]
) -> list[int]:
    """Removes the first `sizes` that together make `total`, and returns them."""
    n = 1
    while combine(sizes[:n]) < total:
        n += 1
    taken = sizes[:n]
    del sizes[:n]
    return taken
