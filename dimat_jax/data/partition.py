"""Partitions split the samples of a training set among agents.

A partition gives every agent its shard, a sorted array of sample indices; every sample
is in exactly one shard. A new partition is a function of `(labels, n_agents)` and of
keyword options, with a record in `PARTITIONS` at the foot of this file.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer

from dimat_jax.data._partition_table import table
from dimat_jax.data._shard_sizes import bounds, none_empty, none_small, proportions
from dimat_jax.errors import UserError, nearest
from dimat_jax.options import SEED, Option, Record, Registry, registry

__all__ = [
    "DATA_SEED",
    "MIN_SAMPLES",
    "PARTITION",
    "PARTITIONS",
    "PRETRAIN_PARTITION",
    "VALIDATION",
    "ByClass",
    "PartitionError",
    "class_counts",
    "data_seed",
    "partition",
    "set_aside",
    "spread_over_classes",
    "table",
]

Labels = Integer[np.ndarray, " samples"]
# Shards have different lengths, so their axis has no name.
Shard = Int64[np.ndarray, " _"]

ALPHA = Option(
    "data.alpha",
    0.5,
    "The concentration of the Dirichlet distribution. Smaller values make the agents' "
    "shards more unequal.",
    above=0,
)
CLASSES = Option(
    "data.classes",
    2,
    "The number of classes that each agent holds.",
    at_least=1,
    unit="classes",
)


MIN_SAMPLES = Option(
    "data.min_samples",
    1,
    "The least number of training samples that an agent gets, validation samples "
    "included. What the partition leaves an agent short of comes from the largest "
    "shards, at random.",
    at_least=1,
    unit="samples",
)
DATA_SEED = Option(
    "data.seed",
    0,
    "The seed that decides which samples are used, held out or kept back for "
    "validation, which agent gets them, and which labels are wrong. With it, runs of "
    "several seeds train on the same division of the data.",
    at_least=0,
    empty="the value of seed",
)
VALIDATION = Option(
    "data.validation",
    0.0,
    "The training samples that agents keep back for validation, as a share of each "
    "agent's samples (below 1) or as a number for all agents together (1 or more). An "
    "agent keeps back some samples of each of its classes. Nobody trains on them. Tune "
    "learning rates and other options on their accuracy, and never on test samples.",
    at_least=0,
    empty="none",
)


class PartitionError(UserError):
    """A partition is unknown, or it leaves an agent without samples."""


def data_seed(fields: Mapping[str, Any]) -> int:
    """The seed of all that concerns the data, from a config's values by path."""
    return fields[DATA_SEED.path] or fields[SEED.path]


