"""Weight matching: what it maximises, that it does, and what it finds."""

from functools import partial
from itertools import permutations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat_jax import permutation
from dimat_jax.matching import weight_matching, weight_similarity
from dimat_jax.matching._descent import (
    MatchedGroups,
    PairPerms,
    Pairs,
    Problem,
    Solver,
    every_pair_alone,
    improve_group,
    objective,
    total_score,
)
from dimat_jax.matching._weight import first_pass
from dimat_jax.matching._weight_scores import WeightScorer
from dimat_jax.models import MODELS, permutation_spec
from dimat_jax.models.classifier import init
from dimat_jax.permutation import PermutationSpec, PermutationSpecError
from dimat_jax.tree import PyTree, flatten, map_with_path, stack, take
from tests.matching.networks import NETWORKS, network, noisy, shuffled, spec_of

KEY = jax.random.key(0)

kinds = pytest.mark.parametrize("kind", NETWORKS)
seeds = st.integers(0, 2**16)


def assert_identical(one: PyTree, other: PyTree) -> None:
    for path, leaf in flatten(one).items():
        np.testing.assert_array_equal(leaf, flatten(other)[path], err_msg=path)


# The objective ========================================================================


def scorer_of(kind: str, networks: list[PyTree], pairs: list[tuple[int, int]]):
    ends = np.array(pairs, np.int32)
    return WeightScorer(
        spec_of(kind),
        permutation.group_shapes(spec_of(kind), networks[0]),
        flatten(stack(networks)),
        [Pairs(ends[:, 0], ends[:, 1], len(ends))],
        names=["one", "other", "third"],
    )


def random_perms(scorer: WeightScorer, rng: np.random.Generator) -> PairPerms:
    return {
        group: np.stack([rng.permutation(size) for _ in range(scorer.n_pairs)]).astype(
            np.int32
        )
        for group, size in scorer.sizes.items()
    }


def three_networks(kind: str, seed: int) -> list[PyTree]:
    """Two that are alike but for noise and order, and another one."""
    base = network(kind, seed)
    _, copy = shuffled(spec_of(kind), noisy(base, 0.5, seed + 1), seed)
    return [base, copy, network(kind, seed + 2)]


PAIRS = [(0, 1), (2, 0)]


@pytest.mark.every_nth(3)
@kinds
@given(seed=seeds)
@settings(max_examples=5)
def test_the_similarity_is_the_cosine_of_the_permuted_weights(kind, seed):
    networks = three_networks(kind, seed)
    scorer = scorer_of(kind, networks, PAIRS)
    perms = random_perms(scorer, np.random.default_rng(seed))
    for p, (reference, permutee) in enumerate(PAIRS):
        aligned = permutation.apply(spec_of(kind), take(perms, p), networks[permutee])
        one, other = (
            np.concatenate([np.ravel(leaf) for leaf in flatten(x).values()])
            for x in (networks[reference], aligned)
        )
        expected = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
        assert scorer.similarity(perms)[p] == pytest.approx(expected, abs=1e-5)
        assert weight_similarity(networks[reference], aligned) == pytest.approx(
            expected, abs=1e-5
        )


@pytest.mark.every_nth(3)
@kinds
@given(seed=seeds)
@settings(max_examples=5)
def test_scores_tell_what_any_other_permutation_of_a_group_changes(kind, seed):
    scorer = scorer_of(kind, three_networks(kind, seed), PAIRS)
    rng = np.random.default_rng(seed)
    perms, others = random_perms(scorer, rng), random_perms(scorer, rng)
    before = scorer.similarity(perms)
    for group in scorer.sizes:
        if group in scorer.neighbours(group):
            continue  # scores are a linear approximation
        change = scorer.similarity({**perms, group: others[group]}) - before
        scores = scorer.scores(group, perms)
        expected = total_score(scores, others[group]) - total_score(
            scores, perms[group]
        )
        np.testing.assert_allclose(change, expected, atol=1e-5)


@kinds
def test_mean_scores_in_units_of_their_scale_lie_between_minus_and_plus_1(kind):
    base = network(kind)
    copy = jax.tree.map(lambda x: 3 * x, base)
    scorer = scorer_of(kind, [base, copy, jax.tree.map(np.negative, base)], PAIRS)
    still = {
        group: np.tile(np.arange(size, dtype=np.int32), (2, 1))
        for group, size in scorer.sizes.items()
    }
    for group, size in scorer.sizes.items():
        if group in scorer.neighbours(group):
            continue
        means = total_score(scorer.scores(group, still), still[group]) / size
        np.testing.assert_allclose(means / scorer.scale(group), [1, -1], atol=1e-5)


