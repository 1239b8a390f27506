"""Assignments that are solved by the process on whose devices the scores are.

A pair's scores are on the device of the receiver, at least where every agent has as
many neighbours as the others. Only the permutations travel between processes.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Array, Key

from dimat_jax._slots import fetch_local, local_slots, put_slots
from dimat_jax.matching._activation import ActivationScorer, Found
from dimat_jax.matching._descent import (
    PairPerms,
    Pairs,
    Problem,
    every_pair_alone,
    identities,
)
from dimat_jax.placement import Placement

__all__ = ["search_local_pairs"]


def search_local_pairs(
    search: Callable[[Problem, Key[Array, ""]], PairPerms],
    scorer: ActivationScorer,
    edge_waves: Sequence[Pairs],
    placement: Placement,
    *,
    stay: float,
    key: Key[Array, ""],
) -> Found:
    """Matches every pair alone, each on one process. All processes make the call.

    Args:
        search: finds good permutations of a problem; see `Matcher.search`.
        scorer: the scores of all pairs.
        edge_waves: the pairs.
        placement: the devices on which the scores are.
        stay: the score that a unit must gain to move.
        key: the randomness of the search; the key is consumed.

    Returns:
        the permutations of all pairs, and how well each pair fits, on every process.
    """
    rows = local_slots(placement)
    # The rows are in ascending order, so that the real pairs still come first.
    local_waves = [
        Pairs(references[rows], permutees[rows], int((rows < real).sum()))
        for references, permutees, real in edge_waves
    ]
    local = scorer.restricted(local_waves, fetch_local)
    perms, similarity = identities(local), np.zeros(0)
    if local.n_pairs:
        problem = Problem(local, every_pair_alone(local.n_pairs, stay))
        perms = search(problem, key)
        similarity = local.similarity(perms)

    # Everything that is known of a pair becomes one row of whole numbers.
    # A process may have no pairs; then `reshape` cannot tell what -1 stands for.
    of_pairs = [
        perm.reshape(len(perm), math.prod(perm.shape[1:])) for perm in perms.values()
    ]
    columns = [*of_pairs, similarity.astype(np.float64)[:, None].view(np.int32)]
    found = np.concatenate(columns, axis=1).astype(np.int32)
    sent = np.zeros((placement.slots, len(edge_waves), found.shape[1]), np.int32)
    start = 0
    for number, wave in enumerate(local_waves):
        sent[rows[: wave.real], number] = found[start : start + wave.real]
        start += wave.real
    received = placement.fetch(put_slots(placement, sent))
    whole = np.concatenate(
        [received[: wave.real, number] for number, wave in enumerate(edge_waves)]
    )
    ends = np.cumsum([perm.shape[1] for perm in of_pairs])
    *parts, similarity = np.split(whole, ends, axis=1)
    parts = [
        part.reshape(-1, *perm.shape[1:])
        for part, perm in zip(parts, perms.values(), strict=True)
    ]
    bits = np.ascontiguousarray(similarity)
    return Found(dict(zip(perms, parts, strict=True)), bits.view(np.float64)[:, 0])
