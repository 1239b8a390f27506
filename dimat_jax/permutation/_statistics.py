"""Finds the running statistics among a model's variables.

A model in training mode updates them. A model in evaluation mode shows them by how it
uses them. BatchNorm subtracts a mean and multiplies by the inverse root of a variance:
`(x - mean) * rsqrt(variance + epsilon)`. Or it first multiplies what does not depend on
the examples: `x * factor + (bias - mean * factor)`, where the factor is the inverse
root, perhaps times a scale.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax.extend as jex

from dimat_jax._jaxprs import Atom, Equation, Jaxpr, Var, called_by
from dimat_jax.permutation._jaxpr import shape_of

__all__ = ["normalising_arguments"]

# These operations move or copy entries, but do not change them.
_PASSING = (
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "expand_dims",
    "reduce_precision",
    "reshape",
    "squeeze",
    "stop_gradient",
    "transpose",
)
# The result of one of these operations on a statistic and a scalar, such as an epsilon
# or a correction of bias, still counts as the statistic.
_SHIFTING = ("add", "add_any", "sub", "mul", "div", "max")


class _Mark(NamedTuple):
    """What an array is made of.

    Attributes:
        kind: "argument": an argument of the model, perhaps shifted or scaled by
            scalars; "root": the root of a variance; "inverse": the inverse root,
            perhaps scaled; "centred": an array less a mean.
        number: the number of the argument: the variance or the mean.
        scales: the numbers of the arguments by which an inverse root is multiplied.
    """

    kind: Literal["argument", "root", "inverse", "centred"]
    number: int
    scales: frozenset[int] = frozenset()


_Marks = Sequence[_Mark | None]


def normalising_arguments(jaxpr: Jaxpr) -> frozenset[int]:
    """The numbers of the arguments that normalise other values, as BatchNorm's do."""
    finder = _Finder()
    marks = [_Mark("argument", n) for n in range(len(jaxpr.invars))]
    finder.read(jaxpr, [None] * len(jaxpr.constvars) + marks)
    return frozenset(finder.result())


class _Finder:
    """Follows arguments through a jaxpr, and notes where they normalise."""

    def __init__(self):
        # Means and variances that the model uses one after the other.
        self._found: set[int] = set()
        # For each variance, the scales of its inverse root where a value is multiplied
        # by it, and where it is subtracted.
        self._factors: dict[int, set[int]] = {}
        self._offsets: dict[int, set[int]] = {}

    def result(self) -> set[int]:
        """The numbers of all means and variances."""
        found = set(self._found)
        for variance, offset in self._offsets.items():
            mean = offset - self._factors.get(variance, offset)
            if len(mean) == 1:
                found |= {variance, *mean}
        return found

    def read(self, jaxpr: Jaxpr, arguments: _Marks) -> list[_Mark | None]:
        """Follows a jaxpr and returns the marks of the outputs."""
        marks: dict[Var, _Mark | None] = dict(
            zip([*jaxpr.constvars, *jaxpr.invars], arguments, strict=True)
        )

        def mark_of(atom: Atom) -> _Mark | None:
            return None if isinstance(atom, jex.core.Literal) else marks[atom]

        for eqn in jaxpr.eqns:
            operands = [mark_of(atom) for atom in eqn.invars]
            outputs: _Marks = [None] * len(eqn.outvars)
            if (called := called_by(eqn)) is not None:
                constants = [None] * len(called.jaxpr.constvars)
                outputs = self.read(called.jaxpr, [*constants, *operands])
            elif eqn.primitive.name == "scan":
                body, n = eqn.params["jaxpr"].jaxpr, eqn.params["num_consts"]
                # What is carried changes from step to step.
                operands[n : n + eqn.params["num_carry"]] = [None] * eqn.params[
                    "num_carry"
                ]
                self.read(body, [None] * len(body.constvars) + operands)
            elif len(eqn.outvars) == 1:
                outputs = [self._step(eqn, operands)]
            marks.update(zip(eqn.outvars, outputs, strict=True))
        return [mark_of(atom) for atom in jaxpr.outvars]

    def _step(self, eqn: Equation, operands: _Marks) -> _Mark | None:
        """Notes what an operation tells, and returns the mark of its result."""
        name = eqn.primitive.name
        if name in _PASSING:
            return operands[0]
        if name == "rsqrt" or name == "sqrt":
            return _root(name, operands[0])
        if len(operands) != 2:
            return None
        left, right = operands
        if name in _SHIFTING:
            for mark, other in ((left, eqn.invars[1]), (right, eqn.invars[0])):
                if mark is not None and mark.kind == "argument" and _is_scalar(other):
                    return mark
        if name == "div" and right is not None and right.kind == "root":
            right = right._replace(kind="inverse")
            name = "mul"
        if name == "mul":
            return self._product(left, right)
        if name == "sub" and right is not None:
            if right.kind == "argument" and left is None:
                return right._replace(kind="centred")
            if right.kind == "inverse":
                self._offsets.setdefault(right.number, set()).update(right.scales)
        return None

    def _product(self, left: _Mark | None, right: _Mark | None) -> _Mark | None:
        inverses = [m for m in (left, right) if m is not None and m.kind == "inverse"]
        if len(inverses) != 1:
            return None
        (inverse,) = inverses
        other = right if inverse is left else left
        if other is None:
            self._factors.setdefault(inverse.number, set()).update(inverse.scales)
            return inverse
        if other.kind == "centred":
            self._found |= {inverse.number, other.number}
        if other.kind == "argument":
            # The scale of the layer, or the mean that is subtracted later.
            return inverse._replace(scales=inverse.scales | {other.number})
        return None


def _root(name: str, operand: _Mark | None) -> _Mark | None:
    if operand is None or operand.kind != "argument":
        return None
    return operand._replace(kind="inverse" if name == "rsqrt" else "root")


def _is_scalar(atom: Atom) -> bool:
    return all(size == 1 for size in shape_of(atom))
