"""Matches units by the correlations of their activations."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dimat_jax._stopwatch import Stopwatch
from dimat_jax.matching._assignment import STAY
from dimat_jax.matching._descent import (
    MatchedGroups,
    PairPerms,
    Pairs,
    Problem,
    Solver,
    coordinate_descent,
    every_pair_alone,
    identities,
    total_score,
    two_networks,
)
from dimat_jax.matching._moments import (
    TapMoments,
    centre,
    group_scores,
    no_moments,
    update_taps,
)
from dimat_jax.matching._taps import Activations, check_taps, tap_units
from dimat_jax.permutation import Perms, PermutationSpec, group_sizes, validate
from dimat_jax.tree import PyTree, stack

__all__ = [
    "ActivationScorer",
    "ObservedNetworks",
    "activation_matching",
    "match_activations",
    "stream_scores",
]


def activation_matching(
    spec: PermutationSpec,
    activations: Callable[[PyTree, Any], Activations],
    reference: PyTree,
    permutee: PyTree,
    batches: Iterable[Any],
    *,
    stay: float = STAY.default,
) -> Perms:
    """Finds the permutations of a network's units that best fit another's.

    Units are matched by Pearson's correlation of their activations on the same inputs,
    averaged over a group's taps (DIMAT, arXiv 2404.08079, section 3; Li et al. 2015).

    Args:
        spec: the symmetry, with a tap for each group.
        activations: `activations(variables, inputs) -> {tap: array}`.
        reference: the variables of the network that stays as it is.
        permutee: the variables of the network to be permuted.
        batches: inputs, one batch at a time.
        stay: a unit moves only if its correlation gains more than this.

    Returns:
        perms, such that `permutation.apply(spec, perms, permutee)` is aligned with
        `reference`.

    Raises:
        PermutationSpecError: a group has no tap, the spec does not fit the variables,
            or the activations lack a tap or do not have the tap's axes.
        ValueError: there are no batches, a group's size differs between the networks,
            or activations are not finite.
        OptionError: `stay` is negative or not finite.
    """
    perms = match_activations(
        spec,
        activations,
        [reference, permutee],
        two_networks(),
        every_pair_alone(1, stay),
        batches,
    )
    return {group: jnp.asarray(perm[0]) for group, perm in perms.items()}


def match_activations(
    spec: PermutationSpec,
    activations: Callable[[PyTree, Any], Activations],
    models: Sequence[PyTree],
    pairs: Pairs,
    solver: Solver,
    batches: Iterable[Any],
) -> PairPerms:
    """Matches pairs of some networks by their activations.

    Args:
        spec: the symmetry, with a tap for each group.
        activations: `activations(variables, inputs) -> {tap: array}`.
        models: the variables of each network.
        pairs: which networks to match with which.
        solver: which permutations are allowed and preferred.
        batches: inputs, one batch at a time; all networks look at the same.

    Raises:
        PermutationSpecError: as of `activation_matching`.
        ValueError: as of `activation_matching`.
    """
    networks = _ListedNetworks(spec, activations, models)
    scorer = ActivationScorer(stream_scores(networks, batches, [pairs]), [pairs])
    return coordinate_descent(Problem(scorer, solver), identities(scorer))


# From activations to scores ===========================================================


@runtime_checkable
class ObservedNetworks(Protocol):
    """Some networks, and how to compute their activations and correlations.

    Two kinds of networks implement it: networks in a list, and agents that are stacked
    over devices. What the methods pass to each other has the form that suits the kind.
    """

    def no_moments(self, wave: Pairs) -> Any:
        """The moments of a wave's pairs over no samples."""
        ...

    def observe(self, batch: Any) -> Any:
        """Computes every network's activations at its taps on its own inputs."""
        ...

    def observe_permutees(self, batch: Any, wave: Pairs) -> Any:
        """Computes the activations of a wave's permutees on their references' inputs.

        None if all networks look at the same inputs: `observe` has computed it then.
        """
        ...

    def add(self, moments: Any, observed: Any, permutees: Any, wave: Pairs) -> Any:
        """Adds a batch to the moments of a wave's pairs.

        Args:
            moments: the moments so far; their buffers may be reused.
            observed: what `observe` returned.
            permutees: what `observe_permutees` returned.
            wave: the pairs.
        """
        ...

    def scores(self, moments: Any) -> dict[str, Float[Array, "length units units"]]:
        """For each group the scores of a wave's pairs; see `group_scores`."""
        ...


