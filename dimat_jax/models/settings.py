"""What architectures check of their settings."""

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
        ModelError: these are not whole numbers of units, at least one.
    """
    exact = [width * n for n in units]
    # 0.1 x 30 is not quite 3.
    whole = all(abs(n - round(n)) < 1e-6 for n in exact)
    if not whole or min(exact, default=1) < 0.5:
        made = ", ".join(f"{width:g} x {n} = {width * n:g}" for n in units)
        raise ModelError(
            f"width {width:g} must make whole numbers of units, at least one: {made}"
        )
    return tuple(round(n) for n in exact)