def test_permuting_or_scaling_both_networks_changes_no_similarity():
    spec, (one, other, _) = spec_of("mlp"), three_networks("mlp", 0)
    perms, moved = shuffled(spec, one, 3)
    expected = float(weight_similarity(one, other))
    same = [
        (other, one),
        (moved, permutation.apply(spec, perms, other)),
        (one, jax.tree.map(lambda x: 2 * x, other)),
    ]
    for pair in same:
        assert weight_similarity(*pair) == pytest.approx(expected, abs=1e-6)
    assert weight_similarity(one, one) == pytest.approx(1, abs=1e-6)
    nothing = jax.tree.map(np.zeros_like, one)
    assert weight_similarity(one, nothing) == 0


# Ascent ===============================================================================


@kinds
@pytest.mark.parametrize("stay", [0.0, 0.2])
@given(seed=seeds)
@settings(max_examples=5)
def test_no_step_ever_lowers_the_objective(kind, stay, seed):
    scorer = scorer_of(kind, three_networks(kind, seed), PAIRS)
    problem = Problem(scorer, every_pair_alone(2, stay))
    rng = np.random.default_rng(seed)
    perms = random_perms(scorer, rng)
    value = objective(problem, perms)
    for group in rng.choice(list(scorer.sizes), 8):
        new = improve_group(problem, group, perms)
        if group not in scorer.neighbours(group):
            # And then nothing is to be gained by this group.
            again = improve_group(problem, group, new, tolerance=1e-6)
            assert again is new
        better = objective(problem, new)
        assert (better >= value - 1e-6).all()
        perms, value = new, better


def test_a_step_that_would_lower_the_objective_is_not_taken():
    # By a score that is linear only here: units of the state drive each other.
    scorer = scorer_of("recurrent", three_networks("recurrent", 0), PAIRS)
    refused = 0
    for seed in range(10):
        perms = random_perms(scorer, np.random.default_rng(seed))
        best = every_pair_alone(2).solve(scorer.scores("state", perms), perms["state"])
        gains = scorer.similarity({"state": best}) - scorer.similarity(perms)
        problem = Problem(scorer, every_pair_alone(2))
        new = improve_group(problem, "state", perms)["state"]
        for p in range(2):
            kept = best[p] if gains[p] > 1e-6 else perms["state"][p]
            np.testing.assert_array_equal(new[p], kept)
        refused += (gains < 0).sum()
    assert refused  # else this would test nothing


@pytest.mark.every_nth(2)
@kinds
def test_no_group_can_be_permuted_to_advantage_in_the_end(kind):
    spec = spec_of(kind)
    one, other = network(kind, 0), network(kind, 1)
    found = weight_matching(spec, one, other, key=KEY)
    scorer = scorer_of(kind, [one, other], [(0, 1)])
    perms = {group: np.asarray(perm)[None] for group, perm in found.items()}
    for group, size in scorer.sizes.items():
        if group in scorer.neighbours(group):
            continue  # scores are a linear approximation
        scores = scorer.scores(group, perms)[0]
        every = np.array(list(permutations(range(size))))
        best = scores[np.arange(size), every].sum(axis=1).max()
        assert total_score(scores, perms[group][0]) == pytest.approx(best, abs=1e-6)


def test_more_restarts_never_find_less_and_sometimes_more():
    spec, gained = spec_of("mlp"), []
    for seed in range(4):
        one, other = network("mlp", seed), network("mlp", seed + 100)
        values = []
        for restarts in (1, 2, 8):
            found = weight_matching(spec, one, other, key=KEY, restarts=restarts)
            aligned = permutation.apply(spec, found, other)
            values.append(float(weight_similarity(one, aligned)))
        assert values[0] <= values[1] + 1e-6
        assert values[1] <= values[2] + 1e-6
        gained.append(values[2] > values[0] + 0.01)
    assert any(gained)


def test_a_key_draws_the_same_permutations_every_time():
    spec, one, other = spec_of("residual"), network("residual"), network("residual", 1)
    first, second = (weight_matching(spec, one, other, key=KEY) for _ in range(2))
    assert_identical(first, second)


