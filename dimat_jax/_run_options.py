"""The options that say how long a run trains, alone and in rounds."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dimat_jax._registries import Together
from dimat_jax._schedules import WARMUP
from dimat_jax.data.partition import PRETRAIN_PARTITION
from dimat_jax.optimizers import CLIP_NORM, LEARNING_RATE, OPTIMIZER, SCHEDULE
from dimat_jax.options import Option, Record

__all__ = [
    "BATCH_SIZE",
    "LOCAL_EPOCHS",
    "LOCAL_STEPS",
    "PRETRAIN_EPOCHS",
    "ROUNDS",
]

BATCH_SIZE = Option(
    "batch_size",
    100,
    "The number of images in a batch of each agent's local steps.",
    at_least=1,
    unit="images",
)
ROUNDS = Option(
    "rounds",
    100,
    "The number of rounds. In a round agents communicate, are evaluated, and train.",
    at_least=0,
    unit="rounds",
)
LOCAL_EPOCHS = Option(
    "local_epochs",
    2,
    "The number of epochs in a round. An epoch has as many steps as the largest shard "
    "needs for all of its images; every agent takes all of these steps, unless "
    "data.small_shards says otherwise.",
    at_least=0,
    unit="epochs",
    empty="local_steps says how long a round is",
)
LOCAL_STEPS = Option(
    "local_steps",
    0,
    "The number of steps in a round. Every agent takes all of them, unless "
    "data.small_shards says otherwise.",
    at_least=0,
    unit="steps",
    empty="local_epochs says how long a round is",
)


def _without_rounds(option: Option) -> Option:
    """Returns a copy of an option whose units of time do not include rounds."""
    choices = option.choices
    if isinstance(choices, Mapping):
        choices = Together(choices, change=_record_without_rounds)
    elif choices is not None:
        choices = tuple(name for name in choices if name != "rounds")
    opens = tuple(map(_without_rounds, option.opens))
    return dataclasses.replace(option, choices=choices, opens=opens)


def _record_without_rounds(record: Record[Any]) -> Record[Any]:
    options = tuple(map(_without_rounds, record.options))
    return dataclasses.replace(record, options=options)


# There are no rounds in pre-training.
PRETRAIN_OPTIMIZER = (
    dataclasses.replace(OPTIMIZER.under("pretrain"), default="adam", empty=""),
    LEARNING_RATE.under("pretrain"),
    _without_rounds(SCHEDULE).under("pretrain"),
    _without_rounds(WARMUP).under("pretrain"),
    CLIP_NORM.under("pretrain"),
)
PRETRAIN_EPOCHS = Option(
    "pretrain.epochs",
    100,
    "The number of epochs that every agent trains alone before the first round. All "
    "agents take as many steps in an epoch as the largest shard needs, as in rounds.",
    at_least=0,
    unit="epochs",
    empty="agents start the rounds with random weights",
    opens=(
        BATCH_SIZE.under("pretrain"),
        *PRETRAIN_OPTIMIZER,
        PRETRAIN_PARTITION,
        Option(
            "pretrain.checkpoint_every",
            10,
            "The number of epochs between two checkpoints of pre-training.",
            at_least=1,
            unit="epochs",
            changes_results=False,
        ),
        Option(
            "pretrain.eval_every",
            0,
            "The number of epochs of pre-training between two evaluations on the test "
            "images. The end of pre-training is always evaluated.",
            at_least=0,
            unit="epochs",
            empty="epochs have the training loss and accuracy alone, which cost no "
            "time",
            changes_results=False,
        ),
        Option(
            "pretrain.cache_dir",
            "",
            "The folder where runs share the agents that they have pre-trained.",
            empty="pre-trained agents are not shared",
            changes_results=False,
        ),
    ),
)
