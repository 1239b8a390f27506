"""DIMAT, weight averaging and no communication, from the same agents, on digits.

DIMAT comes twice: as in the paper, where every agent stays in its own frame, and in a
common frame of reference, where a unit moves only if its correlation gains over 0.1.
WM matches by weights instead, cycle-consistently.

    python -m experiments.sweep --sweep=configs/sweeps/quickstart.py --workdir=DIR

IID and by class, ring and fully connected: 18 runs (agents that train alone need no
topology), under 2 minutes on 2 CPU cores.
"""

from configs import quickstart
from dimat_jax.sweeps import grid


def get_config(line: str):
    """The config of one line of the comparison, e.g. "dimat-own"."""
    name, _, frame = line.partition("-")
    config = quickstart.get_config(name)
    if frame in ("own", "joint"):
        config.merge.frame = frame
        config.merge.stay = 0.0
    return config


def get_runs():
    """The runs, by name."""
    choices = {
        "data.partition": ("iid", "by_class"),
        "topology": ("ring", "fully_connected"),
    }
    lines = ("dimat-reference", "dimat-own", "wm-joint", "wa", "local")
    return grid(choices, {line: get_config(line) for line in lines})