# What is found ========================================================================


@kinds
@given(seed=seeds)
@settings(max_examples=8)
def test_a_planted_permutation_is_found(kind, seed):
    spec, variables = spec_of(kind), network(kind, seed)
    planted, permutee = shuffled(spec, variables, seed)
    found = weight_matching(spec, variables, permutee, key=jax.random.key(seed))
    assert {group: perm.dtype for group, perm in found.items()} == {
        group: jnp.int32 for group in planted
    }
    assert_identical(permutation.apply(spec, found, permutee), variables)


@pytest.mark.slow
def test_a_resnets_planted_permutations_are_found_under_noise_as_well():
    model = MODELS["resnet20"](n_classes=10)
    spec = permutation_spec(model)
    shapes = jax.eval_shape(partial(init, model), KEY, np.zeros((1, 8, 8, 3)))

    def trained_like(path, leaf):
        rng = np.random.default_rng(list(path.encode()))
        if path.endswith(("/var", "/scale")):
            return rng.uniform(0.5, 1.5, leaf.shape)
        return rng.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape)

    one = jax.tree.map(np.float32, map_with_path(trained_like, shapes))
    for noise in (0.0, 0.02):
        other = noisy(one, noise)
        planted, permutee = shuffled(spec, other, 1)
        found = weight_matching(spec, one, permutee, key=KEY)
        assert_identical(permutation.apply(spec, found, permutee), other)
        assert (planted["stream1"] != np.arange(32)).any()


def test_the_first_pass_alone_finds_what_was_planted():
    # From the identity coordinate descent may get stuck.
    base = network("residual", 0)
    _, copy = shuffled(spec_of("residual"), base, 1)
    scorer = scorer_of("residual", [base, copy], [(0, 1)])
    rng = np.random.default_rng(0)
    perms = first_pass(Problem(scorer, every_pair_alone(1)), rng)
    assert scorer.similarity(perms) == pytest.approx(1, abs=1e-6)


def test_first_passes_prefer_groups_of_which_much_is_known():
    scorer = scorer_of("residual", [network("residual")] * 2, [(0, 1)])
    nothing = MatchedGroups(frozenset())
    stream = MatchedGroups(frozenset({"stream"}))
    # Three inputs and two outputs of the stream; nothing of what is inside.
    assert scorer.evidence("stream", nothing) == 5
    assert scorer.evidence("inner1", nothing) == 0
    assert scorer.evidence("inner1", stream) == scorer.evidence("inner1") == 10
    assert scorer.evidence("inner1", nothing._replace(slack=1)) == 10


def test_networks_that_are_alike_already_are_left_as_they_are():
    spec, one = spec_of("mlp"), network("mlp")
    found = weight_matching(spec, one, noisy(one, 0.01), key=KEY)
    assert_identical(found, permutation.identity(spec, one))


def test_groups_of_which_nothing_counts_are_left_as_they_are():
    spec = PermutationSpec(
        {"params/w": (None, "a"), "batch_stats/mean": ("b",), "params/count": ("c",)},
        statistics={"batch_stats/mean"},
    )

    def variables(seed: int) -> PyTree:
        rng = np.random.default_rng(seed)
        return {
            "params": {
                "w": rng.normal(size=(3, 4)).astype(np.float32),
                "count": rng.integers(0, 9, 4),
            },
            "batch_stats": {"mean": rng.normal(size=4).astype(np.float32)},
        }

    found = weight_matching(spec, variables(0), variables(1), key=KEY)
    for group in "bc":
        np.testing.assert_array_equal(found[group], np.arange(4))
    assert (found["a"] != np.arange(4)).any()


def test_running_statistics_have_no_say_unless_they_are_included():
    spec = PermutationSpec({"w": (None, "a"), "mean": ("a",)}, statistics={"mean"})
    one = {
        "w": np.array([[1, 2, 3]], np.float32),
        "mean": np.array([90, 80, 70], np.float32),
    }
    weights, statistics = np.array([1, 2, 0]), np.array([2, 0, 1])
    other = {"w": one["w"][:, weights], "mean": one["mean"][statistics]}
    by_weights = weight_matching(spec, one, other, key=KEY)["a"]
    np.testing.assert_array_equal(weights[by_weights], np.arange(3))
    by_all = weight_matching(spec, one, other, key=KEY, include=lambda path: True)["a"]
    np.testing.assert_array_equal(statistics[by_all], np.arange(3))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_weights_are_matched_in_float32(dtype):
    spec = spec_of("flattened maps")
    variables = jax.tree.map(lambda x: jnp.asarray(x, dtype), network("flattened maps"))
    _, permutee = shuffled(spec, variables, 1)
    found = weight_matching(spec, variables, permutee, key=KEY)
    assert_identical(permutation.apply(spec, found, permutee), variables)


