"""Where a declared symmetry departs from the one that a model has."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from dimat_jax.permutation._spec import (
    Axis,
    Concat,
    PermutationSpec,
    Product,
    axis_groups,
    group_sizes,
)
from dimat_jax.tree import PyTree, flatten

__all__ = ["Mistake", "mended", "mistakes"]

# What permutes one index of an axis: groups, with the number of the unit in each. Two
# axes are permuted alike if all their indices are.
Label = tuple[tuple[str, int], ...]


class Mistake(NamedTuple):
    """An axis that is not declared as it should be."""

    leaf: str
    dimension: int
    declared: Axis
    right: Axis

    def __str__(self) -> str:
        return (
            f"{self.leaf!r} axis {self.dimension} is declared {self.declared!r}, and "
            f"should be {self.right!r}"
        )


def mistakes(
    declared: PermutationSpec, derived: PermutationSpec, variables: PyTree
) -> list[Mistake]:
    """The axes on which two specs disagree, in the declared groups' names.

    A derived group is taken for the declared one that most of its axes have, and one
    that is not declared anywhere, for fixed: a symmetry may be left aside.
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
    # A group that is declared on some axes was forgotten on the others.
    for (group, name), _ in sorted(
        votes.items(), key=lambda item: (item[0][1] is None, -item[1])
    ):
        names.setdefault(group, name)
    return [
        Mistake(
            leaf,
            d,
            declared.axes[leaf][d],
            _renamed(derived.axes[leaf][d], names, derived_sizes),
        )
        for (leaf, d), (said, found) in labels.items()
        if said != [_renamed_label(label, names) for label in found]
    ]


def mended(spec: PermutationSpec, wrong: Iterable[Mistake]) -> PermutationSpec:
    """The spec with these axes as they should be. Its sizes are left out."""
    axes = {leaf: list(leaf_axes) for leaf, leaf_axes in spec.axes.items()}
    for mistake in wrong:
        axes[mistake.leaf][mistake.dimension] = mistake.right
    return PermutationSpec({leaf: tuple(leaf_axes) for leaf, leaf_axes in axes.items()})


def _labels(axis: Axis, size: int, sizes: Mapping[str, int]) -> Iterator[Label]:
    match axis:
        case str():
            yield from (((axis, unit),) for unit in range(size))
        case Concat(parts):
            for part, part_size in parts:
                yield from _labels(part, part_size, sizes)
        case Product(factors):
            known = [sizes[f] if isinstance(f, str) else f for f in factors]
            rest = size
            for n in known:
                rest //= n or 1
            grids = [
                list(_labels(f if isinstance(f, str) else None, n or rest, sizes))
                for f, n in zip(factors, known, strict=True)
            ]
            for labels in itertools.product(*grids):
                yield tuple(itertools.chain(*labels))
        case _:
            yield from ((),) * size


def _correspondences(
    declared: list[Label], derived: list[Label]
) -> list[tuple[str, str | None]]:
    """Which derived groups are which declared ones, or None, if one axis can tell."""
    units: dict[Any, list[Any]] = {}
    for labels in zip(derived, declared, strict=True):
        groups = tuple(tuple(group for group, _ in label) for label in labels)
        units.setdefault(groups, []).append(
            tuple(tuple(unit for _, unit in label) for label in labels)
        )
    votes = []
    for (found, said), pairs in units.items():
        # Some factors may have been left aside.
        for kept in itertools.combinations(range(len(found)), len(said)):
            if all(tuple(one[n] for n in kept) == other for one, other in pairs):
                names = dict(zip(kept, said, strict=True))
                votes += [(group, names.get(n)) for n, group in enumerate(found)]
                break
        else:
            return []
    return votes


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
        case _:
            return None
