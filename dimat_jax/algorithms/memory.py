"""What algorithms share that remember more than variables and an optimizer.

A memory is a tree that is shaped like the params: a tracker, a momentum. It is 0 at the
start and after a merge, which makes it meaningless, and lives in its agent's frame.
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
    """Stacked: every leaf is `[agents, ...]`.

    Attributes:
        local: variables and optimizer.
        memory: trees like the params, by name.
        marks: what is in no frame, and no merge changes, e.g. when an agent was last
            there.
    """

    local: LocalState
    memory: dict[str, PyTree]
    marks: dict[str, Array] = {}


def remembering(
    alone: Algorithm,
    task: Task,
    placement: Placement,
    *,
    memories: Sequence[str],
    step: Callable,
    messages: Callable[[State], Messages],
    marks: Callable[[], dict[str, Array]] = dict,
) -> Algorithm:
    """An algorithm on `MemoryState`s.

    Args:
        alone: on `LocalState`s, e.g. `local`.
        task: what is learned.
        placement: where the agents live.
        memories: their names.
        step: as `Algorithm.step`.
        messages: as `Algorithm.messages`.
        marks: makes those of the start.
    """

    def restarted(local_state: LocalState, marks: dict[str, Array]) -> MemoryState:
        params = local_state.variables["params"]
        zeros = {name: jax.tree.map(jnp.zeros_like, params) for name in memories}
        return MemoryState(local_state, zeros, marks)

    def communicate(state, data, network, key):
        local_state, metrics = alone.communicate(state.local, data, network, key)
        return state._replace(local=local_state), metrics

    @placement.per_agent
    def permute(perms, memory):
        return {
            name: permute_params(task.spec, perms, tree)
            for name, tree in memory.items()
        }

    return Algorithm(
        init=lambda variables: restarted(alone.init(variables), marks()),
        step=step,
        communicate=communicate,
        variables=lambda state: alone.variables(state.local),
        with_variables=lambda state, variables: restarted(
            alone.with_variables(state.local, variables), state.marks
        ),
        aligned=lambda state, perms: MemoryState(
            alone.aligned(state.local, perms),
            permute(perms, state.memory),
            state.marks,
        ),
        messages=messages,
    )
