"""Coordinate descent, on scores of activations; and the preference for staying."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat_jax.matching import (
    activation_matching,
    joint_activation_matching,
    joint_weight_matching,
    weight_matching,
)
from dimat_jax.matching._activation import ActivationScorer
from dimat_jax.matching._assignment import STAY
from dimat_jax.matching._descent import (
    PairPerms,
    Pairs,
    Problem,
    Solver,
    better,
    coordinate_descent,
    every_pair_alone,
    identities,
    improve_group,
    objective,
    total_score,
    two_networks,
)
from dimat_jax.matching._joint import all_pairs_together
from dimat_jax.options import OptionError
from dimat_jax.permutation import PermutationSpec
from tests.matching.networks import network, spec_of

SIZES = {"a": 5, "b": 3, "c": 2}
TRIANGLE = np.array([(0, 1), (1, 2), (0, 2)], np.int32)


def scorer_of(seed: int) -> ActivationScorer:
    """Random correlations of a triangle of networks, in two waves of two slots."""
    rng = np.random.default_rng(seed)
    filled = np.concatenate([TRIANGLE, [(0, 0)]]).astype(np.int32).reshape(2, 2, 2)
    waves = [
        Pairs(wave[:, 0], wave[:, 1], real)
        for wave, real in zip(filled, (2, 1), strict=True)
    ]
    scores = [
        {
            group: jnp.asarray(rng.uniform(-1, 1, (2, size, size)), jnp.float32)
            for group, size in SIZES.items()
        }
        for _ in waves
    ]
    return ActivationScorer(scores, waves)


def solvers(stay: float) -> list[Solver]:
    return [every_pair_alone(3, stay), all_pairs_together(TRIANGLE, stay)]


def agreeing_perms(scorer: ActivationScorer, rng: np.random.Generator) -> PairPerms:
    """P_ij = Q_i^-1 Q_j of random Q."""
    perms = {}
    for group, (size,) in scorer.shapes.items():
        frames = [rng.permutation(size) for _ in range(3)]
        perms[group] = np.stack(
            [frames[j][np.argsort(frames[i])] for i, j in TRIANGLE.tolist()]
        ).astype(np.int32)
    return perms


stays = pytest.mark.parametrize("stay", [0.0, 0.3])
seeds = st.integers(0, 2**16)


@stays
@pytest.mark.parametrize("joint", [False, True])
@given(seed=seeds)
@settings(max_examples=15)
def test_no_step_ever_lowers_the_objective_of_activations(joint, stay, seed):
    rng = np.random.default_rng(seed)
    problem = Problem(scorer_of(seed), solvers(stay)[joint])
    perms = agreeing_perms(problem.scorer, rng)

    def blocks(perms: PairPerms) -> np.ndarray:
        """The objective of what is accepted or rejected together."""
        return np.bincount(problem.solver.blocks, objective(problem, perms))

    value = blocks(perms)
    for group in rng.permutation(list(SIZES)):
        perms = improve_group(problem, group, perms)
        assert (blocks(perms) >= value - 1e-6).all()
        value = blocks(perms)
    ends = coordinate_descent(problem, perms)
    assert (blocks(ends) >= value - 1e-6).all()
    chosen = better(problem, perms, ends)
    assert (blocks(chosen) >= value - 1e-6).all()


@stays
@given(seed=seeds)
@settings(max_examples=15)
def test_the_objective_changes_by_the_scores_that_a_group_picks(stay, seed):
    """A group of few units weighs no more than its scores, and staying the same."""
    rng = np.random.default_rng(seed)
    problem = Problem(scorer_of(seed), every_pair_alone(3, stay))
    perms, others = (agreeing_perms(problem.scorer, rng) for _ in range(2))
    before = objective(problem, perms)
    for group, size in SIZES.items():
        change = objective(problem, {**perms, group: others[group]}) - before
        scores = problem.scorer.scores(group, perms) + stay * np.eye(size)
        expected = total_score(scores, others[group]) - total_score(
            scores, perms[group]
        )
        np.testing.assert_allclose(change, expected, atol=1e-5)


def test_where_nothing_moves_staying_counts_once_for_every_unit():
    scorer = scorer_of(0)
    still = identities(scorer)
    gain = objective(Problem(scorer, every_pair_alone(3, 0.25)), still) - objective(
        Problem(scorer, every_pair_alone(3)), still
    )
    np.testing.assert_allclose(gain, 0.25 * sum(SIZES.values()), atol=1e-9)
    np.testing.assert_allclose(
        scorer.total(still), objective(Problem(scorer, every_pair_alone(3)), still)
    )


@given(seed=seeds)
@settings(max_examples=15)
def test_the_similarity_is_the_mean_over_groups_of_means_over_units(seed):
    scorer = scorer_of(seed)
    perms = agreeing_perms(scorer, np.random.default_rng(seed))
    for p, found in enumerate(scorer.similarity(perms)):
        means = [
            np.mean([scorer.scores(g, perms)[p, u, v] for u, v in enumerate(perm[p])])
            for g, perm in perms.items()
        ]
        assert found == pytest.approx(sum(means) / len(means), abs=1e-5)


def test_pairs_of_two_networks_are_int32():
    references, permutees, real = two_networks()
    assert (references.tolist(), permutees.tolist(), real) == ([0], [1], 1)
    assert references.dtype == permutees.dtype == np.int32


def test_permutations_stay_int32_whatever_is_done_to_them():
    problem = Problem(scorer_of(0), every_pair_alone(3))
    still = identities(problem.scorer)
    found = coordinate_descent(problem, still)
    for perms in (still, found, better(problem, still, found)):
        assert {perm.dtype for perm in perms.values()} == {np.dtype(np.int32)}


# Staying put: one default, one check ==================================================

SPEC = PermutationSpec({"w": (None, "units")}, {"tanh": "units"})
INPUTS = np.random.default_rng(0).normal(size=(2, 50, 3)).astype(np.float32)
NETWORKS = [
    {"w": np.random.default_rng(seed).normal(size=(3, 8)).astype(np.float32)}
    for seed in range(2)
]
KEY = jax.random.key(0)


def observe(variables, inputs):
    return {"tanh": jnp.tanh(inputs @ variables["w"])}


def never_read():
    raise AssertionError("a senseless stay is refused before any input is read")
    yield


WAYS: dict[str, Any] = {
    "activation_matching": lambda batches, **stay: activation_matching(
        SPEC, observe, NETWORKS[0], NETWORKS[1], batches, **stay
    ),
    "joint_activation_matching": lambda batches, **stay: joint_activation_matching(
        SPEC, observe, NETWORKS, batches, **stay
    ),
    "weight_matching": lambda batches, **stay: weight_matching(
        SPEC, NETWORKS[0], NETWORKS[1], key=KEY, **stay
    ),
    "joint_weight_matching": lambda batches, **stay: joint_weight_matching(
        SPEC, NETWORKS, key=KEY, **stay
    ),
    "every_pair_alone": lambda batches, **stay: every_pair_alone(1, **stay),
    "all_pairs_together": lambda batches, **stay: all_pairs_together(TRIANGLE, **stay),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stay", [-0.1, np.nan, np.inf])
def test_a_preference_that_makes_no_sense_is_refused_wherever_it_is_given(way, stay):
    with pytest.raises(OptionError, match=rf"stay is {stay}; it must be at least 0"):
        WAYS[way](never_read(), stay=stay)


@pytest.mark.parametrize("way", [way for way in WAYS if "matching" in way])
def test_without_a_preference_units_move_as_by_default(way):
    one, other = WAYS[way](INPUTS), WAYS[way](INPUTS, stay=STAY.default)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert STAY.default == 0


def test_the_preference_is_what_the_solver_says():
    spec, one, other = spec_of("mlp"), network("mlp"), network("mlp", 4)
    for stay in (0.0, 0.3, 2.0):
        found = weight_matching(spec, one, other, key=KEY, stay=stay)
        _, jointly = joint_weight_matching(spec, [one, other], key=KEY, stay=stay)
        jax.tree.map(np.testing.assert_array_equal, found, jointly)
