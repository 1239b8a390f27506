"""How much of whom: mixing matrices, and mixing stacked agents with them.

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

from dimat_jax.errors import UserError
from dimat_jax.options import Option, Record, registry
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
    "FROM_FILE",
    "MIXING",
    "MIXINGS",
    "MixingError",
    "MixingMatrix",
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


class MixingError(UserError):
    """A graph that a mixing rule does not fit, or a matrix that is no mixing matrix."""


def _at_every_time(rule: Rule) -> Callable[[Adjacency | Schedule], MixingMatrix]:
    """Makes a rule for one graph into one for a stack of them, too."""

    @functools.wraps(rule)
    def mixing(adjacency):
        if adjacency.ndim == 2:
            return rule(adjacency)
        return np.stack([rule(graph) for graph in adjacency])

    return mixing


@_at_every_time
def uniform(adjacency: Adjacency) -> MixingMatrix:
    """1 / (max degree + 1) to every neighbour, the rest to oneself; float64.

    On a regular graph that is 1 / (degree + 1) for oneself too: 1/N when fully
    connected, 1/3 on a ring. On others these are the max-degree weights. Doubly
    stochastic on every undirected graph, and on directed ones in which everyone sends
    to as many as they receive from.

    Raises:
        MixingError: a directed graph in which that is not so.
    """
    received, sent = adjacency.sum(axis=1), adjacency.sum(axis=0)
    if (received != sent).any():
        agent = int(np.argmax(received != sent))
        raise MixingError(
            f"uniform weights need agents who send to as many as they receive from, "
            f"but agent {agent} receives from {received[agent]} and sends to "
            f"{sent[agent]}; column_stochastic weights (with push-sum) do not need that"
        )
    return _with_remainder_on_diagonal(adjacency / (received.max(initial=0) + 1))


@_at_every_time
def metropolis_hastings(adjacency: Adjacency) -> MixingMatrix:
    """1 / (1 + max(degree_i, degree_j)) on every edge, the rest to oneself; float64.

    Doubly stochastic on every undirected graph, and no agent needs to know more than
    its neighbours' degrees (Xiao, Boyd & Lall 2006).

    Raises:
        MixingError: a directed graph.
    """
    _require_undirected(adjacency, "metropolis_hastings")
    degree = adjacency.sum(axis=1)
    return _with_remainder_on_diagonal(
        adjacency / (1 + np.maximum.outer(degree, degree))
    )


@_at_every_time
def lazy(adjacency: Adjacency) -> MixingMatrix:
    """(I + W) / 2 with uniform W: half of everyone stays; float64.

    Its eigenvalues are at least 0, which D2 (Tang et al. 2018) and consensus on
    bipartite graphs ask for.

    Raises:
        MixingError: as `uniform`.
    """
    return (np.eye(len(adjacency)) + uniform(adjacency)) / 2


@_at_every_time
def column_stochastic(adjacency: Adjacency) -> MixingMatrix:
    """Every sender splits itself evenly over its receivers and itself; float64.

    Columns sum to 1, rows need not: what push-sum takes on directed graphs (Assran et
    al. 2019, section 3).
    """
    sent = adjacency | np.eye(len(adjacency), dtype=bool)
    return sent / sent.sum(axis=0)


@_at_every_time
def row_stochastic(adjacency: Adjacency) -> MixingMatrix:
    """Every receiver takes the mean of what it has and gets; float64.

    Rows sum to 1, columns need not: the average over agents is not preserved.
    """
    received = adjacency | np.eye(len(adjacency), dtype=bool)
    return received / received.sum(axis=1, keepdims=True)


@_at_every_time
def fastest(adjacency: Adjacency) -> MixingMatrix:
    """The symmetric weights of the largest spectral gap; float64.

    Minimises the spectral norm of W - 11^T / N over symmetric W on the graph's edges
    with rows that sum to 1 (Xiao & Boyd 2004, equation 17), a semidefinite program; in
    a graph that is not connected, for every component. Some weights may be negative.
    Takes the optional package cvxpy.

    Raises:
        MixingError: a directed graph, cvxpy is not installed, or it finds no solution.
    """
    _require_undirected(adjacency, "fastest")
    weights = np.zeros(adjacency.shape)
    for component in components(adjacency):
        own = np.ix_(component, component)
        weights[own] = _fastest_connected(adjacency[own])
    return _with_remainder_on_diagonal(weights)


def _fastest_connected(adjacency: Adjacency) -> MixingMatrix:
    """The weights of a connected graph's edges; 0 off them."""
    n_agents = len(adjacency)
    if adjacency.sum() == n_agents * (n_agents - 1):
        return adjacency / n_agents  # everyone with everyone: consensus in one step
    try:
        import cvxpy  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MixingError(
            "fastest weights need cvxpy: pip install 'dimat_jax[sdp]'"
        ) from error
    # W = I - sum_e w_e (e_i - e_j)(e_i - e_j)^T: symmetric with rows that sum to 1.
    ends = np.argwhere(np.triu(adjacency))
    edges = np.arange(len(ends))
    incidence = np.zeros((n_agents, len(ends)))
    incidence[ends[:, 0], edges], incidence[ends[:, 1], edges] = 1, -1
    weights, norm = cvxpy.Variable(len(ends)), cvxpy.Variable()
    identity = np.eye(n_agents)
    away = identity - incidence @ cvxpy.diag(weights) @ incidence.T - 1 / n_agents
    problem = cvxpy.Problem(
        cvxpy.Minimize(norm), [away << norm * identity, away >> -norm * identity]
    )
    try:
        problem.solve(solver=cvxpy.CLARABEL)
    except cvxpy.SolverError as error:
        raise MixingError(f"the fastest weights were not found: {error}") from error
    if weights.value is None:
        raise MixingError(f"the fastest weights were not found: {problem.status}")
    matrix = np.zeros((n_agents, n_agents))
    matrix[ends[:, 0], ends[:, 1]] = weights.value
    return matrix + matrix.T


