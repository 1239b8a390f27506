"""Follows the axes of a model's variables through its jaxpr."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.extend as jex
import jax.numpy as jnp

from dimat_jax._jaxprs import Atom, ClosedJaxpr, Equation, Jaxpr, called_by
from dimat_jax.permutation._causes import Cause
from dimat_jax.permutation._jaxpr import Place, shape_of
from dimat_jax.permutation._rules import RULES
from dimat_jax.permutation._stacked import Occurrence, read_together
from dimat_jax.permutation._units import (
    ArrayUnits,
    AxisUnits,
    fix,
    fixed,
    fixed_axes,
    same,
    unknown,
)
from dimat_jax.permutation._unknown import UnknownOperations

__all__ = ["Located", "Operation", "Trace", "Value", "constant"]

# Matrix products and convolutions. A layer reads units by such an operation.
_CONTRACTIONS = ("dot_general", "conv_general_dilated")


class Value(NamedTuple):
    """What a trace knows about one array.

    Attributes:
        axes: the units along each axis of the array.
        sources: the arguments on which the array depends, as a set of bits.
    """

    axes: ArrayUnits
    sources: int


class Located(NamedTuple):
    """A value at a place.

    Attributes:
        place: the place of the value in the model's jaxpr.
        value: what is known of the value.
        steps: the steps of the scans around the value, from the outermost inwards.
    """

    place: Place
    value: Value
    steps: tuple[AxisUnits, ...]


class Operation(NamedTuple):
    """An operation that a trace has followed.

    Attributes:
        eqn: the equation of the jaxpr.
        operands: what is known of its operands.
        results: what is known of its results.
        place: its place in the model's jaxpr; None inside of loops and branches other
            than scans.
        steps: the steps of the scans around it.
    """

    eqn: Equation
    operands: list[Value]
    results: list[Value]
    place: Place | None
    steps: tuple[AxisUnits, ...]

    @property
    def name(self) -> str:
        """The name of the operation."""
        return self.eqn.primitive.name


class Trace:
    """What a jaxpr tells about the axes of its arguments.

    Attributes:
        operands: the operands of all contractions, with their places.
        values: all computed values, with their places.
        occurrences: all arrays with units, wherever they are computed.
        first_used: the numbers of the arguments, in the order of their first use.
        operations: all operations but calls, loops and branches, in their order.
        unknown: the operations without a rule.
    """

    def __init__(self):
        self.operands: list[Located] = []
        self.values: list[Located] = []
        self.occurrences: list[Occurrence] = []
        self.first_used: list[int] = []
        self.operations: list[Operation] = []
        self.unknown = UnknownOperations()
        # The steps of the scans around the operation that is followed at the moment.
        self._steps: tuple[AxisUnits, ...] = ()
        # By id(value). It holds the values too, so that no id is used a second time.
        self._seen_operands: dict[int, Value] = {}

    def read(
        self, jaxpr: Jaxpr, arguments: Sequence[Value], place: Place | None = ()
    ) -> list[Value]:
        """Follows all operations of a jaxpr and returns its outputs.

        Args:
            jaxpr: an open jaxpr.
            arguments: the jaxpr's constants, followed by its inputs.
            place: the place of the jaxpr; None inside of loops and branches, whose
                values cannot be recorded.
        """
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], arguments, strict=True))

        def value_of(atom: Atom) -> Value:
            if isinstance(atom, jex.core.Literal):
                return constant(atom.val)
            return values[atom]

        for number, eqn in enumerate(jaxpr.eqns):
            inputs = [value_of(atom) for atom in eqn.invars]
            here = None if place is None else (*place, number)
            outputs = self._operation(eqn, inputs, here)
            values.update(zip(eqn.outvars, outputs, strict=True))
        return [value_of(atom) for atom in jaxpr.outvars]

    def _operation(
        self, eqn: Equation, inputs: list[Value], place: Place | None
    ) -> list[Value]:
        name = eqn.primitive.name
        if (called := called_by(eqn)) is not None:
            return self.read(called.jaxpr, [*_constants(called), *inputs], place)
        match name:
            case "scan":
                outputs = self._scan(eqn, inputs, place)
            case "while":
                outputs = self._while(eqn, inputs)
            case "cond":
                outputs = self._cond(eqn, inputs)
            case _:
                outputs = self._simple(eqn, inputs, place)
        self.occurrences += [Occurrence(axes, self._steps) for axes, _ in outputs]
        if place is not None:
            self.values += [
                Located((*place, ~n), value, self._steps)
                for n, value in enumerate(outputs)
            ]
            if name in _CONTRACTIONS:
                self._add_operands(place, inputs)
        return outputs

    def _simple(
        self, eqn: Equation, inputs: list[Value], place: Place | None
    ) -> list[Value]:
        for value in inputs:
            self._note_use(value)
        rule = RULES.get(eqn.primitive.name, self._no_rule)
        sources = _union(inputs)
        results = rule(eqn, [list(value.axes) for value in inputs])
        self.occurrences += [
            Occurrence(axes, self._steps)
            for axes in read_together(eqn, [value.axes for value in inputs], results)
        ]
        outputs = [Value(axes, sources) for axes in results]
        self.operations.append(Operation(eqn, inputs, outputs, place, self._steps))
        return outputs

    @property
    def contractions(self) -> list["Operation"]:
        """All matrix products and convolutions."""
        return [op for op in self.operations if op.name in _CONTRACTIONS]

    def _note_use(self, value: Value) -> None:
        if value.sources.bit_count() == 1:
            argument = value.sources.bit_length() - 1
            if argument not in self.first_used:
                self.first_used.append(argument)

    def _add_operands(self, place: Place, operands: list[Value]) -> None:
        for n, value in enumerate(operands):
            # One array may go into several contractions, as into those of an
            # attention's queries, keys and values. It is kept once.
            if id(value) not in self._seen_operands:
                self._seen_operands[id(value)] = value
                self.operands.append(Located((*place, n), value, self._steps))

    def _no_rule(self, eqn: Equation, inputs: list[ArrayUnits]) -> list[ArrayUnits]:
        touched = [axis for axis in itertools.chain(*inputs) if axis is not None]
        of_touched, of_result = self.unknown.add(eqn.primitive.name, touched)
        for axis in touched:
            fix(axis, of_touched)
        return [fixed_axes(shape_of(atom), of_result) for atom in eqn.outvars]

    def _scan(
        self, eqn: Equation, inputs: list[Value], place: Place | None
    ) -> list[Value]:
        n_constants, n_carry = eqn.params["num_consts"], eqn.params["num_carry"]
        # Through the carry every output may depend on every input.
        sources = _union(inputs)
        constants, rest = inputs[:n_constants], inputs[n_constants:]
        carry = _loop_carried(rest[:n_carry], eqn.invars[n_constants:], sources)
        steps = fixed(eqn.params["length"], "the steps of a scan")
        for axes, _ in rest[n_carry:]:
            same(steps, axes[0])
        slices = [Value(axes[1:], own) for axes, own in rest[n_carry:]]
        body = eqn.params["jaxpr"]
        arguments = [*_constants(body), *constants, *carry, *slices]
        self._steps = (*self._steps, steps)
        outputs = self.read(body.jaxpr, arguments, place)
        self._steps = self._steps[:-1]
        stacked = [Value([steps, *axes], own) for axes, own in outputs[n_carry:]]
        return [*_closed_loop(carry, outputs[:n_carry]), *stacked]

    def _while(self, eqn: Equation, inputs: list[Value]) -> list[Value]:
        n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        sources = _union(inputs)
        start = inputs[n_cond + n_body :]
        carry = _loop_carried(start, eqn.invars[n_cond + n_body :], sources)
        cond, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
        self.read(cond.jaxpr, [*_constants(cond), *inputs[:n_cond], *carry], None)
        arguments = [*_constants(body), *inputs[n_cond : n_cond + n_body], *carry]
        return _closed_loop(carry, self.read(body.jaxpr, arguments, None))

    def _cond(self, eqn: Equation, inputs: list[Value]) -> list[Value]:
        branches = [
            self.read(branch.jaxpr, [*_constants(branch), *inputs[1:]], None)
            for branch in eqn.params["branches"]
        ]
        return [
            Value(
                [same(*axes) for axes in zip(*(v.axes for v in values), strict=True)],
                _union([inputs[0], *values]),
            )
            for values in zip(*branches, strict=True)
        ]


def constant(array: Any) -> Value:
    """The value of an array that a model has captured.

    All of its axes are fixed, even if its entries are alike today: the captured array
    of a trained model, as running statistics, may differ from unit to unit.
    """
    shape = jnp.shape(array)
    cause = Cause("captured", f"{getattr(array, 'dtype', '')}{list(shape)}")
    return Value(fixed_axes(shape, cause), 0)


def _union(values: Sequence[Value]) -> int:
    sources = 0
    for value in values:
        sources |= value.sources
    return sources


def _loop_carried(
    start: Sequence[Value], atoms: Sequence[Atom], sources: int
) -> list[Value]:
    """The carry of a loop's steps, from the carry with which the loop starts.

    An axis that is uniform at the start need not stay uniform, so it gets units.
    """
    return [
        Value(
            [
                unknown(size) if axis is None else axis
                for axis, size in zip(value.axes, shape_of(atom), strict=True)
            ],
            sources,
        )
        for value, atom in zip(start, atoms, strict=False)
    ]


def _closed_loop(carry: list[Value], outputs: list[Value]) -> list[Value]:
    """The carry after a loop: its units are the same before and after each step."""
    return [
        Value([same(*axes) for axes in zip(begin.axes, end.axes, strict=True)], sources)
        for begin, end in zip(carry, outputs, strict=True)
        for sources in [begin.sources]
    ]


def _constants(closed: ClosedJaxpr) -> list[Value]:
    return [constant(array) for array in closed.consts]
