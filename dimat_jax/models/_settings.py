"""Checks of the settings of architectures."""

import math
from collections.abc import Iterable

from dimat_jax.errors import UserError, nearest

__all__ = ["ModelError", "one_of", "scaled"]


class ModelError(UserError):
    """A setting has a value that the architecture cannot have.

    The message tells which values it can have.
    """


def one_of(field: str, value: str, allowed: Iterable[str]) -> None:
    """Checks that the setting `field` has one of the allowed values.

    Raises:
        ModelError: it has another value.
    """
    if value not in allowed:
        raise ModelError(f"{field} is {value!r}; {nearest(value, allowed)}")


def scaled(width: float, *units: int) -> tuple[int, ...]:
    """Multiplies numbers of units by `width`.

    Raises:
        ModelError: a product is not a whole number, or it is below 1.
    """
    if not 0 < width < math.inf:  # the comparison is false for NaN, too
        raise ModelError(f"width is {width:g}; it must be positive")
    scaled_units = tuple(round(width * n) for n in units)
    for n, count in zip(units, scaled_units, strict=True):
        # Floating-point products of whole numbers may be inexact: 0.1 x 30 is not 3.
        if count < 1 or not math.isclose(width * n, count):
            raise ModelError(
                f"width {width:g} makes {width * n:g} units of {n}; it must be a whole "
                "number, at least 1"
            )
    return scaled_units
