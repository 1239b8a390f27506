"""Following a model's axes through its jaxpr, and watching what it computes on the way.

A `Place` tells where in a jaxpr a value occurs: the numbers of the equations that lead
to it, from the outermost jaxpr inwards, and last the number of the operand (or, as ~n,
of the output).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dimat_jax.permutation.rules import RULES, fixed_axes, fresh_axes
from dimat_jax.permutation.units import Known, Units, fix, same, unknown

__all__ = ["Place", "Trace", "Value", "operations", "watch"]

Jaxpr = Any  # jax.extend.core.Jaxpr, whose attributes type checkers do not know
Place = tuple[int, ...]

# A matrix product or a convolution: the activations that go in are what units are for.
_CONTRACTIONS = ("dot_general", "conv_general_dilated")

# Operations that only call a jaxpr, on their own operands.
_CALLS = (
    "call",
    "checkpoint",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
    "jit",
    "pjit",
    "remat",
    "remat2",
)


class Value(NamedTuple):
    """What is known of one array.

    Attributes:
        axes: the units along each of its axes.
        sources: a bit set of the arguments that it depends on.
    """

    axes: list[Known]
    sources: int


class Trace:
    """What a jaxpr says about the axes of its arguments.

    Attributes:
        operands: what goes into contractions, with the place.
        values: all that is computed, with the place.
        first_used: the numbers of the arguments, in the order of their first use.
        not_known: operations without a rule, with what they touched.
    """

    def __init__(self):
        self.operands: list[tuple[Place, Value]] = []
        self.values: list[tuple[Place, Value]] = []
        self.first_used: list[int] = []
        self.not_known: list[tuple[str, list[Units]]] = []
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
        if (called := _called(eqn)) is not None:
            return self.read(called.jaxpr, [*_constants(called), *inputs], place)
        match name:
            case "scan":
                return self._scan(eqn, inputs, place)
            case "while":
                return self._while(eqn, inputs)
            case "cond":
                return self._cond(eqn, inputs)
        for value in inputs:
            self._use(value)
        sources = _union(inputs)
        axes = [value.axes for value in inputs]
        if name in RULES:
            results = RULES[name](eqn, [list(a) for a in axes])
        else:
            results = self._no_rule(eqn, axes)
        outputs = [Value(result, sources) for result in results]
        if place is not None:
            self.values += [((*place, ~n), value) for n, value in enumerate(outputs)]
            if name in _CONTRACTIONS:
                self._watch(place, inputs)
        return outputs

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

    def _no_rule(self, eqn, inputs: list[list[Known]]) -> list[list[Known]]:
        name = eqn.primitive.name
        results = [fixed_axes(atom.aval.shape, name) for atom in eqn.outvars]
        touched = [axis for axes in inputs for axis in axes if axis is not None]
        for axis in touched:
            fix(axis, name)
        self.not_known.append((name, touched))
        return results

    def _scan(self, eqn, inputs: list[Value], place: Place | None) -> list[Value]:
        n_constants, n_carry = eqn.params["num_consts"], eqn.params["num_carry"]
        sources = _union(inputs)  # through the carry, everything may reach everything
        constants, rest = inputs[:n_constants], inputs[n_constants:]
        carry = _loop_carried(rest[:n_carry], eqn.invars[n_constants:], sources)
        slices = []
        for axes, _ in rest[n_carry:]:
            fix(axes[0], "the steps of a scan")
            slices.append(Value(axes[1:], sources))
        body = eqn.params["jaxpr"]
        arguments = [*_constants(body), *constants, *carry, *slices]
        outputs = self.read(body.jaxpr, arguments, place)
        stacked = [
            Value(
                [*fixed_axes([eqn.params["length"]], "the steps of a scan"), *axes],
                sources,
            )
            for axes, _ in outputs[n_carry:]
        ]
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
    axes: list[Known] = [unknown(size) for size in shape]
    for d, axis in enumerate(axes):
        if (array == np.take(array, [0], axis=d)).all():
            axes[d] = None
        else:
            fix(axis, "captured")
    return Value(axes, 0)


def _union(values: Sequence[Value]) -> int:
    sources = 0
    for value in values:
        sources |= value.sources
    return sources


def _loop_carried(start: Sequence[Value], atoms, sources: int) -> list[Value]:
    """What a loop begins with. Zeros need not stay zeros."""
    return [
        Value(fresh_axes(value.axes, atom.aval.shape), sources)
        for value, atom in zip(start, atoms, strict=False)
    ]


def _closed_loop(carry: list[Value], outputs: list[Value]) -> list[Value]:
    return [
        Value([same(*axes) for axes in zip(begin.axes, end.axes, strict=True)], sources)
        for begin, end in zip(carry, outputs, strict=True)
        for sources in [begin.sources]
    ]


def _called(eqn) -> Jaxpr | None:
    """The closed jaxpr that an equation just calls, if it is one that does."""
    if eqn.primitive.name not in _CALLS:
        return None
    jaxpr = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
    return jaxpr if hasattr(jaxpr, "jaxpr") else jex.core.ClosedJaxpr(jaxpr, ())


def _constants(closed: Jaxpr) -> list[Value]:
    return [constant(array) for array in closed.consts]


def operations(jaxpr: Jaxpr) -> Iterator[str]:
    """The names of all operations that a place can lead to, in order."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        if eqn.primitive.name == "scan":
            yield from operations(eqn.params["jaxpr"].jaxpr)
        elif (called := _called(eqn)) is not None:
            yield from operations(called.jaxpr)


