"""The record of an algorithm that merges once a round, on top of another algorithm."""

import dataclasses
from typing import Any

from dimat_jax.algorithms._ahead import GRADIENT, check_gradient
from dimat_jax.algorithms._frames import FRAMES
from dimat_jax.algorithms._merging import FRAME
from dimat_jax.algorithms.base import Algorithm
from dimat_jax.algorithms.conditions import averaging, no_negative_weights, two_way
from dimat_jax.algorithms.record import AlgorithmRecord
from dimat_jax.data.selection import MATCH_DATA
from dimat_jax.network import Links

__all__ = ["MergingRecord"]


@dataclasses.dataclass(frozen=True, eq=False)
class MergingRecord(AlgorithmRecord):
    """The record of an algorithm that merges once a round.

    Its `build(inner, task, placement, **arguments)` takes the algorithm that agents run
    between merges in place of an optimizer. `over` makes a record that can be built
    like any other.

    Attributes:
        inner: the record of the algorithm between merges; None as long as it has not
            been chosen.
    """

    inner: AlgorithmRecord | None = None

    def __call__(self, *args: Any, **arguments: Any) -> Algorithm:
        if self.inner is None:
            raise TypeError(
                f"{self.name} merges on top of another algorithm: call "
                f"ALGORITHMS[{self.name!r}], or `over` first"
            )
        return super().__call__(*args, **arguments)

    @property
    def merges(self) -> bool:
        """Whether agents merge once a round."""
        return True

    @property
    def aligns(self) -> bool:
        """Whether units are permuted when agents merge."""
        return FRAME in self.options

    @property
    def matches_activations(self) -> bool:
        """Whether units are matched by their activations on examples."""
        return MATCH_DATA in self.leads_to

    @property
    def title(self) -> str:
        """The algorithm's name in messages, with what agents run between merges."""
        if self.inner is None or self.inner.name == "local":
            return self.name
        return f"{self.name} with {self.inner.name} between merges"

    def over(self, inner: AlgorithmRecord) -> "MergingRecord":
        """Makes the record of this algorithm with a given algorithm between merges."""

        def build(task, tx, placement, **arguments: Any) -> Algorithm:
            check_gradient(arguments.get("gradient", GRADIENT.default), inner.name)
            own = {k: v for k, v in arguments.items() if k in inner.argument_names}
            rest = {
                k: v
                for k, v in arguments.items()
                if k not in own or k in self.argument_names
            }
            between = inner.build(task, tx, placement, **own)
            return self.build(between, task, placement, **rest)

        return dataclasses.replace(
            self,
            build=build,
            options=(*self.options, *inner.options),
            leads_to=(*self.leads_to, *inner.leads_to),
            summary=self.meaning,
            optimizer=inner.optimizer,
            other_optimizers=inner.other_optimizers,
            # If both compress, they use the same compressor.
            compressor=inner.compressor or self.compressor,
            facts=self.facts | inner.facts,
            inner=inner,
        )

    def check_network(self, links: Links, **arguments: Any) -> None:
        """Checks a network for the merge, and for the algorithm between merges."""
        assert self.inner is not None  # `over` has been called
        given = {option.keyword: option.default for option in self.options} | arguments
        frame = given.get("frame")  # plain averaging has no frames
        if frame is not None and FRAMES[frame].two_way:
            two_way(f"{self.name} with frame={frame!r}", links)
        averaging(self.name, links)
        if given["opt_state"] == "merge":
            no_negative_weights(f"{self.name} with opt_state='merge'", links)
        self.inner.check_network(links, **arguments)
