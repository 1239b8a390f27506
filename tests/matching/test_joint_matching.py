"""Joint matching: permutations that agree round every cycle, of large total score."""

from itertools import combinations, permutations

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat_jax import permutation
from dimat_jax.matching import (
    activation_matching,
    joint_activation_matching,
    joint_weight_matching,
    solve_assignment,
    weight_matching,
    weight_similarity,
)
from dimat_jax.matching._descent import total_score
from dimat_jax.matching._joint import all_pairs_together, synchronise
from dimat_jax.permutation import PermutationSpec
from dimat_jax.tree import flatten
from tests.matching.networks import network, noisy, shuffled, spec_of

KEY = jax.random.key(0)

# Synchronisation ======================================================================

GRAPHS = {
    "pair": [(0, 1)],
    "path": [(1, 0), (1, 2)],
    "triangle": [(0, 1), (1, 2), (0, 2)],
    "both directions": [(0, 1), (1, 0), (1, 2), (2, 1), (2, 0), (0, 2)],
    "square": [(0, 1), (1, 2), (3, 2), (0, 3)],
    "complete": list(combinations(range(4), 2)),
    "two components": [(3, 1), (0, 4), (4, 2), (2, 0)],
}

graphs = st.sampled_from(sorted(GRAPHS))
sizes = st.integers(1, 5)
seeds = st.integers(0, 2**16)


def pairs_of(graph: str) -> np.ndarray:
    return np.array(GRAPHS[graph], np.int32)


def random_scores(graph: str, units: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(len(GRAPHS[graph]), units, units)).astype(np.float32)


def from_frames(graph: str, frames: np.ndarray) -> np.ndarray:
    """P_ij = Q_i^-1 Q_j: i's unit at a place, and j's unit there."""
    perms = np.empty((len(GRAPHS[graph]), frames.shape[1]), np.int32)
    for p, (i, j) in enumerate(GRAPHS[graph]):
        perms[p, frames[i]] = frames[j]
    return perms


def random_frames(graph: str, units: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(units) for _ in range(pairs_of(graph).max() + 1)])


def still(graph: str, units: int) -> np.ndarray:
    return np.tile(np.arange(units, dtype=np.int32), (len(GRAPHS[graph]), 1))


def assert_cycles_are_identities(graph: str, perms: np.ndarray) -> None:
    steps = nx.DiGraph()
    for (i, j), perm in zip(GRAPHS[graph], perms, strict=True):
        for a, b, step in ((i, j, perm), (j, i, np.argsort(perm))):
            if steps.has_edge(a, b):
                np.testing.assert_array_equal(steps[a][b]["step"], step)
            steps.add_edge(a, b, step=step)
    for cycle in nx.simple_cycles(steps):
        unit = np.arange(perms.shape[1])
        for a, b in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
            unit = steps[a][b]["step"][unit]
        np.testing.assert_array_equal(unit, np.arange(perms.shape[1]), str(cycle))


@given(graph=graphs, units=sizes, seed=seeds)
def test_round_every_cycle_the_permutations_are_the_identity(graph, units, seed):
    scores = random_scores(graph, units, seed)
    perms = synchronise(scores, pairs_of(graph), still(graph, units))
    assert perms.dtype == np.int32
    np.testing.assert_array_equal(np.sort(perms), still(graph, units))
    assert_cycles_are_identities(graph, perms)


@given(graph=graphs, units=sizes, seed=seeds)
def test_no_component_ever_scores_less_than_before(graph, units, seed):
    scores = random_scores(graph, units, seed)
    pairs, blocks = pairs_of(graph), all_pairs_together(pairs_of(graph)).blocks
    before = from_frames(graph, random_frames(graph, units, seed))
    after = synchronise(scores, pairs, before)
    gains = np.bincount(
        blocks, total_score(scores, after) - total_score(scores, before)
    )
    assert (gains >= -1e-6).all()
    # And again there is nothing to be gained.
    again = total_score(scores, synchronise(scores, pairs, after))
    assert again.sum() >= total_score(scores, after).sum() - 1e-6


@given(graph=graphs, units=st.integers(1, 4), seed=seeds)
@settings(max_examples=40)
def test_no_network_can_be_permuted_to_advantage_in_the_end(graph, units, seed):
    scores, pairs = random_scores(graph, units, seed), pairs_of(graph)
    perms = synchronise(scores, pairs, still(graph, units))
    total = total_score(scores, perms).sum()
    for network_ in np.unique(pairs):
        for perm in map(np.array, permutations(range(units))):
            other = perms.copy()
            for p, (i, j) in enumerate(GRAPHS[graph]):
                if j == network_:
                    other[p] = perm[perms[p]]
                elif i == network_:
                    other[p] = perms[p][np.argsort(perm)]
            assert total_score(scores, other).sum() <= total + 1e-5