def stream_scores(
    networks: ObservedNetworks,
    batches: Iterable[Any],
    waves: Sequence[Pairs],
    stopwatch: Stopwatch | None = None,
) -> list[dict[str, Float[Array, "length units units"]]]:
    """Scores of pairs of networks, streamed over batches.

    Args:
        networks: the networks.
        batches: what the networks look at, one batch at a time.
        waves: the pairs. The pairs of one wave are computed together.
        stopwatch: books the phases "activations" and "correlations".

    Returns:
        for each wave and group the scores of the wave's pairs.

    Raises:
        ValueError: there are no batches.
    """
    stopwatch = stopwatch or Stopwatch()
    moments = [networks.no_moments(wave) for wave in waves]
    n_batches = 0
    for batch in batches:
        n_batches += 1
        with stopwatch("activations") as block:
            observed = block(networks.observe(batch))
        for number, wave in enumerate(waves):
            with stopwatch("activations") as block:
                permutees = block(networks.observe_permutees(batch, wave))
            with stopwatch("correlations") as block:
                moments[number] = block(
                    networks.add(moments[number], observed, permutees, wave)
                )
    if not n_batches:
        raise ValueError("activation matching needs at least one batch of inputs")
    return [networks.scores(of_wave) for of_wave in moments]


_update = jax.jit(update_taps)
_scores = jax.jit(lambda of_pairs: stack([group_scores(pair) for pair in of_pairs]))


class _ListedNetworks:
    """Networks in a list, all of which look at the same inputs.

    They are computed one after the other, so their leaves may differ in shape wherever
    no group is concerned, and nothing is copied to be stacked.

    Args:
        spec: the symmetry, with a tap for each group.
        activations: `activations(variables, inputs) -> {tap: array}`.
        models: the variables of each network.

    Raises:
        PermutationSpecError: a group has no tap, or the spec does not fit the first
            network.
        ValueError: a group's size differs between the networks.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        activations: Callable[[PyTree, Any], Activations],
        models: Sequence[PyTree],
    ):
        check_taps(spec)
        validate(spec, models[0])
        sizes = group_sizes(spec, models[0])
        for variables in models[1:]:
            for group, size in group_sizes(spec, variables).items():
                if size != sizes[group]:
                    raise ValueError(
                        f"group {group!r} has {sizes[group]} units in one network, and "
                        f"{size} in another"
                    )

        @jax.jit
        def observe(variables, inputs):
            units = tap_units(spec, sizes, activations(variables, inputs))
            return jax.tree.map(centre, units)

        self._spec, self._sizes, self._models = spec, sizes, models
        self._observe = observe

    def no_moments(self, wave: Pairs) -> list[TapMoments]:
        return [no_moments(self._spec, self._sizes) for _ in range(wave.real)]

    def observe(self, batch: Any) -> list[Any]:
        return [self._observe(variables, batch) for variables in self._models]

    def observe_permutees(self, batch: Any, wave: Pairs) -> None:
        del batch, wave

    def add(self, moments, observed, permutees, wave: Pairs) -> list[TapMoments]:
        del permutees
        return [
            _update(of_pair, observed[reference], observed[permutee])
            for of_pair, reference, permutee in zip(moments, *wave[:2], strict=True)
        ]

    def scores(self, moments: list[TapMoments]) -> dict[str, Array]:
        return _scores(moments)


class ActivationScorer:
    """Scores permutations by correlations of activations; a `Scorer`.

    The scores of one group do not depend on another group's permutation.

    Args:
        scores: for each wave of pairs and each group `[length, units, units]`.
        waves: the pairs.
        fetch: brings arrays to the host.
    """

    def __init__(
        self,
        scores: Sequence[Mapping[str, Array]],
        waves: Sequence[Pairs],
        *,
        fetch: Callable[[Array], np.ndarray] = jax.device_get,
    ):
        self.sizes = {group: score.shape[-1] for group, score in scores[0].items()}
        self.n_pairs = sum(wave.real for wave in waves)
        self._scores, self._waves, self._fetch = scores, waves, fetch

    def restricted(
        self, waves: Sequence[Pairs], fetch: Callable[[Array], np.ndarray]
    ) -> "ActivationScorer":
        """Makes the scorer of those pairs whose scores `fetch` brings to the host."""
        return ActivationScorer(self._scores, waves, fetch=fetch)

    def scores(
        self, group: str, perms: PairPerms, matched: MatchedGroups | None = None
    ) -> Float[np.ndarray, "pairs units units"]:
        del perms, matched
        return np.concatenate(
            [
                self._fetch(scores[group])[: wave.real]
                for scores, wave in zip(self._scores, self._waves, strict=True)
            ]
        )

    def scale(
        self, group: str, matched: MatchedGroups | None = None
    ) -> Float[np.ndarray, " pairs"]:
        del group, matched
        return np.ones(self.n_pairs)

    def neighbours(self, group: str) -> Collection[str]:
        del group
        return ()

    def total(self, perms: PairPerms) -> Float[np.ndarray, " pairs"]:
        """The sum over all groups' units of the correlation with the matched unit."""
        totals = [
            total_score(self.scores(group, perms), perm)
            for group, perm in perms.items()
        ]
        return np.sum(totals, axis=0)

    def similarity(self, perms: PairPerms) -> Float[np.ndarray, " pairs"]:
        """The correlation of matched units: the mean over units, then over groups."""
        means = [
            total_score(self.scores(group, perms), perm) / self.sizes[group]
            for group, perm in perms.items()
        ]
        return np.mean(means, axis=0)
