"""Consensus-based distributed SGD: a gossip average and a gradient step at once.

    x_i  <-  sum_j W_ij x_j + u_i,    u_i = -alpha g_i(x_i)

(CDSGD, Jiang et al. 2017, arXiv 1706.07880, equation 3; D-PSGD, Lian et al. 2017, arXiv
1705.09056, Algorithm 1.) The step u_i is the local optimizer's, and two other
algorithms differ only in this optimizer:

- CDMSGD (Jiang et al. 2017, Algorithm 2): v_i <- beta v_i - alpha g_i(x_i), u_i = v_i:
  `OPTIMIZERS["heavy_ball"]`. The code that its authors published steps by
  u_i = beta v_i - alpha g_i(x_i), with the new v_i: `optimizer.form="nesterov"`.
- CDAdam (DAdam, Nazari et al. 2022, arXiv 1901.09109, Algorithm 1): a max-type second
  moment and no bias correction: `OPTIMIZERS["dadam"]`.

The other order, x_i <- sum_j W_ij (x_j + u_j), is adapt-then-combine (Chen & Sayed
2012).
"""

import optax

from dimat_jax.algorithms.base import (
    Algorithm,
    Task,
    apply_updates,
    gradient,
    one_agent,
    optimizer_step,
)
from dimat_jax.algorithms.conditions import balanced
from dimat_jax.algorithms.local import LocalState, local
from dimat_jax.algorithms.record import GRAPH, AlgorithmRecord
from dimat_jax.ledger import Messages
from dimat_jax.mixing import mix
from dimat_jax.options import Option
from dimat_jax.placement import Placement

__all__ = ["RECORDS", "cdsgd"]

ORDER = Option(
    "gossip.order",
    "combine_then_adapt",
    "Whether an agent's own step is added after its neighbours' weights are mixed "
    "(combine_then_adapt), or is mixed with them (adapt_then_combine).",
    choices=("combine_then_adapt", "adapt_then_combine"),
)


def cdsgd(
    task: Task,
    tx: optax.GradientTransformation,
    placement: Placement,
    *,
    order: str = ORDER.default,
) -> Algorithm:
    """Gossips with every local step. W must be doubly stochastic.

    Running statistics are updated, and then averaged like the params.

    Args:
        task: the task that the agents learn.
        tx: the optimizer that makes the step u; the paper uses plain SGD.
        placement: the devices on which the agents live.
        order: the order of the step and the mixing; see `ORDER`.

    Raises:
        OptionError: the order is unknown.
    """
    ORDER.check(order)

    def adapt(state: LocalState, batch, key):
        variables, opt_state = state
        grads, model_state, metrics = gradient(task, variables, batch, key)
        updates, opt_state = optimizer_step(
            tx, batch, grads, opt_state, variables["params"]
        )
        return updates, {**variables, **model_state}, opt_state, metrics

    def step(state, batch, network, key):
        updates, variables, opt_state, metrics = placement.per_agent(adapt)(
            state, batch, placement.keys(key)
        )
        if order == "combine_then_adapt":
            variables = apply_updates(mix(network.W, variables, placement), updates)
        else:
            variables = mix(network.W, apply_updates(variables, updates), placement)
        return LocalState(variables, opt_state), metrics

    return local(task, tx, placement)._replace(
        step=step, messages=lambda state: Messages(step=one_agent(state.variables))
    )


RECORDS = (
    AlgorithmRecord(
        "cdsgd",
        cdsgd,
        (ORDER,),
        leads_to=GRAPH,
        summary="With every step x_i moves to sum_j W_ij x_j - alpha g(x_i) (Jiang et "
        "al. 2017; D-PSGD, Lian et al. 2017).",
        network=balanced,
        optimizer="sgd",
    ),
    AlgorithmRecord(
        "cdmsgd",
        cdsgd,
        leads_to=GRAPH,
        summary="It is CDSGD with a heavy ball, in Polyak's form or in Nesterov's "
        "(Jiang et al. 2017).",
        network=balanced,
        optimizer="heavy_ball",
        other_optimizers=False,
    ),
    AlgorithmRecord(
        "cdadam",
        cdsgd,
        leads_to=GRAPH,
        summary="It is CDSGD with DAdam's step (Nazari et al. 2022).",
        network=balanced,
        optimizer="dadam",
        other_optimizers=False,
    ),
)
