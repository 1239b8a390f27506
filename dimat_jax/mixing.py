"""How much of whom: mixing matrices, and mixing stacked agents with them.

A mixing matrix W has a row for each receiver: agent i moves to sum_j W[i, j] x_j.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dimat_jax.errors import UserError
from dimat_jax.topology import Adjacency
from dimat_jax.tree import PyTree, is_inexact

__all__ = [
    "MIXINGS",
    "MixingError",
    "is_doubly_stochastic",
    "metropolis_hastings",
    "mix",
    "spectral_gap",
    "uniform",
]

MixingMatrix = Float[np.ndarray, "agents agents"]


class MixingError(UserError):
    """A graph that a mixing rule does not fit, or a matrix that is no mixing matrix."""


def uniform(adjacency: Adjacency) -> MixingMatrix:
    """1 / (max degree + 1) to every neighbour, the rest to oneself; float64.

    On a regular graph that is 1 / (degree + 1) for oneself too: 1/N when fully
    connected, 1/3 on a ring. Doubly stochastic on every undirected graph.
    """
    _require_undirected(adjacency, "uniform")
    degree = adjacency.sum(axis=1)
    return _with_remainder_on_diagonal(adjacency / (degree.max(initial=0) + 1))


def metropolis_hastings(adjacency: Adjacency) -> MixingMatrix:
    """1 / (1 + max(degree_i, degree_j)) on every edge, the rest to oneself; float64.

    Doubly stochastic on every undirected graph, and no agent needs to know more than
    its neighbours' degrees (Xiao, Boyd & Lall 2006).
    """
    _require_undirected(adjacency, "metropolis_hastings")
    degree = adjacency.sum(axis=1)
    return _with_remainder_on_diagonal(
        adjacency / (1 + np.maximum.outer(degree, degree))
    )


MIXINGS: dict[str, Callable[[Adjacency], MixingMatrix]] = {
    "uniform": uniform,
    "metropolis_hastings": metropolis_hastings,
}


def _with_remainder_on_diagonal(weights: MixingMatrix) -> MixingMatrix:
    return weights + np.diag(1 - weights.sum(axis=1))


def _require_undirected(adjacency: Adjacency, rule: str) -> None:
    if (adjacency != adjacency.T).any():
        receiver, sender = np.argwhere(adjacency & ~adjacency.T)[0]
        raise MixingError(
            f"{rule} weights need an undirected graph, but agent {receiver} receives "
            f"from agent {sender} and does not send to it"
        )


def is_doubly_stochastic(mixing_matrix: MixingMatrix, tolerance: float = 1e-6) -> bool:
    """Whether rows and columns sum to 1 and no weight is negative."""
    return bool(
        (mixing_matrix >= -tolerance).all()
        and np.allclose(mixing_matrix.sum(axis=0), 1, atol=tolerance)
        and np.allclose(mixing_matrix.sum(axis=1), 1, atol=tolerance)
    )


def spectral_gap(mixing_matrix: MixingMatrix) -> float:
    """1 - |lambda_2|, lambda_2 the eigenvalue of second largest modulus.

    0: some agents never hear of each other; 1: consensus in a single step. The paper's
    rho is |lambda_2|^2.
    """
    if len(mixing_matrix) == 1:
        return 1.0
    moduli = np.sort(np.abs(np.linalg.eigvals(np.asarray(mixing_matrix, np.float64))))
    # Rounding may put an eigenvalue of modulus 1 a hair above it.
    return float(np.clip(1 - moduli[-2], 0.0, 1.0))


def mix(mixing_matrix: Float[Array, "agents agents"], stacked: PyTree) -> PyTree:
    """sum_j W[i, j] x_j for every leaf `[agents, ...]` of a stacked tree.

    Computed in float32 whatever the leaf's dtype; leaves that are no real numbers
    (counters) stay each agent's own.
    """

    def mix_leaf(leaf):
        if not is_inexact(leaf):
            return leaf
        mixed = jnp.tensordot(
            mixing_matrix.astype(jnp.float32),
            leaf.astype(jnp.float32),
            axes=1,
            # GPUs and TPUs would round the factors to ten bits.
            precision=jax.lax.Precision.HIGHEST,
        )
        return mixed.astype(leaf.dtype)

    return jax.tree.map(mix_leaf, stacked)
