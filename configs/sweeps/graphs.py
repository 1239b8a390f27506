"""Who talks to whom: every topology with 16 agents, on digits, by class.

    python -m experiments.sweep --sweep=configs/sweeps/graphs.py --workdir=DIR

DIMAT (own frames, as directed graphs ask for), plain averaging, and CDSGD. 33 runs.
"""

from itertools import product

from configs.sweeps import algorithms
from dimat_jax.topology import TOPOLOGIES


def get_runs():
    """The runs, by name."""
    runs = {}
    for topology, line in product(TOPOLOGIES, ("dimat-own", "wa", "cdsgd")):
        if topology in ("file", "disconnected"):
            continue
        config = algorithms.get_config(line)
        config.agents = 16
        config.topology = topology
        config.data.partition = "by_class"
        runs[f"{topology}-{line}"] = config
    return runs
