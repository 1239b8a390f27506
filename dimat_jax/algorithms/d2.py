"""D2: decentralized SGD for agents whose data differ.

    x_i(t+1)  =  sum_j W_ij (2 x_j(t) - x_j(t-1) + u_j(t) - u_j(t-1)),    u = -alpha g

(D2, Tang et al. 2018, arXiv 1803.07068, Algorithm 1; x(1) = W (x(0) + u(0)).) The part
of an agent's gradient that stays the same from step to step cancels, so the variance
between the agents' data does not matter. Here the state is kept as the increment

    s(t) = x(t) - x(t-1) - u(t-1),    s(0) = 0,    z = x(t) + s(t) + u(t),
    x(t+1) = W z,                                  s(t+1) = s(t) + W z - z.

W must be symmetric, have eigenvalues above -1/3 (Assumption 1), and never change.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dimat_jax.algorithms.base import (
    Algorithm,
    Task,
    gradient,
    one_agent,
    optimizer_step,
)
from dimat_jax.algorithms.conditions import symmetric
from dimat_jax.algorithms.local import LocalState, local
from dimat_jax.algorithms.memory import MemoryState, remembering
from dimat_jax.algorithms.record import GRAPH, AlgorithmRecord
from dimat_jax.ledger import Messages
from dimat_jax.mixing import mix
from dimat_jax.network import Links, NetworkError
from dimat_jax.placement import Placement
from dimat_jax.tree import take

__all__ = ["RECORD", "constant_symmetric", "d2"]


def d2(task: Task, tx: optax.GradientTransformation, placement: Placement) -> Algorithm:
    """Gossips with every local step. W must be `constant_symmetric`.

    Args:
        task: the task that the agents learn.
        tx: the optimizer that makes the step u; the paper uses plain SGD.
        placement: the devices on which the agents live.
    """

    def adapt(state: MemoryState, batch, key):
        (variables, opt_state), memory, _ = state
        grads, model_state, metrics = gradient(task, variables, batch, key)
        updates, opt_state = optimizer_step(
            tx, batch, grads, opt_state, variables["params"]
        )
        ahead = jax.tree.map(
            lambda x, s, u: x + s + u,
            variables["params"],
            memory["increment"],
            updates,
        )
        return {**variables, **model_state, "params": {}}, ahead, opt_state, metrics

    def step(state, batch, network, key):
        sent, ahead, opt_state, metrics = placement.per_agent(adapt)(
            state, batch, placement.keys(key)
        )
        # The mean of the increments must stay 0: no later step corrects it. In float32
        # the weights do not sum to 1 exactly, so they are applied only to the agents'
        # differences from agent 0. On least squares the error after 40,000 steps is
        # then 5e-6, and otherwise 0.2.
        origin = take(ahead, slice(1))
        own = jax.tree.map(jnp.subtract, ahead, origin)
        mixed = mix(network.W, own, placement)
        increment = jax.tree.map(
            lambda s, old, new: s + (new - old), state.memory["increment"], own, mixed
        )
        params = jax.tree.map(jnp.add, origin, mixed)
        variables = {**mix(network.W, sent, placement), "params": params}
        local_state = LocalState(variables, opt_state)
        return MemoryState(local_state, {"increment": increment}), metrics

    return remembering(
        local(task, tx, placement),
        task,
        placement,
        memories=["increment"],
        step=step,
        messages=lambda state: Messages(step=one_agent(state.local.variables)),
    )


def constant_symmetric(name: str, links: Links) -> None:
    """W is symmetric, never changes, and has only eigenvalues above -1/3.

    Raises:
        NetworkError: the network changes over time, or W is not symmetric, not doubly
            stochastic, or has an eigenvalue of -1/3 or less.
    """
    if links.changes:
        raise NetworkError(
            f"{name} needs the same network at every step: no changing topology, no "
            "dropout, no lossy links"
        )
    symmetric(name, links)
    least = float(np.linalg.eigvalsh(links.mixing_matrix[0]).min())
    if least <= -1 / 3 + 1e-9:
        raise NetworkError(
            f"{name} needs a mixing matrix whose eigenvalues are above -1/3, but the "
            f"least is {least:.4f}; mixing='lazy', (I + W) / 2, has none below 0"
        )


RECORD = AlgorithmRecord(
    "d2",
    d2,
    leads_to=GRAPH,
    summary="Increments cancel the differences between the agents' data (Tang et al. "
    "2018).",
    network=constant_symmetric,
    optimizer="sgd",
    other_optimizers=False,
)
