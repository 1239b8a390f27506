"""Who talks to whom: every topology with 16 agents, on unevenly shared digits.

    python -m experiments.sweep --sweep=configs/sweeps/graphs.py --workdir=DIR

DIMAT (own frames, as directed graphs ask for), plain averaging, CDSGD, and agents who
never communicate. 44 runs, about 4 minutes on 2 CPU cores.
"""

from itertools import product

from dimat_jax.configs.sweeps import algorithms
from dimat_jax.topology import TOPOLOGIES


def get_runs():
    """The runs, by name."""
    runs = {}
    for topology, line in product(TOPOLOGIES, ("local", "dimat-own", "wa", "cdsgd")):
        if topology in ("file", "disconnected"):
            continue
        config = algorithms.get_config(line)
        config.agents = 16
        config.topology = topology
        config.data.partition = "dirichlet"
        config.data.alpha = 0.3
        runs[f"{topology}-{line}"] = config
    return runs
