"""Runs a model's jaxpr; records or changes the values that it computes on the way."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.extend as jex
from jax.typing import ArrayLike
from jaxtyping import Array

from dimat_jax._jaxprs import (
    Atom,
    ClosedJaxpr,
    Equation,
    Jaxpr,
    called_by,
    run_equation,
)
from dimat_jax.permutation._jaxpr import Place

__all__ = ["run_and_record", "run_edited"]


def run_and_record(
    closed: ClosedJaxpr, arguments: Sequence[ArrayLike], places: Iterable[Place]
) -> dict[Place, Array]:
    """Runs a closed jaxpr and returns the values at some places.

    The values of a scan's steps are stacked on a leading axis.
    """
    wanted = {place: place for place in places}
    return _run(closed.jaxpr, [*closed.consts, *arguments], wanted)[1]


def run_edited(
    closed: ClosedJaxpr,
    arguments: Sequence[ArrayLike],
    edits: Mapping[Place, Callable[[Any], Any]],
) -> list[Any]:
    """Runs a closed jaxpr, with changed results at some places.

    Args:
        closed: the jaxpr.
        arguments: its inputs.
        edits: for each place of a result the function that changes it. The places are
            in no loop and no branch.
    """
    return _run_edited(closed.jaxpr, [*closed.consts, *arguments], edits)


def _run_edited(
    jaxpr: Jaxpr,
    arguments: Sequence[Any],
    edits: Mapping[Place, Callable[[Any], Any]],
) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], arguments, strict=True))

    def value_of(atom: Atom) -> Any:
        return atom.val if isinstance(atom, jex.core.Literal) else values[atom]

    for number, eqn in enumerate(jaxpr.eqns):
        inputs = [value_of(atom) for atom in eqn.invars]
        here = {place[1:]: f for place, f in edits.items() if place[0] == number}
        inside = {place: f for place, f in here.items() if len(place) > 1}
        called = called_by(eqn)
        if inside and called is not None:
            outputs = _run_edited(called.jaxpr, [*called.consts, *inputs], inside)
        else:
            outputs = run_equation(eqn, inputs)
        for (n, *rest), edit in here.items():
            if not rest:
                outputs[~n] = edit(outputs[~n])
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [value_of(atom) for atom in jaxpr.outvars]


def _run(
    jaxpr: Jaxpr, arguments: Sequence[ArrayLike], wanted: Mapping[Place, Place]
) -> tuple[list[Any], dict[Place, Any]]:
    """Runs an open jaxpr and records the values at some places.

    Args:
        jaxpr: the jaxpr to run, perhaps an inner one.
        arguments: its constants, followed by its inputs.
        wanted: the places to record: for each place within this jaxpr, the place within
            the outermost jaxpr.

    Returns:
        the outputs, and the recorded values by their places in the outermost jaxpr.
    """
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], arguments, strict=True))
    recorded: dict[Place, Any] = {}

    def value_of(atom: Atom) -> Any:
        return atom.val if isinstance(atom, jex.core.Literal) else values[atom]

    for number, eqn in enumerate(jaxpr.eqns):
        inputs = [value_of(atom) for atom in eqn.invars]
        here = {p[1:]: whole for p, whole in wanted.items() if p[0] == number}
        inside = {place: whole for place, whole in here.items() if len(place) > 1}
        if not inside:
            outputs = run_equation(eqn, inputs)
        elif eqn.primitive.name == "scan":
            outputs, inner = _run_scan(eqn, inputs, inside)
            recorded |= inner
        else:
            called = called_by(eqn)
            assert called is not None  # a Trace gives places in calls and scans alone
            outputs, inner = _run(called.jaxpr, [*called.consts, *inputs], inside)
            recorded |= inner
        values.update(zip(eqn.outvars, outputs, strict=True))
        for place, whole in here.items():
            if len(place) == 1:
                recorded[whole] = [*inputs, *reversed(outputs)][place[0]]
    return [value_of(atom) for atom in jaxpr.outvars], recorded


def _run_scan(
    eqn: Equation, inputs: list[Any], wanted: Mapping[Place, Place]
) -> tuple[list[Any], dict[Place, Any]]:
    n_constants, n_carry = eqn.params["num_consts"], eqn.params["num_carry"]
    body: ClosedJaxpr = eqn.params["jaxpr"]

    def step(carry, slices):
        arguments = [*body.consts, *inputs[:n_constants], *carry, *slices]
        outputs, recorded = _run(body.jaxpr, arguments, wanted)
        return outputs[:n_carry], (outputs[n_carry:], recorded)

    rest = inputs[n_constants:]
    carry, (stacked, recorded) = jax.lax.scan(
        step,
        rest[:n_carry],
        rest[n_carry:],
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
    )
    return [*carry, *stacked], recorded
