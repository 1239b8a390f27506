"""Chooses the taps of a traced model: the values that hold the units' activations.

The operands of contractions are the best taps: they are what the next layer reads of
the units, after norms and nonlinearities. Units that no contraction reads get as a tap
the last value that holds them.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from dimat_jax.permutation._jaxpr import Place
from dimat_jax.permutation._spec import (
    Axes,
    Axis,
    Concat,
    Stack,
    axis_groups,
)
from dimat_jax.permutation._trace import Located, Trace
from dimat_jax.permutation._units import ArrayUnits

__all__ = ["Tap", "choose_taps", "read_tap"]


class Tap(NamedTuple):
    """A value in the model's jaxpr, or one part of a value that concatenates units.

    Attributes:
        place: the place of the value in the model's jaxpr.
        bounds: for each axis, where the part starts and where it stops. None as the
            stop means the end of the axis.
        axes: the axes of the part.
        groups: the groups whose units the part shows.
        steps: the axes of the steps of the scans around the value.
    """

    place: Place
    bounds: tuple[tuple[int, int | None], ...]
    axes: Axes
    groups: tuple[str, ...]
    steps: Axes = ()

    @property
    def shown_axes(self) -> Axes:
        """The axes as a spec declares them for what `read_tap` returns.

        The steps of a scan are samples, unless they stack the layers of a group.
        """
        if not any(isinstance(axis, Stack) for axis in self.steps):
            return self.axes
        n_examples = int(self.axes[0] is None)
        return (*self.axes[:n_examples], *self.steps, *self.axes[n_examples:])


def choose_taps(
    trace: Trace,
    groups: Iterable[str],
    declare: Callable[[ArrayUnits], Axes],
    inputs: int,
) -> dict[str, Tap]:
    """Chooses taps for every group; the taps of a group are numbered.

    Args:
        trace: the trace of the model.
        groups: the names of all groups.
        declare: turns the units along an array's axes into a spec's notation.
        inputs: the source bit of the model's inputs (see `Value`). A value that does
            not depend on the inputs cannot be a tap.

    Returns:
        the taps by name: "<group>#<number>". A group may have none.
    """

    def parts(values: Sequence[Located]) -> list[list[Tap]]:
        found = []
        for place, value, steps in values:
            if value.sources & inputs:
                axes = declare([*steps, *value.axes])
                n = len(steps)
                found.append(list(_parts(place, axes[n:], axes[:n])))
        return found

    operands, values = parts(trace.operands), parts(trace.values)
    taps: dict[str, Tap] = {}
    for group in groups:
        shown = list(_showing(group, operands))
        if not shown:
            shown = [tap for tap in itertools.chain(*values) if group in tap.groups]
            shown = shown[-1:]
        # Matching averages a tap over the units of all other groups. So taps that show
        # this group alone are better, if there are any.
        alone = [tap for tap in shown if len(tap.groups) == 1]
        new = [tap for tap in alone or shown if tap not in taps.values()]
        taps |= {f"{group}#{n}": tap for n, tap in enumerate(new)}
    return taps


def read_tap(tap: Tap, value: Array) -> Array:
    """Cuts a tap's part out of its value.

    The axis of a scan's steps, if there is one, is put behind the axis of the examples.
    """
    part = value[(..., *(slice(*bound) for bound in tap.bounds))]
    n_steps = len(tap.steps)
    return jnp.moveaxis(part, n_steps, 0) if tap.axes[0] is None else part


def _parts(place: Place, axes: Axes, steps: Axes) -> Iterator[Tap]:
    """The parts of a value that show groups, without those that show a group twice."""
    for parts in itertools.product(*map(_axis_parts, axes)):
        bounds, part_axes = zip(*parts, strict=True) if parts else ((), ())
        groups = tuple(group for axis in part_axes for group in axis_groups(axis))
        if groups and len(set(groups)) == len(groups):
            own, own_steps = (
                tuple(_only(groups, axis) for axis in all_axes)
                for all_axes in (part_axes, steps)
            )
            yield Tap(place, bounds, own, groups, own_steps)


def _only(groups: Sequence[str], axis: Axis) -> Axis:
    """An axis without the layers of groups that a part of an array does not show."""
    if not isinstance(axis, Stack):
        return axis
    shown = [group for group in axis.groups if group in groups]
    return Stack(*shown) if shown else None


def _axis_parts(axis: Axis) -> Iterator[tuple[tuple[int, int | None], Axis]]:
    """The bounds and the axis of each part of an axis that can belong to a tap."""
    if not isinstance(axis, Concat):
        yield (0, None), axis
        return
    start = 0
    for part, size in axis.parts:
        if any(axis_groups(part)):
            yield (start, start + size), part
        start += size


def _showing(group: str, values: Sequence[Sequence[Tap]]) -> Iterator[Tap]:
    """The taps of a group, from those values that show it in exactly one part."""
    for parts in values:
        showing = [tap for tap in parts if group in tap.groups]
        if len(showing) == 1:
            yield showing[0]
