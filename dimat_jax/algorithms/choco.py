"""CHOCO-SGD: gossip of compressed differences.

    x_i(t+1/2)  =  x_i(t) + u_i(t),    u = -alpha g
    q_i         =  Q(x_i(t+1/2) - x^_i),    x^_i  <-  x^_i + q_i
    x_i(t+1)    =  x_i(t+1/2) + gamma sum_j W_ij (x^_j - x^_i)

(Koloskova, Stich & Jaggi 2019, arXiv 1902.00340, Algorithm 2.) x^_i is what others know
of agent i. It is kept here for every edge, as what that neighbour knows: where a link
fails, the neighbour goes on with what it knew, and so does the agent. In a network that
does not fail all of an agent's x^ are the same, and it is the paper's algorithm; in any
other the mean over agents is preserved all the same, for W is symmetric.
"""

import jax
import optax

from dimat_jax.algorithms.base import (
    Algorithm,
    Task,
    descend,
    gradient,
    moved,
    one_agent,
)
from dimat_jax.algorithms.exchange import Exchange
from dimat_jax.algorithms.local import LocalState, local
from dimat_jax.algorithms.memory import MemoryState, remembering
from dimat_jax.compression import Compressor
from dimat_jax.errors import UserError
from dimat_jax.ledger import Messages
from dimat_jax.mixing import mix
from dimat_jax.placement import Placement
from dimat_jax.topology import Adjacency

__all__ = ["choco"]


def choco(
    task: Task,
    tx: optax.GradientTransformation,
    placement: Placement,
    *,
    adjacency: Adjacency,
    compressor: Compressor,
    gamma: float = 1.0,
) -> Algorithm:
    """Gossip of compressed params with every local step.

    Running statistics are few, and are averaged as they are.

    Args:
        task: what to learn.
        tx: makes the step; plain SGD is the paper's.
        placement: where the agents live.
        adjacency: all edges that there ever are; undirected.
        compressor: Q.
        gamma: the consensus step size; the more Q loses, the smaller: 1 does for int8,
            while top_k of a tenth needs less than a half.

    Raises:
        UserError: gamma is not above 0 and at most 1.
    """
    if not 0 < gamma <= 1:
        raise UserError(f"gamma must be above 0 and at most 1, got {gamma}")
    exchange = Exchange.over(adjacency, placement.slots)
    names = [f"known{k}" for k in range(exchange.neighbours.shape[1])]

    def adapt(state: LocalState, batch, key):
        variables, opt_state = state
        grads, model_state, metrics = gradient(task, variables, batch, key)
        updates, opt_state = descend(tx, batch, grads, opt_state, variables["params"])
        return moved({**variables, **model_state}, updates), opt_state, metrics

    @placement.per_agent
    def tell(params, known, active, key):
        """What an agent's neighbours know of it, once it has told them."""

        def told(k, name):
            before = known[name]
            difference = jax.tree.map(lambda x, old: x - old, params, before)
            # The same key for all neighbours: they are told the same.
            sent = compressor.compress(difference, key)
            return jax.tree.map(lambda old, q: old + active[k] * q, before, sent)

        return {name: told(k, name) for k, name in enumerate(names)}

    @placement.per_agent
    def meet(params, known, heard, weights):
        for k, name in enumerate(names):
            params = jax.tree.map(
                lambda x, mine, theirs, w=weights[k]: x + gamma * w * (theirs - mine),
                params,
                known[name],
                heard[k],
            )
        return params

    def step(state: MemoryState, batch, network, key):
        gradient_key, compression_key = jax.random.split(key)
        variables, opt_state, metrics = placement.per_agent(adapt)(
            state.local, batch, placement.keys(gradient_key)
        )
        active = exchange.active(network.active_edges)
        params = variables["params"]
        known = tell(params, state.memory, active, placement.keys(compression_key))
        told = [known[name] for name in names]
        heard = [exchange.answers(told, k) for k in range(len(names))]
        weights = exchange.weights(network.W) * active
        mixed = mix(network.W, {**variables, "params": {}})
        variables = {**mixed, "params": meet(params, known, heard, weights)}
        return MemoryState(LocalState(variables, opt_state), known), metrics

    def messages(state):
        variables = one_agent(state.local.variables)
        params = compressor.message(variables["params"])
        return Messages(step={**variables, "params": params})

    return remembering(
        local(task, tx, placement),
        task,
        placement,
        memories=names,
        step=step,
        messages=messages,
    )
