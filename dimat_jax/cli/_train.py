"""Runs one config, or what is left of it.

    python -m experiments.train --config=configs/quickstart.py --workdir=DIR

Any field can be overridden: `--config.topology=fully_connected`. The same command
resumes a run that was killed. Exits with 2 on bad input, and with 1 if the loss is not
finite.
"""

from absl import flags
from ml_collections import config_flags

from dimat_jax import train
from dimat_jax.placement import request_cpu_devices
from experiments import program, report

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config file to run.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where all results go.", required=True)
flags.mark_flag_as_required("config")


def main(arguments: list[str]) -> None:
    """Runs the config and reports on it."""
    program.expect_no(arguments)
    config = _CONFIG.value
    request_cpu_devices(config.placement.cpu_devices)
    train.run(config, _WORKDIR.value)
    for path in report.write([_WORKDIR.value], _WORKDIR.value):
        print(f"wrote {path}")


if __name__ == "__main__":
    program.run(main)
