"""Quasi-global momentum: a momentum of the mixed params, not of local gradients.

    x_i(t+1/2)  =  x_i(t) - alpha (beta m_i(t) + g_i(t))
    x_i(t+1)    =  sum_j W_ij x_j(t+1/2)
    m_i(t+1)    =  mu m_i(t) + (1 - mu) (x_i(t) - x_i(t+1)) / alpha

(QG-DSGDm, Lin et al. 2021, arXiv 2102.04761, Algorithm 1, with mu = beta as there.) A
momentum of local gradients amplifies what is special about an agent's data; a momentum
of the differences of mixed params does not.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

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
from dimat_jax.algorithms.memory import MemoryState, remembering
from dimat_jax.algorithms.record import GRAPH, AlgorithmRecord
from dimat_jax.ledger import Messages
from dimat_jax.mixing import mix
from dimat_jax.options import Option
from dimat_jax.placement import Placement

__all__ = ["RECORD", "qgm"]


MOMENTUM = Option(
    "gossip.momentum",
    0.9,
    "The share of the quasi-global momentum that a step repeats (beta, and mu).",
    at_least=0,
    below=1,
)


def qgm(
    task: Task,
    tx: optax.GradientTransformation,
    placement: Placement,
    *,
    momentum: float = MOMENTUM.default,
) -> Algorithm:
    """Gossips with every local step. W must be doubly stochastic.

    Args:
        task: the task that the agents learn.
        tx: plain SGD, whose step is -alpha times its input. The learning rate alpha is
            found from the step, so it may follow a schedule.
        placement: the devices on which the agents live.
        momentum: the factors beta and mu, at least 0 and below 1.

    Raises:
        OptionError: the momentum is out of range.
    """
    MOMENTUM.check(momentum)

    def adapt(state: MemoryState, batch, key):
        (variables, opt_state), memory, _ = state
        grads, model_state, metrics = gradient(task, variables, batch, key)
        direction = jax.tree.map(
            lambda g, m: g + momentum * m, grads, memory["momentum"]
        )
        params = variables["params"]
        rate = _learning_rate(tx, opt_state, params)
        updates, opt_state = optimizer_step(tx, batch, direction, opt_state, params)
        variables = apply_updates({**variables, **model_state}, updates)
        return LocalState(variables, opt_state), rate, metrics

    def step(state, batch, network, key):
        before = state.local.variables["params"]
        local_state, rate, metrics = placement.per_agent(adapt)(
            state, batch, placement.keys(key)
        )
        variables = mix(network.W, local_state.variables, placement)

        @placement.per_agent
        def remember(old, new, memory, rate):
            def blend(x, mixed, m):
                # A schedule may end at a learning rate of 0. Then the step is no
                # evidence, and the momentum does not change.
                speed = (x - mixed) / jnp.where(rate > 0, rate, 1)
                return jnp.where(rate > 0, momentum * m + (1 - momentum) * speed, m)

            return jax.tree.map(blend, old, new, memory)

        memory = remember(before, variables["params"], state.memory["momentum"], rate)
        local_state = local_state._replace(variables=variables)
        return MemoryState(local_state, {"momentum": memory}), metrics

    return remembering(
        local(task, tx, placement),
        task,
        placement,
        memories=["momentum"],
        step=step,
        messages=lambda state: Messages(step=one_agent(state.local.variables)),
    )


def _learning_rate(tx: optax.GradientTransformation, opt_state, params) -> Array:
    """Returns the number alpha with which plain SGD multiplies a gradient."""

    def step_for(like):
        updates, _ = tx.update(jax.tree.map(like, params), opt_state, params)
        return jax.tree.leaves(updates)[0].ravel()[0].astype(jnp.float32)

    # Weight decay adds the same number to both steps and cancels in the difference.
    return step_for(jnp.zeros_like) - step_for(jnp.ones_like)


RECORD = AlgorithmRecord(
    "qgm",
    qgm,
    (MOMENTUM,),
    leads_to=GRAPH,
    summary="A momentum of how the network's mean moves (Lin et al. 2021).",
    network=balanced,
    optimizer="sgd",
    other_optimizers=False,
)
