"""The algorithms, by name.

`ALGORITHMS[name](task, tx, placement, **arguments)` builds an `Algorithm`. To add one,
write a file that ends with its record, and add the record to the list below.
"""

import dataclasses

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
    sgp,
    wa,
    wm,
)
from dimat_jax.algorithms.base import Algorithm, MergeData, Task
from dimat_jax.algorithms.record import AlgorithmRecord, MergingRecord
from dimat_jax.options import Option, registry

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
    "record",
]

BETWEEN_MERGES: dict[str, AlgorithmRecord] = registry(
    local.RECORD,
    *cdsgd.RECORDS,
    sgp.RECORD,
    d2.RECORD,
    dsgt.RECORD,
    qgm.RECORD,
    *cga.RECORDS,
    choco.RECORD,
)
"""The algorithms that agents can run between merges.

They do nothing of their own once a round.
"""

MERGING: dict[str, MergingRecord] = registry(dimat.RECORD, wm.RECORD, wa.RECORD)
"""The algorithms that merge once a round, on top of one of `BETWEEN_MERGES`."""

INNER = Option(
    "merge.inner",
    "local",
    "The algorithm that agents run between merges. They train alone (local), or they "
    "gossip with every step too.",
    choices=BETWEEN_MERGES,
)


def _with_inner(merging: MergingRecord) -> AlgorithmRecord:
    """Makes a record that takes the name of the inner algorithm as an argument."""

    def build(task, tx, placement, *, inner: str = INNER.default, **arguments):
        INNER.check(inner)
        over = merging.over(BETWEEN_MERGES[inner])
        return over.build(task, tx, placement, **arguments)

    over_local = merging.over(local.RECORD)
    return dataclasses.replace(
        over_local, build=build, leads_to=(*over_local.leads_to, INNER)
    )


ALGORITHMS: dict[str, AlgorithmRecord] = registry(
    local.CENTRALIZED,
    fedavg.RECORD,
    *BETWEEN_MERGES.values(),
    *(_with_inner(merging) for merging in MERGING.values()),
)
"""All algorithms. `ALGORITHMS[name](task, tx, placement, **arguments)` builds one."""

ALGORITHM = Option(
    "algorithm", "dimat", "The algorithm by which the agents learn.", choices=ALGORITHMS
)


def record(name: str, inner: str = INNER.default) -> AlgorithmRecord:
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
