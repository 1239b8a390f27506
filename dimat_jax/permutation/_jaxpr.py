"""How the permutation tools read JAX's jaxprs: shapes, inner jaxprs and places."""

import jax.extend as jex

__all__ = ["ClosedJaxpr", "Equation", "Jaxpr", "Place", "called_by", "shape_of"]

Atom = jex.core.Var | jex.core.Literal
ClosedJaxpr = jex.core.ClosedJaxpr
Equation = jex.core.JaxprEqn
Jaxpr = jex.core.Jaxpr

Place = tuple[int, ...]
"""Where in a jaxpr a value occurs.

A place lists the numbers of the equations that lead to the value, from the outermost
jaxpr inwards. Its last entry is the number of the operand, or `~n` for output n.
"""

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


def shape_of(atom: Atom) -> tuple[int, ...]:
    """The shape of the array that an equation reads or writes."""
    return atom.aval.shape  # pyright: ignore[reportAttributeAccessIssue]
