"""The options of a merge of model files."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from dimat_jax import merge
from dimat_jax._folders import check_output
from dimat_jax._merge_models._methods import FRAME, METHOD, RESTARTS, STAY
from dimat_jax.data.sources import SOURCES
from dimat_jax.errors import UserError
from dimat_jax.models import MODELS
from dimat_jax.options import SEED, Option, describe_readers, read, readers

__all__ = ["OPTIONS", "Options", "check"]


def _field(option: Option) -> Any:
    """Makes the field of an option."""
    return dataclasses.field(default=option.default, metadata={"option": option})


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
    # The options of a model or a data set are no options of a merge, so only the names
    # of the registries are choices.
    model: str | None = _field(
        Option(
            "model",
            None,
            "The architecture that PyTorch files hold.",
            choices=MODELS.keys(),
        )
    )
    data: str | None = _field(
        Option(
            "data",
            None,
            "The data set. It is needed if no model says what it was trained on.",
            choices=SOURCES.keys(),
        )
    )
    data_dir: str | None = _field(
        Option(
            "data_dir",
            None,
            "The folder of the data set. By default, the one that the runs name.",
        )
    )
    method: str = _field(METHOD)
    frame: str = _field(FRAME)
    weights: tuple[float, ...] | None = _field(
        Option(
            "weights",
            None,
            "The models' relative weights in the average. By default, all are equal.",
        )
    )
    samples: int = _field(
        Option(
            "samples",
            1000,
            "The number of training images for matching and for statistics.",
            at_least=2,
        )
    )
    points: int = _field(
        Option(
            "points",
            11,
            "The number of points to evaluate on each line.",
            at_least=2,
            at_most=10_000,
        )
    )
    train_size: int | None = _field(
        Option(
            "train_size",
            None,
            "The number of training images to draw from. By default, all.",
            at_least=1,
        )
    )
    test_size: int | None = _field(
        Option(
            "test_size",
            None,
            "The number of test images to evaluate on. By default, all.",
            at_least=1,
        )
    )
    seed: int = _field(SEED)
    restarts: int = _field(RESTARTS)
    stay: float = _field(STAY)


OPTIONS: dict[str, Option] = {
    field.name: field.metadata["option"]
    for field in dataclasses.fields(Options)
    if field.metadata
}
"""The options of a merge by name: by their fields of `Options`, and their flags."""


def check(options: Options) -> None:
    """Checks the options before any file is read.

    Raises:
        UserError: an option is wrong; the message names the flag, its value and what is
            allowed.
    """
    if len(set(map(_identity, options.models))) < max(2, len(options.models)):
        raise UserError(
            "expected two different models or more: A B [C ...] --out=DIR; got "
            f"{list(options.models)}"
        )
    for name, option in OPTIONS.items():
        value = getattr(options, name)
        if value is not None:
            option.check(value, f"--{name}")
    _refuse_unread(options)
    merge.check_weights(options.weights, len(options.models))
    check_output(options.out, "--out")
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out} exists already; choose a new folder")


def _identity(name: str) -> tuple[str, int]:
    """What is equal for two names of the same model: its place, and its agent."""
    place, colon, agent = name.rpartition(":")
    if colon and agent.isdecimal() and not os.path.lexists(name):
        return os.path.realpath(place), int(agent)
    return os.path.realpath(name), 0


def _refuse_unread(options: Options) -> None:
    """Refuses options that were changed although the chosen method reads none of them.

    Raises:
        UserError: there are such options; the message says which methods read them.
    """
    found, routes = read((METHOD,), vars(options)), readers((METHOD,))
    problems = [
        f"--{path} is {value!r}, but --method={options.method} does not read it; it is "
        f"read where {describe_readers(routes[path])}"
        for path, option in OPTIONS.items()
        if path in routes and path not in found
        if (value := getattr(options, path)) != option.default
    ]
    if problems:
        raise UserError("; ".join(problems))
