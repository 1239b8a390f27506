"""Activation matching along the edges of a graph, all agents at once.

Edges are worked off in waves of as many edges as there are agents, so that a wave is
stacked, sharded and balanced like the agents themselves, whatever the graph: a ring
takes two waves, a fully connected graph N - 1, a star two.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dimat_jax.data.pipeline import Samples
from dimat_jax.matching.activation import (
    Activations,
    TapMoments,
    centre,
    check_taps,
    group_scores,
    no_moments,
    solve_groups,
    tap_units,
    update_taps,
)
from dimat_jax.permutation import PermutationSpec, PermutationSpecError, group_sizes
from dimat_jax.placement import Placement
from dimat_jax.stopwatch import Stopwatch
from dimat_jax.tree import PyTree, take

__all__ = ["EdgeMatcher", "Wave", "waves"]


class Wave(NamedTuple):
    """Some of a graph's edges, filled up with self-loops of agent 0.

    Attributes:
        receivers: int32[slots], the references.
        senders: int32[slots], the permutees.
        real: how many of them, from the start, are edges.
    """

    receivers: np.ndarray
    senders: np.ndarray
    real: int


def waves(edges: Int[np.ndarray, "edges 2"], slots: int) -> list[Wave]:
    """Groups `(receiver, sender)` edges into waves of `slots`."""
    # By offset first: on a ring or a fully connected graph whose agents fill the slots
    # every wave then holds each receiver exactly once, in order.
    offsets = (edges[:, 1] - edges[:, 0]) % slots
    edges = edges[np.lexsort((edges[:, 0], offsets))]
    result = []
    for start in range(0, len(edges), slots):
        wave = edges[start : start + slots]
        filled = np.zeros((slots, 2), np.int32)
        filled[: len(wave)] = wave
        result.append(Wave(filled[:, 0], filled[:, 1], len(wave)))
    return result


class EdgeMatcher:
    """Finds, for every edge, the permutation that aligns the sender with the receiver.

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
        self._slots = placement.slots

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
        self._placement = placement

    def match(
        self,
        variables: PyTree,
        edge_waves: Sequence[Wave],
        samples: Samples,
        *,
        stay: float = 0.0,
        stopwatch: Stopwatch,
    ) -> list[dict[str, np.ndarray]]:
        """Matches along all edges.

        Args:
            variables: stacked.
            edge_waves: the edges.
            samples: the examples to look at.
            stay: as in `activation_matching`.
            stopwatch: books "activations", "correlations" and "assignment".

        Returns:
            for each wave and group int32 `[slots, units]`: the permutation that aligns
            the wave's senders with its receivers.
        """
        watch = self._watch_shared if samples.shared else self._watch_own
        moments: list[Any] = []
        for inputs, _, mask in samples:
            with stopwatch("activations") as block:
                seen = block(watch(variables, inputs, mask))
            moments = moments or [self._empty(variables) for _ in edge_waves]
            for w, (receivers, senders, _) in enumerate(edge_waves):
                if np.array_equal(receivers, np.arange(self._slots)):
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
        with stopwatch("assignment"):
            return [
                self._assign(wave_moments, wave.real, stay)
                for wave_moments, wave in zip(moments, edge_waves, strict=True)
            ]

    def _empty(self, variables: PyTree) -> TapMoments:
        """The moments of no samples, for one wave."""
        one = jax.eval_shape(lambda v: take(v, 0), variables)
        return jax.tree.map(
            lambda x: self._placement.zeros(*x.shape),
            no_moments(self._spec, group_sizes(self._spec, one)),
        )

    def _assign(self, moments, real: int, stay: float) -> dict[str, np.ndarray]:
        scores = self._placement.fetch(self._scores(moments))
        perms = solve_groups({g: s[:real] for g, s in scores.items()}, stay)
        return {group: self._fill(perm) for group, perm in perms.items()}

    def _fill(self, perm: np.ndarray) -> np.ndarray:
        """Adds identities for the self-loops that fill up a wave."""
        real, units = perm.shape
        identity = np.arange(units, dtype=np.int32)
        return np.concatenate([perm, np.tile(identity, (self._slots - real, 1))])


def _pick(stacked: PyTree, indices: Array | np.ndarray | None) -> PyTree:
    """Stacked entries by index; None leaves them as they are."""
    return stacked if indices is None else take(stacked, indices)