def partition(
    name: str, labels: Labels, n_agents: int, *, seed: int, **options: float
) -> list[Shard]:
    """Splits samples among agents.

    Args:
        name: a key of `PARTITIONS`.
        labels: int[samples], the class of every sample.
        n_agents: the number of shards to make.
        seed: the seed of every random choice that the partition makes.
        **options: the partition's own options.

    Returns:
        For each agent its shard int64[shard], sorted. Shards may differ in length.

    Raises:
        PartitionError: `name` is unknown, `labels` are not int[samples], `n_agents` is
            below 1 or above the number of samples, or an agent would get no samples.
        OptionError: an option has a value that is not allowed.
        TypeError: the partition does not take one of the options.
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
    # Labels become int64, because NumPy refuses `labels % n_agents` if a narrow integer
    # type cannot hold `n_agents`.
    shards = PARTITIONS[name](labels.astype(np.int64), n_agents, seed=seed, **options)
    empty = [agent for agent, shard in enumerate(shards) if not len(shard)]
    if empty:
        raise PartitionError(
            f"{name} leaves agents {empty} of {n_agents} without samples: the "
            f"{len(labels)} samples have {len(np.unique(labels))} classes; use fewer "
            "agents, more samples or another partition"
        )
    return shards


def set_aside(
    shards: Sequence[Shard], labels: Labels, amount: float, *, seed: Sequence[int]
) -> tuple[list[Shard], list[Shard]]:
    """Takes a part out of every shard, with the same shares of classes.

    Args:
        shards: for each agent the indices of its samples.
        labels: int[samples], the class of every sample.
        amount: the share of each shard if it is below 1, else the number of samples of
            all shards together.
        seed: the seed by which the samples are chosen.

    Returns:
        for each agent what is left of its shard, and what was taken; both are sorted.

    Raises:
        PartitionError: nothing would be left.
    """
    total = sum(map(len, shards))
    share = amount if amount < 1 else amount / total
    if share >= 1:
        raise PartitionError(
            f"{VALIDATION.path} is {amount:g}, but there are only {total} samples, and "
            "agents need some of them to train on"
        )
    left, taken = [], []
    for agent, shard in enumerate(shards):
        # A small shard gives one sample, and keeps one.
        size = max(round(share * len(shard)), 1) if share > 0 else 0
        size = min(size, len(shard) - 1)
        order = shard[spread_over_classes(labels[shard], [*seed, agent])]
        taken.append(np.sort(order[:size]))
        left.append(np.sort(order[size:]))
    return left, taken


def spread_over_classes(labels: Labels, seed: Sequence[int]) -> Shard:
    """Orders samples at random so that each first part has about the same classes.

    Returns:
        the positions of all samples, int64[samples]. A class with a share of the
        samples has about the same share of any of the first ones.
    """
    labels = np.asarray(labels)
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    places = np.empty(len(labels))
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels[shuffled] == label)
        places[of_class] = (np.arange(len(of_class)) + 0.5) / len(of_class)
    return shuffled[np.argsort(places, kind="stable")]


def iid(labels: Labels, n_agents: int, *, seed: int) -> list[Shard]:
    """Every agent gets an equal share of every class, at random.

    Shares differ by at most one sample, for each class and in total. Samples are dealt
    out like cards, class after class. Each class begins with the agent after the one
    that got the last sample of the class before, so that the remainders of different
    classes go to different agents.
    """
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    dealt = shuffled[np.argsort(labels[shuffled], kind="stable")]
    return [np.sort(dealt[agent::n_agents]) for agent in range(n_agents)]


def by_class(labels: Labels, n_agents: int, *, seed: int) -> list[Shard]:
    """Class c belongs to agent c mod N; this is the paper's non-IID partition.

    If there are more agents than classes that occur, C of them, the c-th class is split
    evenly and at random among the agents a with a mod C = c.
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


def dirichlet(
    labels: Labels,
    n_agents: int,
    *,
    seed: int,
    alpha: float = ALPHA.default,
    min_samples: int = MIN_SAMPLES.default,
) -> list[Shard]:
    """Every class is split in proportions from a symmetric Dirichlet distribution.

    The smaller alpha is, the fewer agents hold most of a class (Hsu et al. 2019, arXiv
    1909.06335, who draw proportions of classes for each agent; most later work draws
    them as here). An agent that would get fewer than `min_samples` samples gets some of
    the largest shards.

    Raises:
        PartitionError: there are too few samples for all agents.
    """
    rng = np.random.default_rng(seed)
    ALPHA.check(alpha)
    parts: list[list[np.ndarray]] = [[] for _ in range(n_agents)]
    for label in np.unique(labels):
        samples = rng.permutation(np.flatnonzero(labels == label))
        cuts = bounds(proportions(rng, n_agents, alpha), len(samples))
        for agent, part in enumerate(np.split(samples, cuts)):
            parts[agent].append(part)
    return _none_small([np.concatenate(part) for part in parts], min_samples, rng)


