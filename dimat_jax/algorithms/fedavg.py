"""Federated averaging: the reference point with a server in the middle.

    x_i  <-  sum_k (n_k / n) x_k

once a round, over the agents that are there, weighted by how many examples they hold;
in between everyone trains alone (McMahan et al. 2017, arXiv 1602.05629, Algorithm 1).
No graph is asked: everyone talks to the server.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from dimat_jax.algorithms.base import Algorithm, Task, one_agent
from dimat_jax.algorithms.local import local
from dimat_jax.ledger import Messages
from dimat_jax.mixing import mix
from dimat_jax.placement import Placement

__all__ = ["fedavg"]


def fedavg(
    task: Task,
    tx: optax.GradientTransformation,
    placement: Placement,
    *,
    examples: Sequence[int] | None = None,
) -> Algorithm:
    """Local training, and a weighted average once a round.

    Running statistics are averaged like the params; optimizers go on.

    Args:
        task: what to learn.
        tx: the local optimizer; plain SGD is the paper's.
        placement: where the agents live.
        examples: how many each agent holds; None: all as many.
    """
    alone = local(task, tx, placement)
    held = jnp.zeros(placement.slots)
    held = held.at[: placement.n_agents].set(
        jnp.ones(placement.n_agents) if examples is None else jnp.asarray(examples)
    )

    @jax.jit
    def average(variables, present):
        shares = jnp.where(present, held, 0)
        shares = shares / jnp.maximum(shares.sum(), 1)
        # Who is away hears nothing, and keeps what it has.
        W = jnp.where(present[:, None], shares, jnp.eye(placement.slots))
        return mix(W, variables)

    def communicate(state, data, network, key):
        del data, key
        variables = average(alone.variables(state), network.present)
        return alone.with_variables(state, variables), {}

    return alone._replace(
        communicate=communicate,
        messages=lambda state: Messages(server=one_agent(alone.variables(state))),
    )
