"""Weight averaging (WA): average the neighbours' networks as they are.

    x_i  <-  sum_j W_ij x_j                 once a round
    x_i  <-  an optimizer step on agent i's own data

This is DIMAT (arXiv 2404.08079) without its permutations, and one of its baselines. W
is the mixing matrix.
"""

from dimat_jax.algorithms._merging import OPT_STATE, merging
from dimat_jax.algorithms.base import Algorithm, Task
from dimat_jax.algorithms.record import GRAPH, MergingRecord
from dimat_jax.compression import COMPRESSOR, Compressor, none
from dimat_jax.data.selection import BN_DATA
from dimat_jax.placement import Placement

__all__ = ["RECORD", "wa"]


def wa(
    inner: Algorithm,
    task: Task,
    placement: Placement,
    *,
    opt_state: str = OPT_STATE.default,
    compressor: Compressor = none(),  # noqa: B008
) -> Algorithm:
    """Averages networks as they are, once a round.

    Args:
        inner: how agents train between merges.
        task: what the agents learn.
        placement: where the agents live.
        opt_state: what becomes of the optimizer state at a merge.
        compressor: compresses what is sent.

    Raises:
        OptionError, UserError: as of `merging`.
    """
    return merging(
        inner,
        task,
        placement,
        match=None,
        opt_state=opt_state,
        compressor=compressor,
    )


RECORD = MergingRecord(
    "wa",
    wa,
    (OPT_STATE,),
    leads_to=(*GRAPH, COMPRESSOR, BN_DATA),
    summary="Neighbours' weights are averaged as they are.",
    compressor="none",
    facts=frozenset({"compressor"}),
    merges=True,
)
