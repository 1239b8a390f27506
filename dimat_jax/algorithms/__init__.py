"""The algorithms, by name.

`ALGORITHMS[name](task, tx, placement, options)` makes an `Algorithm`; `NEEDS[name]` is
what it asks for. To add one, write a file, and a line in each of the two.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import optax

from dimat_jax._lazy import public_names
from dimat_jax.algorithms._merging import OptStatePolicy, merging
from dimat_jax.algorithms._presence import attended
from dimat_jax.algorithms.base import Algorithm, MergeData, Task
from dimat_jax.algorithms.cdsgd import Order, cdsgd
from dimat_jax.algorithms.cga import cga
from dimat_jax.algorithms.choco import choco
from dimat_jax.algorithms.conditions import (
    Condition,
    anything,
    averaging,
    balanced,
    no_negative_weights,
    pushing,
    symmetric,
    two_way,
    undirected,
)
from dimat_jax.algorithms.d2 import check_links as d2_links
from dimat_jax.algorithms.d2 import d2
from dimat_jax.algorithms.dsgt import dsgt
from dimat_jax.algorithms.fedavg import fedavg
from dimat_jax.algorithms.local import local
from dimat_jax.algorithms.qgm import qgm
from dimat_jax.algorithms.sgp import sgp
from dimat_jax.compression import Compressor, none
from dimat_jax.errors import UserError, nearest
from dimat_jax.network import Links
from dimat_jax.placement import Placement
from dimat_jax.topology import Adjacency

__all__ = [
    "ALGORITHMS",
    "ALIGNING",
    "BETWEEN_MERGES",
    "MERGING",
    "NEEDS",
    "WATCHING",
    "Algorithm",
    "GossipOptions",
    "MergeData",
    "MergeOptions",
    "Needs",
    "Options",
    "Task",
    "check_links",
    "needs",
]


class MergeOptions(NamedTuple):
    """How to merge; see `merging`.

    Frame and stay are of no concern to "wa", restarts only to "wm". `inner` names what
    agents do between merges: one of `BETWEEN_MERGES`.
    """

    frame: str = "own"
    stay: float = 0.0
    opt_state: OptStatePolicy = "reset"
    restarts: int = 1
    inner: str = "local"


class GossipOptions(NamedTuple):
    """Choices of single algorithms; `NEEDS[name].options` tells whose.

    Attributes:
        order: cdsgd's.
        momentum: qgm's.
        gamma: choco's.
    """

    order: Order = "combine_then_adapt"
    momentum: float = 0.9
    gamma: float = 1.0


class Options(NamedTuple):
    """Everything an algorithm can be told; each reads the part that is its own.

    Attributes:
        merge: for those that merge.
        gossip: for those that gossip with every step.
        compressor: of what is sent, for those that compress.
        edges: all edges that there ever are, for those that keep something for each.
        changing: whether the network may change, or messages may not arrive.
        examples: how many each agent holds, for fedavg; None: all as many.
    """

    merge: MergeOptions = MergeOptions()
    gossip: GossipOptions = GossipOptions()
    compressor: Compressor = none()
    edges: Adjacency | None = None
    changing: bool = True
    examples: Sequence[int] | None = None


class Needs(NamedTuple):
    """What makes an algorithm what its name says.

    Attributes:
        links: the check of the network.
        graph: whether it looks at the graph at all.
        optimizer: the local optimizer that is its own.
        other_optimizers: whether others will do.
        options: which `GossipOptions` it reads.
        compressor: the one that is its own; None: it sends everything.
    """

    links: Condition = anything
    graph: bool = True
    optimizer: str = "adam"
    other_optimizers: bool = True
    options: frozenset[str] = frozenset()
    compressor: str | None = None


Builder = Callable[[Task, optax.GradientTransformation, Placement, Options], Algorithm]


def _edges(options: Options) -> Adjacency:
    if options.edges is None:
        raise ValueError("it keeps something for every edge: pass Options.edges")
    return options.edges


_BUILDERS: dict[str, Builder] = {
    "local": lambda task, tx, placement, options: local(task, tx, placement),
    # The same training; a run gives it a single agent that holds all data.
    "centralized": lambda task, tx, placement, options: local(task, tx, placement),
    "cdsgd": lambda task, tx, placement, options: cdsgd(
        task, tx, placement, order=options.gossip.order
    ),
    # These two differ from it by the optimizer alone.
    "cdmsgd": lambda task, tx, placement, options: cdsgd(task, tx, placement),
    "cdadam": lambda task, tx, placement, options: cdsgd(task, tx, placement),
    "sgp": lambda task, tx, placement, options: sgp(task, tx, placement),
    "d2": lambda task, tx, placement, options: d2(task, tx, placement),
    "dsgt": lambda task, tx, placement, options: dsgt(task, tx, placement),
    "qgm": lambda task, tx, placement, options: qgm(
        task, tx, placement, momentum=options.gossip.momentum
    ),
    "cga": lambda task, tx, placement, options: cga(
        task, tx, placement, adjacency=_edges(options)
    ),
    "compcga": lambda task, tx, placement, options: cga(
        task, tx, placement, adjacency=_edges(options), compressor=options.compressor
    ),
    "choco": lambda task, tx, placement, options: choco(
        task,
        tx,
        placement,
        compressor=options.compressor,
        lossy_edges=_edges(options) if options.changing else None,
        gamma=options.gossip.gamma,
    ),
    "fedavg": lambda task, tx, placement, options: fedavg(
        task, tx, placement, examples=options.examples
    ),
    "dimat": lambda *arguments: _merging("activations", *arguments),
    "wm": lambda *arguments: _merging("weights", *arguments),
    "wa": lambda *arguments: _merging(None, *arguments),
}


def _merging(match, task, tx, placement, options: Options) -> Algorithm:
    merge = options.merge._asdict()
    inner = merge.pop("inner")
    if inner not in BETWEEN_MERGES:
        raise UserError(f"between merges: {nearest(inner, BETWEEN_MERGES)}")
    return merging(
        _BUILDERS[inner](task, tx, placement, options),
        task,
        placement,
        match=match,
        compressor=options.compressor,
        **merge,
    )


def _attended(build: Builder) -> Builder:
    def built(task, tx, placement, options=Options()) -> Algorithm:  # noqa: B008
        return attended(build(task, tx, placement, options), placement)

    return built


ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    name: _attended(build) for name, build in _BUILDERS.items()
}
"""`ALGORITHMS[name](task, tx, placement, options=Options())`."""

NEEDS: dict[str, Needs] = {
    "local": Needs(graph=False),
    "centralized": Needs(graph=False),
    "cdsgd": Needs(balanced, optimizer="sgd", options=frozenset({"order"})),
    "cdmsgd": Needs(balanced, optimizer="heavy_ball", other_optimizers=False),
    "cdadam": Needs(balanced, optimizer="dadam", other_optimizers=False),
    "sgp": Needs(pushing, optimizer="sgd"),
    "d2": Needs(d2_links, optimizer="sgd", other_optimizers=False),
    "dsgt": Needs(balanced, optimizer="sgd"),
    "qgm": Needs(
        balanced,
        optimizer="sgd",
        other_optimizers=False,
        options=frozenset({"momentum"}),
    ),
    "cga": Needs(undirected, optimizer="heavy_ball"),
    "compcga": Needs(undirected, optimizer="heavy_ball", compressor="sign"),
    "choco": Needs(
        symmetric, optimizer="sgd", options=frozenset({"gamma"}), compressor="int8"
    ),
    "fedavg": Needs(graph=False, optimizer="sgd"),
    "dimat": Needs(compressor="none"),
    "wm": Needs(compressor="none"),
    "wa": Needs(compressor="none"),
}

# What merges once a round, what permutes units when it does, and what looks at the
# activations of examples for that.
MERGING = frozenset({"dimat", "wa", "wm"})
ALIGNING = frozenset({"dimat", "wm"})
WATCHING = frozenset({"dimat"})
# What has no rounds of its own, so that others can merge once a round.
BETWEEN_MERGES = frozenset(ALGORITHMS) - MERGING - {"centralized", "fedavg"}


def needs(name: str, inner: str = "local") -> Needs:
    """What an algorithm needs, with what it does between merges, if it merges."""
    if name not in MERGING or inner == "local":
        return NEEDS[name]
    # Where both compress, what is said of compression holds for both.
    return NEEDS[inner]._replace(compressor=NEEDS[inner].compressor or "none")


def check_links(name: str, links: Links, merge: MergeOptions = MergeOptions()) -> None:  # noqa: B008
    """Checks that a network is what an algorithm's theory asks for.

    Raises:
        NetworkError: it is not; the message says what is needed.
    """
    if name in MERGING:
        if name in ALIGNING and merge.frame != "own":
            two_way(f"{name} with frame={merge.frame!r}", links)
        averaging(name, links)
        if merge.opt_state == "merge":
            no_negative_weights(f"{name} with opt_state='merge'", links)
        name = merge.inner
    NEEDS[name].links(name, links)


def __dir__() -> list[str]:
    return public_names(__name__)
