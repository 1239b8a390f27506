"""Who owns which samples: splitting a training set among agents.

A partition gives every agent its shard, a sorted array of sample indices; every sample
is in exactly one shard. A new partition is a function of `(labels, n_agents, *, seed)`
in `PARTITIONS`.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int, Int64

from dimat_jax.errors import UserError, nearest

__all__ = ["PARTITIONS", "PartitionError", "class_counts", "partition"]

Labels = Int[np.ndarray, " samples"]
Shard = Int64[np.ndarray, " shard"]


class PartitionError(UserError):
    """A partition that is unknown, or that leaves an agent without samples."""


def partition(name: str, labels: Labels, n_agents: int, *, seed: int) -> list[Shard]:
    """Splits samples among agents.

    Args:
        name: a key of `PARTITIONS`.
        labels: int[samples], the class of every sample.
        n_agents: how many shards to make.
        seed: decides which samples go where, as far as the partition leaves it open.

    Returns:
        For each agent int64[shard], sorted; shards may differ in length.

    Raises:
        PartitionError: `name` is unknown, `labels` are not int[samples], `n_agents` is
            below 1 or above the number of samples, or an agent would get no samples.
    """
    if name not in PARTITIONS:
        raise PartitionError(f"unknown partition {name!r}; {nearest(name, PARTITIONS)}")
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise PartitionError(
            f"expected labels int[samples], got {labels.dtype}{list(labels.shape)}"
        )
    if not 1 <= n_agents <= len(labels):
        raise PartitionError(
            f"expected 1 to {len(labels)} agents (one sample each), got {n_agents}"
        )
    # int64, since NumPy refuses `% n_agents` where a narrow type cannot hold it.
    shards = PARTITIONS[name](labels.astype(np.int64), n_agents, seed=seed)
    empty = [agent for agent, shard in enumerate(shards) if not len(shard)]
    if empty:
        raise PartitionError(
            f"{name} leaves agents {empty} of {n_agents} without samples: the "
            f"{len(labels)} samples have {len(np.unique(labels))} classes; use fewer "
            "agents, more samples or another partition"
        )
    return shards


def iid(labels: Labels, n_agents: int, *, seed: int) -> list[Shard]:
    """1/N of every class for everyone, up to one sample of each class and in all.

    Samples are dealt like cards, class after class and without starting again at agent
    0 in between, so that the remainders of different classes go to different agents.
    """
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    dealt = shuffled[np.argsort(labels[shuffled], kind="stable")]
    return [np.sort(dealt[agent::n_agents]) for agent in range(n_agents)]


def by_class(labels: Labels, n_agents: int, *, seed: int) -> list[Shard]:
    """Class c belongs to agent c mod N: the paper's non-IID partition.

    With more agents than the C classes that occur, the c-th of these is shared out at
    random, and evenly, among the agents a with a mod C = c.
    """
    classes = np.unique(labels)
    if n_agents <= len(classes):
        return [np.flatnonzero(labels % n_agents == agent) for agent in range(n_agents)]
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    shards = []
    for agent in range(n_agents):
        turn, rank = divmod(agent, len(classes))
        n_sharing = len(range(rank, n_agents, len(classes)))
        samples = shuffled[labels[shuffled] == classes[rank]]
        shards.append(np.sort(samples[turn::n_sharing]))
    return shards


PARTITIONS: dict[str, Callable[..., list[Shard]]] = {
    "iid": iid,
    "by_class": by_class,
}


def class_counts(
    labels: Labels, shards: Sequence[Shard]
) -> Int64[np.ndarray, "agents classes"]:
    """How many samples of each class, from 0 to the largest label, each agent has."""
    n_classes = int(labels.max()) + 1
    return np.stack([np.bincount(labels[s], minlength=n_classes) for s in shards])
