"""The options of a merge of model files."""

import dataclasses
from pathlib import Path
from typing import Any

from dimat_jax import merge
from dimat_jax.errors import UserError
from dimat_jax.models import MODELS
from dimat_jax.options import Option

__all__ = ["Options", "check", "option_of"]

METHODS = ("activation", "weight", "none")
FRAMES = ("reference", "joint")


def _field(default: Any, meaning: str, **limits: Any) -> Any:
    """Makes a field with a default, and with the other arguments of its `Option`."""
    metadata = {"meaning": meaning, **limits}
    return dataclasses.field(default=default, metadata=metadata)


def option_of(field: dataclasses.Field) -> Option:
    """Makes the `Option` of a field: its meaning, and the values that it may have."""
    return Option(field.name, field.default, **field.metadata)


@dataclasses.dataclass(frozen=True)
class Options:
    """The models of a merge, and the way in which they are merged.

    The fields after the first two are flags of `dimat merge`; each holds its meaning.

    Attributes:
        models: two or more names. Each is the workdir of a run (DIR:2 is its agent 2,
            DIR its agent 0), a PyTorch file, or the `out` of an earlier merge.
        out: the folder for all results, which must be new or empty.
    """

    models: tuple[str, ...]
    out: str
    model: str | None = _field(
        None,
        f"The architecture that PyTorch files hold: one of {', '.join(MODELS)}.",
        choices=MODELS,
    )
    data: str | None = _field(
        None, "The data set. It is needed if no model says what it was trained on."
    )
    data_dir: str | None = _field(
        None, "The folder of the data set. By default, the one that the runs name."
    )
    method: str = _field(
        "activation",
        f"The method of matching: {', '.join(METHODS)}.",
        choices=METHODS,
    )
    frame: str = _field(
        "reference",
        "reference: all models are aligned to the first. joint: all models are aligned "
        "to each other.",
        choices=FRAMES,
    )
    weights: tuple[float, ...] | None = _field(
        None, "The models' relative weights in the average. By default, all are equal."
    )
    samples: int = _field(
        1000,
        "The number of training images for matching and for statistics.",
        at_least=2,
    )
    points: int = _field(
        11, "The number of points to evaluate on each line.", at_least=2
    )
    train_size: int | None = _field(
        None, "The number of training images to draw from. By default, all."
    )
    test_size: int | None = _field(
        None, "The number of test images to evaluate on. By default, all."
    )
    seed: int = _field(0, "The seed of all random numbers.", at_least=0)
    restarts: int = _field(
        1, "The number of starts of weight matching; the best is taken.", at_least=1
    )
    stay: float = _field(
        0.0, "A unit moves only if its score gains more than this.", at_least=0
    )


def check(options: Options) -> None:
    """Checks the options before any file is read.

    Raises:
        UserError: an option is wrong; the message names the flag, its value and what is
            allowed.
    """
    if len(set(options.models)) < max(2, len(options.models)):
        raise UserError(
            "expected two different models or more: A B [C ...] --out=DIR; got "
            f"{list(options.models)}"
        )
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.metadata and value is not None:
            option_of(field).check(value, f"--{field.name}")
    merge.check_weights(options.weights, len(options.models))
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out} exists already; choose a new folder")
