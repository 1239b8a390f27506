"""Tells whether two specs declare the same symmetry, with any names of groups.

Every axis is written as one row of segments. Each segment is a product of factors, and
a factor is a group's name or None, with a size. Details that do not matter for a
symmetry are left out.
"""

import math

from dimat_jax.permutation import Concat, Product, Stack, group_sizes
from dimat_jax.tree import flatten


def same_symmetry(spec, other, variables):
    """Whether the groups correspond one to one so that all axes agree."""
    return not differences(spec, other, variables)


def differences(spec, other, variables):
    """Describes the axes that do not agree."""
    sizes, other_sizes = (group_sizes(s, variables) for s in (spec, other))
    there, back = {}, {}
    found = []
    for leaf, array in flatten(variables).items():
        for d, size in enumerate(array.shape):
            axis, other_axis = spec.axes[leaf][d], other.axes[leaf][d]
            one = segments(axis, size, sizes)
            two = segments(other_axis, size, other_sizes)
            groups, other_groups = names(one), names(two)
            if shape(one) != shape(two) or any(
                there.setdefault(group, other_group) != other_group
                or back.setdefault(other_group, group) != group
                for group, other_group in zip(groups, other_groups, strict=True)
            ):
                found.append(f"{leaf!r} axis {d}: {axis} is not {other_axis}")
    for leaf, axes in spec.axes.items():
        for d, (axis, other_axis) in enumerate(
            zip(axes, other.axes[leaf], strict=True)
        ):
            if {there.get(group) for group in stacks(axis)} != stacks(other_axis):
                found.append(f"{leaf!r} axis {d}: {axis} is not {other_axis}")
    return found


def segments(axis, size, sizes):
    """An axis as a list of segments, each a list of `(group or None, size)`."""
    match axis:
        case Concat(parts):
            rows = [segments(part, n, sizes) for part, n in parts]
            row = [segment for row in rows for segment in row]
        case Product(factors):
            known = [sizes.get(f) if isinstance(f, str) else f for f in factors]
            left = size // math.prod(n for n in known if n is not None)
            row = product(
                [
                    (factor if isinstance(factor, str) else None, n or left)
                    for factor, n in zip(factors, known, strict=True)
                ]
            )
        case Stack():
            row = product([(None, size)])
        case _:
            row = product([(axis, size)])
    return merge_fixed(row)


def stacks(axis):
    """The groups whose layers an axis stacks."""
    return set(axis.groups) if isinstance(axis, Stack) else set()


def product(factors):
    """The segments of a product: one, or several if its outermost factor is fixed."""
    # A group of one unit is the same as a fixed factor.
    factors = [(None if n == 1 else group, n) for group, n in factors]
    n_times = 1
    while factors and factors[0][0] is None:
        n_times *= factors.pop(0)[1]
    if not factors:
        return [[(None, n_times)]]
    segment = [factors[0]]
    for group, n in factors[1:]:
        if group is None and segment[-1][0] is None:
            segment[-1] = (None, segment[-1][1] * n)
        elif n > 1:
            segment.append((group, n))
    return [segment] * n_times


def merge_fixed(row):
    """Joins neighbouring fixed segments to one."""
    merged = []
    for segment in row:
        if merged and names([merged[-1]]) == names([segment]) == []:
            merged[-1] = [(None, merged[-1][0][1] + segment[0][1])]
        else:
            merged.append(segment)
    return merged


def names(row):
    """Lists the groups in a row of segments, in order."""
    return [group for segment in row for group, _ in segment if group is not None]


def shape(row):
    """Removes the groups' names from a row of segments."""
    return [[(group is None, n) for group, n in segment] for segment in row]
