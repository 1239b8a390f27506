"""Mixing matrices, which say with what weights agents average, and `mix` itself.

A mixing matrix W has a row for each receiver: agent i moves to sum_j W[i, j] x_j. For a
topology that changes over time it is a stack `[period, agents, agents]`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from dimat_jax._fastest_mixing import MixingError, edge_weights
from dimat_jax._passing import weighted_sums
from dimat_jax._peer_graphs import PEERS, finite_time_weights
from dimat_jax._spectrum import second_modulus
from dimat_jax.options import Option, Record, Registry, Together, registry
from dimat_jax.placement import Placement
from dimat_jax.topology import (
    MATRIX_FILE,
    Adjacency,
    Schedule,
    components,
    read_matrix,
    schedule,
)
from dimat_jax.tree import PyTree, exact_dtype, is_inexact

__all__ = [
    "MIXING",
    "MIXINGS",
    "MixingError",
    "MixingMatrix",
    "WHOLE",
    "check_mixing_matrix",
    "column_stochastic",
    "columns_sum_to_one",
    "fastest",
    "from_file",
    "is_column_stochastic",
    "is_doubly_stochastic",
    "lazy",
    "metropolis_hastings",
    "mix",
    "row_stochastic",
    "rows_sum_to_one",
    "spectral_gap",
    "uniform",
]

MixingMatrix = Float[np.ndarray, "*period agents agents"]
Rule = Callable[[Adjacency], MixingMatrix]


def _at_every_time(rule: Rule) -> Callable[[Adjacency | Schedule], MixingMatrix]:
    """Extends a rule for one graph, so that it takes a stack of graphs too."""

    @functools.wraps(rule)
    def mixing(adjacency):
        if adjacency.ndim == 2:
            return rule(adjacency)
        return np.stack([rule(graph) for graph in adjacency])

    return mixing


@_at_every_time
def uniform(adjacency: Adjacency) -> MixingMatrix:
    """Each neighbour weighs 1 / (largest degree + 1); an agent itself has the rest.

    On a regular graph an agent itself weighs 1 / (degree + 1) too: 1/N if all agents
    are connected, 1/3 on a ring. On other graphs these are known as the max-degree
    weights. The matrix, float64, is doubly stochastic on every undirected graph, and on
    directed graphs in which each agent has as many receivers as senders.

    Raises:
        MixingError: an agent has not as many receivers as senders.
    """
    received, sent = adjacency.sum(axis=1), adjacency.sum(axis=0)
    if (received != sent).any():
        agent = int(np.argmax(received != sent))
        raise MixingError(
            "uniform, max_degree and lazy weights need agents that send to as many as "
            f"they receive from, but agent {agent} receives from {received[agent]} and "
            f"sends to {sent[agent]}; column_stochastic weights (for sgp) and "
            "row_stochastic ones (for algorithms that merge) do not need that"
        )
    return _with_remainder_on_diagonal(adjacency / (received.max(initial=0) + 1))


@_at_every_time
def metropolis_hastings(adjacency: Adjacency) -> MixingMatrix:
    """The edge of agents i and j weighs 1 / (1 + the larger of their degrees).

    An agent itself has the rest. The matrix, float64, is doubly stochastic on every
    undirected graph, and an agent needs to know nothing but its neighbours' degrees
    (Xiao, Boyd & Lall 2006).

    Raises:
        MixingError: the graph is directed.
    """
    _require_undirected(adjacency, "metropolis_hastings")
    degree = adjacency.sum(axis=1)
    return _with_remainder_on_diagonal(
        adjacency / (1 + np.maximum.outer(degree, degree))
    )


@_at_every_time
def lazy(adjacency: Adjacency) -> MixingMatrix:
    """The matrix is (I + W) / 2 with the uniform W: each agent keeps half of its own.

    On an undirected graph the eigenvalues of this float64 matrix are at least 0, which
    D2 (Tang et al. 2018) and consensus on bipartite graphs need.

    Raises:
        MixingError: as for `uniform`.
    """
    return (np.eye(len(adjacency)) + uniform(adjacency)) / 2


@_at_every_time
def column_stochastic(adjacency: Adjacency) -> MixingMatrix:
    """Every sender divides its weight evenly among its receivers and itself.

    The columns of this float64 matrix sum to 1, while its rows need not. Push-sum uses
    it on directed graphs (Assran et al. 2019, section 3).
    """
    sent = adjacency | np.eye(len(adjacency), dtype=bool)
    return sent / sent.sum(axis=0)


@_at_every_time
def row_stochastic(adjacency: Adjacency) -> MixingMatrix:
    """Every receiver takes the plain mean of its own weights and of those it receives.

    The rows of this float64 matrix sum to 1, while its columns need not, so the mean
    over agents is not preserved.
    """
    received = adjacency | np.eye(len(adjacency), dtype=bool)
    return received / received.sum(axis=1, keepdims=True)


@_at_every_time
def fastest(adjacency: Adjacency) -> MixingMatrix:
    """The symmetric weights that have the largest spectral gap on the graph.

    They are float64, and some of them may be negative. They minimise the spectral norm
    of W - 11^T / N over all symmetric W on the graph's edges whose rows sum to 1 (Xiao
    & Boyd 2004, equation 17). In a graph that is not connected each component is solved
    by itself. This semidefinite program needs the optional package cvxpy.

    Raises:
        MixingError: the graph is directed, cvxpy is not installed, or it finds no
            solution.
    """
    _require_undirected(adjacency, "fastest")
    weights = np.zeros(adjacency.shape)
    for component in components(adjacency):
        block = np.ix_(component, component)
        weights[block] = edge_weights(adjacency[block])
    return _with_remainder_on_diagonal(weights)


def from_file(adjacency: Adjacency | Schedule, *, file: str) -> MixingMatrix:
    """The matrix is read from a file: one matrix, a stack, or edges with weights.

    It is a float64 matrix for the whole graph. Unlike a rule, it cannot be applied anew
    to a part of the graph. If the file holds edges, each agent gives itself what these
    leave to 1.

    Raises:
        TopologyError: the file cannot be read, or its matrix has another number of
            agents.
        MixingError: neither the matrix's rows nor its columns sum to 1, or it has a
            weight where the graph has no edge.
    """
    matrix = read_matrix(file, adjacency.shape[-1])
    return check_mixing_matrix(matrix, adjacency)


def finite_time(adjacency: Schedule | Adjacency, *, peers: int) -> MixingMatrix:
    """The weights with which base_k_plus_1 graphs reach exact consensus in a period.

    They are float64, symmetric and doubly stochastic (Takezawa et al. 2023).

    Raises:
        OptionError, MixingError: `peers` is below 1, or is not the graph's.
    """
    PEERS.check(peers)
    matrix = finite_time_weights(adjacency.shape[-1], peers)
    if not np.array_equal(matrix * (1 - np.eye(len(matrix[0]))) > 0, adjacency):
        raise MixingError(f"finite_time weights need base_k_plus_1 of {peers} peer(s)")
    return matrix


def _with_remainder_on_diagonal(weights: MixingMatrix) -> MixingMatrix:
    return weights + np.diag(1 - weights.sum(axis=1))


def _require_undirected(adjacency: Adjacency, rule: str) -> None:
    if (adjacency != adjacency.T).any():
        receiver, sender = np.argwhere(adjacency & ~adjacency.T)[0]
        raise MixingError(
            f"{rule} weights need an undirected graph, but agent {receiver} receives "
            f"from agent {sender} and does not send to it"
        )


def check_mixing_matrix(
    mixing_matrix: ArrayLike, adjacency: Adjacency | Schedule | None = None
) -> MixingMatrix:
    """Checks a mixing matrix that no rule has made, or a stack of such matrices.

    Args:
        mixing_matrix: a matrix or a stack whose rows sum to 1 at all times, or whose
            columns do. Weights may be negative.
        adjacency: the graph that the matrix is for, if it is known. A stack must have
            the graph's period; a single matrix is used at all times. Only edges may
            have weights.

    Returns:
        the matrix as float64.

    Raises:
        MixingError: a condition does not hold; the message names the row or the entry.
    """
    matrix = np.asarray(mixing_matrix, np.float64)
    shape = list(matrix.shape)
    if matrix.ndim not in (2, 3) or shape[-1] != shape[-2] or not matrix.size:
        raise MixingError(
            f"a mixing matrix is [agents, agents], or a stack of such; got {shape}"
        )
    if not np.isfinite(matrix).all():
        raise MixingError("a mixing matrix holds finite numbers")
    if not rows_sum_to_one(matrix) and not columns_sum_to_one(matrix):
        rows = schedule(matrix).sum(axis=-1)
        time, agent = np.argwhere(~np.isclose(rows, 1, atol=_TOLERANCE))[0]
        raise MixingError(
            "a mixing matrix's rows or columns (or both) sum to 1; here neither do, "
            f"and row {agent} sums to {rows[time, agent]:g}{_at(time, matrix)}"
        )
    if adjacency is not None:
        _check_support(matrix, adjacency)
    return matrix


def _check_support(matrix: np.ndarray, adjacency: Adjacency | Schedule) -> None:
    weights, edges = schedule(matrix), schedule(adjacency)
    if weights.shape[1:] != edges.shape[1:] or len(weights) not in (1, len(edges)):
        raise MixingError(
            f"a mixing matrix of shape {list(matrix.shape)} does not fit a topology "
            f"of shape {list(adjacency.shape)}"
        )
    stray = np.argwhere((weights != 0) & ~edges & ~np.eye(edges.shape[-1], dtype=bool))
    if len(stray):
        time, receiver, sender = stray[0]
        weight = weights[time % len(weights), receiver, sender]
        raise MixingError(
            f"the mixing matrix has a weight of {weight:g} in row {receiver}, column "
            f"{sender}{_at(time, adjacency)}, but agent {receiver} does not receive "
            f"from agent {sender}"
        )


def _at(time: int | np.integer, stack: np.ndarray) -> str:
    return f" at time {time}" if len(schedule(stack)) > 1 else ""


# Sums may differ from 1 by this much: a matrix may have been written down in a few
# decimals, or in float32.
_TOLERANCE = 1e-6


def rows_sum_to_one(mixing_matrix: MixingMatrix, tolerance: float = _TOLERANCE) -> bool:
    """Whether every row sums to 1, so that mixing preserves a consensus.

    In a stack this must hold at all times.
    """
    return columns_sum_to_one(np.swapaxes(mixing_matrix, -1, -2), tolerance)


def columns_sum_to_one(
    mixing_matrix: MixingMatrix, tolerance: float = _TOLERANCE
) -> bool:
    """Whether every column sums to 1, so that mixing preserves the sum over agents.

    In a stack this must hold at all times.
    """
    return bool((np.abs(mixing_matrix.sum(axis=-2) - 1) <= tolerance).all())


def is_doubly_stochastic(
    mixing_matrix: MixingMatrix, tolerance: float = _TOLERANCE
) -> bool:
    """Whether rows and columns sum to 1 and no weight is negative."""
    return is_column_stochastic(mixing_matrix, tolerance) and rows_sum_to_one(
        mixing_matrix, tolerance
    )


def is_column_stochastic(
    mixing_matrix: MixingMatrix, tolerance: float = _TOLERANCE
) -> bool:
    """Whether columns sum to 1 and no weight is negative."""
    return bool((mixing_matrix >= -tolerance).all()) and columns_sum_to_one(
        mixing_matrix, tolerance
    )


def spectral_gap(mixing_matrix: MixingMatrix, *, per_step: bool = False) -> float:
    """Computes 1 - |lambda_2|; lambda_2 is the eigenvalue of second largest modulus.

    The gap is 1 if agents reach consensus in a single step. It is 0 if mixing alone
    does not lead to consensus, for example because some agents never receive anything
    from some others. The paper's rho is |lambda_2|^2. For a stack
    `[period, agents, agents]` the gap is that of the product W_period ... W_2 W_1,
    which is the effect of a whole period. The gap per step is that of a graph that does
    not change and has the same effect in a period: 1 - |lambda_2|^(1 / period).
    """
    matrices = schedule(np.asarray(mixing_matrix, np.float64))
    if matrices.shape[-1] == 1:
        return 1.0
    # Rounding may put an eigenvalue of modulus 1 a hair above it.
    modulus = np.clip(second_modulus(matrices), 0.0, 1.0)
    return float(1 - (modulus ** (1 / len(matrices)) if per_step else modulus))


def mix(
    mixing_matrix: Float[Array, "agents agents"],
    stacked: PyTree,
    placement: Placement | None = None,
) -> PyTree:
    """Computes sum_j W[i, j] x_j for every leaf `[agents, ...]` of a stacked tree.

    A leaf keeps its dtype. The sum is computed in float32, or in the leaf's dtype if
    that is more precise or complex. Leaves of other dtypes, such as integer counters,
    are not mixed: every agent keeps its own.

    Args:
        mixing_matrix: W.
        stacked: the tree.
        placement: the devices on which the agents live. With it, devices send each
            other only what W gives a weight to. Without it, the result is the same, and
            XLA decides what is sent: if agents live on several devices, that may be
            everything, to every device.
    """
    if placement is not None and placement.spread:
        leaves, treedef = jax.tree.flatten(stacked)
        sums = iter(
            weighted_sums(
                placement.mesh, mixing_matrix, list(filter(is_inexact, leaves))
            )
        )
        return treedef.unflatten(
            next(sums) if is_inexact(leaf) else leaf for leaf in leaves
        )

    def mix_leaf(leaf):
        if not is_inexact(leaf):
            return leaf
        dtype = exact_dtype(leaf.dtype)
        mixed = jnp.tensordot(
            mixing_matrix.astype(dtype),
            leaf.astype(dtype),
            axes=1,
            # GPUs and TPUs would round the factors to ten bits.
            precision=jax.lax.Precision.HIGHEST,
        )
        return mixed.astype(leaf.dtype)

    return jax.tree.map(mix_leaf, stacked)


MIXINGS: Registry[Record[MixingMatrix]] = registry(
    Record("uniform", uniform),
    Record("max_degree", uniform, summary="The same rule as uniform."),
    Record("metropolis_hastings", metropolis_hastings),
    Record("lazy", lazy),
    Record("column_stochastic", column_stochastic),
    Record("row_stochastic", row_stochastic),
    Record("fastest", fastest),
)
"""`MIXINGS[name](adjacency)` applies a rule. It returns a mixing matrix, or a stack."""

WHOLE: Registry[Record[MixingMatrix]] = registry(
    Record("file", from_file, (MATRIX_FILE,)),
    Record("finite_time", finite_time, (PEERS,)),
)
"""Matrices for a whole graph. They are no rules, so `MIXINGS` does not hold them."""

MIXING = Option(
    "mixing",
    "uniform",
    "The rule that gives the edges of the graph their weights.",
    choices=Together(MIXINGS, WHOLE),
)
