"""Weight averaging (WA): average the neighbours' networks as they are.

    x_i  <-  sum_j W_ij x_j                 once a round
    x_i  <-  an optimizer step on agent i's own data

This is DIMAT (arXiv 2404.08079) without its permutations, and one of its baselines. W
is the mixing matrix.
"""

from dimat_jax.algorithms._ahead import GRADIENT
from dimat_jax.algorithms._merge_times import EVERY, UNIT
from dimat_jax.algorithms._merging import OPT_STATE, merging
from dimat_jax.algorithms.base import Algorithm, Task
from dimat_jax.algorithms.merging_record import MergingRecord
from dimat_jax.algorithms.record import GRAPH
from dimat_jax.compression import COMPRESSOR, Compressor, none
from dimat_jax.placement import Placement

__all__ = ["RECORD", "wa"]


def wa(
    inner: Algorithm,
    task: Task,
    placement: Placement,
    *,
    opt_state: str = OPT_STATE.default,
    gradient: str = GRADIENT.default,
    compressor: Compressor = none(),  # noqa: B008
) -> Algorithm:
    """Averages networks as they are, once a round.

    Args:
        inner: the algorithm between merges.
        task: the task that the agents learn.
        placement: the devices on which the agents live.
        opt_state: the policy for the optimizer state at a merge.
        gradient: where the gradient of the step after a merge is computed.
        compressor: the compressor of the messages.

    Raises:
        OptionError, UserError: as for `merging`.
    """
    return merging(
        inner,
        task,
        placement,
        match=None,
        opt_state=opt_state,
        gradient=gradient,
        compressor=compressor,
    )


RECORD = MergingRecord(
    "wa",
    wa,
    (OPT_STATE, GRADIENT),
    leads_to=(*GRAPH, COMPRESSOR, EVERY, UNIT),
    summary="Neighbours' weights are averaged without matching.",
    compressor="none",
    facts=frozenset({"compressor"}),
)
