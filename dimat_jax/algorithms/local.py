"""Training alone: every agent descends on its own data and never communicates.

It is the control that every decentralized algorithm has to beat, and the local training
of algorithms that merge. With a single agent that holds all data it is centralized
training, the upper limit.
"""

from typing import NamedTuple

import jax
import optax

from dimat_jax import permutation
from dimat_jax.algorithms.base import (
    Algorithm,
    State,
    Task,
    Variables,
    apply_updates,
    gradient,
    optimizer_step,
    permute_opt_state,
)
from dimat_jax.algorithms.record import SEVERAL_AGENTS, AlgorithmRecord
from dimat_jax.ledger import Messages
from dimat_jax.placement import Placement

__all__ = [
    "CENTRALIZED",
    "RECORD",
    "LocalState",
    "local",
    "local_part",
    "with_opt_state",
]


class LocalState(NamedTuple):
    """The agents' states, stacked: every leaf is `[agents, ...]`.

    Attributes:
        variables: the params and the other collections.
        opt_state: the optimizer's state.
    """

    variables: Variables
    opt_state: optax.OptState


def local_part(state: State) -> LocalState:
    """Returns the `LocalState` of a state: the state itself, or its field `local`."""
    return state if isinstance(state, LocalState) else state.local


def with_opt_state(state: State, opt_state: optax.OptState) -> State:
    """Returns a state with another optimizer state in its `local_part`."""
    part = local_part(state)._replace(opt_state=opt_state)
    return part if isinstance(state, LocalState) else state._replace(local=part)


def local(
    task: Task, tx: optax.GradientTransformation, placement: Placement
) -> Algorithm:
    """Trains every agent alone, with an optax optimizer.

    Args:
        task: the task that the agents learn.
        tx: the local optimizer.
        placement: the devices on which the agents live.
    """

    def train(state: LocalState, batch, key):
        variables, opt_state = state
        grads, model_state, metrics = gradient(task, variables, batch, key)
        updates, opt_state = optimizer_step(
            tx, batch, grads, opt_state, variables["params"]
        )
        variables = apply_updates({**variables, **model_state}, updates)
        return LocalState(variables, opt_state), metrics

    def align(state: LocalState, perms) -> LocalState:
        variables, opt_state = state
        return LocalState(
            permutation.apply(task.spec, perms, variables),
            permute_opt_state(
                tx, task.spec, perms, opt_state, params=variables["params"]
            ),
        )

    init_stacked = jax.jit(
        placement.per_agent(tx.init), out_shardings=placement.sharding
    )

    def init(variables):
        return LocalState(variables, init_stacked(variables["params"]))

    def step(state, batch, network, key):
        del network
        return placement.per_agent(train)(state, batch, placement.keys(key))

    return Algorithm(
        init=init,
        step=step,
        communicate=lambda state, data, network, key: (state, {}),
        variables=lambda state: state.variables,
        with_variables=lambda state, variables: state._replace(variables=variables),
        with_statistics=lambda state, statistics: state._replace(
            variables={**state.variables, "batch_stats": statistics}
        ),
        aligned=placement.per_agent(align),
        messages=lambda state: Messages(),
    )


RECORD = AlgorithmRecord("local", local, summary="Agents train alone.")

CENTRALIZED = AlgorithmRecord(
    "centralized",
    local,
    ignores=SEVERAL_AGENTS,
    summary="One model is trained on all data.",
)
