"""Runs one config, or goes on with an interrupted run, and writes a report.

    python -m experiments.train --config=configs/quickstart.py --workdir=DIR

Any field of the config can be overridden: `--config.topology=fully_connected`.
This is `dimat train`; `--help` says more.
"""

from dimat_jax.cli import _program, _train

if __name__ == "__main__":
    _program.run(_train.COMMAND, "python -m experiments.train")
