"""Compares all algorithms on a ring where agents drop out and links fail, on digits.

    python -m experiments.sweep --sweep=configs/sweeps/faults.py --workdir=DIR

In every round each agent is absent with probability 0.3, and in every exchange each
link fails with probability 0.3. Only a third of the ring's links works at a time, so
there are 40 rounds instead of 10. D2 is left out, because it refuses such a network.
The 72 runs, with two seeds, take about 9 minutes on 2 CPU cores.
"""

from itertools import product

from dimat_jax.config import drop_unread
from dimat_jax.configs.sweeps import algorithms


def get_runs():
    """Returns the configs of all runs, by name."""
    runs = {}
    for seed, partition, line in product(
        range(2), ("iid", "by_class"), algorithms.LINES
    ):
        if line in ("centralized", "d2"):
            continue
        config = algorithms.get_config(line)
        if line in ("cdmsgd", "cga"):
            # 0.3 is their best rate without faults, but the heavy ball diverges here.
            config.optimizer.learning_rate = 0.1
        config.seed = seed
        config.rounds = 40
        config.eval.every = 5
        config.data.partition = partition
        config.faults.dropout = 0.3
        # Algorithms that send nothing along the graph's links do not read it.
        config.faults.edge_loss = 0.3
        runs[f"{partition}-{line}-{seed}"] = drop_unread(config)
    return runs
