"""Every algorithm on a ring where agents drop out and links fail, on digits.

    python -m experiments.sweep --sweep=configs/sweeps/faults.py --workdir=DIR

In every round each agent is away with probability 0.3; in every exchange each link
fails with probability 0.3: of a ring's links a third works at a time, so there are 40
rounds instead of 10. Without d2, which refuses such a network. Two seeds: 64 runs,
about 8 minutes on 2 CPU cores.
"""

from itertools import product

from configs.sweeps import algorithms
from dimat_jax.config import drop_unread


def get_runs():
    """The runs, by name."""
    runs = {}
    for seed, partition, line in product(
        range(2), ("iid", "by_class"), algorithms.LINES
    ):
        if line in ("centralized", "d2"):
            continue
        config = algorithms.get_config(line)
        if line in ("cdmsgd", "cga"):
            # At 0.3, their best without faults, a heavy ball diverges here.
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
