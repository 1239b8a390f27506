"""Exports the average of a run's agents, or one of them, for use elsewhere.

    dimat export WORKDIR --out=FILE.safetensors
    dimat export WORKDIR --out=FOLDER

The average is the one that the run measures: aligned, with BatchNorm statistics that
are measured anew. A .safetensors file has the names that PyTorch code uses, for the
architectures that it knows. A folder holds an Orbax checkpoint, FOLDER/model/0/tree.
On bad input the command exits with 2 and writes nothing.
"""

from absl import flags

from dimat_jax.cli import _program
from dimat_jax.errors import UserError
from dimat_jax.export import export_model

__all__ = ["COMMAND"]


def define_flags() -> None:
    """Defines the flags of the command."""
    meaning = "The file (.safetensors) or the folder to write, which must not exist."
    flags.DEFINE_string("out", None, meaning, required=True)
    flags.DEFINE_integer("agent", None, "An agent instead of the average.", 0)
    flags.DEFINE_integer(
        "round",
        None,
        "The round after which the agents are taken; 0 for the end of pre-training. By "
        "default they are those of the newest checkpoint.",
        0,
    )
    flags.DEFINE_string(
        "data_dir", None, "Where the run's data are now, if they have moved."
    )


def main(workdirs: list[str]) -> None:
    """Exports a model of the run that the argument names."""
    if len(workdirs) != 1:
        raise UserError(f"expected the folder of one run, got {workdirs}")
    values = flags.FLAGS
    path = export_model(
        workdirs[0],
        values.out,
        agent=values.agent,
        round=values.round,
        data_dir=values.data_dir,
    )
    print(f"wrote {path}")


COMMAND = _program.Command("export", __doc__, main, define_flags)
