"""Runs a sweep: many configs, one after the other, and a report on all of them.

    python -m experiments.sweep --sweep=configs/sweeps/quickstart.py --workdir=DIR

This is `dimat sweep`; `--help` says more.
"""

from dimat_jax.cli import _program, _sweep

if __name__ == "__main__":
    _program.run(_sweep.COMMAND, "python -m experiments.sweep")
