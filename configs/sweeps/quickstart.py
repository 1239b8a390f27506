"""DIMAT, weight averaging and no communication, from the same agents, on digits.

DIMAT comes twice: as in the paper, where every agent stays in its own frame, and in a
common frame of reference, where a unit moves only if its correlation gains over 0.1.
WM matches by weights instead, cycle-consistently.

    python -m experiments.sweep --sweep=configs/sweeps/quickstart.py --workdir=DIR

IID and by class, ring and fully connected: 20 runs, under 2 minutes on 2 CPU cores.
"""

from itertools import product

from dimat_jax.configs import quickstart


def get_runs():
    """The runs, by name."""
    runs = {}
    for partition, topology, algorithm in product(
        ("iid", "by_class"),
        ("ring", "fully_connected"),
        ("dimat-reference", "dimat-own", "wm-joint", "wa", "local"),
    ):
        name, _, frame = algorithm.partition("-")
        config = quickstart.get_config(name)
        config.topology = topology
        config.data.partition = partition
        if frame in ("own", "joint"):
            config.merge.frame = frame
            config.merge.stay = 0.0
        runs[f"{partition}-{topology}-{algorithm}"] = config
    return runs
