"""Measures how much accuracy compression costs on digits, and how many bytes it saves.

    python -m experiments.sweep --sweep=configs/sweeps/compression.py --workdir=DIR

DIMAT compresses the params that it merges once a round, and CHOCO those that it gossips
with every step. The graph is a ring, and the data are IID or split by class. The 28
runs take about 3 minutes on 2 CPU cores.
"""

from itertools import product

from dimat_jax.configs.sweeps import algorithms

# CHOCO's consensus step size with each compressor. It must be smaller if more is lost.
COMPRESSIONS = {
    "none": 1.0,
    "float16": 1.0,
    "bfloat16": 1.0,
    "int8": 1.0,
    "sign": 1.0,
    "top_k": 0.6,
    "random_k": 0.3,
}


def get_runs():
    """Returns the configs of all runs, by name."""
    runs = {}
    for partition, line, (compression, gamma) in product(
        ("iid", "by_class"), ("dimat-reference", "choco"), COMPRESSIONS.items()
    ):
        config = algorithms.get_config(line)
        config.data.partition = partition
        config.compression.name = compression
        if compression in ("top_k", "random_k"):
            config.compression.fraction = 0.25
        if line == "choco":
            config.gossip.gamma = gamma
        runs[f"{partition}-{line}-{compression}"] = config
    return runs
