"""Who talks to whom: every topology with 16 agents, on unevenly shared digits.

    python -m experiments.sweep --sweep=configs/sweeps/graphs.py --workdir=DIR

DIMAT (own frames, as directed graphs ask for), plain averaging, CDSGD, and agents who
never communicate. 34 runs, about 4 minutes on 2 CPU cores.
"""

from configs.sweeps import algorithms
from dimat_jax.sweeps import grid
from dimat_jax.topology import TOPOLOGIES


def get_runs():
    """The runs, by name."""
    configs = {}
    for line in ("local", "dimat-own", "wa", "cdsgd"):
        config = configs[line] = algorithms.get_config(line)
        config.agents = 16
        config.data.partition = "dirichlet"
        config.data.alpha = 0.3
    topologies = [t for t in TOPOLOGIES if t not in ("file", "disconnected")]
    return grid({"topology": topologies}, configs)