def classes_per_agent(
    labels: Labels, n_agents: int, *, seed: int, classes: int = CLASSES.default
) -> list[Shard]:
    """Every agent holds the same number of classes, and classes are split evenly.

    The classes of an agent are random, but the numbers of agents that hold a class
    differ by at most one.

    Raises:
        PartitionError: there are fewer than `classes` classes, or the agents together
            could not hold all classes.
    """
    present = np.unique(labels)
    if not 1 <= classes <= len(present):
        raise PartitionError(
            f"an agent holds from 1 to all {len(present)} classes, not {classes}"
        )
    if n_agents * classes < len(present):
        raise PartitionError(
            f"{n_agents} agents with {classes} classes each cannot hold all "
            f"{len(present)} classes; every sample must belong to an agent"
        )
    rng = np.random.default_rng(seed)
    # Classes are in a circle, and each agent takes the next `classes` ones in turn. So
    # no agent takes a class twice.
    order = rng.permutation(present)
    holders: dict[int, list[int]] = {int(label): [] for label in present}
    for place in range(n_agents * classes):
        holders[int(order[place % len(order)])].append(place // classes)
    parts: list[list[np.ndarray]] = [[] for _ in range(n_agents)]
    for label, agents in holders.items():
        samples = rng.permutation(np.flatnonzero(labels == label))
        for turn, agent in enumerate(agents):
            parts[agent].append(samples[turn :: len(agents)])
    return [np.sort(np.concatenate(part)) for part in parts]


def quantity_skew(
    labels: Labels,
    n_agents: int,
    *,
    seed: int,
    alpha: float = ALPHA.default,
    min_samples: int = MIN_SAMPLES.default,
) -> list[Shard]:
    """Samples are IID, but the sizes of the shards follow a Dirichlet distribution.

    The distribution is symmetric. An agent that would get fewer than `min_samples`
    samples gets some of the largest shards.

    Raises:
        PartitionError: there are too few samples for all agents.
    """
    rng = np.random.default_rng(seed)
    ALPHA.check(alpha)
    samples = rng.permutation(len(labels))
    cuts = bounds(proportions(rng, n_agents, alpha), len(samples))
    return _none_small(np.split(samples, cuts), min_samples, rng)


def contiguous(labels: Labels, n_agents: int, *, seed: int) -> list[Shard]:
    """Every agent gets a piece of the samples in their stored order, equally long.

    For a text it is a passage of it, and for a time series a span of time. Nothing is
    random.
    """
    del seed
    return np.array_split(np.arange(len(labels)), n_agents)


def class_counts(
    labels: Labels, shards: Sequence[Shard]
) -> Int64[np.ndarray, "agents classes"]:
    """Counts each agent's samples of each class, from 0 to the largest label."""
    n_classes = int(labels.max()) + 1
    return np.stack([np.bincount(labels[s], minlength=n_classes) for s in shards])


def _none_small(
    shards: list[np.ndarray], min_samples: int, rng: np.random.Generator
) -> list[Shard]:
    """Sorts shards, of which none is empty or has fewer than `min_samples` samples."""
    MIN_SAMPLES.check(min_samples)
    shards = none_empty(shards)
    if min_samples == 1:
        return shards
    total = sum(map(len, shards))
    if min_samples * len(shards) > total:
        raise PartitionError(
            f"{MIN_SAMPLES.path} is {min_samples}, but {total} samples are too few for "
            f"{len(shards)} agents with so many each"
        )
    return none_small(shards, min_samples, rng)


@dataclasses.dataclass(frozen=True, eq=False)
class ByClass(Record[list[Shard]]):
    """A partition that looks at classes. It is refused for labels of other kinds.

    Where labels are no classes, other partitions get 0 as the class of every sample.
    """


PARTITIONS: Registry[Record[list[Shard]]] = registry(
    Record("iid", iid, (SEED,)),
    ByClass("by_class", by_class, (SEED,)),
    ByClass("dirichlet", dirichlet, (SEED, ALPHA, MIN_SAMPLES)),
    ByClass("classes_per_agent", classes_per_agent, (SEED, CLASSES)),
    Record("quantity_skew", quantity_skew, (SEED, ALPHA, MIN_SAMPLES)),
    Record("contiguous", contiguous, (SEED,)),
)
"""`PARTITIONS[name](labels, n_agents, **options)` gives each agent its shard."""

PARTITION = Option(
    "data.partition",
    "iid",
    "How the training samples are split among the agents.",
    choices=PARTITIONS,
)
PRETRAIN_PARTITION = Option(
    "pretrain.partition",
    "",
    "How the training samples are split among the agents while they pre-train.",
    choices=PARTITIONS,
    empty="the same as data.partition",
)
