"""Every algorithm on a ring where agents drop out and links fail, on digits.

    python -m experiments.sweep --sweep=configs/sweeps/faults.py --workdir=DIR

In every round each agent is away with probability 0.3; in every exchange each link
fails with probability 0.3. Without d2, which refuses such a network. Three seeds: 96
runs, about 6 minutes on 2 CPU cores.
"""

from itertools import product

from configs.sweeps import algorithms


def get_runs():
    """The runs, by name."""
    runs = {}
    for seed, partition, line in product(
        range(3), ("iid", "by_class"), algorithms.LINES
    ):
        if line in ("centralized", "d2"):
            continue
        config = algorithms.get_config(line)
        config.seed = seed
        config.data.partition = partition
        config.faults.dropout = 0.3
        config.faults.edge_loss = 0.3
        runs[f"{partition}-{line}-{seed}"] = config
    return runs
