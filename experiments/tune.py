"""Chooses a value of a config field for every algorithm, by validation accuracy.

    python -m experiments.tune DIR [DIR ...] [--field=optimizer.learning_rate]

This is `dimat tune`; `--help` says more.
"""

from dimat_jax.cli import _program, _tune

if __name__ == "__main__":
    _program.run(_tune.COMMAND, "python -m experiments.tune")
