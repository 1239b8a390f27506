"""Runs a model's jaxpr; records or changes the values that it computes on the way."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

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

_T = TypeVar("_T")

Edits = Mapping[Place, Callable[[Any], Any]]
"""The functions that change results, by the places of the results."""


def run_and_record(
    closed: ClosedJaxpr, arguments: Sequence[ArrayLike], places: Iterable[Place]
) -> dict[Place, Array]:
    """Runs a closed jaxpr and returns the values at some places.

    The values of a scan's steps are stacked on a leading axis.
    """
    wanted = {place: place for place in places}
    return _run(closed.jaxpr, [*closed.consts, *arguments], wanted, {})[1]


def run_edited(
    closed: ClosedJaxpr,
    arguments: Sequence[ArrayLike],
    edits: Edits,
) -> list[Any]:
    """Runs a closed jaxpr, with changed results at some places.

    Args:
        closed: the jaxpr.
        arguments: its inputs.
        edits: for each place of a result the function that changes it. The places are
            in no loop and no branch.
    """
    return _run(closed.jaxpr, [*closed.consts, *arguments], {}, edits)[0]


def _run(
    jaxpr: Jaxpr,
    arguments: Sequence[ArrayLike],
    wanted: Mapping[Place, Place],
    edits: Edits,
) -> tuple[list[Any], dict[Place, Any]]:
    """Runs an open jaxpr; records the values at some places and changes others.

    Args:
        jaxpr: the jaxpr to run, perhaps an inner one.
        arguments: its constants, followed by its inputs.
        wanted: the places to record: for each place within this jaxpr, the place within
            the outermost jaxpr.
        edits: the functions that change results, by their places within this jaxpr.

    Returns:
        the outputs, and the recorded values by their places in the outermost jaxpr.
    """
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], arguments, strict=True))
    recorded: dict[Place, Any] = {}

    def value_of(atom: Atom) -> Any:
        return atom.val if isinstance(atom, jex.core.Literal) else values[atom]

    for number, eqn in enumerate(jaxpr.eqns):
        inputs = [value_of(atom) for atom in eqn.invars]
        wanted_here, wanted_inside = _at(number, wanted)
        edits_here, edits_inside = _at(number, edits)
        if not (wanted_inside or edits_inside):
            outputs = run_equation(eqn, inputs)
        elif eqn.primitive.name == "scan":
            assert not edits_inside
            outputs, inner = _run_scan(eqn, inputs, wanted_inside)
            recorded |= inner
        else:
            called = called_by(eqn)
            assert called is not None  # a Trace gives places in calls and scans alone
            outputs, inner = _run(
                called.jaxpr, [*called.consts, *inputs], wanted_inside, edits_inside
            )
            recorded |= inner
        for (n,), edit in edits_here.items():
            outputs[~n] = edit(outputs[~n])
        values.update(zip(eqn.outvars, outputs, strict=True))
        for (n,), whole in wanted_here.items():
            recorded[whole] = [*inputs, *reversed(outputs)][n]
    return [value_of(atom) for atom in jaxpr.outvars], recorded


def _at(
    number: int, by_place: Mapping[Place, _T]
) -> tuple[dict[Place, _T], dict[Place, _T]]:
    """The entries for an equation: for its own values, and for places inside of it."""
    found = {place[1:]: x for place, x in by_place.items() if place[0] == number}
    own = {place: x for place, x in found.items() if len(place) == 1}
    return own, {place: x for place, x in found.items() if len(place) > 1}


def _run_scan(
    eqn: Equation, inputs: list[Any], wanted: Mapping[Place, Place]
) -> tuple[list[Any], dict[Place, Any]]:
    n_constants, n_carry = eqn.params["num_consts"], eqn.params["num_carry"]
    body: ClosedJaxpr = eqn.params["jaxpr"]

    def step(carry, slices):
        arguments = [*body.consts, *inputs[:n_constants], *carry, *slices]
        outputs, recorded = _run(body.jaxpr, arguments, wanted, {})
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
