"""Weight matching (WM): align the neighbours' networks by their weights, and average.

    x_i  <-  sum_j W_ij P_ij x_j            once a round
    x_i  <-  an optimizer step on agent i's own data

P_ij permutes agent j's hidden units onto agent i's. It maximises <x_i, P_ij x_j>, the
inner product of the two networks' weights, by coordinate descent over the layers
(Ainsworth et al. 2023, "Git Re-Basin", arXiv 2209.04836; a baseline in DIMAT, arXiv
2404.08079). It needs no data. W is the mixing matrix.
"""

from dimat_jax.algorithms._ahead import GRADIENT
from dimat_jax.algorithms._merge_times import EVERY, UNIT
from dimat_jax.algorithms._merging import FRAME, OPT_STATE, merging
from dimat_jax.algorithms.base import Algorithm, Task
from dimat_jax.algorithms.merging_record import MergingRecord
from dimat_jax.algorithms.record import GRAPH
from dimat_jax.compression import COMPRESSOR, Compressor, none
from dimat_jax.matching._assignment import STAY
from dimat_jax.matching._weight import RESTARTS
from dimat_jax.placement import Placement

__all__ = ["RECORD", "wm"]


def wm(
    inner: Algorithm,
    task: Task,
    placement: Placement,
    *,
    frame: str = FRAME.default,
    stay: float = STAY.default,
    opt_state: str = OPT_STATE.default,
    gradient: str = GRADIENT.default,
    restarts: int = RESTARTS.default,
    compressor: Compressor = none(),  # noqa: B008
) -> Algorithm:
    """Merges networks that are aligned by their weights, once a round.

    Args:
        inner: the algorithm between merges.
        task: the task that the agents learn; its spec needs no taps.
        placement: the devices on which the agents live.
        frame: the frame in which agents merge.
        stay: the gain that a unit needs to move, in its share of the weights' cosine.
        opt_state: the policy for the optimizer state at a merge.
        gradient: where the gradient of the step after a merge is computed.
        restarts: the number of times that weights are matched; the best permutations
            are kept.
        compressor: the compressor of the messages.

    Raises:
        OptionError, UserError: as for `merging`.
    """
    return merging(
        inner,
        task,
        placement,
        match="weights",
        frame=frame,
        stay=stay,
        opt_state=opt_state,
        gradient=gradient,
        restarts=restarts,
        compressor=compressor,
    )


RECORD = MergingRecord(
    "wm",
    wm,
    (FRAME, STAY, OPT_STATE, GRADIENT, RESTARTS),
    leads_to=(*GRAPH, COMPRESSOR, EVERY, UNIT),
    summary="Neighbours' units are matched by their weights, then averaged.",
    compressor="none",
    facts=frozenset({"compressor"}),
)
