"""The linear assignment problem: exact, batched, maximising."""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from dimat_jax.matching import _assignment, solve_assignment
from dimat_jax.matching._assignment import prefer_staying


def matrices(max_units: int) -> st.SearchStrategy[np.ndarray]:
    # Multiples of 1/8, with ties: sums of them are exact.
    entries = st.integers(-16, 16)
    return st.integers(1, max_units).flatmap(
        lambda n: st.lists(
            st.lists(entries, min_size=n, max_size=n), min_size=n, max_size=n
        ).map(lambda rows: np.array(rows, np.float32) / 8)
    )


def total_score(scores: np.ndarray, perm) -> float:
    return float(scores[np.arange(len(scores)), perm].sum())


def favourites_differ(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of which every row's largest entry is in another column, and which."""
    rng = np.random.default_rng(seed)
    scores, perm = rng.uniform(-1, 1, (n, n)), rng.permutation(n)
    scores[np.arange(n), perm] += 2
    return scores.astype(np.float32), perm


@given(scores=matrices(max_units=7))
@settings(max_examples=40)
def test_no_permutation_scores_more(scores):
    n = len(scores)
    every = np.array(list(itertools.permutations(range(n))))
    perm = solve_assignment(scores)
    np.testing.assert_array_equal(np.sort(perm), np.arange(n))
    assert total_score(scores, perm) == scores[np.arange(n), every].sum(axis=1).max()


@given(scores=matrices(max_units=12))
def test_it_scores_as_much_as_scipys(scores):
    scipys = linear_sum_assignment(scores, maximize=True)[1]
    found = total_score(scores, solve_assignment(scores))
    assert found == total_score(scores, scipys)


@pytest.mark.parametrize("n", [1, 2, 64])
def test_the_shortcut_is_scipys_answer_without_asking_it(n, monkeypatch):
    scores, perm = favourites_differ(n, seed=n)
    scipys = linear_sum_assignment(scores, maximize=True)[1]

    def refuse(*args, **kwargs):
        raise AssertionError("the rows' favourites are a permutation already")

    monkeypatch.setattr(_assignment, "linear_sum_assignment", refuse)
    solved = solve_assignment(scores)
    np.testing.assert_array_equal(solved, scipys)
    np.testing.assert_array_equal(solved, perm)


def test_rows_are_the_references_and_the_score_is_maximised():
    # The reference's unit 0 is like the permutee's unit 1, and so on.
    scores = np.array([[0, 9, 0], [0, 0, 9], [9, 0, 0]])
    np.testing.assert_array_equal(solve_assignment(scores), [1, 2, 0])
    np.testing.assert_array_equal(solve_assignment(-scores[:2, :2]), [0, 1])


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (0,)])
def test_every_matrix_of_a_batch_is_solved_on_its_own(batch, order):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(*batch, 5, 5)).astype(np.float32)
    if batch == (4,):
        scores[2] = favourites_differ(5, seed=0)[0]  # the shortcut, among others
    perms = solve_assignment(np.asarray(scores, order=order))
    assert perms.shape == (*batch, 5)
    assert perms.dtype == np.int32
    for index in np.ndindex(*batch):
        alone = linear_sum_assignment(scores[index], maximize=True)[1]
        np.testing.assert_array_equal(perms[index], alone)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_jax_arrays_of_any_dtype_are_taken(dtype):
    scores: Any = jnp.array([[0, 3, 2], [0, 3, 0], [1, 0, 0]], dtype)
    np.testing.assert_array_equal(solve_assignment(scores), [2, 1, 0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    scores = np.eye(4)[None].repeat(3, axis=0)
    scores[1, 2, 3] = bad
    with pytest.raises(ValueError, match="finite"):
        solve_assignment(scores)


@pytest.mark.parametrize("shape", [(3,), (3, 4), (2, 4, 3), ()])
def test_scores_that_are_not_square_are_refused(shape):
    with pytest.raises(ValueError, match="square"):
        solve_assignment(np.zeros(shape))


# Staying put ==========================================================================


@given(scores=matrices(max_units=8), stay=st.sampled_from([0, 0.5, 1.25, 8]))
def test_units_move_only_if_they_gain_more_than_stay_on_average(scores, stay):
    perm = solve_assignment(prefer_staying(scores, stay))
    for cycle in cycles(perm):
        gain = sum(scores[u, perm[u]] - scores[u, u] for u in cycle)
        assert gain >= stay * len(cycle)


def cycles(perm: np.ndarray) -> list[list[int]]:
    """Units that change places with each other."""
    found, seen = [], set()
    for start in range(len(perm)):
        cycle, unit = [], start
        while unit not in seen:
            seen.add(unit)
            cycle.append(unit)
            unit = int(perm[unit])
        if len(cycle) > 1:
            found.append(cycle)
    return found


@pytest.mark.parametrize(("stay", "perm"), [(0.39, [1, 0]), (0.41, [0, 1])])
def test_a_pair_swaps_if_each_gains_more_than_stay(stay, perm):
    scores = np.array([[0.3, 0.7], [0.7, 0.3]], np.float32)
    np.testing.assert_array_equal(solve_assignment(prefer_staying(scores, stay)), perm)


def test_a_swap_that_gains_less_waits_while_another_that_gains_more_is_made():
    scores = np.zeros((2, 4, 4), np.float32)
    scores[:, [0, 1], [1, 0]] = 0.2
    scores[:, [2, 3], [3, 2]] = 0.6
    perms = solve_assignment(prefer_staying(scores, 0.4))
    np.testing.assert_array_equal(perms, [[0, 1, 3, 2]] * 2)


def test_stay_is_added_to_every_diagonal_and_leaves_the_scores_alone():
    scores = np.ones((2, 3, 3), np.float32)
    np.testing.assert_array_equal(prefer_staying(scores, 0.5)[1], 1 + 0.5 * np.eye(3))
    np.testing.assert_array_equal(scores, 1)
