"""The two ways to match agents along edges: by their activations, by their weights."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key

from dimat_jax._stopwatch import Stopwatch
from dimat_jax.algorithms.base import MergeData, one_agent
from dimat_jax.data.pipeline import Batch
from dimat_jax.matching._activation import ActivationScorer, activation_scorers
from dimat_jax.matching._descent import (
    PairPerms,
    Pairs,
    Problem,
    coordinate_descent,
    identities,
)
from dimat_jax.matching._moments import (
    TapMoments,
    group_scores,
    no_moments,
    update_taps,
)
from dimat_jax.matching._observed import (
    ListedNetworks,
    NetworkPrograms,
    ObservedNetworks,
    observer,
)
from dimat_jax.matching._taps import Activations
from dimat_jax.matching._weight import RESTARTS, match_by_weights
from dimat_jax.matching._weight_scores import (
    WeightScorer,
    included,
)
from dimat_jax.permutation import PermutationSpec, group_shapes
from dimat_jax.placement import Placement
from dimat_jax.tree import PyTree

__all__ = ["ActivationMatcher", "WeightMatcher"]


class ActivationMatcher:
    """Matches units that are active alike.

    If all agents look at the same examples, each agent computes its activations once
    for all its edges. If the examples are an agent's own, a receiver runs every model
    that it has received on its own examples. Agents that run one after the other on one
    device are a list of networks. Others are stacked.

    Args:
        spec: the symmetry, with a tap for each group.
        activations: a function of one agent,
            `activations(variables, inputs) -> {tap: array}`.
        placement: the devices on which the agents live.

    Raises:
        PermutationSpecError: a group has no tap.
    """

    by_activations = True

    def __init__(
        self,
        spec: PermutationSpec,
        activations: Callable[[PyTree, Array], Activations],
        placement: Placement,
    ):
        self._stacked = _Programs(spec, activations, placement)
        self._listed = NetworkPrograms(spec, activations)
        self._placement = placement

    def both_ways(self, data: MergeData) -> bool:
        return data.match is not None and data.match.shared

    def scorers(
        self,
        variables: PyTree,
        edge_waves: Sequence[Pairs],
        data: MergeData,
        stopwatch: Stopwatch,
    ) -> Iterator[ActivationScorer]:
        """Makes the scorers; it measures "activations" and "correlations"."""
        if data.match is None:
            raise ValueError("matching needs examples to look at: MergeData.match")
        if self._placement.one_by_one and not data.match.shared:
            edge_waves = _single_edges(edge_waves)
        return activation_scorers(
            self._agents(variables, data.match.shared),
            data.match,
            edge_waves,
            as_needed=data.match.as_needed,
            stopwatch=stopwatch,
            fetch=self._placement.fetch,
        )

    def _agents(self, variables: PyTree, shared: bool) -> ObservedNetworks:
        """The agents in the form that suits the devices."""
        if not self._placement.one_by_one:
            return _StackedAgents(self._stacked, variables, shared)
        models = [_agent(variables, i) for i in range(self._placement.n_agents)]
        read = _read_shared if shared else _read_own
        return ListedNetworks(self._listed, models, read, shared=shared)

    def search(self, problem: Problem, key: Key[Array, ""], /) -> PairPerms:
        del key
        return coordinate_descent(problem, identities(problem.scorer))


class _Programs:
    """The compiled programs of an `ActivationMatcher`, on stacked agents.

    Attributes:
        observe_shared: computes all agents' activations on the same inputs.
        observe_own: computes each agent's activations on its own inputs.
        observe_received: computes the senders' activations on their receivers' inputs.
        update: adds a batch to the moments of a wave.
        scores: computes the scores of a wave.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        activations: Callable[[PyTree, Array], Activations],
        placement: Placement,
    ):
        observe = observer(spec, activations)

        def pick(stacked, indices):
            # None stands for all entries in order.
            return stacked if indices is None else placement.pick(stacked, indices)

        def observe_received(variables, inputs, mask, senders, receivers):
            return placement.per_agent(observe)(
                pick(variables, senders),
                pick(inputs, receivers),
                pick(mask, receivers),
            )

        def update(moments, references, receivers, permutees, senders):
            return placement.per_agent(update_taps)(
                moments, pick(references, receivers), pick(permutees, senders)
            )

        self.spec, self.placement = spec, placement
        self.observe_shared = placement.jit(
            placement.per_agent(observe, in_axes=(0, None, None))
        )
        self.observe_own = placement.jit(placement.per_agent(observe))
        self.observe_received = placement.jit(observe_received)
        self.update = placement.jit(update, donate_argnums=0)
        self.scores = placement.jit(placement.per_agent(group_scores))


