"""Compares DIMAT, plain averaging, CDSGD and local training on a text, on a ring.

    python -m experiments.sweep --sweep=configs/sweeps/text.py --workdir=DIR

The 4 runs start from the same pre-trained agents, whose weights were drawn differently.
They take about 5 minutes on 2 CPU cores.
"""

from dimat_jax.configs import text


def get_runs():
    """Returns the configs of all runs, by name."""
    return {line: text.get_config(line) for line in ("local", "wa", "dimat", "cdsgd")}