def test_a_network_without_groups_has_nothing_to_match():
    spec = PermutationSpec({"w": (None, None)})
    variables = {"w": np.ones((2, 3), np.float32)}
    assert weight_matching(spec, variables, variables, key=KEY) == {}


# Staying put ==========================================================================


def test_fewer_units_move_the_more_staying_is_preferred():
    spec, one, other = spec_of("mlp"), network("mlp"), network("mlp", 4)
    stayed = []
    for stay in (0.0, 0.3, 2.0):
        found = weight_matching(spec, one, other, key=KEY, stay=stay)
        still = [perm == np.arange(len(perm)) for perm in found.values()]
        stayed.append(np.concatenate(still).mean())
    assert stayed[0] < stayed[1] < stayed[2] == 1


@pytest.mark.parametrize(("stay", "perm"), [(0.19, [1, 0]), (0.21, [0, 1])])
def test_a_unit_moves_only_if_its_mean_score_gains_more_than_stay(stay, perm):
    spec = PermutationSpec({"w": ("a", None)})
    one, other = (
        {"w": np.array([[2], [1]], np.float32)},
        {"w": np.array([[10], [20]], np.float32)},
    )
    # Both networks' directions agree if swapped, else their cosine is 4 / 5.
    found = weight_matching(spec, one, other, key=KEY, stay=stay)
    np.testing.assert_array_equal(found["a"], perm)


# What is refused ======================================================================


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("whose", ["reference", "permutee"])
def test_weights_that_are_not_finite_are_named(bad, whose):
    networks: dict[str, Any] = {"reference": network("mlp"), "permutee": network("mlp")}
    networks[whose]["b2"][1] = bad
    with pytest.raises(ValueError, match=f"'b2'.*the {whose}"):
        weight_matching(spec_of("mlp"), **networks, key=KEY)


def test_networks_of_other_widths_are_refused_by_leaf():
    wide = {**network("mlp"), "w3": np.ones((4, 3), np.float32)}
    with pytest.raises(ValueError, match=r"'w3'.*\(4, 2\).*\(4, 3\)"):
        weight_matching(spec_of("mlp"), network("mlp"), wide, key=KEY)


def test_networks_that_do_not_fit_the_spec_are_refused_by_leaf():
    other = {leaf: x for leaf, x in network("mlp").items() if leaf != "b1"}
    with pytest.raises(PermutationSpecError, match="'b1'"):
        weight_matching(spec_of("mlp"), network("mlp"), other, key=KEY)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"restarts": 0}, "restarts is 0; it must be at least 1"),
        ({"stay": -0.1}, "stay is -0.1; it must be at least 0"),
    ],
)
def test_senseless_settings_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        weight_matching(
            spec_of("mlp"), network("mlp"), network("mlp"), key=KEY, **settings
        )


def test_pairs_of_one_block_stand_or_fall_together():
    # One pair would gain by its assignment and the other lose more.
    scorer = scorer_of("mlp", three_networks("mlp", 0), PAIRS)
    rng = np.random.default_rng(0)
    perms = random_perms(scorer, rng)
    scores = scorer.scores("a", perms)
    every = np.array(list(permutations(range(5))), np.int32)
    totals = scores[:, np.arange(5), every].sum(axis=-1)
    proposed = every[np.stack([totals[0].argmax(), totals[1].argmin()], axis=0)]
    for blocks, moves in ((np.array([0, 1]), [True, False]), (np.zeros(2, int), None)):
        problem = Problem(scorer, Solver(lambda s, p: proposed, blocks))
        new = improve_group(problem, "a", perms)["a"]
        gain = total_score(scores, proposed) - total_score(scores, perms["a"])
        expected = [gain.sum() > 0] * 2 if moves is None else moves
        for p in range(2):
            kept = proposed[p] if expected[p] else perms["a"][p]
            np.testing.assert_array_equal(new[p], kept)
