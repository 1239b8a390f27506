"""The grid from which configs/sweeps/algorithms.py has its learning rates, on digits.

    python -m experiments.sweep --sweep=configs/sweeps/learning_rates.py --workdir=DIR

176 runs, about 8 minutes on 2 CPU cores.
"""

from itertools import product

from dimat_jax.configs.sweeps import algorithms

GRID = (0.01, 0.03, 0.1, 0.3)


def get_runs():
    """The runs, by name."""
    runs = {}
    for partition, topology, line, rate in product(
        ("iid", "by_class"), ("ring", "fully_connected"), algorithms.BASELINES, GRID
    ):
        # An adaptive step has another scale.
        rate = rate / 30 if line == "cdadam" else rate
        config = algorithms.get_config(line)
        config.topology = topology
        config.data.partition = partition
        config.optimizer.learning_rate = rate
        config.eval.every = config.rounds
        runs[f"{partition}-{topology}-{line}-{rate:.2g}"] = config
    return runs
