"""The state of algorithms that keep more than variables and an optimizer state.

A memory is a tree that is shaped like the params, such as a tracker or a momentum. It
is in its agent's frame. It is 0 at the start, and again after a merge, because the old
values do not fit the merged params.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dimat_jax.algorithms.base import Algorithm, State, Task, permute_params
from dimat_jax.algorithms.local import LocalState
from dimat_jax.ledger import Messages
from dimat_jax.placement import Placement
from dimat_jax.tree import PyTree

__all__ = ["MemoryState", "remembering"]


class MemoryState(NamedTuple):
    """The agents' states, stacked: every leaf is `[agents, ...]`.

    Attributes:
        local: the variables and the optimizer state.
        memory: the memories by name, each shaped like the params.
        marks: arrays that are in no frame and that no merge changes, e.g. the number of
            the last average that an agent has received.
    """

    local: LocalState
    memory: dict[str, PyTree]
    marks: dict[str, Array] = {}


def remembering(
    base: Algorithm,
    task: Task,
    placement: Placement,
    *,
    memories: Sequence[str],
    step: Callable,
    messages: Callable[[State], Messages],
    marks: Callable[[], dict[str, Array]] = dict,
) -> Algorithm:
    """Makes an algorithm on `MemoryState`s.

    Args:
        base: an algorithm on `LocalState`s, e.g. `local`.
        task: the task that the agents learn.
        placement: the devices on which the agents live.
        memories: the names of the memories.
        step: the local step, as `Algorithm.step`.
        messages: the messages, as `Algorithm.messages`.
        marks: the function that makes the marks at the start.
    """

    def restarted(local_state: LocalState, marks: dict[str, Array]) -> MemoryState:
        params = local_state.variables["params"]
        zeros = {name: jax.tree.map(jnp.zeros_like, params) for name in memories}
        return MemoryState(local_state, zeros, marks)

    def communicate(state, data, network, key):
        local_state, metrics = base.communicate(state.local, data, network, key)
        return state._replace(local=local_state), metrics

    @placement.per_agent
    def permute(perms, memory):
        return {
            name: permute_params(task.spec, perms, tree)
            for name, tree in memory.items()
        }

    return Algorithm(
        init=lambda variables: restarted(base.init(variables), marks()),
        step=step,
        communicate=communicate,
        variables=lambda state: base.variables(state.local),
        with_variables=lambda state, variables: restarted(
            base.with_variables(state.local, variables), state.marks
        ),
        with_statistics=lambda state, statistics: state._replace(
            local=base.with_statistics(state.local, statistics)
        ),
        aligned=lambda state, perms: MemoryState(
            base.aligned(state.local, perms),
            permute(perms, state.memory),
            state.marks,
        ),
        messages=messages,
    )
