"""Tests scores that are streamed over batches, for both kinds of networks.

Networks in a list and agents that are stacked over devices give the same scores, which
are those of all samples at once.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dimat_jax._stopwatch import Stopwatch
from dimat_jax.algorithms._matchers import ActivationMatcher
from dimat_jax.algorithms.base import MergeData
from dimat_jax.data.pipeline import Reader, Samples, place_pool
from dimat_jax.data.sources import Split
from dimat_jax.matching._activation import (
    ActivationScorer,
    activation_scorers,
    match_activations,
)
from dimat_jax.matching._descent import Pairs, every_pair_alone
from dimat_jax.matching._observed import ListedNetworks, NetworkPrograms
from dimat_jax.permutation import PermutationSpec
from dimat_jax.placement import place
from dimat_jax.tree import PyTree, stack

N = 4
SPEC = PermutationSpec(
    {"w": (None, "units"), "v": (None, "others")},
    {"tanh": "units", "relu": (None, "units", None, None), "sin": "others"},
)
TAPS = {"units": ["tanh", "relu"], "others": ["sin"]}
NETWORKS = [
    {
        "w": np.random.default_rng(seed).normal(size=(3, 6)).astype(np.float32),
        "v": np.random.default_rng(seed).normal(size=(3, 4)).astype(np.float32),
    }
    for seed in range(N)
]
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), np.uint8)
MEAN, STD = np.full(3, 120.0), np.full(3, 70.0)
BATCH = 8
ENDS = np.array(list(combinations(range(N), 2)), np.int32)
PLACEMENT = place(N, jax.devices()[:1], "vmap")


def activations(variables: PyTree, inputs: jax.Array) -> dict[str, jax.Array]:
    units = inputs @ variables["w"]
    return {
        "tanh": jnp.tanh(units),
        "relu": jnp.moveaxis(jax.nn.relu(units), -1, 1),
        "sin": jnp.sin(inputs @ variables["v"]),
    }


def inputs_of(indices: np.ndarray) -> np.ndarray:
    return np.asarray((IMAGES[indices] - MEAN) / STD, np.float32)


def batches() -> Iterator[np.ndarray]:
    for start in range(0, len(IMAGES), BATCH):
        yield inputs_of(np.arange(start, start + BATCH))


def in_waves(ends: np.ndarray, length: int) -> list[Pairs]:
    """Groups pairs into waves; the last wave is filled up with pairs (0, 0)."""
    waves = []
    for start in range(0, len(ends), length):
        wave = ends[start : start + length]
        filled = np.zeros((length, 2), np.int32)
        filled[: len(wave)] = wave
        waves.append(Pairs(filled[:, 0], filled[:, 1], len(wave)))
    return waves


def at_once(group: str, reference: int, permutee: int, inputs) -> np.ndarray:
    """Computes the correlations on all inputs at once, in float64."""
    scores = []
    for tap in TAPS[group]:
        one, other = (
            np.asarray(activations(NETWORKS[i], inputs)[tap], np.float64)
            for i in (reference, permutee)
        )
        if tap == "relu":
            one, other = (np.moveaxis(units, 1, -1) for units in (one, other))
        one, other = (units.reshape(-1, units.shape[-1]) for units in (one, other))
        both = np.asarray(np.corrcoef(one, other, rowvar=False))
        scores.append(both[: one.shape[1], one.shape[1] :])
    return np.mean(scores, axis=0)


def assert_scores(scorer: ActivationScorer, ends: np.ndarray, inputs_by_pair) -> None:
    for group in TAPS:
        found = scorer.scores(group, {})
        assert len(found) == len(ends)
        for score, (reference, permutee), inputs in zip(
            found, ends.tolist(), inputs_by_pair, strict=True
        ):
            expected = at_once(group, reference, permutee, inputs)
            np.testing.assert_allclose(score, expected, atol=1e-4)


def samples(whose: str) -> Samples:
    labels = np.zeros(len(IMAGES), np.int32)
    pool = place_pool(Split(IMAGES, labels), MEAN, STD, PLACEMENT)
    reader = Reader(pool, PLACEMENT)
    if whose == "shared":
        return reader.shared(np.arange(len(IMAGES)), BATCH)
    return reader.own(SHARDS, BATCH)


def scorers(examples: Samples, batching: str = "vmap") -> Iterator[ActivationScorer]:
    placement = place(N, jax.devices()[:1], batching)
    return ActivationMatcher(SPEC, activations, placement).scorers(
        placement.put(stack(NETWORKS)),
        in_waves(ENDS, N),
        MergeData(examples),
        Stopwatch(),
    )


SHARDS = [np.arange(0, 9), np.arange(9, 30), np.arange(5, 19), np.arange(20, 40)]


@pytest.mark.parametrize("n_waves", [1, 2])
def test_networks_in_a_list_have_the_scores_of_all_samples(n_waves):
    waves = [
        Pairs(part[:, 0], part[:, 1], len(part))
        for part in np.array_split(ENDS, n_waves)
    ]
    networks = ListedNetworks(NetworkPrograms(SPEC, activations), NETWORKS)
    (scorer,) = activation_scorers(networks, batches(), waves)
    everything = inputs_of(np.arange(len(IMAGES)))
    assert_scores(scorer, ENDS, [everything] * len(ENDS))


@pytest.mark.parametrize("batching", ["vmap", "unroll"])
@pytest.mark.parametrize("whose", ["shared", "own"])
def test_agents_have_the_scores_of_all_samples_that_they_look_at(whose, batching):
    (scorer,) = scorers(samples(whose), batching)
    everything = np.arange(len(IMAGES))
    inputs = [
        inputs_of(everything if whose == "shared" else SHARDS[receiver])
        for receiver, _ in ENDS.tolist()
    ]
    assert_scores(scorer, ENDS, inputs)


def test_both_kinds_of_networks_are_matched_alike():
    pairs = Pairs(ENDS[:, 0], ENDS[:, 1], len(ENDS))
    solver = every_pair_alone(len(ENDS))
    listed = match_activations(SPEC, activations, NETWORKS, pairs, solver, batches())
    (scorer,) = scorers(samples("shared"))
    for group, perms in listed.items():
        stacked = solver.solve(scorer.scores(group, {}), perms)
        np.testing.assert_array_equal(perms, stacked)


@pytest.mark.parametrize("batching", ["vmap", "unroll"])
def test_scores_as_needed_rest_on_1_2_4_and_all_batches(batching):
    examples = replace(samples("shared"), as_needed=True)
    found = list(scorers(examples, batching))
    assert [scorer.n_batches for scorer in found] == [1, 2, 4, 5]
    for scorer in found:
        seen = inputs_of(np.arange(BATCH * scorer.n_batches))
        assert_scores(scorer, ENDS, [seen] * len(ENDS))
    (whole,) = scorers(samples("shared"), batching)
    assert whole.n_batches == 5
    for group in TAPS:
        np.testing.assert_array_equal(
            found[-1].scores(group, {}), whole.scores(group, {})
        )


def test_only_as_many_batches_are_read_as_scorers_are_asked_for():
    read = []

    def watched() -> Iterator[np.ndarray]:
        for batch in batches():
            read.append(batch)
            yield batch

    networks = ListedNetworks(NetworkPrograms(SPEC, activations), NETWORKS)
    waves = in_waves(ENDS, len(ENDS))
    found = activation_scorers(networks, watched(), waves, as_needed=True)
    for n_batches in (1, 2, 4):
        assert next(found).n_batches == len(read) == n_batches


@pytest.mark.parametrize("kind", ["listed", "stacked"])
def test_without_a_batch_there_are_no_scores(kind):
    with pytest.raises(ValueError, match="at least one batch"):
        if kind == "listed":
            networks = ListedNetworks(NetworkPrograms(SPEC, activations), NETWORKS)
            next(activation_scorers(networks, [], in_waves(ENDS, len(ENDS))))
        else:
            nothing = samples("shared")
            nothing = Samples(nothing.load, *np.zeros((2, 0, BATCH), int), shared=True)
            next(scorers(nothing))


def test_networks_in_a_list_may_differ_where_no_unit_is_permuted():
    spec = PermutationSpec(
        {"w": (None, "units"), "head": ("units", None)}, {"t": "units"}
    )

    def observe(variables, inputs):
        return {"t": jnp.tanh(inputs @ variables["w"])}

    one, other = (
        {"w": NETWORKS[seed]["w"], "head": np.ones((6, classes), np.float32)}
        for seed, classes in ((0, 10), (1, 100))
    )
    pairs = Pairs(np.zeros(1, np.int32), np.ones(1, np.int32), 1)
    found = match_activations(
        spec, observe, [one, other], pairs, every_pair_alone(1), batches()
    )
    np.testing.assert_array_equal(np.sort(found["units"][0]), np.arange(6))
