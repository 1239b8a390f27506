"""Writes the tables and the figures of runs, or of sweeps, and prints the tables.

    python -m experiments.report DIR [DIR ...]

This is `dimat report`; `--help` says more.
"""

from dimat_jax.cli import _program, _report

if __name__ == "__main__":
    _program.run(_report.COMMAND, "python -m experiments.report")
