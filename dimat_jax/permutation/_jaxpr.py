"""Where values occur in a jaxpr, and their shapes."""

from dimat_jax._jaxprs import Atom

__all__ = ["Place", "shape_of"]

Place = tuple[int, ...]
"""Where in a jaxpr a value occurs.

A place lists the numbers of the equations that lead to the value, from the outermost
jaxpr inwards. Its last entry is the number of the operand, or `~n` for output n.
"""


def shape_of(atom: Atom) -> tuple[int, ...]:
    """The shape of the array that an equation reads or writes."""
    return atom.aval.shape  # pyright: ignore[reportAttributeAccessIssue]
