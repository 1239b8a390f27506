"""Matching along the edges of a graph, all agents at once.

Edges are worked off in waves of as many edges as there are agents, so that a wave is
stacked, sharded and balanced like the agents themselves, whatever the graph: a ring
takes two waves, a fully connected graph N - 1, a star two. Where matching j with i is
matching i with j inverted, half of them will do.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from dimat_jax._stopwatch import Stopwatch
from dimat_jax.algorithms.base import MergeData
from dimat_jax.data.pipeline import Samples
from dimat_jax.matching._activation import (
    Activations,
    ActivationScorer,
    TapMoments,
    centre,
    check_taps,
    group_scores,
    no_moments,
    tap_units,
    update_taps,
)
from dimat_jax.matching._descent import (
    PairPerms,
    Pairs,
    Solver,
    descend,
    every_pair_alone,
    identities,
)
from dimat_jax.matching._joint import all_pairs_together
from dimat_jax.matching._weight import check_restarts, match_by_weights
from dimat_jax.matching._weight_scores import (
    WeightScorer,
    included,
    not_running_statistics,
)
from dimat_jax.permutation import (
    PermutationSpec,
    PermutationSpecError,
    group_sizes,
)
from dimat_jax.placement import Placement
from dimat_jax.tree import PyTree, take

__all__ = [
    "ActivationMatcher",
    "EdgePerms",
    "Matcher",
    "WeightMatcher",
    "match_edges",
    "waves",
]

Edges = Int[np.ndarray, "edges 2"]
"""(receiver, sender)s: the sender is to be aligned with the receiver."""

EdgePerms = dict[tuple[int, int], dict[str, np.ndarray]]
"""For every edge (receiver, sender), what aligns the sender with the receiver."""


def waves(edges: Edges, slots: int) -> list[Pairs]:
    """Groups edges into waves of `slots`, filled up with self-loops of agent 0."""
    # By offset first: on a ring or a fully connected graph whose agents fill the slots
    # every wave then holds each receiver exactly once, in order.
    offsets = (edges[:, 1] - edges[:, 0]) % slots
    edges = edges[np.lexsort((edges[:, 0], offsets))]
    result = []
    for start in range(0, len(edges), slots):
        wave = edges[start : start + slots]
        filled = np.zeros((slots, 2), np.int32)
        filled[: len(wave)] = wave
        result.append(Pairs(filled[:, 0], filled[:, 1], len(wave)))
    return result


@runtime_checkable
class Matcher(Protocol):
    """Matches stacked agents along edges."""

    def both_ways(self, data: MergeData) -> bool:
        """Whether aligning j with i tells how to align i with j: inverted."""
        ...

    def match(
        self,
        variables: PyTree,
        edge_waves: Sequence[Pairs],
        solver: Solver,
        data: MergeData,
        *,
        stay: float,
        key: Key[Array, ""],
        stopwatch: Stopwatch,
    ) -> tuple[PairPerms, Float[np.ndarray, " edges"]]:
        """Finds the permutations along all edges.

        Args:
            variables: stacked.
            edge_waves: the edges; at least one.
            solver: which permutations are allowed.
            data: the examples to look at.
            stay: what a unit must gain for it to move.
            key: consumed.
            stopwatch: books phases.

        Returns:
            the permutations, in the order of the waves' edges, and each edge's
            similarity of what is then aligned, within [-1, 1].
        """
        ...


def match_edges(
    matcher: Matcher,
    variables: PyTree,
    edges: Edges,
    data: MergeData,
    *,
    placement: Placement,
    joint: bool = False,
    stay: float = 0.0,
    key: Key[Array, ""],
    stopwatch: Stopwatch,
) -> tuple[EdgePerms, float]:
    """Matches along edges, each of both directions once where one tells the other.

    Args:
        matcher: how.
        variables, data, stay, key, stopwatch: as for `Matcher.match`.
        edges: at least one.
        placement: where the agents live.
        joint: whether permutations must agree: be the identity round any cycle.

    Returns:
        the permutations by edge, and the mean similarity.
    """
    both_ways = matcher.both_ways(data)
    edge_waves = waves(
        _one_way(edges, placement.slots) if both_ways else edges, placement.slots
    )
    pairs = np.concatenate([np.stack(w[:2], axis=1)[: w.real] for w in edge_waves])
    perms, similarity = matcher.match(
        variables,
        edge_waves,
        all_pairs_together(pairs) if joint else every_pair_alone(len(pairs)),
        data,
        stay=stay,
        key=key,
        stopwatch=stopwatch,
    )
    found = _by_edge(pairs, perms)
    if both_ways:
        inverted = {group: np.argsort(perm, axis=1) for group, perm in perms.items()}
        found |= _by_edge(pairs[:, ::-1], inverted)
    wanted = {(i, j): found[i, j] for i, j in edges.tolist()}
    return wanted, float(similarity.mean())


def _by_edge(pairs: Edges, perms: PairPerms) -> EdgePerms:
    return {
        (i, j): {group: perm[e].astype(np.int32) for group, perm in perms.items()}
        for e, (i, j) in enumerate(pairs.tolist())
    }


def _one_way(edges: Edges, slots: int) -> Edges:
    """Of two opposite edges the one that `waves` balances best."""
    receivers, senders = edges.T
    there, back = (senders - receivers) % slots, (receivers - senders) % slots
    second = (there > back) | ((there == back) & (receivers > senders))
    opposite = set(map(tuple, edges[:, ::-1].tolist()))
    paired = np.array([edge in opposite for edge in map(tuple, edges.tolist())], bool)
    return edges[~(second & paired)]


class ActivationMatcher:
    """Matches units that are active alike.

    Where all agents look at the same examples, each computes its activations once for
    all its edges. On own data a receiver runs every model that it was sent.

    Args:
        spec: the symmetry, with a tap for each group.
        activations: for one agent, `activations(variables, inputs) -> {tap: array}`.
        placement: where the agents live.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        activations: Callable[[PyTree, Array], Activations],
        placement: Placement,
    ):
        check_taps(spec)
        self._spec = spec
        self._placement = placement

        def watch(variables, inputs, mask):
            shown = activations(variables, inputs)
            units = tap_units(spec, group_sizes(spec, variables), shown)
            return {
                group: {tap: centre_examples(tap, taps[tap], mask) for tap in taps}
                for group, taps in units.items()
            }

        def centre_examples(tap, units, mask):
            if len(units) % len(mask):
                raise PermutationSpecError(
                    f"tap {tap!r} shows {len(units)} samples of {len(mask)} examples; "
                    "the first axis of its activations must be the examples"
                )
            # Every position of a feature map is a sample of its example.
            return centre(units, jnp.repeat(mask, len(units) // len(mask)))

        def watch_received(variables, inputs, mask, senders, receivers):
            return placement.per_agent(watch)(
                _pick(variables, senders),
                _pick(inputs, receivers),
                _pick(mask, receivers),
            )

        def update(moments, seen, receivers, sent, senders):
            return placement.per_agent(update_taps)(
                moments, _pick(seen, receivers), _pick(sent, senders)
            )

        self._watch_shared = jax.jit(
            placement.per_agent(watch, in_axes=(0, None, None))
        )
        self._watch_own = jax.jit(placement.per_agent(watch))
        self._watch_received = jax.jit(watch_received)
        self._update = jax.jit(update, donate_argnums=0)
        self._scores = jax.jit(placement.per_agent(group_scores))

    def both_ways(self, data: MergeData) -> bool:
        return data.match is not None and data.match.shared

    def match(
        self, variables, edge_waves, solver, data, *, stay, key, stopwatch
    ) -> tuple[PairPerms, np.ndarray]:
        """Books "activations", "correlations" and "assignment"."""
        del key
        if data.match is None:
            raise ValueError("matching needs examples to look at: MergeData.match")
        scores = self._correlate(variables, edge_waves, data.match, stopwatch)
        with stopwatch("assignment"):
            scorer = ActivationScorer(scores, edge_waves, fetch=self._placement.fetch)
            perms = descend(scorer, solver, identities(scorer), stay=stay)
            return perms, scorer.similarity(perms)

    def _correlate(
        self,
        variables: PyTree,
        edge_waves: Sequence[Pairs],
        samples: Samples,
        stopwatch: Stopwatch,
    ) -> list[dict[str, Array]]:
        """For each wave and group the scores `[slots, units, units]`."""
        watch = self._watch_shared if samples.shared else self._watch_own
        moments = [self._empty(variables) for _ in edge_waves]
        for inputs, _, mask in samples:
            with stopwatch("activations") as block:
                seen = block(watch(variables, inputs, mask))
            for w, (receivers, senders, _) in enumerate(edge_waves):
                if np.array_equal(receivers, np.arange(self._placement.slots)):
                    receivers = None  # in order already; spares a copy
                sent = (seen, senders)
                if not samples.shared:
                    with stopwatch("activations") as block:
                        received = self._watch_received(
                            variables, inputs, mask, senders, receivers
                        )
                        sent = (block(received), None)
                with stopwatch("correlations") as block:
                    moments[w] = block(self._update(moments[w], seen, receivers, *sent))
        return [self._scores(of_wave) for of_wave in moments]

    def _empty(self, variables: PyTree) -> TapMoments:
        """The moments of no samples, for one wave."""
        sizes = group_sizes(self._spec, _one_agent(variables))
        return jax.tree.map(
            lambda x: self._placement.zeros(*x.shape), no_moments(self._spec, sizes)
        )


class WeightMatcher:
    """Matches units whose weights are alike; looks at no data.

    Args:
        spec: the symmetry.
        placement: where the agents live.
        restarts: as for `matching.weight_matching`.

    Raises:
        ValueError: `restarts` < 1.
    """

    def __init__(self, spec: PermutationSpec, placement: Placement, restarts: int = 1):
        check_restarts(restarts)
        self._spec, self._placement, self._restarts = spec, placement, restarts
        self._lift = placement.per_agent

    def both_ways(self, data: MergeData) -> bool:
        del data
        return True

    def match(
        self, variables, edge_waves, solver, data, *, stay, key, stopwatch
    ) -> tuple[PairPerms, np.ndarray]:
        """Books "scores" and "assignment"."""
        del data
        agents, slots = self._placement.n_agents, self._placement.slots

        def fetch(scores):
            with stopwatch("scores"):
                return self._placement.fetch(scores)

        with stopwatch("assignment"):
            scorer = WeightScorer(
                self._spec,
                group_sizes(self._spec, _one_agent(variables)),
                included(variables, not_running_statistics),
                edge_waves,
                lift=self._lift,
                fetch=fetch,
                names=[f"agent {slot % agents}" for slot in range(slots)],
            )
            perms = match_by_weights(
                scorer, solver, key=key, restarts=self._restarts, stay=stay
            )
            return perms, scorer.similarity(perms)


def _one_agent(variables: PyTree) -> PyTree:
    """The shapes of one agent's variables."""
    return jax.eval_shape(lambda v: take(v, 0), variables)


def _pick(stacked: PyTree, indices: Array | np.ndarray | None) -> PyTree:
    """Stacked entries by index; None leaves them as they are."""
    return stacked if indices is None else take(stacked, indices)
