"""Compares DIMAT, weight averaging and local training on CIFAR-100, on a CPU.

    python -m experiments.sweep --sweep=configs/sweeps/cifar100_small.py \
        --data_dir=DATA --workdir=DIR

The data are IID, and the graph is a ring or fully connected. The 7 runs start from the
same agents, and take about 40 minutes on 2 cores.
"""

from dimat_jax.configs import cifar100_resnet20
from dimat_jax.sweeps import grid


def get_config(line: str):
    """Makes the config of a line of the comparison, e.g. "dimat-own"."""
    name, _, frame = line.partition("-")
    config = cifar100_resnet20.get_config("small")
    config.algorithm = name
    if frame == "reference":
        config.merge.frame = frame
        config.merge.stay = 0.1
    return config


def get_runs():
    """Returns the configs of all runs, by name."""
    lines = ("dimat-own", "dimat-reference", "wa", "local")
    return grid(
        {"topology": ("ring", "fully_connected")},
        {line: get_config(line) for line in lines},
    )
