"""The record of an algorithm says how the algorithm is built, and what it needs.

Adding an algorithm takes one file that ends with its record, and one line in
`dimat_jax.algorithms`. Checks of configs and networks, the builder of a run, reports
and the documentation all read the records; none of them names an algorithm.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

from dimat_jax.algorithms._presence import with_absences
from dimat_jax.algorithms._recalibration import recalibrating
from dimat_jax.algorithms.base import Algorithm, Task
from dimat_jax.algorithms.conditions import Condition, anything
from dimat_jax.compression import COMPRESSORS, Compressor
from dimat_jax.data._small_shards import SMALL_SHARDS
from dimat_jax.data.partition import PARTITION, PRETRAIN_PARTITION
from dimat_jax.mixing import MIXING
from dimat_jax.network import ABSENCES, DROPOUT, EDGE_LOSS, Links
from dimat_jax.options import Option, Record
from dimat_jax.placement import AGENTS, Placement
from dimat_jax.topology import TOPOLOGY

__all__ = ["GRAPH", "INIT", "INIT_FROM", "SEVERAL_AGENTS", "AlgorithmRecord"]

INIT = Option(
    "init",
    "different",
    "Whether the agents start from different random weights, or all of them from the "
    "same ones.",
    choices=("different", "same"),
)

INIT_FROM = Option(
    "init_from",
    "",
    "The trained weights from which the agents start. The folder of a run, DIR, gives "
    "its agents to the new ones in their order; DIR@10 gives those at the end of round "
    "10. A list of models with commas between them, or a pattern such as "
    "'models/*.pth', has one for each agent, or a single one for all. A model is an "
    "agent of a run (DIR:2), the folder of a merge or of an export, or a PyTorch file.",
    empty="agents start from random weights",
)

GRAPH = (TOPOLOGY, MIXING, EDGE_LOSS)
"""The options of every algorithm whose agents send along a graph."""

SEVERAL_AGENTS = (
    AGENTS,
    INIT,
    DROPOUT,
    ABSENCES,
    PARTITION,
    PRETRAIN_PARTITION,
    SMALL_SHARDS,
)
"""The options that mean nothing if there is only one agent."""


@dataclasses.dataclass(frozen=True, eq=False)
class AlgorithmRecord(Record[Algorithm]):
    """An algorithm's record. `record(task, tx, placement, **arguments)` builds it.

    The arguments are the algorithm's `options` by their keywords, and the `facts` that
    it needs.

    Attributes:
        network: the check that raises NetworkError for a network that the algorithm's
            theory does not cover.
        optimizer: the name of the algorithm's own local optimizer.
        other_optimizers: whether the algorithm may have another local optimizer.
        compressor: the name of the algorithm's own compressor; None if the algorithm
            never compresses its messages.
        facts: the names of further arguments of `build`, which a run finds out by
            itself: "adjacency" (all edges that ever exist), "lossy_edges" (the same
            edges, or None if the network never changes and every message arrives),
            "mixing_matrix" (W at all times, without faults), "compressor", "server"
            (what a server makes of an average; see `algorithms.server`), and "examples"
            (the number of each agent's examples, or None if every agent counts the
            same; see `data.small_shards`).
        check_together: `check_together(links, compressor=..., **options)` checks
            options that suit only some networks and compressors. It raises an
            OptionError. None if there are no such options.
    """

    network: Condition = anything
    optimizer: str = "adam"
    other_optimizers: bool = True
    compressor: str | None = None
    facts: frozenset[str] = frozenset()
    check_together: Callable[..., None] | None = None

    def __call__(
        self,
        task: Task,
        tx: optax.GradientTransformation,
        placement: Placement,
        **arguments: Any,
    ) -> Algorithm:
        """Builds the algorithm, with what holds for every algorithm.

        Agents measure their BatchNorm statistics anew after a communication that is
        given examples for it, and absent agents keep their state.
        """
        arguments = {**self._own_compressor, **arguments}
        algorithm = self.build(task, tx, placement, **arguments)
        return with_absences(recalibrating(algorithm, task, placement), placement)

    @property
    def _own_compressor(self) -> dict[str, Compressor]:
        """The argument that a builder needs if no other compressor is chosen."""
        if "compressor" not in self.facts or self.compressor is None:
            return {}
        return {"compressor": COMPRESSORS[self.compressor]()}

    @property
    def title(self) -> str:
        """The algorithm's name in messages."""
        return self.name

    @property
    def single(self) -> bool:
        """Whether there is only one agent, which holds all data."""
        return AGENTS in self.ignores

    @property
    def merges(self) -> bool:
        """Whether agents merge once a round."""
        return False

    @property
    def aligns(self) -> bool:
        """Whether units are permuted when agents merge."""
        return False

    @property
    def matches_activations(self) -> bool:
        """Whether units are matched by their activations on examples."""
        return False

    @property
    def uses_graph(self) -> bool:
        """Whether agents send along the edges of a graph."""
        return TOPOLOGY in self.leads_to

    @property
    def argument_names(self) -> frozenset[str]:
        """The names of all keyword arguments of `build`."""
        return self.facts | {option.keyword for option in self.options}

    def check_network(self, links: Links, **arguments: Any) -> None:
        """Checks that the algorithm's theory covers a network.

        Args:
            links: the network.
            arguments: the algorithm's options, by keyword, and its compressor if that
                is not its own.

        Raises:
            NetworkError: the theory does not cover it; the message says what is needed.
            OptionError: an option has a value that does not suit the network.
        """
        self.network(self.name, links)
        if self.check_together is not None:
            known = {**self._own_compressor, **arguments}
            names = {"compressor", *(option.keyword for option in self.options)}
            self.check_together(
                links, **{name: known[name] for name in names & known.keys()}
            )
