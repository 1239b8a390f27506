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

__all__ = ["OPTIONS", "Options", "check", "is_own"]


def _field(option: Option) -> Any:
    """Makes the field of an option."""
    return dataclasses.field(default=option.default, metadata={"option": option})


@dataclasses.dataclass(frozen=True)
class Options:
    """The models of a merge, and the way in which they are merged.

    The fields after the first two are flags of `dimat merge`; each holds its meaning.

    Attributes:
        models: two or more names. Each is the workdir of a run (DIR:2 is its agent 2,
            DIR its agent 0), the `out` of an earlier merge, a PyTorch file, or, for a
            model of your own, a file or folder of weights.
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
            "The architecture that PyTorch files hold; or path.py:function for a model "
            "of your own, with function(variables, inputs) -> outputs. If it has "
            "running statistics, it also takes train=True, and then returns (outputs, "
            "updated variables).",
            choices=MODELS.keys(),
        )
    )
    entry: str | None = _field(
        Option(
            "entry",
            None,
            "The entry of a checkpoint that holds the weights, or the entries that "
            "lead to it, joined by '/'. By default, it is found.",
        )
    )
    prefix: str | None = _field(
        Option(
            "prefix",
            None,
            "What the keys of the weights in PyTorch files begin with, as 'model.'. By "
            "default, it is found for the architectures that have names.",
        )
    )
    data: str | None = _field(
        Option(
            "data",
            None,
            "The data set, if no model says what it was trained on; or images of your "
            "own: a folder with a folder for each class (or with two such folders, "
            "train and test), an .npz file (images and labels, or train_images, "
            "train_labels, test_images and test_labels), or path.py:function with "
            "function(directory, cache_dir) -> Dataset. Without data, models can be "
            "merged by their weights, but nothing is evaluated or measured anew.",
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
    size: tuple[int, ...] | None = _field(
        Option(
            "size",
            None,
            "The size of your own images, SIDE or HEIGHT,WIDTH,CHANNELS. Others are "
            "scaled until they cover it, and their middle is cut out. By default, the "
            "images keep their size. Without data, the size that a model of your own "
            "takes.",
        )
    )
    mean: tuple[float, ...] | None = _field(
        Option(
            "mean",
            None,
            "The mean that is subtracted from each channel of your own images, whose "
            "pixels count from 0 to 1. By default, that of the training images.",
        )
    )
    std: tuple[float, ...] | None = _field(
        Option(
            "std",
            None,
            "The standard deviation by which each channel of your own images is "
            "divided, as mean.",
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
        if value is not None and not (name in _OWN and is_own(value)):
            option.check(value, f"--{name}")
    _refuse_unread(options)
    _check_form(options)
    merge.check_weights(options.weights, len(options.models))
    check_output(options.out, "--out")
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out} exists already; choose a new folder")


# The options that may also name something of the user's own.
_OWN = ("model", "data")


def is_own(value: str) -> bool:
    """Whether a value of --model or --data names something of the user's own."""
    if value in MODELS or value in SOURCES:
        return False
    return ".py:" in value or value.endswith(".npz") or Path(value).is_dir()


def _check_form(options: Options) -> None:
    """Checks how a user's own images are to be made alike and normalised.

    Raises:
        UserError: an option is wrong, or it is given although nothing reads it.
    """
    size = options.size
    if size is not None and (len(size) not in (1, 3) or min(size) < 1):
        raise UserError(
            f"--size is {','.join(map(str, size))}; it must be SIDE or "
            "HEIGHT,WIDTH,CHANNELS"
        )
    if size is not None and len(size) == 3 and size[2] not in (1, 3):
        raise UserError(f"--size has {size[2]} channels; images have 1 or 3")
    data = options.data
    is_images = data is not None and is_own(data) and ".py:" not in data
    for name in ("size", "mean", "std"):
        without_data = name == "size" and data is None
        if getattr(options, name) is not None and not (is_images or without_data):
            raise UserError(
                f"--{name} is for images of your own, in a folder or an .npz file; got "
                f"--data={data}"
            )
    if options.std is not None and min(options.std) <= 0:
        raise UserError(f"--std must be above 0, got {options.std}")


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
