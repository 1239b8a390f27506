"""Merges models that were trained apart, and evaluates the lines between them.

    dimat merge A B [C ...] --out=DIR

A model is the workdir of a run (DIR:2 is its agent 2, DIR its agent 0), a PyTorch file
(.pth, .pt or .safetensors; --model and --data name its architecture and its data set),
or the --out of an earlier merge. All models are aligned to the first and averaged. Then
BatchNorm statistics are measured anew; networks without BatchNorm are rescaled
(REPAIR).

The command writes into DIR: model/ (the merged model), summary.json, barrier.json and
barrier.png (loss and accuracy on the straight line from the first model to each other
one, before and after), and report.md, which it also prints. DIR must be new or empty.
On bad input the command exits with 2 and writes nothing.
"""

import dataclasses
from typing import Any

from absl import flags

from dimat_jax._merge_models import Options, option_of, run
from dimat_jax.cli import _program
from dimat_jax.errors import UserError

__all__ = ["COMMAND"]

_DEFINE = {
    str | None: flags.DEFINE_string,
    str: flags.DEFINE_string,
    int | None: flags.DEFINE_integer,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    tuple[float, ...] | None: flags.DEFINE_list,
}
_FIELDS = [field for field in dataclasses.fields(Options) if field.metadata]


def define_flags() -> None:
    """Defines the flags of the command: `out`, and one for each option of a merge."""
    meaning = "The folder for all results, which must be new or empty."
    flags.DEFINE_string("out", None, meaning, required=True)
    for field in _FIELDS:
        option = option_of(field)
        _DEFINE[field.type](option.keyword, option.default, option.meaning)


def main(models: list[str]) -> None:
    """Merges the models that the arguments name."""
    values: dict[str, Any] = {
        field.name: flags.FLAGS[field.name].value for field in _FIELDS
    }
    if values["weights"] is not None:
        try:
            values["weights"] = tuple(map(float, values["weights"]))
        except ValueError as error:
            raise UserError(f"--weights: {error}") from error
    run(Options(models=tuple(models), out=flags.FLAGS.out, **values))


COMMAND = _program.Command("merge", __doc__, main, define_flags)
