"""Runs one config, or goes on with an interrupted run, and writes a report.

    dimat train --config=NAME --workdir=DIR [--config.FIELD=VALUE ...]

NAME is a bundled config (`dimat show configs`) or the path of a file that defines
`get_config() -> config`; NAME:ARGUMENT calls `get_config(ARGUMENT)`. Any field of the
config can be overridden: `--config.topology=fully_connected`. Options of the file that
an override leaves unread go back to their defaults. The same command resumes a run that
was killed. It exits with 2 on bad input, and with 1 if the loss is not
finite.
"""

from absl import flags

from dimat_jax import reports, train
from dimat_jax.cli import _bundled, _program
from dimat_jax.placement import request_cpu_devices

__all__ = ["COMMAND"]


def define_flags() -> None:
    """Defines the flags of the command."""
    _bundled.define_config(None, "The config to run.")
    flags.DEFINE_string("workdir", None, "The folder for all results.", required=True)


def main(arguments: list[str]) -> None:
    """Runs the config and reports on it."""
    _program.expect_no(arguments)
    config, workdir = _bundled.given_config(), flags.FLAGS.workdir
    request_cpu_devices(config.placement.cpu_devices)
    train.run(config, workdir)
    for path in reports.write([workdir], workdir):
        print(f"wrote {path}")


COMMAND = _program.Command("train", __doc__, main, define_flags, resumes=True)
