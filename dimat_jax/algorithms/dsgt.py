"""Gradient tracking: every agent follows an estimate of the network's mean gradient.

    y_i(t)    =  sum_j W_ij y_j(t-1) + g_i(t) - g_i(t-1),    y(-1) = g(-1) = 0
    x_i(t+1)  =  sum_j W_ij x_j(t) - alpha y_i(t)

(DSGT, Pu & Nedic 2021, arXiv 1805.11454; DIGing, Nedic et al. 2017.) The mean of y over
agents is the mean of their gradients, at any time and however W changes, as long as it
is doubly stochastic; so the agents' optimum is that of all data together.
"""

import jax
import jax.numpy as jnp
import optax

from dimat_jax.algorithms.base import Algorithm, Task, gradient, moved, one_agent
from dimat_jax.algorithms.local import LocalState, local
from dimat_jax.algorithms.memory import MemoryState, remembering
from dimat_jax.ledger import Messages
from dimat_jax.mixing import mix
from dimat_jax.placement import Placement

__all__ = ["dsgt"]


def dsgt(
    task: Task, tx: optax.GradientTransformation, placement: Placement
) -> Algorithm:
    """Gossip of params and trackers with every step. W is to be doubly stochastic.

    Args:
        task: what to learn.
        tx: makes a step along the tracker; plain SGD is the paper's.
        placement: where the agents live.
    """

    def track(state: MemoryState, heard, batch, key):
        (variables, opt_state), memory = state
        grads, model_state, metrics = gradient(task, variables, batch, key)
        # Without an example the gradient counts as unchanged.
        grads = jax.tree.map(
            lambda new, old: jnp.where(batch.mask.any(), new, old),
            grads,
            memory["gradient"],
        )
        tracker = jax.tree.map(
            lambda y, new, old: y + new - old, heard, grads, memory["gradient"]
        )
        updates, opt_state = tx.update(tracker, opt_state, variables["params"])
        memory = {"tracker": tracker, "gradient": grads}
        variables = {**variables, **model_state}
        return updates, MemoryState(LocalState(variables, opt_state), memory), metrics

    def step(state, batch, network, key):
        heard = mix(network.W, state.memory["tracker"])
        updates, state, metrics = placement.per_agent(track)(
            state, heard, batch, placement.keys(key)
        )
        variables = moved(mix(network.W, state.local.variables), updates)
        return state._replace(local=state.local._replace(variables=variables)), metrics

    return remembering(
        local(task, tx, placement),
        task,
        placement,
        memories=["tracker", "gradient"],
        step=step,
        messages=lambda state: Messages(
            step=one_agent(
                {**state.local.variables, "tracker": state.memory["tracker"]}
            )
        ),
    )