class _StackedAgents:
    """Agents that are stacked over devices, in the form of `ObservedNetworks`.

    Args:
        programs: the compiled programs that run on the agents.
        variables: the agents' variables, stacked.
        shared: whether all agents look at the same examples.
    """

    def __init__(self, programs: _Programs, variables: PyTree, shared: bool):
        self._programs, self._variables, self._shared = programs, variables, shared

    def no_moments(self, wave: Pairs) -> TapMoments:
        del wave
        spec, placement = self._programs.spec, self._programs.placement
        shapes = group_shapes(spec, one_agent(self._variables))
        return jax.tree.map(
            lambda x: placement.zeros(*x.shape), no_moments(spec, shapes)
        )

    def observe(self, batch: Batch) -> Any:
        programs = self._programs
        observe = programs.observe_shared if self._shared else programs.observe_own
        return observe(self._variables, batch.inputs, batch.mask)

    def observe_permutees(self, batch: Batch, wave: Pairs) -> Any:
        if self._shared:
            return None
        return self._programs.observe_received(
            self._variables,
            batch.inputs,
            batch.mask,
            wave.permutees,
            self._receivers(wave),
        )

    def add(
        self, moments: TapMoments, observed: Any, permutees: Any, wave: Pairs
    ) -> TapMoments:
        shown = (observed, wave.permutees) if self._shared else (permutees, None)
        return self._programs.update(moments, observed, self._receivers(wave), *shown)

    def scores(self, moments: TapMoments) -> dict[str, Array]:
        return self._programs.scores(moments)

    def _receivers(self, wave: Pairs) -> np.ndarray | None:
        """Returns a wave's receivers; None if they are all agents in order.

        None saves a copy of the stacked arrays.
        """
        slots = self._programs.placement.slots
        in_order = np.array_equal(wave.references, np.arange(slots))
        return None if in_order else wave.references


def _single_edges(edge_waves: Sequence[Pairs]) -> list[Pairs]:
    """Splits waves into waves of one edge each.

    Then the activations of a received model are gone before those of the next one are
    computed.
    """
    return [
        Pairs(wave.references[k : k + 1], wave.permutees[k : k + 1], 1)
        for wave in edge_waves
        for k in range(wave.real)
    ]


# One agent of a stack. The index is traced, so all agents share one program.
_agent = jax.jit(
    lambda stacked, agent: jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, agent, keepdims=False), stacked
    )
)


def _read_shared(batch: Batch, agent: int) -> tuple[Array, Array]:
    """What an agent sees of a batch that all agents share."""
    del agent
    return batch.inputs, batch.mask


def _read_own(batch: Batch, agent: int) -> tuple[Array, Array]:
    """What an agent sees of a batch of each agent's own examples."""
    return _agent((batch.inputs, batch.mask), agent)


class WeightMatcher:
    """Matches units whose weights are alike. It looks at no data.

    Args:
        spec: the symmetry.
        placement: the devices on which the agents live.
        restarts: the number of starts, as for `matching.weight_matching`.
    """

    by_activations = False

    def __init__(
        self,
        spec: PermutationSpec,
        placement: Placement,
        restarts: int = RESTARTS.default,
    ):
        self._spec, self._placement = spec, placement
        self.search: Callable[[Problem, Key[Array, ""]], PairPerms] = partial(
            match_by_weights, restarts=restarts
        )
        self._lift, self._pick = placement.per_agent, placement.pick

    def both_ways(self, data: MergeData) -> bool:
        del data
        return True

    def scorers(
        self,
        variables: PyTree,
        edge_waves: Sequence[Pairs],
        data: MergeData,
        stopwatch: Stopwatch,
    ) -> Iterator[WeightScorer]:
        """Makes the only scorer; it measures "scores"."""
        del data
        agents, slots = self._placement.n_agents, self._placement.slots

        def fetch(scores):
            with stopwatch("scores"):
                return self._placement.fetch(scores)

        yield WeightScorer(
            self._spec,
            group_shapes(self._spec, one_agent(variables)),
            included(variables, self._spec.is_weight),
            edge_waves,
            lift=self._lift,
            pick=self._pick,
            fetch=fetch,
            names=[f"agent {slot % agents}" for slot in range(slots)],
        )
