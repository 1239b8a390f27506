"""RelaySGD: models are relayed along a tree, so that every agent averages all of them.

    x_i(t+1/2)  =  x_i(t) + u_i(t),    u = -alpha g
    m_ij(t)     =  x_i(t+1/2) + sum_k m_ki(t-1),    c_ij(t)  =  1 + sum_k c_ki(t-1)
    x_i(t+1)    =  (x_i(t+1/2) + sum_j m_ji(t)) / (1 + sum_j c_ji(t))

(Vogels et al. 2021, arXiv 2110.04175, Algorithm 1.) Agent i sends m_ij, and the number
c_ij of models in it, to its neighbour j. The sums in the second line are over i's other
neighbours k, and all m and c are 0 at first. On a tree every model arrives once, the
later the longer the way is, so agents average all models uniformly. There is no mixing
matrix.

The paper starts all agents from the same x. From different ones they agree on a
weighted mean. A message that does not arrive counts as 0, with c = 0: the average is
then of fewer models.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from dimat_jax import permutation
from dimat_jax.algorithms.base import Algorithm, Task, Variables, one_agent
from dimat_jax.algorithms.conditions import tree
from dimat_jax.algorithms.exchange import Exchange
from dimat_jax.algorithms.local import LocalState, local
from dimat_jax.algorithms.record import AlgorithmRecord
from dimat_jax.ledger import Messages
from dimat_jax.network import EDGE_LOSS
from dimat_jax.placement import Placement
from dimat_jax.topology import TOPOLOGY, Adjacency
from dimat_jax.tree import PyTree, is_inexact

__all__ = ["RECORD", "RelayState", "relaysgd"]


class RelayState(NamedTuple):
    """The agents' states, stacked: every leaf is `[agents, ...]`.

    Attributes:
        local: the variables and the optimizer state.
        received: for each k, the message m that an agent has got from its k-th
            neighbour in the last step, shaped like the variables.
        counts: the number of models in each of these messages.
    """

    local: LocalState
    received: list[Variables]
    counts: Int[Array, "agents most"]


def relaysgd(
    task: Task,
    tx: optax.GradientTransformation,
    placement: Placement,
    *,
    adjacency: Adjacency,
) -> Algorithm:
    """Relays models with every local step. The graph must be a `tree`.

    Running statistics are relayed and averaged like the params.

    Args:
        task: the task that the agents learn.
        tx: the optimizer that makes the step u; the paper uses SGD, with momentum too.
        placement: the devices on which the agents live.
        adjacency: all edges that ever exist, undirected.
    """
    exchange = Exchange.over(adjacency, placement.slots)
    columns = range(exchange.neighbours.shape[1])
    local_algorithm, relay = local(task, tx, placement), _relay(exchange, placement)

    def restarted(local_state: LocalState) -> RelayState:
        nothing = jax.tree.map(jnp.zeros_like, local_state.variables)
        received = [jax.tree.map(jnp.copy, nothing) for _ in columns]
        counts = jnp.zeros(exchange.neighbours.shape, int, device=placement.sharding)
        return RelayState(local_state, received, counts)

    def step(state: RelayState, batch, network, key):
        (own, opt_state), metrics = local_algorithm.step(
            state.local, batch, network, key
        )
        active = exchange.active(network.active_edges)
        variables, received, counts = relay(own, state.received, state.counts, active)
        return RelayState(LocalState(variables, opt_state), received, counts), metrics

    @placement.per_agent
    def permuted(state: RelayState, perms) -> list[Variables]:
        return [permutation.apply(task.spec, perms, m) for m in state.received]

    return Algorithm(
        init=lambda variables: restarted(local_algorithm.init(variables)),
        step=step,
        communicate=local_algorithm.communicate,
        variables=lambda state: state.local.variables,
        with_variables=lambda state, variables: restarted(
            state.local._replace(variables=variables)
        ),
        with_statistics=lambda state, statistics: state._replace(
            local=local_algorithm.with_statistics(state.local, statistics)
        ),
        aligned=lambda state, perms: state._replace(
            local=local_algorithm.aligned(state.local, perms),
            received=permuted(state, perms),
        ),
        messages=lambda state: Messages(
            step={
                **one_agent(state.local.variables),
                "relay_count": jax.ShapeDtypeStruct((), state.counts.dtype),
            }
        ),
    )


def _relay(exchange: Exchange, placement: Placement) -> Callable[..., tuple]:
    """Makes the function by which agents relay models and average them.

    `relay(own, received, counts, active) -> (average, received, counts)` takes the
    agents' variables, the messages of the last step, the numbers of models in them, and
    which messages arrive now, bool `[agents, most]`.
    """
    average = placement.per_agent(
        lambda total, n: _map(lambda x: x / n.astype(x.dtype), total)
    )

    def relay(own, received, counts, active):
        total, count = _sum(own, received), 1 + counts.sum(axis=1)
        # What a neighbour has sent itself does not go back to it.
        relayed = [_map(jnp.subtract, total, message) for message in received]
        counts = count[:, None] - counts
        received = [
            _only(active[:, k], exchange.answers(relayed, k, placement))
            for k in range(len(relayed))
        ]
        counts = jnp.where(active, counts[exchange.neighbours, exchange.place], 0)
        return average(_sum(own, received), 1 + counts.sum(axis=1)), received, counts

    return relay


def _map(fn, tree: PyTree, *rest: PyTree) -> PyTree:
    """Maps over leaves of numbers that can be averaged; counters do not change."""
    return jax.tree.map(
        lambda leaf, *others: fn(leaf, *others) if is_inexact(leaf) else leaf,
        tree,
        *rest,
    )


def _sum(own: PyTree, received: Sequence[PyTree]) -> PyTree:
    for message in received:
        own = _map(jnp.add, own, message)
    return own


def _only(arrives: Bool[Array, " agents"], message: PyTree) -> PyTree:
    """Returns a stacked message, or zeros for the agents that it does not reach."""
    return jax.tree.map(
        lambda m: jnp.where(arrives.reshape(-1, *[1] * (m.ndim - 1)), m, 0), message
    )


RECORD = AlgorithmRecord(
    "relaysgd",
    relaysgd,
    leads_to=(TOPOLOGY, EDGE_LOSS),
    summary="Models are relayed along a tree; every agent averages those of all "
    "others, some of them some steps late (Vogels et al. 2021).",
    network=tree,
    optimizer="sgd",
    facts=frozenset({"adjacency"}),
)
