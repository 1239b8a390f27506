"""Pairs that are solved where their scores are get the same permutations.

With one process all scores are local; `tests/test_processes.py` has two processes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dimat_jax.algorithms import _local_pairs
from dimat_jax.algorithms._edges import waves
from dimat_jax.algorithms._local_pairs import search_local_pairs
from dimat_jax.matching._activation import ActivationScorer
from dimat_jax.matching._descent import (
    Problem,
    coordinate_descent,
    every_pair_alone,
    identities,
)
from dimat_jax.placement import place

N_AGENTS, UNITS = 5, {"first": 6, "second": 4}
EDGES = np.array([(0, 1), (1, 0), (2, 4), (3, 1), (4, 0), (1, 3), (0, 2)])


def search(problem, key):
    del key
    return coordinate_descent(problem, identities(problem.scorer))


@pytest.fixture(params=[1, 2, 5])
def placed(request):
    """A placement, the waves of the edges, and scores of their pairs."""
    placement = place(N_AGENTS, jax.devices()[: request.param])
    edge_waves = waves(EDGES, placement.slots)
    rng = np.random.default_rng(0)

    def draw(n):
        stacked = rng.uniform(-1, 1, (placement.slots, n, n)).astype(np.float32)
        return jax.device_put(stacked, placement.sharding)

    scores = [{group: draw(n) for group, n in UNITS.items()} for _ in edge_waves]
    return placement, edge_waves, scores


@pytest.mark.parametrize("stay", [0.0, 0.5])
def test_local_pairs_get_the_permutations_of_all_pairs(placed, stay):
    placement, edge_waves, scores = placed
    scorer = ActivationScorer(scores, edge_waves, fetch=placement.fetch)
    problem = Problem(scorer, every_pair_alone(scorer.n_pairs, stay))
    expected = search(problem, jax.random.key(0))
    perms, similarity = search_local_pairs(
        search, scorer, edge_waves, placement, stay=stay, key=jax.random.key(0)
    )
    assert perms.keys() == expected.keys()
    for group, perm in expected.items():
        assert perms[group].dtype == perm.dtype
        np.testing.assert_array_equal(perms[group], perm)
    np.testing.assert_array_equal(similarity, scorer.similarity(expected))


def test_a_process_solves_its_own_rows_alone(monkeypatch):
    """This process plays one that holds the first two slots of five, and then none."""
    placement = place(N_AGENTS, jax.devices()[:1])
    edge_waves = waves(EDGES, placement.slots)
    rng = np.random.default_rng(0)
    scores = [
        {
            group: jnp.float32(rng.uniform(-1, 1, (5, n, n)))
            for group, n in UNITS.items()
        }
        for _ in edge_waves
    ]
    solved = []

    def counted(problem, key):
        solved.append(problem.scorer.n_pairs)
        return search(problem, key)

    for rows in (np.array([0, 1]), np.array([3, 4])):
        monkeypatch.setattr(_local_pairs, "local_slots", lambda placement, r=rows: r)
        monkeypatch.setattr(
            _local_pairs, "fetch_local", lambda x, r=rows: np.asarray(x)[r]
        )
        scorer = ActivationScorer(scores, edge_waves, fetch=np.asarray)
        expected = search(
            Problem(scorer, every_pair_alone(scorer.n_pairs)), jax.random.key(0)
        )
        perms, _ = search_local_pairs(
            counted, scorer, edge_waves, placement, stay=0.0, key=jax.random.key(0)
        )
        # The first wave holds five pairs and the second holds two.
        own = np.concatenate([rows, 5 + rows[rows < 2]])
        for group, perm in expected.items():
            np.testing.assert_array_equal(perms[group][own], perm[own])
            others = np.setdiff1d(np.arange(7), own)
            assert not perms[group][others].any()  # they come from other processes
    assert solved == [4, 2]
