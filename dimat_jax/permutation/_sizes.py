"""The sizes of a spec's groups, and whether a spec fits its variables."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dimat_jax.errors import nearest
from dimat_jax.permutation._spec import (
    Axis,
    Concat,
    PermutationSpec,
    PermutationSpecError,
    Product,
    Stack,
    axes_groups,
    stack_dimensions,
)
from dimat_jax.tree import PyTree, flatten

__all__ = ["array_leaves", "group_shapes", "group_sizes", "validate"]


def validate(spec: PermutationSpec, variables: PyTree) -> None:
    """Checks that a spec covers every leaf, and that ranks and sizes agree.

    `verify` checks that the network's function has the declared symmetry.

    Raises:
        PermutationSpecError: the spec does not fit. The message names the leaf and the
            group.
    """
    shapes = group_shapes(spec, variables)
    groups = spec.groups
    for leaf in sorted(spec.statistics):
        if leaf not in spec.axes:
            raise PermutationSpecError(
                f"the spec names the statistic {leaf!r}, which the variables do not "
                f"have; {nearest(leaf, spec.axes)}"
            )
    for tap, axes in spec.taps.items():
        axes = (axes,) if isinstance(axes, str) else axes
        shown = axes_groups(axes)
        if not shown:
            raise PermutationSpecError(
                f"tap {tap!r} must show the units of a group; its axes are {axes}"
            )
        for axis in axes:
            if isinstance(axis, Concat):
                raise PermutationSpecError(
                    f"tap {tap!r} concatenates units of several kinds ({axis}); give "
                    "each part a tap of its own"
                )
        for group in shown:
            if group not in groups:
                raise PermutationSpecError(
                    f"tap {tap!r} shows group {group!r}, which no leaf has; "
                    f"{nearest(group, groups)}"
                )
            if len(stack_dimensions(axes)[group]) != len(shapes[group]) - 1:
                raise PermutationSpecError(
                    f"tap {tap!r} must show each layer of the stacked group {group!r}, "
                    f"with an axis Stack({group!r}); its axes are {axes}"
                )
            if shown.count(group) > 1:
                raise PermutationSpecError(
                    f"tap {tap!r} shows group {group!r} twice, as if pairs of its "
                    f"units were units; its axes are {axes}"
                )


def array_leaves(variables: PyTree) -> dict[str, Any]:
    """The leaves of variables by path.

    Raises:
        PermutationSpecError: a leaf is not an array.
    """
    leaves = flatten(variables)
    for path, leaf in leaves.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise PermutationSpecError(
                f"the leaf {path!r} is no array, but {type(leaf).__name__}; split the "
                "variables from what is not traced first (of a TrainState, pass "
                "state.params)"
            )
    return leaves


def group_sizes(spec: PermutationSpec, variables: PyTree) -> dict[str, int]:
    """The number of units of each group, in the order of `spec.groups`.

    The number of a stacked group is that of one layer.

    Raises:
        PermutationSpecError: the axes do not fit the leaves, as in `validate`.
    """
    shapes = group_shapes(spec, variables)
    return {group: shape[-1] for group, shape in shapes.items()}


def group_shapes(
    spec: PermutationSpec, variables: PyTree
) -> dict[str, tuple[int, ...]]:
    """The shape of each group's permutation, in the order of `spec.groups`.

    It is `(units,)`, and `(layers, units)` for a group that is stacked.

    Raises:
        PermutationSpecError: the axes do not fit the leaves, as in `validate`.
    """
    leaves = array_leaves(variables)
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    for path in shapes:
        if path not in spec.axes:
            raise PermutationSpecError(
                f"the spec does not cover the leaf {path!r} of shape {shapes[path]}; "
                f"{nearest(path, spec.axes)}"
            )
    for path, axes in spec.axes.items():
        if path not in shapes:
            raise PermutationSpecError(
                f"the spec names the leaf {path!r}, which the variables do not have; "
                f"{nearest(path, shapes)}"
            )
        if len(axes) != len(shapes[path]):
            raise PermutationSpecError(
                f"the spec gives {path!r} {len(axes)} axes, {axes}, but its shape is "
                f"{shapes[path]}"
            )
    sizes = _Sizes(spec, shapes).resolve()
    stacks = _stack_shapes(spec, shapes)
    return {group: (*stacks[group], size) for group, size in sizes.items()}


def _stack_shapes(
    spec: PermutationSpec, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """For each group the lengths of the axes that stack its layers."""
    found: dict[str, tuple[int, ...]] = {}
    source: dict[str, str] = {}
    for leaf, axes in spec.axes.items():
        dimensions = stack_dimensions(axes)
        for axis in axes:
            for group in axis.groups if isinstance(axis, Stack) else ():
                if group not in dimensions:
                    raise PermutationSpecError(
                        f"{leaf!r} stacks layers of group {group!r}, but has no axis "
                        f"that this group permutes; its axes are {axes}"
                    )
        for group, dims in dimensions.items():
            stack = tuple(shapes[leaf][d] for d in dims)
            if found.setdefault(group, stack) != stack:
                raise PermutationSpecError(
                    f"{source[group]!r} stacks the layers of group {group!r} along "
                    f"axes of lengths {found[group]}, but {leaf!r} along {stack}"
                )
            source.setdefault(group, leaf)
    return found


class _Sizes:
    """Infers the sizes of groups from leaf shapes, and checks that they agree."""

    def __init__(self, spec: PermutationSpec, shapes: Mapping[str, tuple[int, ...]]):
        self._spec = spec
        self._shapes = shapes
        self._sizes: dict[str, int] = {}
        self._source: dict[str, str] = {}

    def resolve(self) -> dict[str, int]:
        groups = self._spec.groups
        for group, size in self._spec.sizes.items():
            if group not in groups:
                raise PermutationSpecError(
                    f"the spec gives the size of group {group!r}, which no leaf has; "
                    f"{nearest(group, groups)}"
                )
            self._learn(group, size, "spec.sizes")
        # The size of a group in a Product may follow only from another leaf. So plain
        # axes come first, and products are visited until no size is new.
        self._visit(lambda axis: not isinstance(axis, Product))
        while True:
            n_before = len(self._sizes)
            self._visit(lambda axis: isinstance(axis, Product))
            if len(self._sizes) == n_before:
                break
        for group, members in groups.items():
            if group not in self._sizes:
                leaf, dimension = members[0]
                raise PermutationSpecError(
                    f"the size of group {group!r} cannot be told: its only axes are "
                    f"products with other unknown factors ({leaf!r} axis {dimension}); "
                    "spec.sizes can give it"
                )
        return {group: self._sizes[group] for group in groups}

    def _visit(self, wanted: Callable[[Axis], bool]) -> None:
        """Learns from all axes, or parts of concatenations, that `wanted` accepts."""
        for leaf, axes in self._spec.axes.items():
            for dimension, axis in enumerate(axes):
                size = self._shapes[leaf][dimension]
                for part, part_size in self._parts(axis, size, leaf, dimension):
                    if wanted(part):
                        self._learn(part, part_size, f"{leaf!r} axis {dimension}")

    def _parts(
        self, axis: Axis, size: int, leaf: str, dimension: int
    ) -> Iterator[tuple[Axis, int]]:
        """Yields the parts of a (nested) concatenation, or the axis itself."""
        if not isinstance(axis, Concat):
            yield axis, size
            return
        total = sum(part_size for _, part_size in axis.parts)
        if total != size:
            raise PermutationSpecError(
                f"{leaf!r} axis {dimension} has size {size}, but the parts of {axis} "
                f"add up to {total}"
            )
        for part, part_size in axis.parts:
            yield from self._parts(part, part_size, leaf, dimension)

    def _learn(self, axis: Axis, size: int, where: str) -> None:
        match axis:
            case str():
                first_size = self._sizes.setdefault(axis, size)
                source = self._source.setdefault(axis, where)
                if first_size != size:
                    raise PermutationSpecError(
                        f"group {axis!r} has {first_size} units at {source}, but "
                        f"{size} at {where}"
                    )
            case Product(factors):
                self._learn_product(axis, factors, size, where)

    def _learn_product(
        self, axis: Product, factors: Sequence[None | int | str], size: int, where: str
    ) -> None:
        sizes = [
            self._sizes.get(factor) if isinstance(factor, str) else factor
            for factor in factors
        ]
        product = math.prod(s for s in sizes if s is not None)
        unknown = [f for f, s in zip(factors, sizes, strict=True) if s is None]
        if size % product or (not unknown and product != size):
            raise PermutationSpecError(
                f"{where} has size {size}, which {axis} with factors {sizes} does not "
                "make"
            )
        if len(unknown) == 1 and isinstance(unknown[0], str):
            self._learn(unknown[0], size // product, where)
