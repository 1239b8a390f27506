"""DIMAT, weight averaging and no communication on CIFAR-100, in the form for a CPU.

    python -m experiments.sweep --sweep=configs/sweeps/cifar100_small.py \
        --data_dir=DATA --workdir=DIR

Ring and fully connected, IID: 8 runs from the same agents; about 40 minutes on 2 cores.
"""

from itertools import product

from dimat_jax.configs import cifar100_resnet20


def get_runs():
    """The runs, by name."""
    runs = {}
    for topology, algorithm in product(
        ("ring", "fully_connected"), ("dimat-own", "dimat-reference", "wa", "local")
    ):
        name, _, frame = algorithm.partition("-")
        config = cifar100_resnet20.get_config("small")
        config.algorithm = name
        config.topology = topology
        if frame == "reference":
            config.merge.frame = frame
            config.merge.stay = 0.1
        runs[f"{topology}-{algorithm}"] = config
    return runs
