"""The algorithms, by name.

`ALGORITHMS[name](task, tx, placement, **arguments)` builds an `Algorithm`. To add one,
write a file that ends with its record, and add the record to the list below.
"""

import dataclasses

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
"""The algorithms that agents can run between merges: all that have no rounds."""

MERGING: dict[str, MergingRecord] = registry(dimat.RECORD, wm.RECORD, wa.RECORD)
"""The algorithms that merge once a round, on top of one of `BETWEEN_MERGES`."""

INNER = Option(
    "merge.inner",
    "local",
    "What agents do between merges: they train alone, or gossip with every step too.",
    choices=BETWEEN_MERGES,
)


def _with_inner(merging: MergingRecord) -> AlgorithmRecord:
    """A merging algorithm that takes the name of what is between as an argument."""

    def build(task, tx, placement, *, inner: str = INNER.default, **arguments):
        INNER.check(inner)
        over = merging.over(BETWEEN_MERGES[inner])
        return over.build(task, tx, placement, **arguments)

    alone = merging.over(local.RECORD)
    return dataclasses.replace(alone, build=build, leads_to=(*alone.leads_to, INNER))


ALGORITHMS: dict[str, AlgorithmRecord] = registry(
    local.CENTRALIZED,
    fedavg.RECORD,
    *BETWEEN_MERGES.values(),
    *(_with_inner(merging) for merging in MERGING.values()),
)
"""All algorithms. `ALGORITHMS[name](task, tx, placement, **arguments)` builds one."""

ALGORITHM = Option("algorithm", "dimat", "How agents learn.", choices=ALGORITHMS)


def record(name: str, inner: str = INNER.default) -> AlgorithmRecord:
    """The record of an algorithm, on top of what it does between merges if it merges.

    Args:
        name: a key of `ALGORITHMS`.
        inner: a key of `BETWEEN_MERGES`; it matters only to an algorithm that merges.
    """
    if name in MERGING:
        return MERGING[name].over(BETWEEN_MERGES[inner])
    return ALGORITHMS[name]
