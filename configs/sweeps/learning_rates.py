"""Runs the grid of learning rates for configs/sweeps/algorithms.py, on digits.

    python -m experiments.sweep --sweep=configs/sweeps/learning_rates.py --workdir=DIR

The 168 runs take about 8 minutes on 2 CPU cores.
"""

from dimat_jax.configs.sweeps import algorithms
from dimat_jax.sweeps import grid

GRID = (0.01, 0.03, 0.1, 0.3)


def get_runs():
    """Returns the configs of all runs, by name."""
    configs = {}
    for line in algorithms.BASELINES:
        for rate in GRID:
            # An adaptive step has another scale, so its rates are smaller.
            rate = rate / 30 if line == "cdadam" else rate
            config = configs[f"{line}-{rate:.2g}"] = algorithms.get_config(line)
            config.optimizer.learning_rate = rate
            config.eval.every = config.rounds
    choices = {
        "data.partition": ("iid", "by_class"),
        "topology": ("ring", "fully_connected"),
    }
    return grid(choices, configs)
