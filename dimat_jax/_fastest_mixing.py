"""The semidefinite program of the mixing matrix with the largest spectral gap."""

import numpy as np
from jaxtyping import Float

from dimat_jax.errors import UserError
from dimat_jax.topology import Adjacency

__all__ = ["MixingError", "edge_weights"]


class MixingError(UserError):
    """A rule does not fit a graph, or a matrix is no mixing matrix."""


def edge_weights(adjacency: Adjacency) -> Float[np.ndarray, "agents agents"]:
    """Finds the weights of a connected graph's edges; all other entries are 0."""
    n_agents = len(adjacency)
    if adjacency.sum() == n_agents * (n_agents - 1):
        # All agents are connected, so equal weights reach consensus in one step.
        return adjacency / n_agents
    try:
        import cvxpy  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MixingError(
            "fastest weights need cvxpy: pip install 'dimat_jax[sdp]'"
        ) from error
    # W = I - sum_e w_e (e_i - e_j)(e_i - e_j)^T is symmetric, and its rows sum to 1.
    ends = np.argwhere(np.triu(adjacency))
    edges = np.arange(len(ends))
    incidence = np.zeros((n_agents, len(ends)))
    incidence[ends[:, 0], edges], incidence[ends[:, 1], edges] = 1, -1
    weights, norm = cvxpy.Variable(len(ends)), cvxpy.Variable()
    identity = np.eye(n_agents)
    deviation = identity - incidence @ cvxpy.diag(weights) @ incidence.T - 1 / n_agents
    problem = cvxpy.Problem(
        cvxpy.Minimize(norm),
        [deviation << norm * identity, deviation >> -norm * identity],
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
