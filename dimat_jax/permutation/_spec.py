"""Permutation specs: they declare which axes of which leaves are permuted together."""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from dimat_jax.errors import UserError, nearest
from dimat_jax.tree import PyTree, flatten

__all__ = [
    "Axes",
    "Axis",
    "Concat",
    "PermutationSpec",
    "PermutationSpecError",
    "PermutationSpecWarning",
    "Product",
    "axis_groups",
    "group_sizes",
    "validate",
]


class PermutationSpecError(UserError):
    """A spec does not fit its model. The message names the leaf and the group."""


class PermutationSpecWarning(UserWarning):
    """A model may have more symmetry than a derived spec. The message tells why."""


@dataclasses.dataclass(frozen=True)
class Product:
    """An axis that flattens several factors, the last one fastest (row-major).

    `Product(None, "channels")` is the input axis of a dense layer behind a flattened
    `H x W x C` feature map: C is permuted, and H x W, whatever its size, is not.

    Attributes:
        factors: a list whose entries are a group's name, a fixed size, or None for a
            fixed factor whose size is inferred.
    """

    factors: tuple[None | int | str, ...]

    def __init__(self, *factors: None | int | str):
        if sum(factor is None for factor in factors) > 1:
            raise PermutationSpecError(
                f"Product{factors} leaves more than one factor to be inferred"
            )
        object.__setattr__(self, "factors", factors)

    def __repr__(self) -> str:
        return f"Product({', '.join(map(repr, self.factors))})"


@dataclasses.dataclass(frozen=True)
class Concat:
    """An axis that concatenates parts.

    Attributes:
        parts: for each part a pair `(axis, size)`.
    """

    parts: tuple[tuple["Axis", int], ...]

    def __init__(self, *parts: tuple["Axis", int]):
        object.__setattr__(self, "parts", parts)

    def __repr__(self) -> str:
        return f"Concat({', '.join(map(repr, self.parts))})"


Axis = None | str | Product | Concat
"""How one axis is permuted.

None: the axis is never permuted. A string: the group of that name permutes it.
"""

Axes = tuple[Axis, ...]
"""How each axis of one array is permuted."""


@dataclasses.dataclass(frozen=True)
class PermutationSpec:
    """Declares a network's permutation symmetry.

    The groups are those that `axes` names. All axes of one group are permuted alike.

    Attributes:
        axes: for every leaf, by its path (see `dimat_jax.tree`), one `Axis` for each
            dimension, e.g. `{"params/Conv_0/kernel": (None, None, "in", "out")}`.
        taps: for each tap's name, the axes of the array that
            `activations(variables, inputs)` returns under that name. The axes belong
            to the array's last dimensions; the dimensions before them are samples.
            A group's name alone stands for the last axis. A tap may show several
            groups, on axes of their own or as factors of a `Product`.
        sizes: the sizes of groups that cannot be inferred from the axes, as those of
            `Product("a", "b")`.
        statistics: the paths of the leaves that are running statistics. They are
            permuted, but by default matching by weights does not compare them.
    """

    axes: Mapping[str, Axes]
    taps: Mapping[str, str | Axes] = dataclasses.field(default_factory=dict)
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    statistics: Collection[str] = frozenset()

    def __post_init__(self):
        object.__setattr__(self, "statistics", frozenset(self.statistics))

    def __hash__(self) -> int:
        # Equal mappings may have different orders.
        axes = frozenset((leaf, tuple(axes)) for leaf, axes in self.axes.items())
        sizes = frozenset(self.sizes.items())
        return hash((axes, frozenset(self.taps.items()), sizes, self.statistics))

    def is_weight(self, path: str) -> bool:
        """Whether a leaf is something else than a running statistic."""
        return path not in self.statistics

    @property
    def groups(self) -> dict[str, list[tuple[str, int]]]:
        """For each group, the pairs `(leaf, dimension)` that it permutes."""
        members: dict[str, list[tuple[str, int]]] = {}
        for leaf, axes in self.axes.items():
            for dimension, axis in enumerate(axes):
                for group in axis_groups(axis):
                    members.setdefault(group, []).append((leaf, dimension))
        return members

    def taps_of(self, group: str) -> list[str]:
        """The names of the taps that show a group's units."""
        return [
            tap
            for tap, axes in self.taps.items()
            if group in _axes_groups((axes,) if isinstance(axes, str) else axes)
        ]

    def tap_axes(self, tap: str, ndim: int) -> Axes:
        """The axes of a tap's array of `ndim` dimensions; None for the samples.

        Raises:
            PermutationSpecError: the tap has more than `ndim` axes.
        """
        axes = self.taps[tap]
        axes = (axes,) if isinstance(axes, str) else tuple(axes)
        if ndim < len(axes):
            raise PermutationSpecError(
                f"tap {tap!r} has the axes {axes}, but its activations have only "
                f"{ndim} dimensions"
            )
        return (None,) * (ndim - len(axes)) + axes


def axis_groups(axis: Axis) -> Iterator[str]:
    """Yields the names of the groups that permute an axis."""
    match axis:
        case str():
            yield axis
        case Product(factors):
            yield from (factor for factor in factors if isinstance(factor, str))
        case Concat(parts):
            for part, _ in parts:
                yield from axis_groups(part)


def _axes_groups(axes: Axes) -> list[str]:
    return [group for axis in axes for group in axis_groups(axis)]


def validate(spec: PermutationSpec, variables: PyTree) -> None:
    """Checks that a spec covers every leaf, and that ranks and sizes agree.

    `verify` checks that the network's function has the declared symmetry.

    Raises:
        PermutationSpecError: the spec does not fit. The message names the leaf and the
            group.
    """
    group_sizes(spec, variables)
    groups = spec.groups
    for leaf in sorted(spec.statistics):
        if leaf not in spec.axes:
            raise PermutationSpecError(
                f"the spec names the statistic {leaf!r}, which the variables do not "
                f"have; {nearest(leaf, spec.axes)}"
            )
    for tap, axes in spec.taps.items():
        axes = (axes,) if isinstance(axes, str) else axes
        shown = _axes_groups(axes)
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
            if shown.count(group) > 1:
                raise PermutationSpecError(
                    f"tap {tap!r} shows group {group!r} twice, as if pairs of its "
                    f"units were units; its axes are {axes}"
                )


def group_sizes(spec: PermutationSpec, variables: PyTree) -> dict[str, int]:
    """The number of units of each group, in the order of `spec.groups`.

    Raises:
        PermutationSpecError: the axes do not fit the leaves, as in `validate`.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(variables).items()}
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
    return _Sizes(spec, shapes).resolve()


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
