"""What algorithms share that remember more than variables and an optimizer.

A memory is a tree that is shaped like the params: a tracker, a momentum. It is 0 at the
start and after a merge, which makes it meaningless, and lives in its agent's frame.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

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
    """

    local: LocalState
    memory: dict[str, PyTree]


def remembering(
    alone: Algorithm,
    task: Task,
    placement: Placement,
    *,
    memories: Sequence[str],
    step: Callable,
    messages: Callable[[State], Messages],
) -> Algorithm:
    """An algorithm on `MemoryState`s.

    Args:
        alone: on `LocalState`s, e.g. `local`.
        task: what is learned.
        placement: where the agents live.
        memories: their names.
        step: as `Algorithm.step`.
        messages: as `Algorithm.messages`.
    """

    def restarted(local_state: LocalState) -> MemoryState:
        params = local_state.variables["params"]
        return MemoryState(
            local_state,
            {name: jax.tree.map(jnp.zeros_like, params) for name in memories},
        )

    @placement.per_agent
    def permute(perms, memory):
        return {
            name: permute_params(task.spec, perms, tree)
            for name, tree in memory.items()
        }

    return Algorithm(
        init=lambda variables: restarted(alone.init(variables)),
        step=step,
        communicate=alone.communicate,
        variables=lambda state: alone.variables(state.local),
        with_variables=lambda state, variables: restarted(
            alone.with_variables(state.local, variables)
        ),
        aligned=lambda state, perms: MemoryState(
            alone.aligned(state.local, perms), permute(perms, state.memory)
        ),
        messages=messages,
    )
