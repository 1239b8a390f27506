"""Consensus-based distributed SGD: a gossip average and a gradient step at once.

    x_i  <-  sum_j W_ij x_j + u_i,    u_i = -alpha g_i(x_i)

(CDSGD, Jiang et al. 2017, arXiv 1706.07880, equation 3; D-PSGD, Lian et al. 2017, arXiv
1705.09056, Algorithm 1.) The step u_i is the local optimizer's, so that others of this
kind differ in that alone:

- CDMSGD (Jiang et al. 2017, Algorithm 2): v_i <- beta v_i - alpha g_i(x_i), u_i = v_i:
  `OPTIMIZERS["heavy_ball"]`.
- CDAdam (DAdam, Nazari et al. 2022, arXiv 1901.09109, Algorithm 1): a max-type second
  moment and no bias correction: `OPTIMIZERS["dadam"]`.

The other order, x_i <- sum_j W_ij (x_j + u_j), is adapt-then-combine (Chen & Sayed
2012).
"""

from typing import Literal, get_args

import optax

from dimat_jax.algorithms.base import (
    Algorithm,
    Task,
    descend,
    gradient,
    moved,
    one_agent,
)
from dimat_jax.algorithms.local import LocalState, local
from dimat_jax.ledger import Messages
from dimat_jax.mixing import mix
from dimat_jax.placement import Placement

__all__ = ["Order", "cdsgd"]

Order = Literal["combine_then_adapt", "adapt_then_combine"]


def cdsgd(
    task: Task,
    tx: optax.GradientTransformation,
    placement: Placement,
    *,
    order: Order = "combine_then_adapt",
) -> Algorithm:
    """Gossip with every local step. W is to be doubly stochastic.

    Running statistics are averaged like the params, after their update.

    Args:
        task: what to learn.
        tx: makes the step; plain SGD is the paper's.
        placement: where the agents live.
        order: whether an agent's own step is mixed along.

    Raises:
        ValueError: an unknown order.
    """
    if order not in get_args(Order):
        raise ValueError(f"order is one of {get_args(Order)}, got {order!r}")

    def adapt(state: LocalState, batch, key):
        variables, opt_state = state
        grads, model_state, metrics = gradient(task, variables, batch, key)
        updates, opt_state = descend(tx, batch, grads, opt_state, variables["params"])
        return updates, {**variables, **model_state}, opt_state, metrics

    def step(state, batch, network, key):
        updates, variables, opt_state, metrics = placement.per_agent(adapt)(
            state, batch, placement.keys(key)
        )
        if order == "combine_then_adapt":
            variables = moved(mix(network.W, variables), updates)
        else:
            variables = mix(network.W, moved(variables, updates))
        return LocalState(variables, opt_state), metrics

    return local(task, tx, placement)._replace(
        step=step, messages=lambda state: Messages(step=one_agent(state.variables))
    )
