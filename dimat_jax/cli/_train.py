"""Runs one config, or goes on with an interrupted run, and writes a report.

    dimat train --config=NAME --workdir=DIR [--config.FIELD=VALUE ...]

NAME is a bundled config (`dimat show configs`) or the path of a file that defines
`get_config() -> config`; NAME:ARGUMENT calls `get_config(ARGUMENT)`. Any field of the
config can be overridden: `--config.topology=fully_connected`. All fields are listed
at the end of this text. Options of the file that an override leaves unread go back to
their defaults. The same command resumes a run that was killed. It exits with 2 on bad
input, and with 1 if the loss is not finite.

With --multihost, several processes run the config together, each on the devices of its
own machine. Start the same command on all of them. Slurm, TPU pods and Open MPI tell
JAX about the processes; elsewhere, add these to the command of process I, from 0 on:

    --multihost --coordinator=HOST:PORT --n_processes=N --process_id=I
"""

from absl import flags

from dimat_jax import plugins, reports, train
from dimat_jax._processes import is_main
from dimat_jax.cli import _bundled, _multihost, _program
from dimat_jax.cli._field_texts import describe_fields
from dimat_jax.config import check
from dimat_jax.errors import UserError
from dimat_jax.placement import request_cpu_devices

__all__ = ["COMMAND"]


def define_flags() -> None:
    """Defines the flags of the command."""
    _bundled.define_config(None, "The config to run.")
    flags.DEFINE_string("workdir", None, "The folder for all results.", required=True)
    _multihost.define_flags()


def main(arguments: list[str]) -> None:
    """Runs the config and reports on it."""
    _program.expect_no(arguments)
    config, workdir = _bundled.given_config(), flags.FLAGS.workdir
    # JAX splits the CPU into devices before the run can check anything.
    check(config)
    request_cpu_devices(config.placement.cpu_devices)
    with _multihost.joined():
        train.run(config, workdir)
        if is_main():
            _report_on(workdir)


def _report_on(workdir: str) -> None:
    """Writes the report, unless the run has diverged although its losses are finite."""
    try:
        files = reports.write([workdir], workdir)
    except UserError as error:
        print(f"there is no report: {error}")
    else:
        for path in files:
            print(f"wrote {path}")


def _fields() -> str:
    """Describes the fields of a config, for the help text."""
    plugins.load_installed()
    fields = describe_fields("--config.")
    return f"Any field of the config may be set, --config.FIELD=VALUE:\n\n{fields}"


COMMAND = _program.Command(
    "train", __doc__, main, define_flags, resumes=True, more_help=_fields
)
