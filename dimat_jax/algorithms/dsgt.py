"""Gradient tracking: every agent follows an estimate of the network's mean gradient.

    y_i(t)    =  sum_j W_ij y_j(t-1) + g_i(t) - g_i(t-1),    y(-1) = g(-1) = 0
    x_i(t+1)  =  sum_j W_ij (x_j(t) - alpha y_j(t))

(DSGT, Pu & Nedic 2021, arXiv 1805.11454, equation 3.) The mean of y over agents is the
mean of their gradients at all times, even if W changes, as long as W is doubly
stochastic. So the agents reach the optimum of all data together. When an agent leaves
or returns, the mean of the present agents' y is no longer the mean of their gradients.
Then the trackers of all present agents restart from their gradients.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from dimat_jax.algorithms.base import (
    Algorithm,
    Task,
    apply_updates,
    gradient,
    one_agent,
)
from dimat_jax.algorithms.conditions import balanced
from dimat_jax.algorithms.local import LocalState, local
from dimat_jax.algorithms.memory import MemoryState, remembering
from dimat_jax.algorithms.record import GRAPH, AlgorithmRecord
from dimat_jax.ledger import Messages
from dimat_jax.mixing import mix
from dimat_jax.placement import Placement

__all__ = ["RECORD", "dsgt"]


def dsgt(
    task: Task, tx: optax.GradientTransformation, placement: Placement
) -> Algorithm:
    """Gossips params and trackers with every step. W must be doubly stochastic.

    An agent without examples has a gradient of 0.

    Args:
        task: the task that the agents learn.
        tx: the optimizer that makes a step along the tracker; the paper uses plain SGD.
        placement: the devices on which the agents live.
    """

    def track(state: MemoryState, received, batch, key):
        (variables, opt_state), memory, marks = state
        grads, model_state, metrics = gradient(task, variables, batch, key)
        tracker = jax.tree.map(
            lambda y, new, old: y + new - old, received, grads, memory["gradient"]
        )
        updates, opt_state = tx.update(tracker, opt_state, variables["params"])
        memory = {"tracker": tracker, "gradient": grads}
        variables = apply_updates({**variables, **model_state}, updates)
        return MemoryState(LocalState(variables, opt_state), memory, marks), metrics

    def step(state, batch, network, key):
        received = mix(network.W, state.memory["tracker"], placement)
        state, metrics = placement.per_agent(track)(
            state, received, batch, placement.keys(key)
        )
        variables = mix(network.W, state.local.variables, placement)
        return state._replace(local=state.local._replace(variables=variables)), metrics

    tracking = remembering(
        local(task, tx, placement),
        task,
        placement,
        memories=["tracker", "gradient"],
        step=step,
        marks=functools.partial(_all_present, placement),
        messages=lambda state: Messages(
            step=one_agent(
                {**state.local.variables, "tracker": state.memory["tracker"]}
            )
        ),
    )
    restart = jax.jit(
        functools.partial(_restart_if_changed, placement.n_agents),
        out_shardings=placement.sharding,
    )

    def communicate(state, data, network, key):
        del data, key
        return restart(state, network.present), {}

    return tracking._replace(communicate=communicate)


def _all_present(placement: Placement) -> dict[str, Array]:
    """Makes the marks at the start, when all agents are present.

    The mark "company", bool[slots, agents], says for each agent which agents were
    present when it was last present itself. Its second axis has no slots that fill up
    devices, so that a run may resume on another number of devices.
    """
    company = jnp.ones((placement.slots, placement.n_agents), bool)
    return {"company": jax.device_put(company, placement.sharding)}


def _restart_if_changed(
    n_agents: int, state: MemoryState, present: Bool[Array, " slots"]
) -> MemoryState:
    """Restarts all trackers from the gradients if an agent has left or returned."""
    agents = present[:n_agents]
    others = (state.marks["company"] != agents[None, :]).any(axis=1)
    changed = (others & present).any()
    tracker = jax.tree.map(
        lambda y, g: jnp.where(changed, g, y),
        state.memory["tracker"],
        state.memory["gradient"],
    )
    company = jnp.broadcast_to(agents, state.marks["company"].shape)
    return state._replace(
        memory={**state.memory, "tracker": tracker}, marks={"company": company}
    )


RECORD = AlgorithmRecord(
    "dsgt",
    dsgt,
    leads_to=GRAPH,
    summary="Agents follow a tracked mean gradient (Pu & Nedic 2021).",
    network=balanced,
    optimizer="sgd",
)
