"""Runs one config, or what is left of it.

    python -m experiments.train --config=configs/quickstart.py --workdir=DIR

Any field can be overridden: `--config.topology=fully_connected`. Exits with 2 on bad
input and with 1 if the loss is not finite; the same command resumes a killed run.
"""

from absl import flags
from ml_collections import config_flags

from dimat_jax.placement import request_cpu_devices
from experiments import program, report

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config file to run.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where all results go.")


def main(_) -> None:
    config = _CONFIG.value
    # Before anything else: JAX counts the CPU's devices when it first computes.
    request_cpu_devices(config.placement.cpu_devices or max(config.agents, 1))
    from dimat_jax import train

    train.run(config, _WORKDIR.value)
    for path in report.write(_WORKDIR.value, [_WORKDIR.value]):
        print(f"wrote {path}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    program.run(main)
