"""Runs the grid of learning rates for configs/sweeps/algorithms.py, on digits.

    python -m experiments.sweep --sweep=configs/sweeps/learning_rates.py --workdir=DIR
    python -m experiments.tune DIR

All algorithms of the comparison, those that merge too, have the same three seeds, the
same four cells and the same grid, which goes on where its end is best. A fifth of each
agent's images is set aside. The second command chooses the rate with the best accuracy
on these images, and says so; the runs of the comparison train on all images. Some runs
at the largest rates diverge, and are listed at the end. The 888 runs take about 45
minutes on 2 CPU cores.
"""

from dimat_jax.configs.sweeps import algorithms
from dimat_jax.sweeps import grid

GRID = (0.03, 0.1, 0.3, 1.0)
# The best rate of this line is the end of the grid, so it has one more.
FURTHER = {"relaysgd": 3.0}
SEEDS = range(3)


def get_runs():
    """Returns the configs of all runs, by name."""
    graphs = {
        algorithms.LINES: ("ring", "fully_connected"),
        algorithms.ON_TREES: ("path", "star"),
    }
    runs = {}
    for lines, topologies in graphs.items():
        choices = {
            "seed": SEEDS,
            "data.partition": ("iid", "by_class"),
            "topology": topologies,
        }
        runs |= grid(choices, _tried(lines))
    return runs


def _tried(lines):
    """Makes a config for each line of the comparison and each rate, by name."""
    configs = {}
    for line in lines:
        further = [FURTHER[line]] if line in FURTHER else []
        for rate in (*GRID, *further):
            # An adaptive step has another scale, so its rates are smaller.
            rate = rate / 30 if line == "cdadam" else rate
            config = configs[f"{line}-{rate:.2g}"] = algorithms.get_config(line)
            config.optimizer.learning_rate = rate
            config.eval.every = config.rounds
            config.data.validation = 0.2
    return configs
