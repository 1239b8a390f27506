"""What architectures check of their settings."""

import math
from collections.abc import Iterable

from dimat_jax.errors import UserError, nearest

__all__ = ["ModelError", "one_of", "scaled"]


class ModelError(UserError):
    """A setting that an architecture cannot have; the message says what it can."""


def one_of(field: str, value: str, allowed: Iterable[str]) -> None:
    """Checks a setting that is one of a few names.

    Raises:
        ModelError: it is none of them.
    """
    if value not in allowed:
        raise ModelError(f"{field} is {value!r}; {nearest(value, allowed)}")


def scaled(width: float, *units: int) -> tuple[int, ...]:
    """Layers' numbers of units, each `width` times as many.

    Raises:
        ModelError: these are not whole numbers, at least 1.
    """
    if not 0 < width < math.inf:  # which NaN is not, either
        raise ModelError(f"width is {width:g}; it must be positive")
    scaled_units = tuple(round(width * n) for n in units)
    for n, count in zip(units, scaled_units, strict=True):
        # 0.1 x 30 is not quite 3.
        if count < 1 or not math.isclose(width * n, count):
            raise ModelError(
                f"width {width:g} makes {width * n:g} units of {n}; it must be a whole "
                "number, at least 1"
            )
    return scaled_units