@given(graph=graphs, units=sizes, seed=seeds)
def test_pairs_that_agree_already_all_get_their_best(graph, units, seed):
    planted = from_frames(graph, random_frames(graph, units, seed))
    # Noise that could turn no unit's choice, let alone a cycle of them.
    scores = 0.2 * np.tanh(random_scores(graph, units, seed))
    for p, perm in enumerate(planted):
        scores[p, np.arange(units), perm] += 1
    np.testing.assert_array_equal(solve_assignment(scores), planted)
    found = synchronise(scores, pairs_of(graph), still(graph, units))
    np.testing.assert_array_equal(found, planted)


@given(units=sizes, seed=seeds)
def test_a_single_pair_gets_its_best_assignment(units, seed):
    scores = random_scores("pair", units, seed)
    found = synchronise(scores, pairs_of("pair"), still("pair", units))
    best = total_score(scores, solve_assignment(scores))
    np.testing.assert_allclose(total_score(scores, found), best, atol=1e-6)


@given(units=sizes, seed=seeds)
def test_two_directions_of_a_pair_get_the_best_for_their_sum(units, seed):
    pairs = np.array([(0, 1), (1, 0)])
    scores = np.random.default_rng(seed).normal(size=(2, units, units))
    found = synchronise(
        scores, pairs, np.tile(np.arange(units, dtype=np.int32), (2, 1))
    )
    np.testing.assert_array_equal(found[1], np.argsort(found[0]))
    both = scores[0] + scores[1].T
    assert total_score(both, found[0]) == pytest.approx(
        total_score(both, solve_assignment(both))
    )


def test_components_are_solved_as_if_they_were_alone():
    graph = "two components"
    scores, pairs = random_scores(graph, 6, 0), pairs_of(graph)
    together = synchronise(scores, pairs, still(graph, 6))
    for own in ([0], [1, 2, 3]):
        alone = synchronise(scores[own], pairs[own], still(graph, 6)[own])
        np.testing.assert_array_equal(together[own], alone)
    assert all_pairs_together(pairs).blocks.tolist() in ([0, 1, 1, 1], [1, 0, 0, 0])


@pytest.mark.parametrize("order", [(1, 0, 2, 3), (3, 2, 1, 0), (2, 3, 0, 1)])
def test_numbering_the_networks_otherwise_changes_nothing_where_they_agree(order):
    planted = from_frames("complete", random_frames("complete", 6, 0))
    scores = 0.3 * random_scores("complete", 6, 1)
    for p, perm in enumerate(planted):
        scores[p, np.arange(6), perm] += 2
    pairs = pairs_of("complete")
    expected = synchronise(scores, pairs, still("complete", 6))
    found = synchronise(scores, np.array(order)[pairs], still("complete", 6))
    np.testing.assert_array_equal(found, expected)


# Networks =============================================================================


def assert_aligned(spec, perms, models, expected) -> None:
    for own, model in zip(perms, models, strict=True):
        aligned = flatten(permutation.apply(spec, own, model))
        for path, leaf in flatten(expected).items():
            np.testing.assert_array_equal(aligned[path], leaf, err_msg=path)


@pytest.mark.parametrize("kind", ["mlp", "flattened maps", "residual", "recurrent"])
def test_shuffled_copies_are_brought_into_the_first_ones_frame_by_weights(kind):
    spec = spec_of(kind)
    models = [shuffled(spec, network(kind), seed)[1] for seed in range(4)]
    perms = joint_weight_matching(spec, models, key=KEY)
    for group, perm in permutation.identity(spec, models[0]).items():
        np.testing.assert_array_equal(perms[0][group], perm)
        assert {own[group].dtype for own in perms} == {jnp.dtype(jnp.int32)}
    assert_aligned(spec, perms, models, models[0])


