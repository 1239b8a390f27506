"""Where the units of a traced model can be watched.

What goes into a contraction is what the next layer sees of some units, behind norms and
nonlinearities: those are the taps. Units that are never contracted are watched where
they are seen last.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from dimat_jax.permutation._spec import Axes, Axis, Concat, axis_groups
from dimat_jax.permutation._trace import Place, Trace, Value
from dimat_jax.permutation._units import Known

__all__ = ["Tap", "choose_taps", "show"]


class Tap(NamedTuple):
    """A value, or a part of one that concatenates several kinds of units.

    Attributes:
        place: of the value in the model's jaxpr.
        bounds: for each axis, where the part starts and stops (None: at the end).
        axes: of the part.
        groups: that it shows.
    """

    place: Place
    bounds: tuple[tuple[int, int | None], ...]
    axes: Axes
    groups: tuple[str, ...]


def choose_taps(
    trace: Trace,
    groups: Iterable[str],
    declare: Callable[[Known], Axis],
    inputs: int,
) -> dict[str, Tap]:
    """Taps, numbered for each group that can be watched.

    Args:
        trace: of the model.
        groups: all there are.
        declare: what a spec says of an axis.
        inputs: the model's inputs, as a source (see `Value`).
    """

    def parts(values: Sequence[tuple[Place, Value]]) -> list[list[Tap]]:
        return [
            list(_parts(place, [declare(axis) for axis in value.axes]))
            for place, value in values
            if value.sources & inputs
        ]

    operands, values = parts(trace.operands), parts(trace.values)
    taps: dict[str, Tap] = {}
    for group in groups:
        shown = list(_showing(group, operands))
        if not shown:
            shown = [tap for tap in itertools.chain(*values) if group in tap.groups]
            shown = shown[-1:]
        # Of a tap with other groups, only means over their units count.
        alone = [tap for tap in shown if len(tap.groups) == 1]
        new = [tap for tap in alone or shown if tap not in taps.values()]
        taps |= {f"{group}#{n}": tap for n, tap in enumerate(new)}
    return taps


def show(tap: Tap, value: Array) -> Array:
    """What a tap shows of its value; a scan's steps lie behind the examples."""
    part = value[(..., *(slice(*bound) for bound in tap.bounds))]
    n_steps = part.ndim - len(tap.axes)
    return jnp.moveaxis(part, n_steps, 0) if tap.axes[0] is None else part


def _parts(place: Place, axes: Sequence[Axis]) -> Iterator[Tap]:
    """The parts of a value that show groups, each of them once."""
    for parts in itertools.product(*map(_axis_parts, axes)):
        bounds, part_axes = zip(*parts, strict=True) if parts else ((), ())
        groups = tuple(group for axis in part_axes for group in axis_groups(axis))
        if groups and len(set(groups)) == len(groups):
            yield Tap(place, bounds, part_axes, groups)


def _axis_parts(axis: Axis) -> Iterator[tuple[tuple[int, int | None], Axis]]:
    if not isinstance(axis, Concat):
        yield (0, None), axis
        return
    start = 0
    for part, size in axis.parts:
        if any(axis_groups(part)):
            yield (start, start + size), part
        start += size


def _showing(group: str, values: Sequence[Sequence[Tap]]) -> Iterator[Tap]:
    """What shows a group in one part alone, not in several that say the same."""
    for parts in values:
        mine = [tap for tap in parts if group in tap.groups]
        if len(mine) == 1:
            yield mine[0]
