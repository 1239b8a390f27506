"""Finds the running statistics among a model's variables.

A model in training mode updates them. A model in evaluation mode shows them by how it
uses them: BatchNorm subtracts a mean and multiplies by the inverse root of a variance,
`(x - mean) * rsqrt(variance + epsilon)`.
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
# With a scalar (an epsilon, a correction of bias), these leave a statistic one.
_SHIFTING = ("add", "add_any", "sub", "mul", "div", "max")


class _Mark(NamedTuple):
    """What an array is made of.

    Attributes:
        kind: "argument": an argument of the model, but for scalars; "root": the root of
            a variance; "inverse": the inverse root, perhaps scaled; "centred": an array
            less a mean.
        arguments: the numbers of the arguments that are the mean or the variance.
    """

    kind: Literal["argument", "root", "inverse", "centred"]
    arguments: frozenset[int]


_Marks = Sequence[_Mark | None]


def normalising_arguments(jaxpr: Jaxpr) -> frozenset[int]:
    """The numbers of the arguments that normalise other values, as BatchNorm's do."""
    found: set[int] = set()
    marks = [_Mark("argument", frozenset([n])) for n in range(len(jaxpr.invars))]
    _read(jaxpr, [None] * len(jaxpr.constvars) + marks, found)
    return frozenset(found)


def _read(jaxpr: Jaxpr, arguments: _Marks, found: set[int]) -> list[_Mark | None]:
    """Follows a jaxpr, adds to `found`, and returns the marks of the outputs."""
    marks: dict[Var, _Mark | None] = dict(
        zip([*jaxpr.constvars, *jaxpr.invars], arguments, strict=True)
    )

    def mark_of(atom: Atom) -> _Mark | None:
        return None if isinstance(atom, jex.core.Literal) else marks[atom]

    for eqn in jaxpr.eqns:
        operands = [mark_of(atom) for atom in eqn.invars]
        outputs: _Marks
        if (called := called_by(eqn)) is not None:
            constants = [None] * len(called.jaxpr.constvars)
            outputs = _read(called.jaxpr, [*constants, *operands], found)
        elif eqn.primitive.name == "scan":
            body = eqn.params["jaxpr"].jaxpr
            constants = [None] * len(body.constvars)
            n_constants = eqn.params["num_consts"]
            carried = range(n_constants, n_constants + eqn.params["num_carry"])
            # What is carried changes from step to step.
            inside = [None if n in carried else m for n, m in enumerate(operands)]
            _read(body, [*constants, *inside], found)
            outputs = [None] * len(eqn.outvars)
        else:
            outputs = [_step(eqn, operands, found)] * len(eqn.outvars)
        marks.update(zip(eqn.outvars, outputs, strict=True))
    return [mark_of(atom) for atom in jaxpr.outvars]


def _step(eqn: Equation, operands: _Marks, found: set[int]) -> _Mark | None:
    """The mark of an operation's results. Adds complete statistics to `found`."""
    name = eqn.primitive.name
    kinds = tuple(mark and mark.kind for mark in operands)
    marked = [mark for mark in operands if mark is not None]
    arguments = frozenset[int]().union(*(mark.arguments for mark in marked))
    if name in _PASSING:
        return operands[0]
    if name in ("rsqrt", "sqrt"):
        kind = "inverse" if name == "rsqrt" else "root"
        return _Mark(kind, arguments) if kinds == ("argument",) else None
    if (name == "mul" and set(kinds) == {"centred", "inverse"}) or (
        name == "div" and kinds == ("centred", "root")
    ):
        found.update(arguments)
        return None
    if name == "div" and kinds[-1] == "root" and kinds[0] != "centred":
        return _Mark("inverse", operands[1].arguments if operands[1] else arguments)
    if name == "mul" and "inverse" in kinds:
        # The scale of the layer may be multiplied first.
        inverse = operands[kinds.index("inverse")]
        return inverse if None in kinds or "argument" in kinds else None
    if name in _SHIFTING and kinds[0] == "argument" and _is_scalar(eqn.invars[1]):
        return operands[0]
    if name in _SHIFTING and kinds[-1] == "argument" and _is_scalar(eqn.invars[0]):
        return operands[1]
    if name == "sub" and kinds == (None, "argument"):
        return operands[1] and _Mark("centred", operands[1].arguments)
    return None


def _is_scalar(atom: Atom) -> bool:
    return all(size == 1 for size in shape_of(atom))
