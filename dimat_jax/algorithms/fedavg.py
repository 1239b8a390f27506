"""Federated averaging: a server averages all agents, for comparison.

    x_i  <-  sum_k (n_k / n) x_k            once a round

The sum is over the present agents. Between two averages every agent trains alone
(McMahan et al. 2017, arXiv 1602.05629, Algorithm 1). There is no graph: every agent
exchanges messages with the server. An agent that has been absent gets the average, and
enters the next average after it has trained from this one.

In the paper n_k is the number of agent k's examples, and agents take steps in the same
proportion; `data.small_shards=idle` gives that. Then an agent counts about n_k^2 in the
objective (Wang et al. 2020, arXiv 2007.07481, section 3). If small shards are repeated,
all agents take equally many steps and all n_k are equal: every agent counts 1/N, as for
all other algorithms.
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
    """Trains locally, and takes a weighted average once a round.

    Running statistics are averaged like the params. Optimizer states are kept.

    Args:
        task: the task that the agents learn.
        tx: the local optimizer; the paper uses plain SGD.
        placement: the devices on which the agents live.
        examples: n_k, the number of each agent's examples; None if all count the same.
    """
    held = jnp.zeros(placement.slots)
    held = held.at[: placement.n_agents].set(
        jnp.ones(placement.n_agents)
        if examples is None
        else jnp.asarray(examples, jnp.float32)
    )

    local_algorithm = local(task, tx, placement)

    @partial(jax.jit, out_shardings=placement.sharding)
    def average(state: MemoryState, present):
        # An agent's turn counts the averages up to the last one that it has received.
        # Agents with a smaller turn have missed the latest one, and do not count.
        turn = state.marks["turn"]
        latest = jnp.where(present, turn, -1).max()
        shares = jnp.where(present & (turn == latest), held, 0)
        shares = shares / jnp.maximum(shares.sum(), 1)
        # An absent agent receives nothing, and keeps its variables.
        W = jnp.where(present[:, None], shares[None, :], jnp.eye(placement.slots))
        variables = mix(W, state.local.variables, placement)
        return state._replace(
            local=local_algorithm.with_variables(state.local, variables),
            marks={"turn": jnp.where(present, latest + 1, turn)},
        )

    def communicate(state, data, network, key):
        del data, key
        return average(state, network.present), {}

    def step(state: MemoryState, batch, network, key):
        local_state, metrics = local_algorithm.step(state.local, batch, network, key)
        return state._replace(local=local_state), metrics

    def turns():
        return {"turn": jnp.zeros(placement.slots, int, device=placement.sharding)}

    federated = remembering(
        local_algorithm,
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
