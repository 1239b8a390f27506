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
    "WATCHING",
    "Algorithm",
    "MergeData",
    "MergeOptions",
    "Options",
    "Task",
]


class MergeOptions(NamedTuple):
    """How to merge; see `merging`.

    Frame and stay are of no concern to "wa", restarts only to "wm".
    """

    frame: str = "own"
    stay: float = 0.0
    opt_state: OptStatePolicy = "reset"
    restarts: int = 1


class Options(NamedTuple):
    """Everything an algorithm can be told; each reads the part that is its own."""

    merge: MergeOptions = MergeOptions()


def _local(task, tx, placement, options=Options()):  # noqa: B008
    del options
    return local(task, tx, placement)


def _merging(match):
    def build(task, tx, placement, options=Options()):  # noqa: B008
        inner = local(task, tx, placement)
        merge = options.merge._asdict()
        return merging(inner, task, placement, match=match, **merge)

    return build


# What merges once a round, what permutes units when it does, and what looks at the
# activations of examples for that.
MERGING = frozenset({"dimat", "wa", "wm"})
ALIGNING = frozenset({"dimat", "wm"})
WATCHING = frozenset({"dimat"})

ALGORITHMS: dict[
    str, Callable[[Task, optax.GradientTransformation, Placement, Options], Algorithm]
] = {
    "dimat": _merging("activations"),
    "wa": _merging(None),
    "wm": _merging("weights"),
    "local": _local,
    # The same training; a run gives it a single agent that holds all data.
    "centralized": _local,
}
