"""Matches units by the correlations of their activations."""

import math
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dimat_jax._labelled import labels_explained
from dimat_jax._stopwatch import Stopwatch
from dimat_jax.matching._assignment import STAY
from dimat_jax.matching._descent import (
    MatchedGroups,
    PairPerms,
    Pairs,
    Problem,
    Scorer,
    Solver,
    coordinate_descent,
    every_pair_alone,
    identities,
    pair_score,
    two_networks,
)
from dimat_jax.matching._errors import MatchingError
from dimat_jax.matching._observed import (
    ListedNetworks,
    NetworkPrograms,
    ObservedNetworks,
)
from dimat_jax.matching._taps import Activations
from dimat_jax.permutation import Perms, PermutationSpec, group_shapes, validate
from dimat_jax.tree import PyTree, as_arrays

__all__ = [
    "LEAST_GAIN",
    "ActivationScorer",
    "Found",
    "activation_matching",
    "activation_scorers",
    "descended",
    "match_activations",
    "settle",
]

LEAST_GAIN = 0.005
"""Samples are doubled while the mean correlation of matched units gains more than this.

Measured on five ResNet-20s of width 1 (CIFAR-100, a ring): from 100 to 200 images the
correlation by 6,400 images rises from .2939 to .2976, at 400 it is .2990, and the most
that it can be is .2996. The assignments themselves never come to rest, because some
units are alike: from 3,200 to 6,400 images 4 % of them change and gain nothing.
"""

S = TypeVar("S", bound=Scorer)


def activation_matching(
    spec: PermutationSpec,
    activations: Callable[[PyTree, Any], Activations],
    reference: PyTree,
    permutee: PyTree,
    batches: Iterable[Any],
    *,
    stay: float = STAY.default,
    as_needed: bool = False,
) -> Perms:
    """Finds the permutations of a network's units that best fit another's.

    Units are matched by Pearson's correlation of their activations on the same inputs,
    averaged over a group's taps (DIMAT, arXiv 2404.08079, section 3; Li et al. 2015).

    Args:
        spec: the symmetry, with a tap for each group.
        activations: `activations(variables, inputs) -> {tap: array}`.
        reference: the variables of the network that stays as it is.
        permutee: the variables of the network to be permuted.
        batches: inputs, one batch at a time. PyTorch's tensors become arrays. Of a
            DataLoader of inputs and labels, pass `(x for x, _ in loader)`.
        stay: a unit moves only if its correlation gains more than this.
        as_needed: whether to read only as many batches as it takes. Units are matched
            after 1, 2, 4, 8, ... batches, until twice as many batches hardly improve
            the mean correlation of matched units (`LEAST_GAIN`).

    Returns:
        perms, such that `permutation.apply(spec, perms, permutee)` is aligned with
        `reference`.

    Raises:
        PermutationSpecError: a group has no tap, the spec does not fit the variables,
            or the activations lack a tap or do not have the tap's axes.
        MatchingError: there are no batches, a group's size differs between the
            networks, activations are not finite, or batches hold labels.
        OptionError: `stay` is negative or not finite.
    """
    perms = match_activations(
        spec,
        activations,
        [reference, permutee],
        two_networks(),
        every_pair_alone(1, stay),
        batches,
        as_needed=as_needed,
    )
    return {group: jnp.asarray(perm[0]) for group, perm in perms.items()}


def match_activations(
    spec: PermutationSpec,
    activations: Callable[[PyTree, Any], Activations],
    models: Sequence[PyTree],
    pairs: Pairs,
    solver: Solver,
    batches: Iterable[Any],
    *,
    as_needed: bool = False,
) -> PairPerms:
    """Matches pairs of some networks by their activations.

    Args:
        spec: the symmetry, with a tap for each group.
        activations: `activations(variables, inputs) -> {tap: array}`.
        models: the variables of each network.
        pairs: which networks to match with which.
        solver: which permutations are allowed and preferred.
        batches: inputs, one batch at a time; all networks look at the same.
        as_needed: as of `activation_matching`.

    Raises:
        PermutationSpecError: as of `activation_matching`.
        MatchingError: as of `activation_matching`.
    """
    programs = NetworkPrograms(spec, activations)
    _check_models(spec, models)
    networks = ListedNetworks(programs, [as_arrays(model) for model in models])
    scorers = activation_scorers(networks, batches, [pairs], as_needed=as_needed)
    _, found = settle(scorers, lambda scorer: descended(Problem(scorer, solver)))
    return found.perms


def _check_models(spec: PermutationSpec, models: Sequence[PyTree]) -> None:
    """Checks that a spec fits the first network, and that groups have equal sizes."""
    validate(spec, models[0])
    shapes = group_shapes(spec, models[0])
    for variables in models[1:]:
        for group, shape in group_shapes(spec, variables).items():
            if shape != shapes[group]:
                raise MatchingError(
                    f"group {group!r} has {_in_words(shapes[group])} in one network, "
                    f"and {_in_words(shape)} in another"
                )


def _in_words(shape: tuple[int, ...]) -> str:
    *layers, units = shape
    return f"{units} units" + (f" in each of {tuple(layers)} layers" if layers else "")


# From activations to scores ===========================================================


