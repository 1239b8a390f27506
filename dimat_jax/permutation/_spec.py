"""Permutation specs: they declare which axes of which leaves are permuted together."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping

from dimat_jax.errors import UserError

__all__ = [
    "Axes",
    "Axis",
    "Concat",
    "PermutationSpec",
    "PermutationSpecError",
    "PermutationSpecWarning",
    "Product",
    "Stack",
    "axes_groups",
    "axis_groups",
    "stack_dimensions",
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


@dataclasses.dataclass(frozen=True)
class Stack:
    """An axis along which layers, or the members of an ensemble, are stacked.

    The axis itself is never permuted. Each of its entries has a permutation of its own
    for the units of the groups that are named: the group's permutation is
    int32[layers, units], and layer `l` of the array is permuted by its row `l`. The
    first weight of stacked blocks is `(Stack("hidden"), "stream", "hidden")`. Every
    array with units of the group needs such an axis.

    Attributes:
        groups: the names of the groups that are stacked along this axis.
    """

    groups: tuple[str, ...]

    def __init__(self, *groups: str):
        object.__setattr__(self, "groups", groups)

    def __repr__(self) -> str:
        return f"Stack({', '.join(map(repr, self.groups))})"


Axis = None | str | Product | Concat | Stack
"""How one axis is permuted.

None: the axis is never permuted. A string: the group of that name permutes it.
"""

Axes = tuple[Axis, ...]
"""How each axis of one array is permuted."""


@dataclasses.dataclass(frozen=True)
class PermutationSpec:
    """Declares a network's permutation symmetry.

    The groups are those that `axes` names. All axes of one group are permuted alike. A
    group that a `Stack` names has one permutation for each layer of the stack.

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
            if group in axes_groups((axes,) if isinstance(axes, str) else axes)
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


def axes_groups(axes: Axes) -> list[str]:
    """The names of the groups that permute an array, in the order of its axes."""
    return [group for axis in axes for group in axis_groups(axis)]


def stack_dimensions(axes: Axes) -> dict[str, tuple[int, ...]]:
    """For each group that permutes an array, the dimensions that stack its layers.

    The entries of a group that is not stacked are empty.
    """
    return {
        group: tuple(
            d
            for d, axis in enumerate(axes)
            if isinstance(axis, Stack) and group in axis.groups
        )
        for group in dict.fromkeys(axes_groups(axes))
    }