def from_file(adjacency: Adjacency | Schedule, *, file: str) -> MixingMatrix:
    """Weights from a file, one matrix or a stack of them; float64.

    They are a ready matrix for the whole graph, and no rule that could be applied anew
    to a part of it.

    Raises:
        TopologyError: the file cannot be read, or is not for so many agents.
        MixingError: neither the matrix's rows nor its columns sum to 1, or it has a
            weight where the graph has no edge.
    """
    matrix = read_matrix(file, adjacency.shape[-1])
    return check_mixing_matrix(matrix, adjacency)


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
    """A mixing matrix that somebody made themselves, or a stack of them, as float64.

    Args:
        mixing_matrix: rows or columns (or both), at all times the same, sum to 1.
            Weights may be negative.
        adjacency: if given, the graph that it is to be for. The periods are equal, or
            the matrix is one for all times; there are weights on edges alone.

    Raises:
        MixingError: it is not so; the message names the row, or the entry.
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


# For matrices that were written down in decimals, or in float32.
_TOLERANCE = 1e-6


def rows_sum_to_one(mixing_matrix: MixingMatrix, tolerance: float = _TOLERANCE) -> bool:
    """Whether consensus, once reached, stays; at all times, for a stack."""
    return columns_sum_to_one(np.swapaxes(mixing_matrix, -1, -2), tolerance)


def columns_sum_to_one(
    mixing_matrix: MixingMatrix, tolerance: float = _TOLERANCE
) -> bool:
    """Whether mixing preserves the sum over agents; at all times, for a stack."""
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


def spectral_gap(mixing_matrix: MixingMatrix) -> float:
    """1 - |lambda_2|, lambda_2 the eigenvalue of second largest modulus.

    0: some agents never hear of each other; 1: consensus in a single step. The paper's
    rho is |lambda_2|^2. Of a stack `[period, agents, agents]` it is the gap of the
    product W_period ... W_2 W_1, which a whole period does.
    """
    whole = np.asarray(mixing_matrix, np.float64)
    if whole.ndim == 3:
        whole = functools.reduce(lambda product, W: W @ product, whole)
    if len(whole) == 1:
        return 1.0
    moduli = np.sort(np.abs(np.linalg.eigvals(whole)))
    # Rounding may put an eigenvalue of modulus 1 a hair above it.
    return float(np.clip(1 - moduli[-2], 0.0, 1.0))


def mix(mixing_matrix: Float[Array, "agents agents"], stacked: PyTree) -> PyTree:
    """sum_j W[i, j] x_j for every leaf `[agents, ...]` of a stacked tree.

    A leaf keeps its dtype. The sum is computed in float32, or in the leaf's dtype where
    that is finer or complex. Leaves that are no real or complex numbers (counters) stay
    each agent's own.
    """

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


MIXINGS: dict[str, Record[MixingMatrix]] = registry(
    Record("uniform", uniform),
    Record("max_degree", uniform),
    Record("metropolis_hastings", metropolis_hastings),
    Record("lazy", lazy),
    Record("column_stochastic", column_stochastic),
    Record("row_stochastic", row_stochastic),
    Record("fastest", fastest),
)
"""Rules for any graph: `MIXINGS[name](adjacency)` is a mixing matrix, or a stack."""

FROM_FILE = Record("file", from_file, (MATRIX_FILE,))

MIXING = Option(
    "mixing",
    "uniform",
    "The rule that gives the edges of the graph their weights.",
    choices={**MIXINGS, FROM_FILE.name: FROM_FILE},
)
