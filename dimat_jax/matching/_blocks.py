"""Arrays cut into blocks, on each of whose axes at most one group acts.

Products are split into their factors and concatenations into their parts. Each axis of
a block is then permuted by one group or by none, so the rest of the matching code needs
to handle plain axes only.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from dimat_jax.permutation import Axis, Concat, PermutationSpecError, Product, Stack
from dimat_jax.permutation._spec import Axes

__all__ = ["Block", "cut_blocks", "take_block"]


class Block(NamedTuple):
    """A part of an array. Hashable, so that programs can be compiled for it.

    Attributes:
        bounds: for each of the array's dimensions, where the part starts and stops.
        shape: the shape of the part, with products split into their factors.
        groups: for each axis of `shape`, the group that permutes it, or None.
        stacked: for each axis of `shape`, the groups whose layers it stacks.
    """

    bounds: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]
    groups: tuple[Any, ...]
    stacked: tuple[tuple[Any, ...], ...]

    def layers_of(self, group: Any) -> tuple[int, ...]:
        """The axes that stack a group's layers."""
        return tuple(axis for axis, own in enumerate(self.stacked) if group in own)

    def renamed(self, rename: Callable[[Any], Any]) -> "Block":
        """The block with other names, or numbers, for its groups."""
        return self._replace(
            groups=tuple(None if g is None else rename(g) for g in self.groups),
            stacked=tuple(
                tuple(rename(g) for g in own if g in self.groups)
                for own in self.stacked
            ),
        )


class _Part(NamedTuple):
    """A part of one axis.

    Attributes:
        bounds: where the part starts and stops.
        shape: its size, split into factors.
        groups: for each factor, the group that permutes it, or None.
        stacked: the groups whose layers the axis stacks.
    """

    bounds: tuple[int, int]
    shape: tuple[int, ...]
    groups: tuple[str | None, ...]
    stacked: tuple[str, ...] = ()


def cut_blocks(
    axes: Axes, shape: tuple[int, ...], sizes: Mapping[str, int]
) -> list[Block]:
    """Cuts an array into blocks: a single one, unless an axis is a concatenation.

    Args:
        axes: what each of the array's dimensions is.
        shape: the array's shape.
        sizes: each group's number of units.

    Raises:
        PermutationSpecError: an axis whose size is not what its groups need.
    """
    parts = [
        list(_cut_axis(axis, 0, size, sizes))
        for axis, size in zip(axes, shape, strict=True)
    ]
    return [
        Block(
            tuple(part.bounds for part in chosen),
            tuple(itertools.chain.from_iterable(part.shape for part in chosen)),
            tuple(itertools.chain.from_iterable(part.groups for part in chosen)),
            tuple(part.stacked for part in chosen for _ in part.shape),
        )
        for chosen in itertools.product(*parts)
    ]


def take_block(block: Block, array: Array) -> Array:
    """Cuts a block out of its array."""
    starts, stops = zip(*block.bounds, strict=True) if block.bounds else ((), ())
    return jax.lax.slice(array, starts, stops).reshape(block.shape)


def _cut_axis(
    axis: Axis, start: int, size: int, sizes: Mapping[str, int]
) -> Iterator[_Part]:
    bounds = (start, start + size)
    match axis:
        case None:
            yield _Part(bounds, (size,), (None,))
        case Stack(groups):
            yield _Part(bounds, (size,), (None,), groups)
        case str():
            _check_fit(axis, (sizes[axis],), size)
            yield _Part(bounds, (size,), (axis,))
        case Product(factors):
            known = [sizes[f] if isinstance(f, str) else f for f in factors]
            open_size = size // math.prod(k for k in known if k is not None)
            shape = tuple(open_size if k is None else k for k in known)
            _check_fit(axis, shape, size)
            groups = tuple(f if isinstance(f, str) else None for f in factors)
            yield _Part(bounds, shape, groups)
        case Concat(parts):
            _check_fit(axis, (sum(part_size for _, part_size in parts),), size)
            for part, part_size in parts:
                yield from _cut_axis(part, start, part_size, sizes)
                start += part_size


def _check_fit(axis: Axis, shape: tuple[int, ...], size: int) -> None:
    if math.prod(shape) != size:
        raise PermutationSpecError(
            f"an axis of size {size} cannot be {axis!r}, which has {math.prod(shape)}"
        )
