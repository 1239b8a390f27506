"""Reads and runs JAX's jaxprs, one equation at a time."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.extend as jex

__all__ = [
    "Atom",
    "ClosedJaxpr",
    "Equation",
    "Jaxpr",
    "Var",
    "called_by",
    "equations",
    "run_equation",
    "run_equations",
]

Var = jex.core.Var
Atom = Var | jex.core.Literal
ClosedJaxpr = jex.core.ClosedJaxpr
Equation = jex.core.JaxprEqn
Jaxpr = jex.core.Jaxpr

# These operations do nothing but call a jaxpr on their own operands.
_CALLS = (
    "call",
    "closed_call",
    "composite",
    "custom_jvp_call",
    "custom_vjp_call",
    "jit",
    "remat2",
)


def called_by(eqn: Equation) -> ClosedJaxpr | None:
    """The jaxpr that an equation calls, or None if the equation is not such a call."""
    if eqn.primitive.name not in _CALLS:
        return None
    jaxpr = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
    return jaxpr if hasattr(jaxpr, "jaxpr") else ClosedJaxpr(jaxpr, ())


def equations(*eqns: Equation) -> Iterator[Equation]:
    """Yields equations, and those of all jaxprs within them."""
    for eqn in eqns:
        yield eqn
        for inner in jex.core.jaxprs_in_params(eqn.params):
            yield from equations(*inner.eqns)


def run_equation(eqn: Equation, inputs: Sequence[Any]) -> list[Any]:
    """Runs one equation on its operands and returns its results."""
    params = eqn.primitive.get_bind_params(eqn.params)
    # Some versions of JAX return the functions to be called apart from the params.
    functions, params = params if isinstance(params, tuple) else ((), params)
    outputs = eqn.primitive.bind(*functions, *inputs, **params)
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def run_equations(
    eqns: Sequence[Equation],
    values: dict[Var, Any],
    outputs: Sequence[Atom],
    run: Callable[[Equation, list[Any]], Sequence[Any]] = run_equation,
) -> list[Any]:
    """Runs equations in order.

    Args:
        eqns: the equations.
        values: the values of the variables that exist before. The results are added.
        outputs: the variables and literals whose values are returned.
        run: the function that runs one equation on the values of its operands.
    """

    def value_of(atom: Atom) -> Any:
        return atom.val if isinstance(atom, jex.core.Literal) else values[atom]

    for eqn in eqns:
        inputs = [value_of(atom) for atom in eqn.invars]
        values.update(zip(eqn.outvars, run(eqn, inputs), strict=True))
    return [value_of(atom) for atom in outputs]
