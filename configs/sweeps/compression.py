"""Measures how much accuracy compression costs on digits, and how many bytes it saves.

    python -m experiments.sweep --sweep=configs/sweeps/compression.py --workdir=DIR

DIMAT compresses the params that it merges once a round, and CHOCO those that it gossips
with every step; its consensus step size is what the compressor allows. The graph is a
ring, and the data are IID or split by class. The 28 runs take about 3 minutes on 2 CPU
cores.
"""

from itertools import product

from dimat_jax.compression import COMPRESSORS
from dimat_jax.configs.sweeps import algorithms


def get_runs():
    """Returns the configs of all runs, by name."""
    runs = {}
    for partition, line, compression in product(
        ("iid", "by_class"), ("dimat-reference", "choco"), COMPRESSORS
    ):
        config = algorithms.get_config(line)
        config.data.partition = partition
        config.compression.name = compression
        if compression in ("top_k", "random_k"):
            config.compression.fraction = 0.25
        runs[f"{partition}-{line}-{compression}"] = config
    return runs
