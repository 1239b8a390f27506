"""Checks of the settings of architectures."""

import math
from collections.abc import Iterable

from dimat_jax.errors import UserError, nearest
from dimat_jax.options import Option

__all__ = ["DTYPE", "NORM", "NORMS", "STEM", "WIDTH", "ModelError", "one_of", "scaled"]

WIDTH = Option(
    "model.width",
    1.0,
    "The number of channels or units of every layer, in multiples of the "
    "architecture's own. Fractions are allowed. The paper's ResNet-20 has width 8.",
    above=0,
)
# The kinds of normalisation layers. Not every architecture can have all of them.
NORMS = ("batch", "layer", "group", "none")

NORM = Option(
    "model.norm",
    "",
    "The normalisation layers. Not every architecture can have all of them.",
    choices=NORMS,
    empty="the architecture's own",
)
STEM = Option(
    "model.stem",
    "",
    "The first layers, for images of ImageNet's size or of 32 to 64 pixels.",
    choices=("cifar", "imagenet"),
    empty="the architecture's own",
)
DTYPE = Option(
    "model.dtype",
    "float32",
    "The number format that the model computes in. Its weights are float32.",
    choices=("float32", "bfloat16"),
)


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
        OptionError: the width is not a positive, finite number.
        ModelError: a product is not a whole number, or it is below 1.
    """
    WIDTH.check(width)
    scaled_units = tuple(round(width * n) for n in units)
    for n, count in zip(units, scaled_units, strict=True):
        # Floating-point products of whole numbers may be inexact: 0.1 x 30 is not 3.
        if count < 1 or not math.isclose(width * n, count):
            raise ModelError(
                f"width {width:g} makes {width * n:g} units of {n}; it must be a whole "
                "number, at least 1"
            )
    return scaled_units
