"""Merges models that were trained apart, and evaluates the lines between them.

    dimat merge A B [C ...] --out=DIR

A model is the workdir of a run (DIR:2 is its agent 2, DIR its agent 0; DIR@10:2 and
DIR@10 are these at the end of round 10), the --out of an earlier merge or export, or a
PyTorch file (.safetensors, .pth, .pt, .bin, .ckpt; --model names its architecture).
With --model=path.py:function it is a file for a function of your own: one of PyTorch's,
.msgpack or .npz, or a folder that Orbax has written. All models are aligned to the
first and averaged. Then BatchNorm statistics are measured anew; networks without
BatchNorm are rescaled (REPAIR). Images are a data set or your own (--data). Without
any, models can be matched by their weights, but nothing is measured.

The command writes into DIR: the merged model (model/, and model.safetensors with the
names of the PyTorch file that came in; for a function of your own, a file of the kind
that came in), summary.json, barrier.json and barrier.png (loss and accuracy on the
straight line from the first model to each other one, before and after), and report.md,
which it also prints. DIR must be new or empty. On bad input the command exits with 2
and writes nothing.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from absl import flags

from dimat_jax._merge_models import OPTIONS, Options, run
from dimat_jax.cli import _program
from dimat_jax.errors import UserError
from dimat_jax.options import Option, describe_readers, readers

__all__ = ["COMMAND"]

_DEFINE = {
    str | None: flags.DEFINE_string,
    str: flags.DEFINE_string,
    int | None: flags.DEFINE_integer,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    tuple[float, ...] | None: flags.DEFINE_list,
    tuple[int, ...] | None: flags.DEFINE_list,
}
# What makes numbers of the words of a list.
_NUMBERS: dict[Any, type] = {
    tuple[float, ...] | None: float,
    tuple[int, ...] | None: int,
}
_TYPES = {field.name: field.type for field in dataclasses.fields(Options)}


def define_flags() -> None:
    """Defines the flags of the command: `out`, and one for each option of a merge."""
    meaning = "The folder for all results, which must be new or empty."
    flags.DEFINE_string("out", None, meaning, required=True)
    for name, option in OPTIONS.items():
        _DEFINE[_TYPES[name]](name, option.default, _meaning(option))


def _meaning(option: Option) -> str:
    """Says what an option means, which values it may have, and where it is read."""
    sentences = [option.meaning]
    if isinstance(option.choices, Mapping):
        records = option.choices.items()
        sentences += [f"{name}: {record.meaning}" for name, record in records]
    elif option.choices is not None:
        sentences.append(f"Allowed: {', '.join(option.choices)}.")
    if routes := readers(OPTIONS.values()).get(option.path):
        sentences.append(f"It is read where {describe_readers(routes)}.")
    return " ".join(sentences)


def main(models: list[str]) -> None:
    """Merges the models that the arguments name."""
    values: dict[str, Any] = {name: flags.FLAGS[name].value for name in OPTIONS}
    for name, value in values.items():
        if (number := _NUMBERS.get(_TYPES[name])) and value is not None:
            try:
                values[name] = tuple(map(number, value))
            except ValueError as error:
                raise UserError(f"--{name}: {error}") from error
    run(Options(models=tuple(models), out=flags.FLAGS.out, **values))


COMMAND = _program.Command("merge", __doc__, main, define_flags)