def test_networks_that_differ_fit_each_other_better_than_before():
    spec = spec_of("residual")
    models = [
        shuffled(spec, noisy(network("residual"), 0.5, seed), seed)[1]
        for seed in range(4)
    ]

    def similarity(perms):
        aligned = [
            permutation.apply(spec, *both) for both in zip(perms, models, strict=True)
        ]
        return np.mean([weight_similarity(*two) for two in combinations(aligned, 2)])

    still = [permutation.identity(spec, models[0])] * 4
    star = [still[0]] + [
        weight_matching(spec, models[0], other, key=KEY) for other in models[1:]
    ]
    joint = joint_weight_matching(spec, models, key=KEY, restarts=3)
    assert similarity(joint) > similarity(still) + 0.1
    assert similarity(joint) >= similarity(star) - 1e-6


def test_two_networks_are_matched_by_weights_as_a_pair():
    spec, models = spec_of("mlp"), [network("mlp"), network("mlp", 1)]
    first, second = joint_weight_matching(spec, models, key=KEY, restarts=2)
    pair = weight_matching(spec, models[0], models[1], key=KEY, restarts=2)
    for group, perm in pair.items():
        np.testing.assert_array_equal(second[group], perm)
        np.testing.assert_array_equal(first[group], np.arange(len(perm)))


SPEC = PermutationSpec({"w": (None, "units")}, {"tanh": "units"})
INPUTS = np.random.default_rng(0).normal(size=(2, 50, 3)).astype(np.float32)


def activations(variables, inputs):
    return {"tanh": jnp.tanh(inputs @ variables["w"])}


def layers(n: int, noise: float) -> list:
    base = {"w": np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)}
    return [
        shuffled(SPEC, noisy(base, noise, seed) if seed else base, seed)[1]
        for seed in range(n)
    ]


def test_shuffled_copies_are_brought_into_the_first_ones_frame_by_activations():
    models = layers(4, noise=0.0)
    perms = joint_activation_matching(SPEC, activations, models, INPUTS)
    assert_aligned(SPEC, perms, models, models[0])


def test_two_networks_are_matched_by_activations_as_a_pair():
    models = layers(2, noise=1.0)
    _, second = joint_activation_matching(SPEC, activations, models, INPUTS)
    pair = activation_matching(SPEC, activations, models[0], models[1], INPUTS)
    np.testing.assert_array_equal(second["units"], pair["units"])


def test_one_network_is_in_its_own_frame():
    (by_weights,) = joint_weight_matching(SPEC, layers(1, 0.0), key=KEY)
    (by_activations,) = joint_activation_matching(
        SPEC, activations, layers(1, 0.0), INPUTS
    )
    for perms in (by_weights, by_activations):
        np.testing.assert_array_equal(perms["units"], np.arange(8))


@pytest.mark.parametrize("stay", [0.0, 2.0])
def test_units_stay_where_they_are_if_they_are_to(stay):
    models = layers(3, noise=0.1)
    by_weights = joint_weight_matching(SPEC, models, key=KEY, stay=stay)
    by_activations = joint_activation_matching(
        SPEC, activations, models, INPUTS, stay=stay
    )
    for perms in (by_weights, by_activations):
        moved = [(own["units"] != np.arange(8)).any() for own in perms]
        assert moved == [False, stay == 0, stay == 0]


def test_no_networks_and_senseless_settings_are_refused():
    with pytest.raises(ValueError, match="at least one network"):
        joint_weight_matching(SPEC, [], key=KEY)
    with pytest.raises(ValueError, match="at least one network"):
        joint_activation_matching(SPEC, activations, [], INPUTS)
    with pytest.raises(ValueError, match="stay is -1; it must be at least 0"):
        joint_weight_matching(SPEC, layers(2, 0.0), key=KEY, stay=-1)
    with pytest.raises(ValueError, match="stay is -1; it must be at least 0"):
        joint_activation_matching(SPEC, activations, layers(2, 0.0), INPUTS, stay=-1)
    with pytest.raises(ValueError, match="at least one batch"):
        joint_activation_matching(SPEC, activations, layers(2, 0.0), [])


def test_the_network_at_fault_is_named():
    models = layers(3, 0.0)
    models[2] = {"w": np.where(models[2]["w"] > 0, models[2]["w"], np.nan)}
    with pytest.raises(ValueError, match="'w'.*network 2"):
        joint_weight_matching(SPEC, models, key=KEY)
    models[2] = {"w": np.ones((3, 9), np.float32)}
    with pytest.raises(ValueError, match=r"'w'.*\(3, 8\).*\(3, 9\).*network 2"):
        joint_weight_matching(SPEC, models, key=KEY)
    with pytest.raises(ValueError, match="'units' has 8 units.*9"):
        joint_activation_matching(SPEC, activations, models, INPUTS)
