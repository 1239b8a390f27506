"""Selects the training examples that matching and BatchNorm look at.

They are an agent's own, a shared sample, or all. A config makes this choice twice: for
the examples on which units are matched by their activations, and for those on which
BatchNorm statistics are measured anew. The second choice is the same for all
algorithms. Examples that agents share have to be sent to them, and the ledger books
them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from dimat_jax.data._own import OwnReader
from dimat_jax.data.partition import Shard
from dimat_jax.data.pipeline import Samples, draw_own
from dimat_jax.options import Option, Record, registry

__all__ = [
    "BATCH_NORM",
    "BATCH_SIZE",
    "BN_BATCH_SIZE",
    "BN_DATA",
    "BN_SAMPLES",
    "BN_WHEN",
    "HELD_OUT",
    "MATCH",
    "MATCH_DATA",
    "MATCH_SAMPLES",
    "Available",
    "Choice",
]

ENOUGH = "enough"
"""The value of `MATCH_SAMPLES` with which matching looks at as many images as it takes.
"""


class Available(NamedTuple):
    """The training examples from which a round's samples are taken.

    Attributes:
        read_own: makes samples of each agent's own images.
        shards: for each agent the positions of its own images on its device.
        seed: the seed by which an agent chooses among its own images in this round.
        share: `share(size)` makes samples of `size` images that agents train on (0:
            all), the same ones for all agents and in every round.
        share_held_out: the same for images that no agent trains on.
        batch_size: the number of images in a batch of an agent's own.
    """

    read_own: OwnReader
    shards: Sequence[Shard]
    seed: Sequence[int]
    share: Callable[[int], Samples]
    share_held_out: Callable[[int], Samples]
    batch_size: int


Size = int | str
"""How many images are used: at most this number, or all images if it is 0.

The word `ENOUGH` stands for as many images as it takes; all images are available then.
"""


def own(available: Available, size: Size) -> Samples:
    """Every agent uses a random part of its own shard, drawn anew in every round."""
    indices = draw_own(available.shards, _at_most(size), available.seed)
    samples = available.read_own(indices, available.batch_size)
    return replace(samples, as_needed=size == ENOUGH)


def proxy(available: Available, size: Size) -> Samples:
    """All agents use the same sample of all agents' images, in every round."""
    samples = available.share(_at_most(size))
    return replace(samples, as_needed=size == ENOUGH)


def held_out(available: Available, size: Size) -> Samples:
    """All agents use the same sample of images that no agent trains on."""
    samples = available.share_held_out(_at_most(size))
    return replace(samples, as_needed=size == ENOUGH)


def _at_most(size: Size) -> int:
    return size if isinstance(size, int) else 0


def everything(available: Available, size: Size) -> Samples:
    """All agents use all training images, as the published code does."""
    del size
    return proxy(available, 0)


def nothing(available: Available, size: Size) -> None:
    """No examples are used, and nothing is measured."""
    del available, size


HELD_OUT = Option(
    "data.held_out",
    1000,
    "The number of training images that belong to no agent, equally many of each "
    "class. They are taken out before the others are split among the agents.",
    at_least=1,
    unit="images",
)
BATCH_SIZE = Option(
    "merge.batch_size",
    100,
    "The number of images in a batch of the examples on which units are matched.",
    at_least=1,
    unit="images",
)
MATCH_SAMPLES = Option(
    "merge.match_samples",
    1000,
    "The number of images on which units are matched. It counts each agent's own "
    'images, or those of the sample that all agents share. "enough": as many as it '
    "takes. Units are matched after 1, 2, 4, 8, ... batches, until twice as many "
    "images hardly improve the mean correlation of matched units.",
    at_least=0,
    words=(ENOUGH,),
    unit="images",
    empty="all of them",
)
BN_BATCH_SIZE = Option(
    "batch_norm.batch_size",
    100,
    "The number of images in a batch of the examples on which BatchNorm statistics are "
    "measured anew. The statistics are means over batches.",
    at_least=1,
    unit="images",
)
BN_SAMPLES = Option(
    "batch_norm.samples",
    1000,
    "The number of images on which BatchNorm statistics are measured anew. It counts "
    "each agent's own images, or those of the sample that all agents share.",
    at_least=0,
    unit="images",
    empty="all of them",
)
BN_WHEN = Option(
    "batch_norm.when",
    "communication",
    "When BatchNorm statistics are measured anew. communication: after every merge or "
    "server average, and training goes on with the new statistics. An algorithm that "
    "gossips with every step, or never communicates, does it once at the beginning of "
    "a round. evaluation: before every evaluation, and for the "
    "evaluation alone, so that training goes on as if nothing had been measured.",
    choices=("communication", "evaluation"),
)


def _selections(
    size: Option, *leads_to: Option, others: tuple[Record[Samples | None], ...] = ()
) -> dict[str, Record[Samples | None]]:
    """The selections by name.

    Args:
        size: the option that holds the number of images.
        leads_to: the other options that are read if any images are used.
        others: further selections, which use no images.
    """
    return registry(
        Record("own", own, (size,), leads_to=leads_to),
        Record("proxy", proxy, (size,), leads_to=leads_to),
        Record("held_out", held_out, (size,), leads_to=(*leads_to, HELD_OUT)),
        Record("global", everything, leads_to=leads_to),
        *others,
    )


MATCH_DATA = Option(
    "merge.match_data",
    "own",
    "The images on which units are matched by their activations.",
    choices=_selections(MATCH_SAMPLES, BATCH_SIZE),
)
BN_DATA = Option(
    "batch_norm.data",
    "proxy",
    "The images on which BatchNorm statistics are measured anew, whatever the "
    "algorithm is.",
    choices=_selections(
        BN_SAMPLES, BN_BATCH_SIZE, BN_WHEN, others=(Record("none", nothing),)
    ),
)


class Choice(NamedTuple):
    """The options that choose examples for one purpose.

    Attributes:
        data: the option that says whose examples are used.
        samples: the option that says how many are used.
        batch_size: the option that says how many are in a batch.
    """

    data: Option
    samples: Option
    batch_size: Option


MATCH = Choice(MATCH_DATA, MATCH_SAMPLES, BATCH_SIZE)
"""The examples on which units are matched by their activations."""
BATCH_NORM = Choice(BN_DATA, BN_SAMPLES, BN_BATCH_SIZE)
"""The examples on which BatchNorm statistics are measured anew."""
