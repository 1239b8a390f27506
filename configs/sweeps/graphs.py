"""Compares all topologies with 16 agents, on digits that are split unevenly.

    python -m experiments.sweep --sweep=configs/sweeps/graphs.py --workdir=DIR

The algorithms are DIMAT in own frames (directed graphs allow no other frame), plain
averaging, CDSGD, and local training. The 34 runs take about 4 minutes on 2 CPU cores.
"""

from dimat_jax.configs.sweeps import algorithms
from dimat_jax.sweeps import grid
from dimat_jax.topology import TOPOLOGIES


def get_runs():
    """Returns the configs of all runs, by name."""
    configs = {}
    for line in ("local", "dimat-own", "wa", "cdsgd"):
        config = configs[line] = algorithms.get_config(line)
        config.agents = 16
        config.data.partition = "dirichlet"
        config.data.alpha = 0.3
    topologies = [t for t in TOPOLOGIES if t not in ("file", "disconnected")]
    return grid({"topology": topologies}, configs)
