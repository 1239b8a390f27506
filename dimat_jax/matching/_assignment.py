"""The linear assignment problem. This is the only module that solves it."""

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int32
from scipy.optimize import linear_sum_assignment

from dimat_jax.matching._errors import MatchingError
from dimat_jax.options import Option

__all__ = ["STAY", "prefer_staying", "solve_assignment"]

STAY = Option(
    "merge.stay",
    0.0,
    "How much a unit must gain to move to another place. The gain is measured as a "
    "mean over a group's units within [-1, 1]: a correlation of activations, or a "
    "share of the cosine of weights. 0 is the paper's rule; a small preference for "
    "staying helps agents that share a basin of the loss.",
    at_least=0,
)


def solve_assignment(
    scores: ArrayLike,
) -> Int32[np.ndarray, "*batch units"]:
    """Assigns a permutee's unit to each unit of a reference, maximising the score.

    Args:
        scores: `scores[..., u, v]` is the score of matching the permutee's unit v to
            the reference's unit u. NumPy or JAX arrays of any float type.

    Returns:
        `perm`, int32: `perm[..., u]` is the permutee's unit for u, and
        `sum_u scores[u, perm[u]]` is as large as any permutation can make it.

    Raises:
        MatchingError: scores that are not square, or not finite.
    """
    scores = np.asarray(scores)
    if scores.dtype != np.float64:
        scores = scores.astype(np.float32)
    if scores.ndim < 2 or scores.shape[-1] != scores.shape[-2]:
        raise MatchingError(f"scores must be square matrices, got shape {scores.shape}")
    if not np.isfinite(scores).all():
        raise MatchingError("scores must be finite; some are NaN or infinite")
    n = scores.shape[-1]
    perms = scores.argmax(axis=-1).astype(np.int32)
    for perm, matrix in zip(
        perms.reshape(-1, n), scores.reshape(-1, n, n), strict=True
    ):
        # If every unit can have the unit that it scores highest with, no assignment is
        # better. That is common for networks that have been merged before, and it
        # saves them the solver, whose time grows with the cube of n.
        if len(np.unique(perm)) < n:
            perm[:] = linear_sum_assignment(matrix, maximize=True)[1]
    return perms


def prefer_staying(
    scores: Float[np.ndarray, "*batch units units"],
    stay: float,
    scale: float | Float[np.ndarray, "*batch"] = 1.0,
) -> Float[np.ndarray, "*batch units units"]:
    """Adds `stay` to the diagonal: a unit moves only if it gains more than that.

    Args:
        scores: the scores that `solve_assignment` takes.
        stay: what a unit must gain to move, in units of `scale`; at least 0.
        scale: the size of the scores: divided by it, a mean over units lies within
            [-1, 1].

    Returns:
        new scores, float32 or what is finer; `scores` stay as they are.
    """
    scores = np.asarray(scores)
    preferring = scores.astype(np.result_type(scores, np.float32))
    diagonal = np.arange(scores.shape[-1])
    preferring[..., diagonal, diagonal] += np.asarray(stay * scale)[..., None]
    return preferring
