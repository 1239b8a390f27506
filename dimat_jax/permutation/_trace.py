"""Following the axes of a model's variables through its jaxpr.

A `Place` tells where in a jaxpr a value occurs: the numbers of the equations that lead
to it, from the outermost jaxpr inwards, and last the number of the operand (or, as ~n,
of the output).
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np

from dimat_jax.permutation._rules import RULES
from dimat_jax.permutation._units import (
    Axes,
    atoms,
    fix,
    fixed,
    fixed_axes,
    same,
    unknown,
)

__all__ = ["Jaxpr", "Place", "Trace", "Value", "called_by", "constant"]

Jaxpr = Any  # jax.extend.core.Jaxpr, whose attributes type checkers do not know
Place = tuple[int, ...]

# A matrix product or a convolution: the activations that go in are what units are for.
_CONTRACTIONS = ("dot_general", "conv_general_dilated")

# Operations that only call a jaxpr, on their own operands.
_CALLS = (
    "call",
    "closed_call",
    "composite",
    "custom_jvp_call",
    "custom_vjp_call",
    "jit",
    "remat2",
)


class Value(NamedTuple):
    """What is known of one array.

    Attributes:
        axes: the units along each of its axes.
        sources: a bit set of the arguments that it depends on.
    """

    axes: Axes
    sources: int


class Trace:
    """What a jaxpr says about the axes of its arguments.

    Attributes:
        operands: what goes into contractions, with the place.
        values: all that is computed, with the place.
        first_used: the numbers of the arguments, in the order of their first use.
        not_known: the names of operations without a rule.
    """

    def __init__(self):
        self.operands: list[tuple[Place, Value]] = []
        self.values: list[tuple[Place, Value]] = []
        self.first_used: list[int] = []
        self.not_known: set[str] = set()
        self._watched: dict[int, Value] = {}

    def read(
        self, jaxpr: Jaxpr, arguments: Sequence[Value], place: Place | None = ()
    ) -> list[Value]:
        """Follows all operations; returns the outputs.

        Args:
            jaxpr: an open one.
            arguments: its constants first.
            place: of the jaxpr; None where nothing can be watched.
        """
        known = dict(
            zip([*jaxpr.constvars, *jaxpr.invars], arguments, strict=True),
        )

        def value_of(atom) -> Value:
            if isinstance(atom, jex.core.Literal):
                return constant(atom.val)
            return known[atom]

        for number, eqn in enumerate(jaxpr.eqns):
            inputs = [value_of(atom) for atom in eqn.invars]
            here = None if place is None else (*place, number)
            outputs = self._operation(eqn, inputs, here)
            known.update(zip(eqn.outvars, outputs, strict=True))
        return [value_of(atom) for atom in jaxpr.outvars]

    def _operation(self, eqn, inputs: list[Value], place: Place | None) -> list[Value]:
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
                outputs = self._simple(eqn, inputs)
        if place is not None:
            self.values += [((*place, ~n), value) for n, value in enumerate(outputs)]
            if name in _CONTRACTIONS:
                self._watch(place, inputs)
        return outputs

    def _simple(self, eqn, inputs: list[Value]) -> list[Value]:
        for value in inputs:
            self._use(value)
        rule = RULES.get(eqn.primitive.name, self._no_rule)
        sources = _union(inputs)
        results = rule(eqn, [list(value.axes) for value in inputs])
        return [Value(axes, sources) for axes in results]

    def _use(self, value: Value) -> None:
        if value.sources.bit_count() == 1:
            argument = value.sources.bit_length() - 1
            if argument not in self.first_used:
                self.first_used.append(argument)

    def _watch(self, place: Place, operands: list[Value]) -> None:
        for n, value in enumerate(operands):
            # Queries, keys and values read the same array.
            if id(value) not in self._watched:
                self._watched[id(value)] = value
                self.operands.append(((*place, n), value))

    def _no_rule(self, eqn, inputs: list[Axes]) -> list[Axes]:
        name = eqn.primitive.name
        self.not_known.add(name)
        touched = [axis for axis in itertools.chain(*inputs) if axis is not None]
        # What it makes of fixed axes would be fixed in any case.
        reasons = {name}
        if not any(any(atoms(axis)) for axis in touched):
            reasons = reasons.union(*(axis.root().fixed for axis in touched))
        results = [fixed_axes(atom.aval.shape, name) for atom in eqn.outvars]
        for axis in itertools.chain(touched, *results):
            for reason in reasons:
                fix(axis, reason)
        return results

    def _scan(self, eqn, inputs: list[Value], place: Place | None) -> list[Value]:
        n_constants, n_carry = eqn.params["num_consts"], eqn.params["num_carry"]
        sources = _union(inputs)  # through the carry, everything may reach everything
        constants, rest = inputs[:n_constants], inputs[n_constants:]
        carry = _loop_carried(rest[:n_carry], eqn.invars[n_constants:], sources)
        slices = []
        for axes, own in rest[n_carry:]:
            fix(axes[0], "the steps of a scan")
            slices.append(Value(axes[1:], own))
        body = eqn.params["jaxpr"]
        arguments = [*_constants(body), *constants, *carry, *slices]
        outputs = self.read(body.jaxpr, arguments, place)
        steps = fixed(eqn.params["length"], "the steps of a scan")
        stacked = [Value([steps, *axes], own) for axes, own in outputs[n_carry:]]
        return [*_closed_loop(carry, outputs[:n_carry]), *stacked]

    def _while(self, eqn, inputs: list[Value]) -> list[Value]:
        n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        sources = _union(inputs)
        start = inputs[n_cond + n_body :]
        carry = _loop_carried(start, eqn.invars[n_cond + n_body :], sources)
        cond, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
        self.read(cond.jaxpr, [*_constants(cond), *inputs[:n_cond], *carry], None)
        arguments = [*_constants(body), *inputs[n_cond : n_cond + n_body], *carry]
        return _closed_loop(carry, self.read(body.jaxpr, arguments, None))

    def _cond(self, eqn, inputs: list[Value]) -> list[Value]:
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
    """An array that a model captured: where it is not uniform, it is fixed."""
    shape = jnp.shape(array)
    if math.prod(shape) <= 1:
        return Value([None] * len(shape), 0)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return Value(fixed_axes(shape, "captured"), 0)
    array = np.asarray(array)
    uniform = [(array == array.take([0], axis=d)).all() for d in range(array.ndim)]
    axes = [
        None if same_all_along else fixed(size, "captured")
        for same_all_along, size in zip(uniform, shape, strict=True)
    ]
    return Value(axes, 0)


def _union(values: Sequence[Value]) -> int:
    sources = 0
    for value in values:
        sources |= value.sources
    return sources


def _loop_carried(start: Sequence[Value], atoms, sources: int) -> list[Value]:
    """What a loop begins with; what is uniform then need not stay so."""
    return [
        Value(
            [
                unknown(size) if axis is None else axis
                for axis, size in zip(value.axes, atom.aval.shape, strict=True)
            ],
            sources,
        )
        for value, atom in zip(start, atoms, strict=False)
    ]


def _closed_loop(carry: list[Value], outputs: list[Value]) -> list[Value]:
    return [
        Value([same(*axes) for axes in zip(begin.axes, end.axes, strict=True)], sources)
        for begin, end in zip(carry, outputs, strict=True)
        for sources in [begin.sources]
    ]


def called_by(eqn) -> Jaxpr | None:
    """The closed jaxpr that an equation just calls, if it is one that does."""
    if eqn.primitive.name not in _CALLS:
        return None
    jaxpr = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
    return jaxpr if hasattr(jaxpr, "jaxpr") else jex.core.ClosedJaxpr(jaxpr, ())


def _constants(closed: Jaxpr) -> list[Value]:
    return [constant(array) for array in closed.consts]
