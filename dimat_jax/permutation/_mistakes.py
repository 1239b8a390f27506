"""Finds where a declared symmetry differs from the symmetry that a model has."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from dimat_jax.permutation._sizes import group_sizes
from dimat_jax.permutation._spec import (
    Axes,
    Axis,
    Concat,
    PermutationSpec,
    Product,
    Stack,
    axes_groups,
    axis_groups,
)
from dimat_jax.tree import PyTree, flatten

__all__ = ["Mistake", "correct_spec", "find_mistakes"]

Label = tuple[tuple[str, int], ...]
"""What permutes one index of an axis: pairs of a group and the number of a unit in it.

Two axes are permuted alike if their indices have the same labels.
"""


class Mistake(NamedTuple):
    """An axis that a spec declares wrongly.

    Attributes:
        leaf: the path of the leaf.
        dimension: the number of the leaf's axis.
        declared: the axis as the spec declares it.
        right: the axis as it should be declared.
    """

    leaf: str
    dimension: int
    declared: Axis
    right: Axis

    def __str__(self) -> str:
        return (
            f"{self.leaf!r} axis {self.dimension} is declared {self.declared!r}, and "
            f"should be {self.right!r}"
        )


def find_mistakes(
    declared: PermutationSpec, derived: PermutationSpec, variables: PyTree
) -> list[Mistake]:
    """Finds the axes on which a declared and a derived spec disagree.

    A derived group corresponds to the declared group that most of its axes have. A
    derived group that no axis declares is taken as fixed, because a spec need not
    declare every symmetry. The mistakes use the names of the declared groups.
    """
    sizes, derived_sizes = (group_sizes(s, variables) for s in (declared, derived))
    labels = {
        (leaf, d): (
            list(_labels(declared.axes[leaf][d], size, sizes)),
            list(_labels(derived.axes[leaf][d], size, derived_sizes)),
        )
        for leaf, array in flatten(variables).items()
        for d, size in enumerate(array.shape)
    }
    votes = Counter(v for pair in labels.values() for v in _correspondences(*pair))
    names: dict[str, str | None] = {}
    # Votes for a declared group come before votes for None: a group that only some of
    # its axes declare was forgotten on the others.
    for (group, name), _ in sorted(
        votes.items(), key=lambda item: (item[0][1] is None, -item[1])
    ):
        names.setdefault(group, name)
    # A group whose layers are declared to be permuted alike is permuted rightly, even
    # if each layer could be permuted in its own way.
    stacked = {g for axes in declared.axes.values() for a in axes for g in _stacked(a)}
    mistakes = []
    for (leaf, d), (labels_declared, labels_derived) in labels.items():
        axis = declared.axes[leaf][d]
        right = _renamed(derived.axes[leaf][d], names, derived_sizes)
        own = _stacked(right) & stacked
        if isinstance(right, Stack):
            right = Stack(*(g for g in right.groups if g in own)) if own else None
        alike = [_renamed_label(label, names) for label in labels_derived]
        if labels_declared != alike or _stacked(axis) != own:
            mistakes.append(Mistake(leaf, d, axis, right))
    return mistakes


def correct_spec(spec: PermutationSpec, mistakes: Iterable[Mistake]) -> PermutationSpec:
    """The spec with the right axes in place of mistakes, without taps and sizes."""
    axes = {leaf: list(leaf_axes) for leaf, leaf_axes in spec.axes.items()}
    for mistake in mistakes:
        axes[mistake.leaf][mistake.dimension] = mistake.right
    return PermutationSpec({leaf: _in_use(own) for leaf, own in axes.items()})


def _in_use(axes: Sequence[Axis]) -> Axes:
    """Axes without the stacks of groups that the other axes no longer have."""
    present = set(axes_groups(tuple(axes)))

    def kept(axis: Axis) -> Axis:
        if not isinstance(axis, Stack):
            return axis
        groups = [group for group in axis.groups if group in present]
        return Stack(*groups) if groups else None

    return tuple(map(kept, axes))


def _labels(axis: Axis, size: int, sizes: Mapping[str, int]) -> Iterator[Label]:
    """The label of each index of an axis of length `size`."""
    match axis:
        case str():
            yield from (((axis, unit),) for unit in range(size))
        case Concat(parts):
            for part, part_size in parts:
                yield from _labels(part, part_size, sizes)
        case Product(factors):
            given = [sizes[f] if isinstance(f, str) else f for f in factors]
            inferred = size  # the size of the factor None
            for n in given:
                inferred //= n or 1
            grids = [
                list(_labels(f if isinstance(f, str) else None, n or inferred, sizes))
                for f, n in zip(factors, given, strict=True)
            ]
            for labels in itertools.product(*grids):
                yield tuple(itertools.chain(*labels))
        case _:
            yield from ((),) * size


def _correspondences(
    declared: list[Label], derived: list[Label]
) -> list[tuple[str, str | None]]:
    """Pairs the derived groups of one axis with its declared groups.

    Returns:
        pairs of a derived group and the declared group that has the same units. The
        second is None if no declared group has them. The list is empty if the axis
        does not tell.
    """
    # By the pair of group names of a derived and a declared label, their unit numbers.
    units: dict[tuple[tuple[str, ...], ...], list[tuple[tuple[int, ...], ...]]] = {}
    for labels in zip(derived, declared, strict=True):
        groups = tuple(tuple(group for group, _ in label) for label in labels)
        units.setdefault(groups, []).append(
            tuple(tuple(unit for _, unit in label) for label in labels)
        )
    votes = []
    for (in_derived, in_declared), pairs in units.items():
        # The declared label may leave out some factors of the derived label.
        for kept in itertools.combinations(range(len(in_derived)), len(in_declared)):
            if all(tuple(one[n] for n in kept) == other for one, other in pairs):
                names = dict(zip(kept, in_declared, strict=True))
                votes += [(group, names.get(n)) for n, group in enumerate(in_derived)]
                break
        else:
            return []
    return votes


def _stacked(axis: Axis) -> set[str]:
    """The groups whose layers are stacked along an axis."""
    return set(axis.groups) if isinstance(axis, Stack) else set()


def _renamed_label(label: Label, names: Mapping[str, str | None]) -> Label:
    return tuple(
        (name, unit)
        for group, unit in label
        if (name := names.get(group, group)) is not None
    )


def _renamed(
    axis: Axis, names: Mapping[str, str | None], sizes: Mapping[str, int]
) -> Axis:
    match axis:
        case str():
            return names.get(axis, axis)
        case Product(factors):
            renamed = Product(
                *(
                    names.get(f, f) or sizes[f] if isinstance(f, str) else f
                    for f in factors
                )
            )
            return renamed if any(axis_groups(renamed)) else None
        case Concat(parts):
            renamed = Concat(*((_renamed(p, names, sizes), n) for p, n in parts))
            return renamed if any(axis_groups(renamed)) else None
        case Stack(groups):
            own = [name for g in groups if (name := names.get(g, g)) is not None]
            return Stack(*own) if own else None
        case _:
            return None
