"""The linear assignment problem. The only place that solves it."""

import numpy as np
from jaxtyping import Float, Int32
from scipy.optimize import linear_sum_assignment

__all__ = ["check_stay", "prefer_staying", "solve_assignment"]


def solve_assignment(
    scores: Float[np.ndarray, "*batch units units"],
) -> Int32[np.ndarray, "*batch units"]:
    """Assigns a permutee's unit to each unit of a reference, maximising the score.

    Args:
        scores: `scores[..., u, v]` is what matching the permutee's unit v to the
            reference's unit u is worth. NumPy or JAX arrays of any float type.

    Returns:
        `perm`, int32: `perm[..., u]` is the permutee's unit for u, and
        `sum_u scores[u, perm[u]]` is as large as any permutation can make it.

    Raises:
        ValueError: scores that are not square, or not finite.
    """
    scores = np.asarray(scores)
    if scores.dtype != np.float64:
        scores = scores.astype(np.float32)
    if scores.ndim < 2 or scores.shape[-1] != scores.shape[-2]:
        raise ValueError(f"scores must be square matrices, got shape {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite; some are NaN or infinite")
    n = scores.shape[-1]
    perms = scores.argmax(axis=-1).astype(np.int32)
    for perm, matrix in zip(
        perms.reshape(-1, n), scores.reshape(-1, n, n), strict=True
    ):
        # If every unit can have its favourite, no assignment is better. Networks that
        # have been merged before mostly can, and it spares them the O(n^3).
        if len(np.unique(perm)) < n:
            perm[:] = linear_sum_assignment(matrix, maximize=True)[1]
    return perms


def check_stay(stay: float) -> None:
    """Raises ValueError for a preference that is negative, infinite or NaN."""
    if not 0 <= stay < np.inf:
        raise ValueError(f"stay must be at least 0, and finite, got {stay}")


def prefer_staying(
    scores: Float[np.ndarray, "*batch units units"],
    stay: float,
    scale: float | Float[np.ndarray, "*batch"] = 1.0,
) -> Float[np.ndarray, "*batch units units"]:
    """Adds `stay` to the diagonal: units move only if they gain more than that each.

    Args:
        scores: see `solve_assignment`.
        stay: at least 0.
        scale: of the scores; `stay` is in units of it.

    Raises:
        ValueError: `stay` is negative, infinite or NaN.
    """
    check_stay(stay)
    scores = np.asarray(scores)
    preferring = scores.astype(np.result_type(scores, np.float32))
    diagonal = np.arange(scores.shape[-1])
    preferring[..., diagonal, diagonal] += np.asarray(stay * scale)[..., None]
    return preferring
