"""Compares all topologies with 16 agents, on digits that are split unevenly.

    python -m experiments.sweep --sweep=configs/sweeps/graphs.py --workdir=DIR

The algorithms are DIMAT in own frames (directed graphs allow no other frame), plain
averaging, CDSGD (not on random peers), and local training. The 42 runs take about 5
minutes on 2 CPU cores.
"""

from dimat_jax.configs.sweeps import algorithms
from dimat_jax.sweeps import grid
from dimat_jax.topology import TOPOLOGIES

# Graphs with weights of their own, and the algorithms that can use these.
WEIGHTED = {
    "base_k_plus_1": ("finite_time", ("dimat-own", "wa", "cdsgd")),
    "random_peers": ("row_stochastic", ("dimat-own", "wa")),
}
OTHERS = {"file", "disconnected", *WEIGHTED}


def get_runs():
    """Returns the configs of all runs, by name."""
    configs = {}
    for line in ("local", "dimat-own", "wa", "cdsgd"):
        config = configs[line] = algorithms.get_config(line)
        config.agents = 16
        config.data.partition = "dirichlet"
        config.data.alpha = 0.3
    runs = grid({"topology": [t for t in TOPOLOGIES if t not in OTHERS]}, configs)
    for topology, (weights, lines) in WEIGHTED.items():
        choices = {"topology": [topology], "mixing": [weights]}
        runs |= grid(choices, {line: configs[line] for line in lines})
    return runs
