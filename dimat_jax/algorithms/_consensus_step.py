"""The consensus step sizes gamma with which gossip of compressed differences converges.

Without gradients, one number of every agent's params is a vector x over the agents, and
CHOCO's step is

    x^  <-  x^ + M (x - x^),    x  <-  x - gamma L x^,    L = I - W

where M is a diagonal matrix of independent 0s and 1s if random places are sent. A place
is sent with probability omega. The second moments of x and of the error x - x^ stay
bounded if and only if the spectral radius of a matrix H is below 1. H[i, j] says how
much of the noise that agent j makes now is in agent i's errors later. In the basis of
W's eigenvectors, sums over time have a closed form, with p = omega:

    sum_j H[i, j]  =  G(gamma L)[i, i],
    G(s)  =  (1 - p) (2p + (2 + p) s) / (p (4 - 2p - p s))

G is convex on 0 <= s <= 2, G(0) < 1, and G(s) = 1 at s = 2p / (2 - p). H is symmetric
and has no negative entries, so its spectral radius lies between the mean and the
largest of its row sums. This gives two bounds, with w_i = L[i, i] = 1 - W[i, i], the
weight that agent i gives its neighbours:

- If gamma mean_i(w_i) >= 2p / (2 - p), gossip diverges: by convexity, the mean row sum
  is at least G(gamma mean_i(w_i)) >= 1.
- If gamma max_i(w_i) <= p / (2 - p), gossip converges on every connected graph. No
  eigenvalue of gamma L is above S = 2p / (2 - p), so G lies below the line from G(0) to
  G(S) = 1, and no row sum is above G(0) + (1 - G(0)) / 2.

Koloskova et al. (2019, arXiv 1902.00340, theorem 2) prove convergence for all
compressors, with a gamma that is smaller by two orders of magnitude. For compressors
other than random_k the second value, with their usual omega (`Compressor.kept`), is a
rule that works: tests/algorithms/test_consensus_step.py tries all of them on several
graphs. The first bound is proved for random_k alone.
"""

import numpy as np

from dimat_jax.compression import Compressor
from dimat_jax.mixing import MixingMatrix
from dimat_jax.options import OptionError

__all__ = ["check_step", "safe_step"]


def safe_step(compressor: Compressor, mixing_matrix: MixingMatrix | None) -> float:
    """Returns the largest gamma, at most 1, with which gossip converges.

    Args:
        compressor: the compressor of the differences.
        mixing_matrix: W, symmetric, or a stack `[period, agents, agents]`. None if it
            is not known; then agents may give all weight to their neighbours.
    """
    most = 1.0 if mixing_matrix is None else _most_weight(mixing_matrix)
    return min(1.0, _share(compressor) / max(most, _TINY))


def check_step(
    gamma: float, compressor: Compressor, mixing_matrix: MixingMatrix
) -> None:
    """Refuses a gamma with which gossip must diverge, where every message arrives.

    Divergence is proved for compressors that send random places (random_k) alone. For
    other compressors gamma is not checked.

    Args:
        gamma: the step size, above 0.
        compressor: the compressor of the differences.
        mixing_matrix: W, symmetric, or a stack `[period, agents, agents]`.

    Raises:
        OptionError: gossip must diverge; the message says from what value on.
    """
    if not compressor.random_places:
        return
    n_agents = mixing_matrix.shape[-1]
    mean = 1 - np.trace(mixing_matrix, axis1=-2, axis2=-1) / n_agents
    limit = 2 * _share(compressor) / max(float(np.min(mean)), _TINY)
    if gamma >= limit:
        safe = safe_step(compressor, mixing_matrix)
        raise OptionError(
            f"gossip.gamma is {gamma:g}, but with this compressor, which keeps "
            f"{compressor.kept:.3g} of a message, agents on this network drift apart "
            f"from {limit:.3g} on; the default, 0, takes {safe:.3g}, which is safe"
        )


# Where agents keep everything, there is no gossip, and any step size does.
_TINY = 1e-12


def _share(compressor: Compressor) -> float:
    return compressor.kept / (2 - compressor.kept)


def _most_weight(mixing_matrix: MixingMatrix) -> float:
    """Computes the largest weight that an agent gives its neighbours at any time.

    Negative weights count by their absolute values: then no eigenvalue of I - W is
    above twice the result.
    """
    own = np.diagonal(mixing_matrix, axis1=-2, axis2=-1)
    others = np.abs(mixing_matrix).sum(axis=-1) - np.abs(own)
    return float((1 - own + others).max()) / 2
