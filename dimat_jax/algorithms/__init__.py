"""The algorithms, by name.

`ALGORITHMS[name](task, tx, placement, options)` makes an `Algorithm`.
"""

from collections.abc import Callable
from typing import NamedTuple

import optax

from dimat_jax.algorithms.base import Algorithm, MergeData, Task
from dimat_jax.algorithms.local import local
from dimat_jax.algorithms.merging import OptStatePolicy, merging
from dimat_jax.placement import Placement

__all__ = [
    "ALGORITHMS",
    "ALIGNING",
    "MERGING",
    "Algorithm",
    "MergeData",
    "MergeOptions",
    "Options",
    "Task",
]


class MergeOptions(NamedTuple):
    """How to merge; see `merging`. Frame and stay are of no concern to "wa"."""

    frame: str = "own"
    stay: float = 0.0
    opt_state: OptStatePolicy = "reset"


class Options(NamedTuple):
    """Everything an algorithm can be told; each reads the part that is its own."""

    merge: MergeOptions = MergeOptions()


def _local(task, tx, placement, options=Options()):  # noqa: B008
    del options
    return local(task, tx, placement)


def _dimat(task, tx, placement, options=Options()):  # noqa: B008
    inner = local(task, tx, placement)
    return merging(inner, task, placement, match=True, **options.merge._asdict())


def _wa(task, tx, placement, options=Options()):  # noqa: B008
    inner = local(task, tx, placement)
    return merging(inner, task, placement, match=False, **options.merge._asdict())


# What merges once a round, and what permutes units when it does.
MERGING = frozenset({"dimat", "wa"})
ALIGNING = frozenset({"dimat"})

ALGORITHMS: dict[
    str, Callable[[Task, optax.GradientTransformation, Placement, Options], Algorithm]
] = {
    "dimat": _dimat,
    "wa": _wa,
    "local": _local,
    # The same training; a run gives it a single agent that holds all data.
    "centralized": _local,
}
