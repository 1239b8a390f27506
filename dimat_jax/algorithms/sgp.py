"""Stochastic gradient push: agents gossip over directed, changing graphs.

    x_i  <-  sum_j P_ij (x_j + u_j),    w_i  <-  sum_j P_ij w_j,    z_i = x_i / w_i

Gradients, and everything else that uses the model, are computed at z (SGP, Assran et
al. 2019, arXiv 1811.10792, Algorithm 1; push-sum, Kempe et al. 2003). The columns of P
must sum to 1, so that the sums of x and w over agents are preserved; its rows need not.
Some agents then receive more than others, and the division by the weight w corrects
this. The step u is the local optimizer's, taken at z. With momentum it is Algorithm 2
in the paper's appendix.
"""

from functools import partial
from typing import NamedTuple

import jax
import optax
from jaxtyping import Array, Float

from dimat_jax.algorithms.base import (
    Algorithm,
    Task,
    apply_updates,
    gradient,
    one_agent,
    optimizer_step,
)
from dimat_jax.algorithms.conditions import pushing
from dimat_jax.algorithms.local import LocalState, local
from dimat_jax.algorithms.record import GRAPH, AlgorithmRecord
from dimat_jax.ledger import Messages
from dimat_jax.mixing import mix
from dimat_jax.placement import Placement
from dimat_jax.tree import PyTree, is_inexact

__all__ = ["RECORD", "SgpState", "sgp"]


class SgpState(NamedTuple):
    """The agents' states, stacked: every leaf is `[agents, ...]`.

    Attributes:
        local: a state whose variables hold x: the params and running statistics that
            are pushed.
        weight: the push-sum weight w, float32. Its mean over agents is always 1.
    """

    local: LocalState
    weight: Float[Array, " agents"]


def sgp(
    task: Task, tx: optax.GradientTransformation, placement: Placement
) -> Algorithm:
    """Gossips with every local step. W must be column-stochastic; it is the P above.

    Args:
        task: the task that the agents learn.
        tx: the optimizer that makes the step u.
        placement: the devices on which the agents live.
    """
    local_algorithm = local(task, tx, placement)

    def adapt(state: SgpState, batch, key):
        (pushed, opt_state), weight = state
        debiased = _scaled(pushed, 1 / weight)
        grads, model_state, metrics = gradient(task, debiased, batch, key)
        updates, opt_state = optimizer_step(
            tx, batch, grads, opt_state, debiased["params"]
        )
        pushed = apply_updates({**pushed, **_scaled(model_state, weight)}, updates)
        return pushed, opt_state, metrics

    def step(state, batch, network, key):
        keys = placement.keys(key)
        pushed, opt_state, metrics = placement.per_agent(adapt)(state, batch, keys)
        pushed, weight = mix(network.W, (pushed, state.weight), placement)
        return SgpState(LocalState(pushed, opt_state), weight), metrics

    def restarted(local_state: LocalState) -> SgpState:
        return SgpState(local_state, placement.zeros() + 1)

    @jax.jit
    def debiased(state: SgpState):
        divide = placement.per_agent(lambda x, w: _scaled(x, 1 / w))
        return divide(state.local.variables, state.weight)

    @partial(jax.jit, out_shardings=placement.sharding)
    def with_statistics(state: SgpState, statistics):
        # What is pushed is the weight times the statistics, and the weight stays.
        pushed = placement.per_agent(_scaled)(statistics, state.weight)
        local_state = local_algorithm.with_statistics(state.local, pushed)
        return state._replace(local=local_state)

    return Algorithm(
        init=lambda variables: restarted(local_algorithm.init(variables)),
        step=step,
        communicate=local_algorithm.communicate,
        variables=debiased,
        with_variables=lambda state, variables: restarted(
            state.local._replace(variables=variables)
        ),
        with_statistics=with_statistics,
        aligned=lambda state, perms: state._replace(
            local=local_algorithm.aligned(state.local, perms)
        ),
        messages=lambda state: Messages(
            step=one_agent({**state.local.variables, "push_sum_weight": state.weight})
        ),
    )


def _scaled(variables: PyTree, factor: Float[Array, ""]) -> PyTree:
    """Multiplies one agent's variables by a number; counters do not change."""
    return jax.tree.map(
        lambda x: (factor * x).astype(x.dtype) if is_inexact(x) else x, variables
    )


RECORD = AlgorithmRecord(
    "sgp",
    sgp,
    leads_to=GRAPH,
    summary="Agents push params x and a weight w, and compute gradients at x / w "
    "(push-sum, Assran et al. 2019). The graph may be directed and may change.",
    network=pushing,
    optimizer="sgd",
)
