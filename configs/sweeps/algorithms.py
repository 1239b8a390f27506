"""Compares all algorithms on digits: ring and fully connected, IID and by class.

    python -m experiments.sweep --sweep=configs/sweeps/algorithms.py --workdir=DIR

All runs start from the same five agents, which have trained alone, and go on for 10
rounds of two epochs. Merging algorithms communicate once a round, and gossip algorithms
with every step. Each algorithm has one learning rate in all four cells. RelaySGD runs
on a path and on a star, which are trees. The 73 runs take about 6 minutes on 2 CPU
cores.
"""

from dimat_jax.algorithms import ALGORITHMS
from dimat_jax.config import drop_unread
from dimat_jax.configs import quickstart
from dimat_jax.sweeps import grid

# The algorithms that take Adam in the quickstart take SGD here. All rates were chosen
# with configs/sweeps/learning_rates.py, on validation images.
LEARNING_RATES = {
    "centralized": 0.3,
    "local": 0.3,
    "dimat-reference": 0.1,
    "dimat-own": 0.1,
    "wm-joint": 0.3,
    "wa": 0.3,
    "dimat-cdsgd": 0.3,
    **quickstart.LEARNING_RATES,
}


def get_config(line: str):
    """Makes the config of a line of the comparison, e.g. "cdsgd" or "dimat-own"."""
    name, _, form = line.partition("-")
    config = quickstart.get_config(name)
    config.optimizer.learning_rate = LEARNING_RATES[line]
    # All algorithms use plain SGD, unless their papers choose another optimizer.
    uses_sgd = ALGORITHMS[name].other_optimizers and not name.endswith("cga")
    config.optimizer.name = "sgd" if uses_sgd else ""
    # Plain SGD has no moments that could be merged.
    config.merge.opt_state = "keep"
    if name == "d2":
        # D2 needs a W whose eigenvalues are all above -1/3.
        config.mixing = "lazy"
    if form in ("own", "joint"):
        config.merge.frame = form
        config.merge.stay = 0.0
    if form == "cdsgd":
        config.merge.inner = form
    return drop_unread(config)


BASELINES = (
    "fedavg",
    "fedprox",
    "scaffold",
    "cdsgd",
    "cdmsgd",
    "cdadam",
    "sgp",
    "d2",
    "dsgt",
    "qgm",
    "cga",
    "compcga",
    "choco",
)
LINES = (
    "centralized",
    "local",
    "dimat-reference",
    "dimat-own",
    "wm-joint",
    "wa",
    *BASELINES,
    "dimat-cdsgd",
)
# A ring is no tree, and neither are agents that are all connected.
ON_TREES = ("relaysgd",)


def get_runs():
    """Returns the configs of all runs, by name."""
    lines = {line: get_config(line) for line in LINES}
    trees = {line: get_config(line) for line in ON_TREES}
    partitions = {"data.partition": ("iid", "by_class")}
    return {
        **grid({**partitions, "topology": ("ring", "fully_connected")}, lines),
        **grid({**partitions, "topology": ("path", "star")}, trees),
    }
