"""Merging with the gradient of before the merge: Algorithm 1 of the DIMAT paper.

    u_i  =  the local optimizer's step at x_i                   before a merge
    x_i  <-  sum_j W_ij P_ij x_j + u_i

(DIMAT, arXiv 2404.08079, Algorithm 1 as printed.) If no unit is permuted and agents
merge with every step, this is CDSGD. In the published runs, and by default, an agent
merges first and computes the gradient of its next step at what it has merged.
"""

import jax
import jax.numpy as jnp

from dimat_jax.algorithms.base import Algorithm, State, Task, apply_updates
from dimat_jax.algorithms.memory import MemoryState, remembering
from dimat_jax.errors import UserError
from dimat_jax.options import Option
from dimat_jax.placement import Placement

__all__ = ["GRADIENT", "check_gradient", "looking_ahead", "stepped"]

GRADIENT = Option(
    "merge.gradient",
    "after_merge",
    "Where the gradient of the step after a merge is computed: at the merged weights, "
    "as in the published runs (after_merge), or at an agent's own weights before it "
    "merges (before_merge), as in Algorithm 1 of the DIMAT paper.",
    choices=("after_merge", "before_merge"),
)


def check_gradient(gradient: str, inner: str) -> None:
    """Refuses a step that waits for a merge, if it consists of more than training.

    Args:
        gradient: a value of `GRADIENT`.
        inner: the name of the algorithm between merges.

    Raises:
        UserError: agents gossip between merges.
    """
    if gradient == "before_merge" and inner != "local":
        raise UserError(
            f"gradient is {gradient!r}, but between merges agents run {inner}, whose "
            "steps mix weights themselves; inner must be 'local'"
        )


def looking_ahead(inner: Algorithm, task: Task, placement: Placement) -> Algorithm:
    """Makes an algorithm that can compute a step and leave it to be taken later.

    The memory "update" holds what is to be added to the params; it is 0 if no step
    waits. `stepped` takes the step.

    Args:
        inner: training alone: `local`.
        task: the task that the agents learn.
        placement: the devices on which the agents live.
    """

    def step(state: MemoryState, batch, network, key):
        local_state, metrics = inner.step(state.local, batch, network, key)
        return state._replace(local=local_state), metrics

    def ahead(state: MemoryState, batch, network, key):
        old = state.local.variables["params"]
        local_state, metrics = inner.step(state.local, batch, network, key)
        variables = local_state.variables
        update = jax.tree.map(jnp.subtract, variables["params"], old)
        local_state = local_state._replace(variables={**variables, "params": old})
        return MemoryState(local_state, {"update": update}, state.marks), metrics

    waiting = remembering(
        inner,
        task,
        placement,
        memories=["update"],
        step=step,
        messages=lambda state: inner.messages(state.local),
    )
    return waiting._replace(ahead=ahead)


def stepped(algorithm: Algorithm, merged: State, waiting: State) -> State:
    """Returns a merged state after the step that has waited for the merge.

    Args:
        algorithm: an algorithm made by `looking_ahead`.
        merged: the state after the merge.
        waiting: the state before it, in the same frame.
    """
    variables = apply_updates(algorithm.variables(merged), waiting.memory["update"])
    return algorithm.with_variables(merged, variables)
