"""Divides the training images of a run: to train on, to tune on, and to hold out."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from dimat_jax import _randomness
from dimat_jax.config import Config, ConfigError, fields_of, fields_read, record_of
from dimat_jax.data import sources
from dimat_jax.data._label_noise import LABEL_NOISE, with_label_noise
from dimat_jax.data.partition import (
    MIN_SAMPLES,
    PARTITION,
    PRETRAIN_PARTITION,
    VALIDATION,
    Labels,
    Shard,
    data_seed,
    partition,
    set_aside,
    spread_over_classes,
)
from dimat_jax.data.selection import (
    BN_DATA,
    BN_SAMPLES,
    HELD_OUT,
    MATCH_DATA,
    MATCH_SAMPLES,
)
from dimat_jax.evaluate import SAMPLES
from dimat_jax.models._settings import NORM
from dimat_jax.options import SEED, Option, arguments

__all__ = [
    "Division",
    "check_samples",
    "divide",
    "load_data",
    "too_small_to_normalise",
    "with_wrong_labels",
]

Fields = Mapping[str, Any]
"""The values of a config's fields, by dotted path; empty ones are resolved."""


class Division(NamedTuple):
    """Who gets which training images. All are sorted indices, int64.

    Attributes:
        shards: for each agent, the images that it trains on in the rounds.
        pretrain_shards: for each agent, the images that it trains on before.
        validation: for each agent, images like its own that nobody trains on. They may
            be empty.
        held_out: images that belong to no agent; empty unless the config reads them.
    """

    shards: list[Shard]
    pretrain_shards: list[Shard]
    validation: list[Shard]
    held_out: Shard

    @property
    def trained_on(self) -> Shard:
        """The images that some agent trains on."""
        return np.sort(np.concatenate(self.shards))


def load_data(
    config: Config, read: Callable[..., sources.Dataset] = sources.read
) -> sources.Dataset:
    """Loads the data set of a config, or the part of it that the config uses.

    Args:
        config: the config.
        read: reads a whole data set, as `sources.read` does.

    Raises:
        DataError: the data are missing or damaged, or there are too few.
    """
    data = config.data
    whole = read(data.name, data.dir or None, data.cache_dir or None)
    sizes = data.train_size or None, data.test_size or None
    return sources.select(whole, *sizes, data_seed(fields_of(config)))


def divide(labels: Labels, n_agents: int, fields: Fields) -> Division:
    """Divides the training images as a config says.

    Args:
        labels: the classes of the images.
        n_agents: the number of agents.
        fields: the config's values.

    Raises:
        ConfigError: more images are held out than there are.
        UserError: a partition leaves an agent without images, or validation does.
    """
    seed = data_seed(fields)
    held_out = _held_out(labels, fields)
    rest = np.setdiff1d(np.arange(len(labels)), held_out)

    def shards_of(option: Option) -> list[Shard]:
        if record_of(fields).single:
            return [rest]
        record = option.entry(fields[option.path])
        given = arguments(record, {**fields, SEED.path: seed})
        shards = partition(fields[option.path], labels[rest], n_agents, **given)
        return [rest[shard] for shard in shards]

    shards, validation = set_aside(
        shards_of(PARTITION),
        labels,
        fields[VALIDATION.path],
        seed=_randomness.seeds(seed, "validation"),
    )
    kept_back = np.concatenate(validation)
    pretrain_shards = [
        np.setdiff1d(shard, kept_back) for shard in shards_of(PRETRAIN_PARTITION)
    ]
    for agent, shard in enumerate(pretrain_shards):
        if not len(shard):
            raise ConfigError(
                f"{PRETRAIN_PARTITION.path} leaves agent {agent} only images that are "
                f"set aside for validation ({VALIDATION.path}), so it cannot be "
                "pre-trained; choose another partition, fewer agents or fewer of these "
                "images"
            )
    return Division(shards, pretrain_shards, validation, held_out)


def _held_out(labels: Labels, fields: Fields) -> Shard:
    """Draws the images that no agent gets, equally many of each class."""
    size = fields_read(fields).get(HELD_OUT.path, 0)
    if size >= len(labels):
        raise ConfigError(
            f"config.{HELD_OUT.path} is {size}, but there are only {len(labels)} "
            "training images, and agents need some of them"
        )
    seeds = _randomness.seeds(data_seed(fields), "held_out")
    return np.sort(spread_over_classes(labels, seeds)[:size])


def check_samples(
    fields: Fields, division: Division, n_test: int, *, has_statistics: bool = True
) -> None:
    """Refuses samples that are larger than the data.

    An agent may own fewer images than the config names: it then uses all of them. A
    shared sample must have the size that the config says.

    Args:
        fields: the config's values.
        division: who gets which training images.
        n_test: the number of test images.
        has_statistics: whether the model has BatchNorm statistics, for which a sample
            is needed.

    Raises:
        ConfigError: a sample is too large.
    """
    sizes = {"proxy": len(division.trained_on), "held_out": len(division.held_out)}
    available = {SAMPLES.path: n_test}
    choices = [(MATCH_DATA, MATCH_SAMPLES)]
    if has_statistics:
        choices.append((BN_DATA, BN_SAMPLES))
    for choice, option in choices:
        if fields[choice.path] in sizes:
            available[option.path] = sizes[fields[choice.path]]
    read = fields_read(fields)
    for path in available.keys() & read.keys():
        if isinstance(read[path], int) and read[path] > available[path]:
            raise ConfigError(
                f"config.{path} is {read[path]}, but there are only {available[path]} "
                "images"
            )


def with_wrong_labels(
    dataset: sources.Dataset, division: Division, fields: Fields
) -> sources.Split:
    """The training images with the labels on which agents train.

    Some of these are wrong if the config says so; see `data.label_noise`.
    """
    if not (rate := fields[LABEL_NOISE.path]):
        return dataset.train
    labels = with_label_noise(
        dataset.train.labels,
        division.shards,
        dataset.n_classes,
        rate,
        _randomness.seeds(data_seed(fields), "label_noise"),
    )
    return dataset.train._replace(labels=labels)


def too_small_to_normalise(division: Division) -> str:
    """A warning if BatchNorm sees nothing but a single sample of some agents.

    Args:
        division: who gets which training images.

    Returns:
        the warning, which names the agents; "" if every agent has several samples.
    """
    pairs = zip(division.shards, division.pretrain_shards, strict=True)
    alone = [agent for agent, both in enumerate(pairs) if min(map(len, both)) == 1]
    if not alone:
        return ""
    return (
        f"agents {alone} have a single training sample each: BatchNorm normalises "
        "batches by this sample alone, so that its statistics hold for no other one. "
        f"More samples for each ({MIN_SAMPLES.path}), fewer agents or a model without "
        f"BatchNorm ({NORM.path}) help"
    )