def activation_scorers(
    networks: ObservedNetworks,
    batches: Iterable[Any],
    waves: Sequence[Pairs],
    *,
    as_needed: bool = False,
    stopwatch: Stopwatch | None = None,
    fetch: Callable[[Array], np.ndarray] = jax.device_get,
) -> Iterator["ActivationScorer"]:
    """Yields scorers of pairs of networks, streamed over batches.

    Args:
        networks: the networks.
        batches: what the networks look at, one batch at a time.
        waves: the pairs. The pairs of one wave are computed together.
        as_needed: whether there is a scorer after 1, 2, 4, 8, ... batches as well, and
            not only after the last one. See `settle`.
        stopwatch: books the phases "activations" and "correlations".
        fetch: brings arrays to the host.

    Raises:
        MatchingError: there are no batches.
    """
    stopwatch = stopwatch or Stopwatch()
    moments = [networks.no_moments(wave) for wave in waves]
    n_batches = n_scored = 0

    def scorer() -> "ActivationScorer":
        scores = [networks.scores(of_wave) for of_wave in moments]
        return ActivationScorer(scores, waves, n_batches=n_batches, fetch=fetch)

    for batch in map(as_arrays, batches):
        with labels_explained(batch, MatchingError):
            _add_batch(networks, batch, moments, waves, stopwatch)
        n_batches += 1
        if as_needed and n_batches & (n_batches - 1) == 0:
            n_scored = n_batches
            yield scorer()
    if not n_batches:
        raise MatchingError("activation matching needs at least one batch of inputs")
    if n_scored < n_batches:
        yield scorer()


def _add_batch(
    networks: ObservedNetworks,
    batch: Any,
    moments: list[Any],
    waves: Sequence[Pairs],
    stopwatch: Stopwatch,
) -> None:
    """Adds a batch to the moments of each wave, in place.

    The activations are local to this function, so that those of the last batch are gone
    before those of the next one are computed.
    """
    with stopwatch("activations") as block:
        observed = block(networks.observe(batch))
    for number, wave in enumerate(waves):
        with stopwatch("activations") as block:
            permutees = block(networks.observe_permutees(batch, wave))
        with stopwatch("correlations") as block:
            moments[number] = block(
                networks.add(moments[number], observed, permutees, wave)
            )
        del permutees


def settle(scorers: Iterable[S], search: Callable[[S], "Found"]) -> tuple[S, "Found"]:
    """Searches with one scorer after the other until more samples gain nothing.

    The last scorer rates the permutations that it leads to, and those to which the
    scorer before it led. The search ends if no pair has gained more than `LEAST_GAIN`:
    the gain is that of the mean correlation of matched units.

    Args:
        scorers: scorers that rest on more and more samples, at least one. Only as many
            are made as are needed.
        search: finds permutations with a scorer.

    Returns:
        the last scorer, and what it led to.
    """
    scorer, found = None, None
    for scorer in scorers:  # noqa: B007
        before, found = found, search(scorer)
        if before is not None:
            gain = found.similarity - scorer.similarity(before.perms)
            if gain.max() <= LEAST_GAIN:
                break
    assert scorer is not None and found is not None
    return scorer, found


class Found(NamedTuple):
    """The permutations that a search has found.

    Attributes:
        perms: the permutations of each pair.
        similarity: how well each pair fits, as `Scorer.similarity` says.
    """

    perms: PairPerms
    similarity: Float[np.ndarray, " pairs"]


def descended(problem: Problem) -> Found:
    """Searches from identities by coordinate descent."""
    perms = coordinate_descent(problem, identities(problem.scorer))
    return Found(perms, problem.scorer.similarity(perms))


class ActivationScorer:
    """Scores permutations by correlations of activations; a `Scorer`.

    The scores of one group do not depend on another group's permutation. They are
    brought to the host when they are first needed, and kept as long as the scorer.

    Args:
        scores: for each wave of pairs and each group
            `[length, *layers, units, units]`.
        waves: the pairs.
        n_batches: the number of batches on which the scores rest.
        fetch: brings arrays to the host.
    """

    def __init__(
        self,
        scores: Sequence[Mapping[str, Array]],
        waves: Sequence[Pairs],
        *,
        n_batches: int = 1,
        fetch: Callable[[Array], np.ndarray] = jax.device_get,
    ):
        self.n_batches = n_batches
        self.shapes = {group: score.shape[1:-1] for group, score in scores[0].items()}
        self.n_pairs = sum(wave.real for wave in waves)
        self._scores, self._waves, self._fetch = scores, waves, fetch
        self._fetched: dict[str, np.ndarray] = {}

    def restricted(
        self, waves: Sequence[Pairs], fetch: Callable[[Array], np.ndarray]
    ) -> "ActivationScorer":
        """Makes the scorer of those pairs whose scores `fetch` brings to the host."""
        return ActivationScorer(self._scores, waves, fetch=fetch)

    def scores(
        self, group: str, perms: PairPerms, matched: MatchedGroups | None = None
    ) -> Float[np.ndarray, "pairs *layers units units"]:
        del perms, matched
        if group not in self._fetched:
            fetched = np.concatenate(
                [
                    self._fetch(scores[group])[: wave.real]
                    for scores, wave in zip(self._scores, self._waves, strict=True)
                ]
            )
            # Every caller gets this array, so none may change it.
            fetched.flags.writeable = False
            self._fetched[group] = fetched
        return self._fetched[group]

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
            pair_score(self.scores(group, perms), perm) for group, perm in perms.items()
        ]
        return np.sum(totals, axis=0)

    def similarity(self, perms: PairPerms) -> Float[np.ndarray, " pairs"]:
        """The correlation of matched units: the mean over units, then over groups.

        It is 0 if there are no groups.
        """
        if not perms:
            return np.zeros(self.n_pairs)
        means = [
            pair_score(self.scores(group, perms), perm) / math.prod(self.shapes[group])
            for group, perm in perms.items()
        ]
        return np.mean(means, axis=0)
