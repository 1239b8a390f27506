"""The second largest modulus of the eigenvalues of a product of mixing matrices."""

import functools

import numpy as np
from jaxtyping import Float
from scipy.sparse import csr_array
from scipy.sparse.linalg import ArpackNoConvergence, aslinearoperator, eigs, eigsh

from dimat_jax.topology import components, is_connected

__all__ = ["second_modulus"]

# For up to this number of agents all eigenvalues are computed, which takes a second.
_MOST_AT_ONCE = 512


def second_modulus(matrices: Float[np.ndarray, "period agents agents"]) -> float:
    """Computes the second largest modulus of the eigenvalues of W_period ... W_1.

    For many agents it is found by the iterations of Lanczos or Arnoldi, to rounding. If
    mixing is so slow that they do not end, as on a long ring, all eigenvalues are
    computed: for 4096 agents this takes some 15 seconds if W is symmetric, and minutes
    if it is not.

    Args:
        matrices: mixing matrices, float64, of at least two agents.
    """
    n_agents, symmetric = matrices.shape[-1], _symmetric(matrices)
    if n_agents > _MOST_AT_ONCE:
        if len(components(matrices != 0)) > 1:
            return 1.0
        # The iterations return a multiple eigenvalue only once. So they may be used
        # only if the eigenvalue 1 is simple. It is simple if the graph is connected and
        # every agent gives itself some weight.
        simple = is_connected(matrices != 0) and (_diagonals(matrices) > 0).all()
        if simple and (found := _by_iterations(matrices, symmetric)) is not None:
            return found
    product = functools.reduce(lambda product, W: W @ product, matrices)
    if symmetric and n_agents > _MOST_AT_ONCE:
        values = np.linalg.eigvalsh(product)
    else:
        values = np.linalg.eigvals(product)
    return float(np.sort(np.abs(values))[-2])


def _symmetric(matrices: np.ndarray) -> bool:
    return len(matrices) == 1 and bool((matrices[0] == matrices[0].T).all())


def _diagonals(matrices: np.ndarray) -> np.ndarray:
    return np.diagonal(matrices, axis1=-2, axis2=-1)


def _by_iterations(matrices: np.ndarray, symmetric: bool) -> float | None:
    """Finds the second largest modulus; None if the iterations do not converge."""
    sparse = np.count_nonzero(matrices) < 0.1 * matrices.size
    factors = [csr_array(W) for W in matrices] if sparse else matrices
    operators = map(aslinearoperator, factors)
    product = functools.reduce(lambda product, W: W @ product, operators)
    # A fixed start gives the same digits every time.
    start = np.random.default_rng(0).random(matrices.shape[-1])
    solve = eigsh if symmetric else eigs
    try:
        values = solve(
            product, k=2, ncv=64, maxiter=40, v0=start, return_eigenvectors=False
        )
    except ArpackNoConvergence:
        return None
    return float(np.abs(values).min())
