"""Running a model's jaxpr, and seeing what it computes on the way."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.extend as jex
from jaxtyping import Array

from dimat_jax.permutation._trace import Jaxpr, Place, called_by

__all__ = ["watch"]


def watch(
    closed: Jaxpr, arguments: Sequence[Any], places: Iterable[Place]
) -> dict[Place, Array]:
    """Runs a closed jaxpr, and shows the values at some places.

    What a scan computes at each of its steps is stacked on a leading axis.
    """
    wanted = {place: place for place in places}
    return _run(closed.jaxpr, [*closed.consts, *arguments], wanted)[1]


def _run(
    jaxpr: Jaxpr, arguments: Sequence[Any], wanted: Mapping[Place, Place]
) -> tuple[list[Any], dict[Place, Any]]:
    """`wanted`: the places in this jaxpr, and what they are called in the whole."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], arguments, strict=True))
    seen: dict[Place, Any] = {}

    def value_of(atom) -> Any:
        return atom.val if isinstance(atom, jex.core.Literal) else known[atom]

    for number, eqn in enumerate(jaxpr.eqns):
        inputs = [value_of(atom) for atom in eqn.invars]
        here = {p[1:]: whole for p, whole in wanted.items() if p[0] == number}
        inside = {place: whole for place, whole in here.items() if len(place) > 1}
        if not inside:
            outputs = _evaluate(eqn, inputs)
        elif eqn.primitive.name == "scan":
            outputs, shown = _run_scan(eqn, inputs, inside)
            seen |= shown
        else:
            called: Any = called_by(eqn)
            outputs, shown = _run(called.jaxpr, [*called.consts, *inputs], inside)
            seen |= shown
        known.update(zip(eqn.outvars, outputs, strict=True))
        for place, whole in here.items():
            if len(place) == 1:
                seen[whole] = [*inputs, *reversed(outputs)][place[0]]
    return [value_of(atom) for atom in jaxpr.outvars], seen


def _evaluate(eqn, inputs: list[Any]) -> list[Any]:
    params = eqn.primitive.get_bind_params(eqn.params)
    # Some versions of JAX give what is to be called apart from the other params.
    functions, params = params if isinstance(params, tuple) else ((), params)
    outputs = eqn.primitive.bind(*functions, *inputs, **params)
    return outputs if eqn.primitive.multiple_results else [outputs]


def _run_scan(eqn, inputs: list[Any], wanted: Mapping[Place, Place]):
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
    return [*carry, *stacked], seen
