"""Federated averaging: the reference point with a server in the middle.

    x_i  <-  sum_k (n_k / n) x_k

once a round, over the agents that are there, weighted by how many examples they hold;
in between everyone trains alone (McMahan et al. 2017, arXiv 1602.05629, Algorithm 1).
No graph is asked: everyone talks to the server. Who was away is given the average, and
is counted again when it has trained from one.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import optax

from dimat_jax.algorithms.base import Algorithm, Task, one_agent
from dimat_jax.algorithms.local import local
from dimat_jax.algorithms.memory import MemoryState, remembering
from dimat_jax.algorithms.record import AlgorithmRecord
from dimat_jax.ledger import Messages
from dimat_jax.mixing import mix
from dimat_jax.placement import Placement

__all__ = ["RECORD", "fedavg"]


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
    held = jnp.zeros(placement.slots)
    held = held.at[: placement.n_agents].set(
        jnp.ones(placement.n_agents)
        if examples is None
        else jnp.asarray(examples, jnp.float32)
    )

    alone = local(task, tx, placement)

    @partial(jax.jit, out_shardings=placement.sharding)
    def average(state: MemoryState, present):
        turn = state.marks["turn"]
        latest = jnp.where(present, turn, -1).max()
        shares = jnp.where(present & (turn == latest), held, 0)
        shares = shares / jnp.maximum(shares.sum(), 1)
        # Who is away hears nothing, and keeps what it has.
        W = jnp.where(present[:, None], shares[None, :], jnp.eye(placement.slots))
        variables = mix(W, state.local.variables)
        return state._replace(
            local=alone.with_variables(state.local, variables),
            marks={"turn": jnp.where(present, latest + 1, turn)},
        )

    def communicate(state, data, network, key):
        del data, key
        return average(state, network.present), {}

    def step(state: MemoryState, batch, network, key):
        local_state, metrics = alone.step(state.local, batch, network, key)
        return state._replace(local=local_state), metrics

    def turns():
        return {"turn": jnp.zeros(placement.slots, int, device=placement.sharding)}

    federated = remembering(
        alone,
        task,
        placement,
        memories=[],
        step=step,
        marks=turns,
        messages=lambda state: Messages(server=one_agent(state.local.variables)),
    )
    return federated._replace(communicate=communicate)


RECORD = AlgorithmRecord(
    "fedavg",
    fedavg,
    summary="A server averages all agents once a round (McMahan et al. 2017).",
    optimizer="sgd",
    facts=frozenset({"examples"}),
)
