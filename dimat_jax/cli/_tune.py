"""Chooses a value of a config field for every algorithm, by the validation metric.

    dimat tune DIR [DIR ...] [--field=optimizer.learning_rate] [--at=communication|end]

The DIRs hold the runs of a sweep over the values of the field, which set validation
images aside (`data.validation`). The command says which field was tuned on what, prints
a table of all values, and writes both into tuned.md and tuned.json in the first DIR.
"""

from pathlib import Path

from absl import flags

from dimat_jax._metrics import write_json
from dimat_jax._tuning import MOMENTS, tune
from dimat_jax.cli import _program
from dimat_jax.errors import UserError
from dimat_jax.optimizers import LEARNING_RATE

__all__ = ["COMMAND"]


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string(
        "field",
        LEARNING_RATE.path,
        "The field whose values compete; `dimat show options` lists all fields.",
    )
    flags.DEFINE_enum(
        "at",
        "communication",
        list(MOMENTS),
        "Whether the metric right after the last communication counts, or that at "
        "the end of the run.",
    )


def main(directories: list[str]) -> None:
    """Prints and writes what was found."""
    if not directories:
        raise UserError("expected the folders of runs: DIR [DIR ...]")
    given = flags.FLAGS
    tuning = tune(directories, given.field, at=given.at)
    report, data = (Path(directories[0]) / f"tuned.{end}" for end in ("md", "json"))
    report.write_text(tuning.report())
    write_json(data, tuning.record())
    print(tuning.report())
    print(f"wrote {report}\nwrote {data}")


COMMAND = _program.Command("tune", __doc__, main, define_flags)
