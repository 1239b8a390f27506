"""Explains a model's symmetry: the group of every axis, or why it is fixed."""

from collections.abc import Iterator
from typing import NamedTuple

from dimat_jax.permutation._causes import describe
from dimat_jax.permutation._nodes import fixed_nodes
from dimat_jax.permutation._outputs import ChooseOutputs, Forward
from dimat_jax.permutation._reading import Reading, read_model
from dimat_jax.permutation._spec import Axis, Stack
from dimat_jax.permutation._units import AxisUnits
from dimat_jax.tree import PyTree

__all__ = ["AxisExplanation", "Explanation", "explain"]


class AxisExplanation(NamedTuple):
    """What holds of one axis of a leaf.

    Attributes:
        leaf: the path of the leaf.
        dimension: the number of the axis.
        size: the length of the axis.
        axis: the axis as `derive` declares it; None if all of it is fixed.
        reasons: why the axis, or a part of it, is fixed: the input, output, operation
            or captured array, or that there is a single unit. It is empty if all of
            the axis can be permuted.
    """

    leaf: str
    dimension: int
    size: int
    axis: Axis
    reasons: str

    def __str__(self) -> str:
        if self.axis is None:
            return f"fixed: {self.reasons}"
        if isinstance(self.axis, Stack):
            named = ", ".join(map(repr, self.axis.groups))
            return f"fixed, with permutations of {named} for each entry: {self.reasons}"
        rest = f" (fixed in part: {self.reasons})" if self.reasons else ""
        return f"{self.axis}{rest}"


class Explanation(NamedTuple):
    """A model's symmetry, axis by axis. Printed, it is a table.

    Attributes:
        rows: one row for each axis of each leaf, in the order of the leaves.
    """

    rows: tuple[AxisExplanation, ...]

    def __str__(self) -> str:
        head = ("leaf", "axis", "size", "group, or why it is fixed")
        cells = [head] + [
            (row.leaf, str(row.dimension), str(row.size), str(row)) for row in self.rows
        ]
        columns = zip(*cells, strict=True)
        leaf, axis, size, _ = (max(map(len, column)) for column in columns)
        return "\n".join(
            f"{a:<{leaf}}  {b:>{axis}}  {c:>{size}}  {text}" for a, b, c, text in cells
        )


def explain(
    forward: Forward,
    variables: PyTree,
    inputs: PyTree,
    *,
    outputs: ChooseOutputs | None = None,
) -> Explanation:
    """Tells for every axis of every leaf its group, or the reason why it is fixed.

    Args:
        forward: as in `derive`.
        variables: as in `derive`.
        inputs: as in `derive`.
        outputs: as in `derive`.

    Returns:
        the explanation, which `print` shows as a table.

    Raises:
        PermutationSpecError: the model cannot be traced, as in `derive`.
    """
    reading = read_model(forward, variables, inputs, outputs)
    return Explanation(tuple(_rows(reading)))


def _rows(reading: Reading) -> Iterator[AxisExplanation]:
    for leaf, axes in reading.spec({}).axes.items():
        for d, (declared, units) in enumerate(
            zip(axes, reading.axes[leaf], strict=True)
        ):
            reasons = {reason for node in fixed_nodes(units) for reason in node.fixed}
            text = describe(reasons)
            if not reasons and declared is None:
                text = "nothing to permute: every part has a single unit"
            elif not reasons and _has_single(units):
                text = "some parts have a single unit"
            size = units.root().size if units is not None else 1
            yield AxisExplanation(leaf, d, size, declared, text)


def _has_single(units: AxisUnits) -> bool:
    """Whether some part of the units has no inner structure, and a single unit."""
    if units is None:
        return True
    node = units.root()
    return node.size == 1 or any(map(_has_single, node.parts))
