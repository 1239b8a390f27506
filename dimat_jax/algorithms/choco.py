"""CHOCO-SGD: agents gossip compressed differences.

    x_i(t+1/2)  =  x_i(t) + u_i(t),    u = -alpha g
    q_i         =  Q(x_i(t+1/2) - x^_i),    x^_i  <-  x^_i + q_i
    x_i(t+1)    =  x_i(t+1/2) + gamma sum_j W_ij (x^_j - x^_i)

(Koloskova, Stich & Jaggi 2019, arXiv 1902.00340, Algorithm 2.) x^_i is the estimate
that the other agents have of x_i. If messages can fail to arrive, there is one estimate
for every edge. When a link fails, both its ends go on with the old estimate. The mean
over agents is preserved in this case too, because W is symmetric.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from dimat_jax.algorithms._consensus_step import check_step, safe_step
from dimat_jax.algorithms.base import Algorithm, Task, one_agent
from dimat_jax.algorithms.conditions import symmetric
from dimat_jax.algorithms.exchange import Exchange
from dimat_jax.algorithms.local import LocalState, local
from dimat_jax.algorithms.memory import MemoryState, remembering
from dimat_jax.algorithms.record import GRAPH, AlgorithmRecord
from dimat_jax.compression import COMPRESSOR, Compressor, announce
from dimat_jax.ledger import Messages
from dimat_jax.mixing import MixingMatrix, mix
from dimat_jax.network import Links
from dimat_jax.options import Option
from dimat_jax.placement import Placement
from dimat_jax.topology import Adjacency

__all__ = ["RECORD", "choco"]


GAMMA = Option(
    "gossip.gamma",
    0.0,
    "The consensus step size of gossip with compressed messages. It must be smaller if "
    "a compressor loses more, or if agents give their neighbours more weight. On a "
    "ring, 1 is safe for int8, and .08 for random_k of a tenth. A value with which "
    "agents must drift apart is refused.",
    above=0,
    at_most=1,
    empty="the largest value that is safe with the compressor and the network",
)


def choco(
    task: Task,
    tx: optax.GradientTransformation,
    placement: Placement,
    *,
    compressor: Compressor,
    lossy_edges: Adjacency | None = None,
    mixing_matrix: MixingMatrix | None = None,
    gamma: float = GAMMA.default,
) -> Algorithm:
    """Gossips compressed params with every local step.

    Running statistics are few, so they are averaged without compression.

    Args:
        task: the task that the agents learn.
        tx: the optimizer that makes the step u; the paper uses plain SGD.
        placement: the devices on which the agents live.
        compressor: the compressor Q.
        lossy_edges: all edges that ever exist, undirected, if a message may be lost or
            the network changes. None if every message always arrives.
        mixing_matrix: W without faults, or a stack for all times, from which the
            default of gamma is found. None if it is not known.
        gamma: the consensus step size; see `GAMMA`.

    Raises:
        OptionError: gamma is out of range, or gossip with it must diverge.
    """
    GAMMA.check(gamma)
    if gamma and mixing_matrix is not None and lossy_edges is None:
        check_step(gamma, compressor, mixing_matrix)
    gamma = gamma or safe_step(compressor, mixing_matrix)

    local_algorithm = local(task, tx, placement)
    if lossy_edges is None:
        names, gossip = ["known"], _reliable(placement, compressor, gamma)
    else:
        exchange = Exchange.over(lossy_edges, placement.slots)
        names = [f"known{k}" for k in range(exchange.neighbours.shape[1])]
        gossip = _by_edge(placement, compressor, gamma, exchange, names)

    def step(state: MemoryState, batch, network, key):
        gradient_key, compression_key = jax.random.split(key)
        trained, metrics = local_algorithm.step(
            state.local, batch, network, gradient_key
        )
        variables, opt_state = trained
        params, known = gossip(
            variables["params"], state.memory, network, placement.keys(compression_key)
        )
        mixed = mix(network.W, {**variables, "params": {}}, placement)
        local_state = LocalState({**mixed, "params": params}, opt_state)
        return MemoryState(local_state, known), metrics

    def messages(state):
        variables = one_agent(state.local.variables)
        params = compressor.message(variables["params"])
        return Messages(step={**variables, "params": params})

    return remembering(
        local_algorithm,
        task,
        placement,
        memories=names,
        step=step,
        messages=messages,
    )


def _reliable(placement: Placement, compressor: Compressor, gamma: float):
    """Makes the gossip with one estimate x^ for each agent, which neighbours share."""

    update_known = placement.per_agent(functools.partial(announce, compressor))

    def gossip(params, memory, network, keys):
        known = update_known(params, memory["known"], keys)
        params = jax.tree.map(
            lambda x, average, own: x + gamma * (average - own),
            params,
            mix(network.W, known, placement),
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
    """Makes the gossip with one estimate x^ for each agent and each neighbour."""

    @placement.per_agent
    def update_known(params, known, active, key):
        """Updates the estimates that an agent's active neighbours have of it."""

        def update(k, before):
            # All neighbours get the same message, so the key is the same.
            after = announce(compressor, params, before, key)
            return jax.tree.map(functools.partial(jnp.where, active[k]), after, before)

        return {name: update(k, known[name]) for k, name in enumerate(names)}

    @placement.per_agent
    def step_to_consensus(params, known, received, weights):
        for k, name in enumerate(names):
            params = jax.tree.map(
                lambda x, own, other, w=weights[k]: x + gamma * w * (other - own),
                params,
                known[name],
                received[k],
            )
        return params

    def gossip(params, memory, network, keys):
        active = exchange.active(network.active_edges)
        known = update_known(params, memory, active, keys)
        answers = [known[name] for name in names]
        received = [exchange.answers(answers, k, placement) for k in range(len(names))]
        weights = exchange.weights(network.W) * active.astype(network.W.dtype)
        return step_to_consensus(params, known, received, weights), known

    return gossip


def converging(
    links: Links,
    *,
    compressor: Compressor,
    gamma: float = GAMMA.default,
) -> None:
    """Checks that gossip with gamma does not have to diverge on a network.

    Where agents drop out, links fail or the graph changes, no bound on gamma is known,
    so it is not checked.

    Raises:
        OptionError: it must diverge.
    """
    if gamma and not links.changes:
        check_step(gamma, compressor, links.mixing_matrix)


RECORD = AlgorithmRecord(
    "choco",
    choco,
    (GAMMA,),
    leads_to=(*GRAPH, COMPRESSOR),
    summary="Agents gossip compressed differences (Koloskova et al. 2019).",
    network=symmetric,
    optimizer="sgd",
    compressor="int8",
    facts=frozenset({"compressor", "lossy_edges", "mixing_matrix"}),
    check_together=converging,
)
