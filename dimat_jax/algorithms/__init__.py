"""The algorithms, by name.

`ALGORITHMS[name](task, tx, placement, **arguments)` builds an `Algorithm`. To add one,
write a file that ends with its record, and add the record to the list below.
"""

from typing import Any

import optax

from dimat_jax._lazy import public_names
from dimat_jax.algorithms import (
    cdsgd,
    cga,
    choco,
    d2,
    dimat,
    dsgt,
    fedavg,
    local,
    qgm,
    relaysgd,
    scaffold,
    sgp,
    wa,
    wm,
)
from dimat_jax.algorithms.base import Algorithm, MergeData, Task
from dimat_jax.algorithms.merging_record import MergingRecord
from dimat_jax.algorithms.record import AlgorithmRecord
from dimat_jax.network import Links
from dimat_jax.options import Option, Registry, registry
from dimat_jax.placement import Placement

__all__ = [
    "ALGORITHM",
    "ALGORITHMS",
    "BETWEEN_MERGES",
    "INNER",
    "MERGING",
    "Algorithm",
    "AlgorithmRecord",
    "MergeData",
    "Task",
    "algorithm_record",
]

BETWEEN_MERGES: Registry[AlgorithmRecord] = registry(
    local.RECORD,
    *cdsgd.RECORDS,
    sgp.RECORD,
    d2.RECORD,
    dsgt.RECORD,
    qgm.RECORD,
    *cga.RECORDS,
    choco.RECORD,
    relaysgd.RECORD,
    kind=AlgorithmRecord,
)
"""The algorithms that agents can run between merges.

They do nothing of their own once a round.
"""

MERGING: Registry[MergingRecord] = registry(dimat.RECORD, wm.RECORD, wa.RECORD)
"""The algorithms that merge once a round, on top of one of `BETWEEN_MERGES`."""

INNER = Option(
    "merge.inner",
    "local",
    "The algorithm that agents run between merges. They train alone (local), or they "
    "gossip with every step too.",
    choices=BETWEEN_MERGES,
)


class _OverAny(MergingRecord):
    """A merging algorithm that takes the name of its inner algorithm as an argument."""

    def __call__(
        self,
        task: Task,
        tx: optax.GradientTransformation,
        placement: Placement,
        *,
        inner: str = INNER.default,
        **arguments: Any,
    ) -> Algorithm:
        INNER.check(inner)
        return algorithm_record(self.name, inner)(task, tx, placement, **arguments)

    def check_network(
        self, links: Links, *, inner: str = INNER.default, **arguments: Any
    ) -> None:
        algorithm_record(self.name, inner).check_network(links, **arguments)


def _with_inner(merging: MergingRecord) -> _OverAny:
    """The record of a merging algorithm with `merge.inner` among its options."""
    alone = merging.over(local.RECORD)
    options = (*alone.options, INNER)
    return _OverAny(**{**vars(alone), "options": options})


ALGORITHMS: Registry[AlgorithmRecord] = registry(
    local.CENTRALIZED,
    *fedavg.RECORDS,
    scaffold.RECORD,
    *BETWEEN_MERGES.values(),
    *(_with_inner(merging) for merging in MERGING.values()),
    kind=AlgorithmRecord,
)
"""All algorithms. `ALGORITHMS[name](task, tx, placement, **arguments)` builds one."""

ALGORITHM = Option(
    "algorithm", "dimat", "The algorithm by which the agents learn.", choices=ALGORITHMS
)


def algorithm_record(name: str, inner: str = INNER.default) -> AlgorithmRecord:
    """Returns the record of an algorithm.

    For an algorithm that merges, the record includes what agents do between merges.

    Args:
        name: a key of `ALGORITHMS`.
        inner: a key of `BETWEEN_MERGES`; it matters only to an algorithm that merges.
    """
    if name in MERGING:
        return MERGING[name].over(BETWEEN_MERGES[inner])
    return ALGORITHMS[name]


def __dir__() -> list[str]:
    return public_names(__name__)
