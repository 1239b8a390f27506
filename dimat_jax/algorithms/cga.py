"""Cross-gradient aggregation: steps that do not increase any neighbour's loss.

    g_ij  =  the gradient of agent j's loss at x_i (j has received x_i, and sends g_ij)
    u     =  argmin_{u >= 0}  1/2 u' G G' u + (G g_i)' u,    G = (g_ij)_j, with g_ii
    g~_i  =  G' u + g_i
    v_i  <-  beta v_i - alpha g~_i,    x_i  <-  sum_j W_ij x_j + v_i

(CGA, Esfandiari et al. 2021, arXiv 2103.02051, Algorithm 1.) The quadratic program
projects g_i onto the directions with <g~, g_ij> >= 0 for all j, so that a small step
along g~ increases neither the agent's own loss nor, to first order, a neighbour's. The
program above is the dual one, so u >= 0. There is one for each agent, over the whole
gradient. It minimises |G' u + g_i| too, which is a non-negative least-squares problem.

CompCGA (section 3.3 there) compresses the cross-gradients, and adds what a message has
lost to the next one.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Key

from dimat_jax.algorithms.base import (
    Algorithm,
    Gradient,
    Task,
    apply_updates,
    gradient,
    one_agent,
    optimizer_step,
)
from dimat_jax.algorithms.conditions import undirected
from dimat_jax.algorithms.exchange import Exchange
from dimat_jax.algorithms.local import LocalState, local
from dimat_jax.algorithms.memory import MemoryState, remembering
from dimat_jax.algorithms.record import GRAPH, AlgorithmRecord
from dimat_jax.compression import COMPRESSOR, Compressor, none, with_feedback
from dimat_jax.ledger import Messages
from dimat_jax.mixing import mix
from dimat_jax.placement import Placement
from dimat_jax.topology import Adjacency
from dimat_jax.tree import PyTree

__all__ = ["RECORDS", "cga", "project"]

# The number of steps of the first-order solver whose answer is where pivoting starts.
_ITERATIONS = 100
# A coefficient or a slope below minus this number counts as negative.
_TOLERANCE = 1e-6
# The number of exchanges of all wrong coefficients at once that may bring no progress.
_PATIENCE = 3


def cga(
    task: Task,
    tx: optax.GradientTransformation,
    placement: Placement,
    *,
    adjacency: Adjacency,
    compressor: Compressor = none(),  # noqa: B008
) -> Algorithm:
    """Gossips and exchanges gradients with every step. W must be doubly stochastic.

    Running statistics come from an agent's own model on its own data, and are averaged
    like the params. A neighbour that is absent, or has no examples, is no constraint.

    Args:
        task: the task that the agents learn.
        tx: the optimizer that makes a step from the projected gradient; the paper uses
            `OPTIMIZERS["heavy_ball"]`.
        placement: the devices on which the agents live.
        adjacency: all edges that ever exist. They are undirected, because gradients
            are sent back along them.
        compressor: the compressor of the cross-gradients.
    """
    exchange = Exchange.over(adjacency, placement.slots)
    slots = range(exchange.neighbours.shape[1])
    ask_neighbours = _cross_gradients(task, placement, exchange)

    @placement.per_agent
    def aggregate(own, crossed, residuals, active, key):
        if residuals:
            crossed, residuals = _compressed(
                compressor, crossed, residuals, active, key
            )
        return project(own, crossed, active), residuals

    @placement.per_agent
    def adapt(direction, state, batch):
        params = state.variables["params"]
        return optimizer_step(tx, batch, direction, state.opt_state, params)

    def step(state: MemoryState, batch, network, key):
        gradient_key, compression_key = jax.random.split(key)
        variables = state.local.variables
        own, crossed, active = ask_neighbours(
            variables, batch, network, placement.keys(gradient_key)
        )
        direction, lost = aggregate(
            own.grads,
            crossed,
            list(state.memory.values()),
            active,
            placement.keys(compression_key),
        )
        updates, opt_state = adapt(direction, state.local, batch)
        mixed = mix(network.W, {**variables, **own.model_state}, placement)
        local_state = LocalState(apply_updates(mixed, updates), opt_state)
        memory = dict(zip(state.memory, lost, strict=True))
        return MemoryState(local_state, memory), own.metrics

    def messages(state):
        variables = one_agent(state.local.variables)
        gradients = compressor.message(variables["params"])
        # An agent can compute a neighbour's gradient only once it has its model.
        return Messages(step={**variables, "gradients": gradients}, turns=2)

    return remembering(
        local(task, tx, placement),
        task,
        placement,
        memories=[] if compressor.lossless else [f"lost{k}" for k in slots],
        step=step,
        messages=messages,
    )


def _cross_gradients(
    task: Task, placement: Placement, exchange: Exchange
) -> Callable[..., tuple[Gradient, list[PyTree], Array]]:
    """Makes the function with which agents ask their neighbours for gradients.

    `ask(variables, batch, network, keys) -> (own, crossed, active)` returns every
    agent's own `Gradient`; for each k the gradient of its model on its k-th neighbour's
    data; and which of these are constraints, bool `[agents, neighbours]`.
    """

    @placement.per_agent
    def gradient_on(variables, batch, key):
        return gradient(task, variables, batch, key)

    def ask(variables, batch, network, keys):
        returned = [
            gradient_on(placement.pick(variables, senders), batch, keys).grads
            for senders in exchange.neighbours.T
        ]
        crossed = [
            exchange.answers(returned, k, placement) for k in range(len(returned))
        ]
        # An agent without examples has no gradient to send, and is no constraint.
        answering = network.active_edges & batch.mask.any(axis=1)[None, :]
        own = gradient_on(variables, batch, keys)
        return own, crossed, exchange.active(answering)

    return ask


def _compressed(
    compressor: Compressor,
    crossed: list[PyTree],
    residuals: list[PyTree],
    active: Bool[Array, " others"],
    key: Key[Array, ""],
) -> tuple[list[PyTree], list[PyTree]]:
    """Compresses the cross-gradients that are sent to one agent.

    Args:
        compressor: the compressor of each cross-gradient.
        crossed: the cross-gradient from each neighbour.
        residuals: for each neighbour, what its messages have lost so far.
        active: whether each neighbour sends.
        key: the randomness of the compressor; the key is consumed.

    Returns:
        the cross-gradients that the agent receives, and the new residuals.
    """
    received, new_residuals = [], []
    for k, (message, residual) in enumerate(zip(crossed, residuals, strict=True)):
        decompressed, lost = with_feedback(
            compressor, message, residual, jax.random.fold_in(key, k)
        )
        # A neighbour that is not active has sent nothing, so it has lost nothing.
        keep = functools.partial(jnp.where, active[k])
        received.append(decompressed)
        new_residuals.append(jax.tree.map(keep, lost, residual))
    return received, new_residuals


def project(
    own: PyTree, others: list[PyTree], active: Bool[Array, " others"]
) -> PyTree:
    """Projects a gradient onto the directions that agree with all other gradients.

    Args:
        own: one agent's gradient g, which is one of the constraints itself.
        others: the gradients of the agent's model on its neighbours' data, each shaped
            like `own`.
        active: whether each of `others` is a constraint.

    Returns:
        g~ = G' u + g, with <g~, g_j> >= 0 for every row g_j of G, up to the solver's
        tolerance.
    """
    flat, unravel = ravel_pytree(own)
    rows = [flat, *(ravel_pytree(other)[0] for other in others)]
    counts = jnp.concatenate([jnp.ones(1), active.astype(jnp.float32)])
    G = jnp.stack(rows) * counts[:, None]
    # The constraints depend only on the directions of the gradients, so these get unit
    # length. The solver needs only their coordinates in the space that they span.
    lengths = jnp.linalg.norm(G, axis=1, keepdims=True)
    Q, R = jnp.linalg.qr((G / jnp.where(lengths > 0, lengths, 1)).T)
    target = -(Q.T @ flat) / jnp.where(lengths[0] > 0, lengths[0], 1)
    return unravel(flat + lengths[0] * (Q @ (R @ _non_negative(R, target))))


def _non_negative(
    A: Float[Array, "rows n"], b: Float[Array, " rows"]
) -> Float[Array, " n"]:
    """Finds the u >= 0 that minimises |A u - b|, for columns of A of length 0 or 1.

    A first-order solver hardly moves if columns are nearly collinear, as gradients are.
    So its answer is only the starting point of block principal pivoting, which is
    exact. Pivoting solves for the coefficients of a support, moves the coefficients
    that are wrong into or out of the support, and repeats this (Portugal, Judice &
    Vicente 1994; Kim & Park 2011).
    """

    def find_wrong(support, u):
        slope = A.T @ (A @ u - b)
        return jnp.where(support, u < -_TOLERANCE, slope < -_TOLERANCE)

    def exchange(_, state):
        support, best, fewest, patience = state
        allowed = support.astype(A.dtype)
        u = jnp.linalg.lstsq(A * allowed[None, :], b)[0] * allowed
        wrong = find_wrong(support, u)
        count = wrong.sum()
        # All wrong coefficients are exchanged at once as long as that helps. After
        # that only the last one is exchanged, which cannot go round in a cycle.
        patience = jnp.where(count < fewest, _PATIENCE, patience - 1)
        last = jnp.cumsum(wrong) == count
        flipped = wrong & ((patience > 0) | last)
        positive = jnp.maximum(u, 0)
        better = jnp.linalg.norm(A @ positive - b) < jnp.linalg.norm(A @ best - b)
        best = jnp.where(better, positive, best)
        return support ^ flipped, best, jnp.minimum(count, fewest), patience

    start = optax.nnls(A, b, _ITERATIONS)
    state = (start > 0, start, len(b) + 1, _PATIENCE)
    return jax.lax.fori_loop(0, 3 * len(b), exchange, state)[1]


RECORDS = (
    AlgorithmRecord(
        "cga",
        cga,
        leads_to=GRAPH,
        summary="Agents exchange gradients, and take steps that agree with those of "
        "all neighbours (Esfandiari et al. 2021).",
        network=undirected,
        optimizer="heavy_ball",
        facts=frozenset({"adjacency"}),
    ),
    AlgorithmRecord(
        "compcga",
        cga,
        leads_to=(*GRAPH, COMPRESSOR),
        summary="It is CGA with compressed cross-gradients (Esfandiari et al. 2021).",
        network=undirected,
        optimizer="heavy_ball",
        compressor="sign",
        facts=frozenset({"adjacency", "compressor"}),
    ),
)
