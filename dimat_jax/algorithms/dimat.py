"""DIMAT: align the neighbours' networks by their activations, average, train on.

    x_i  <-  sum_j W_ij P_ij x_j            once a round
    x_i  <-  an optimizer step on agent i's own data

P_ij permutes agent j's hidden units onto agent i's. For every layer it maximises the
sum of the correlations of matched units' activations on the same inputs, which is a
linear assignment problem (DIMAT: Decentralized Iterative Merging-And-Training, CVPR
2024, arXiv 2404.08079, equation 4 and Algorithms 1 to 3). W is the mixing matrix. The
order of merge and gradient is that of the published runs; `merge.gradient=before_merge`
is that of Algorithm 1 as printed.
"""

from dimat_jax.algorithms._ahead import GRADIENT
from dimat_jax.algorithms._merge_times import EVERY, UNIT
from dimat_jax.algorithms._merging import FRAME, OPT_STATE, TAPS, merging
from dimat_jax.algorithms.base import Algorithm, Task
from dimat_jax.algorithms.merging_record import MergingRecord
from dimat_jax.algorithms.record import GRAPH
from dimat_jax.compression import COMPRESSOR, Compressor, none
from dimat_jax.data.selection import MATCH_DATA
from dimat_jax.matching._assignment import STAY
from dimat_jax.placement import Placement

__all__ = ["RECORD", "dimat"]


def dimat(
    inner: Algorithm,
    task: Task,
    placement: Placement,
    *,
    frame: str = FRAME.default,
    stay: float = STAY.default,
    opt_state: str = OPT_STATE.default,
    gradient: str = GRADIENT.default,
    taps: str = TAPS.default,
    compressor: Compressor = none(),  # noqa: B008
) -> Algorithm:
    """Merges networks that are aligned by their activations, once a round.

    Args:
        inner: the algorithm between merges.
        task: the task that the agents learn; its spec has a tap for each group.
        placement: the devices on which the agents live.
        frame: the frame in which agents merge.
        stay: the correlation that a unit must gain to move.
        opt_state: the policy for the optimizer state at a merge.
        gradient: where the gradient of the step after a merge is computed.
        taps: the taps at which units are matched.
        compressor: the compressor of the messages.

    Raises:
        OptionError, UserError: as for `merging`.
        PermutationSpecError: a group has no tap.
    """
    return merging(
        inner,
        task,
        placement,
        match="activations",
        frame=frame,
        stay=stay,
        opt_state=opt_state,
        gradient=gradient,
        taps=taps,
        compressor=compressor,
    )


RECORD = MergingRecord(
    "dimat",
    dimat,
    (FRAME, STAY, OPT_STATE, GRADIENT, TAPS),
    leads_to=(*GRAPH, COMPRESSOR, MATCH_DATA, EVERY, UNIT),
    summary="Neighbours' units are matched by their activations, then averaged "
    "(Saadati et al. 2024).",
    compressor="none",
    facts=frozenset({"compressor"}),
)
