"""Sizes of shards: at random, and none too small."""

import heapq

import numpy as np

__all__ = ["bounds", "none_empty", "none_small", "proportions"]


def proportions(rng: np.random.Generator, n_agents: int, alpha: float) -> np.ndarray:
    """Draws a Dirichlet sample, float64[agents]."""
    # A Gamma(a) number is Gamma(a + 1) U^(1/a). For small alpha all of these may be too
    # small for a float, so their logarithms are computed.
    logs = np.log(rng.gamma(alpha + 1, size=n_agents))
    logs += np.log(rng.uniform(size=n_agents)) / alpha
    weights = np.exp(logs - logs.max())
    return weights / weights.sum()


def bounds(proportions: np.ndarray, n_samples: int) -> np.ndarray:
    """Computes the places at which to cut the samples, int64[agents - 1]."""
    return np.rint(np.cumsum(proportions)[:-1] * n_samples).astype(np.int64)


def none_small(
    shards: list[np.ndarray], min_samples: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Moves samples to shards that have fewer than `min_samples`, and sorts all.

    One sample after the other is taken at random from the shard that is the largest
    then. So no agent loses more than the others of its size.
    """
    # The last samples of a shuffled shard are random ones.
    piles = [rng.permutation(shard).tolist() for shard in shards]
    by_size = [(-len(pile), agent) for agent, pile in enumerate(piles)]
    heapq.heapify(by_size)
    for pile in (pile for pile in piles if len(pile) < min_samples):
        while len(pile) < min_samples:
            # The largest shard has more than `min_samples`. So it never is one that has
            # got samples, whose size here is out of date.
            size, largest = by_size[0]
            pile.append(piles[largest].pop())
            heapq.heapreplace(by_size, (size + 1, largest))
    return [np.sort(np.array(pile, np.int64)) for pile in piles]


def none_empty(shards: list[np.ndarray]) -> list[np.ndarray]:
    """Gives one sample of the largest shard to each empty shard, and sorts all."""
    for agent, shard in enumerate(shards):
        if not len(shard):
            largest = max(range(len(shards)), key=lambda a: len(shards[a]))
            shards[agent], shards[largest] = np.split(shards[largest], [1])
    return [np.sort(shard) for shard in shards]
