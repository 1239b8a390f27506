"""CHOCO-SGD: gossip of compressed differences.

    x_i(t+1/2)  =  x_i(t) + u_i(t),    u = -alpha g
    q_i         =  Q(x_i(t+1/2) - x^_i),    x^_i  <-  x^_i + q_i
    x_i(t+1)    =  x_i(t+1/2) + gamma sum_j W_ij (x^_j - x^_i)

(Koloskova, Stich & Jaggi 2019, arXiv 1902.00340, Algorithm 2.) x^_i is what others know
of agent i. Where a message may not arrive it is kept for every edge, as what that
neighbour knows: where a link fails, the neighbour goes on with what it knew, and so
does the agent. The mean over agents is preserved all the same, for W is symmetric.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from dimat_jax.algorithms.base import Algorithm, Task, one_agent
from dimat_jax.algorithms.conditions import symmetric
from dimat_jax.algorithms.exchange import Exchange
from dimat_jax.algorithms.local import LocalState, local
from dimat_jax.algorithms.memory import MemoryState, remembering
from dimat_jax.algorithms.record import GRAPH, AlgorithmRecord
from dimat_jax.compression import COMPRESSOR, Compressor, announce
from dimat_jax.ledger import Messages
from dimat_jax.mixing import mix
from dimat_jax.options import Option
from dimat_jax.placement import Placement
from dimat_jax.topology import Adjacency

__all__ = ["RECORD", "choco"]


GAMMA = Option(
    "gossip.gamma",
    1.0,
    "The consensus step size. The more a compressor loses, the smaller it must be: 1 "
    "works for int8, while top_k of a tenth needs less than a half.",
    above=0,
    at_most=1,
)


def choco(
    task: Task,
    tx: optax.GradientTransformation,
    placement: Placement,
    *,
    compressor: Compressor,
    lossy_edges: Adjacency | None = None,
    gamma: float = GAMMA.default,
) -> Algorithm:
    """Gossip of compressed params with every local step.

    Running statistics are few, and are averaged as they are.

    Args:
        task: what to learn.
        tx: makes the step; plain SGD is the paper's.
        placement: where the agents live.
        compressor: Q.
        lossy_edges: where messages may not arrive, or the network changes: all edges
            that there ever are, undirected. None: everything always arrives.
        gamma: the consensus step size; see `GAMMA`.

    Raises:
        OptionError: gamma is not above 0 and at most 1.
    """
    GAMMA.check(gamma)

    alone = local(task, tx, placement)
    if lossy_edges is None:
        names, gossip = ["known"], _reliable(placement, compressor, gamma)
    else:
        exchange = Exchange.over(lossy_edges, placement.slots)
        names = [f"known{k}" for k in range(exchange.neighbours.shape[1])]
        gossip = _by_edge(placement, compressor, gamma, exchange, names)

    def step(state: MemoryState, batch, network, key):
        gradient_key, compression_key = jax.random.split(key)
        half, metrics = alone.step(state.local, batch, network, gradient_key)
        variables, opt_state = half
        params, known = gossip(
            variables["params"], state.memory, network, placement.keys(compression_key)
        )
        mixed = mix(network.W, {**variables, "params": {}})
        local_state = LocalState({**mixed, "params": params}, opt_state)
        return MemoryState(local_state, known), metrics

    def messages(state):
        variables = one_agent(state.local.variables)
        params = compressor.message(variables["params"])
        return Messages(step={**variables, "params": params})

    return remembering(
        alone,
        task,
        placement,
        memories=names,
        step=step,
        messages=messages,
    )


def _reliable(placement: Placement, compressor: Compressor, gamma: float):
    """One x^ for each agent, which all its neighbours know."""

    tell = placement.per_agent(functools.partial(announce, compressor))

    def gossip(params, memory, network, keys):
        known = tell(params, memory["known"], keys)
        params = jax.tree.map(
            lambda x, heard, mine: x + gamma * (heard - mine),
            params,
            mix(network.W, known),
            known,
        )
        return params, {"known": known}

    return gossip


def _by_edge(
    placement: Placement,
    compressor: Compressor,
    gamma: float,
    exchange: Exchange,
    names: list[str],
):
    """One x^ for each agent and neighbour."""

    @placement.per_agent
    def tell(params, known, active, key):
        """What an agent's neighbours know of it, once it has told them."""

        def knows(k, before):
            # The same key for all neighbours: they are told the same.
            after = announce(compressor, params, before, key)
            return jax.tree.map(functools.partial(jnp.where, active[k]), after, before)

        return {name: knows(k, known[name]) for k, name in enumerate(names)}

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

    def gossip(params, memory, network, keys):
        active = exchange.active(network.active_edges)
        known = tell(params, memory, active, keys)
        answers = [known[name] for name in names]
        heard = [exchange.answers(answers, k) for k in range(len(names))]
        weights = exchange.weights(network.W) * active.astype(network.W.dtype)
        return meet(params, known, heard, weights), known

    return gossip


RECORD = AlgorithmRecord(
    "choco",
    choco,
    (GAMMA,),
    leads_to=(*GRAPH, COMPRESSOR),
    summary="Gossip of compressed differences (Koloskova et al. 2019).",
    network=symmetric,
    optimizer="sgd",
    compressor="int8",
    facts=frozenset({"compressor", "lossy_edges"}),
)
