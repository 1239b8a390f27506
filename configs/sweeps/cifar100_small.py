"""DIMAT, weight averaging and no communication on CIFAR-100, in the form for a CPU.

    python -m experiments.sweep --sweep=configs/sweeps/cifar100_small.py \
        --data_dir=DATA --workdir=DIR

Ring and fully connected, IID: 7 runs from the same agents; about 40 minutes on 2 cores.
"""

from configs import cifar100_resnet20
from dimat_jax.sweeps import grid


def get_config(line: str):
    """The config of one line of the comparison, e.g. "dimat-own"."""
    name, _, frame = line.partition("-")
    config = cifar100_resnet20.get_config("small")
    config.algorithm = name
    if frame == "reference":
        config.merge.frame = frame
        config.merge.stay = 0.1
    return config


def get_runs():
    """The runs, by name."""
    lines = ("dimat-own", "dimat-reference", "wa", "local")
    return grid(
        {"topology": ("ring", "fully_connected")},
        {line: get_config(line) for line in lines},
    )