def watch(
    closed: Jaxpr, arguments: Sequence[Any], wanted: Mapping[Place, str]
) -> dict[str, Array]:
    """Runs a closed jaxpr, and shows the values at some places, by name.

    What a scan computes at each of its steps is stacked behind the first axis.
    """
    return _run(closed.jaxpr, [*closed.consts, *arguments], wanted)[1]


def _run(
    jaxpr: Jaxpr, arguments: Sequence[Any], wanted: Mapping[Place, str]
) -> tuple[list[Any], dict[str, Any]]:
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], arguments, strict=True))
    seen: dict[str, Any] = {}

    def value_of(atom) -> Any:
        return atom.val if isinstance(atom, jex.core.Literal) else known[atom]

    for number, eqn in enumerate(jaxpr.eqns):
        inputs = [value_of(atom) for atom in eqn.invars]
        here = {p[1:]: name for p, name in wanted.items() if p[0] == number}
        inside = {place: name for place, name in here.items() if len(place) > 1}
        if not inside:
            outputs = _evaluate(eqn, inputs)
        elif eqn.primitive.name == "scan":
            outputs, shown = _run_scan(eqn, inputs, inside)
            seen |= shown
        else:
            called: Any = _called(eqn)
            outputs, shown = _run(called.jaxpr, [*called.consts, *inputs], inside)
            seen |= shown
        known.update(zip(eqn.outvars, outputs, strict=True))
        for place, name in here.items():
            if len(place) == 1:
                seen[name] = [*inputs, *reversed(outputs)][place[0]]
    return [value_of(atom) for atom in jaxpr.outvars], seen


def _evaluate(eqn, inputs: list[Any]) -> list[Any]:
    params = eqn.primitive.get_bind_params(eqn.params)
    # Some versions of JAX give what is to be called apart from the other params.
    functions, params = params if isinstance(params, tuple) else ((), params)
    outputs = eqn.primitive.bind(*functions, *inputs, **params)
    return outputs if eqn.primitive.multiple_results else [outputs]


def _run_scan(eqn, inputs: list[Any], wanted: Mapping[Place, str]):
    n_constants, n_carry = eqn.params["num_consts"], eqn.params["num_carry"]
    body = eqn.params["jaxpr"]

    def step(carry, slices):
        arguments = [*body.consts, *inputs[:n_constants], *carry, *slices]
        outputs, seen = _run(body.jaxpr, arguments, wanted)
        return outputs[:n_carry], (outputs[n_carry:], seen)

    rest = inputs[n_constants:]
    carry, (stacked, seen) = jax.lax.scan(
        step,
        rest[:n_carry],
        rest[n_carry:],
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
    )
    # Behind the examples, which come first.
    shown = {
        name: jnp.moveaxis(array, 0, min(1, array.ndim - 1))
        for name, array in seen.items()
    }
    return [*carry, *stacked], shown
