"""Compares DIMAT, WM, weight averaging and local training on digits.

DIMAT runs in two forms: as in the paper, where every agent stays in its own frame, and
in a common reference frame, where a unit moves only if its correlation gains more than
0.1. WM matches by weights, with permutations that agree along every cycle.

    python -m experiments.sweep --sweep=configs/sweeps/quickstart.py --workdir=DIR

The data are IID or split by class, and the graph is a ring or fully connected. The 18
runs start from the same agents (those that train alone need no topology), and take less
than 2 minutes on 2 CPU cores.
"""

from dimat_jax.configs import quickstart
from dimat_jax.sweeps import grid


def get_config(line: str):
    """Makes the config of a line of the comparison, e.g. "dimat-own"."""
    name, _, frame = line.partition("-")
    config = quickstart.get_config(name)
    if frame in ("own", "joint"):
        config.merge.frame = frame
        config.merge.stay = 0.0
    return config


def get_runs():
    """Returns the configs of all runs, by name."""
    choices = {
        "data.partition": ("iid", "by_class"),
        "topology": ("ring", "fully_connected"),
    }
    lines = ("dimat-reference", "dimat-own", "wm-joint", "wa", "local")
    return grid(choices, {line: get_config(line) for line in lines})
