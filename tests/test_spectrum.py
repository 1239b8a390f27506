"""Tests that the iterations for many agents find what all eigenvalues say."""

import numpy as np
import pytest

from dimat_jax import _spectrum
from dimat_jax._spectrum import second_modulus
from dimat_jax.mixing import MIXINGS, MixingError
from dimat_jax.topology import TOPOLOGIES, schedule

N = 81


def matrices(topology: str, rule: str, n: int = N) -> np.ndarray:
    try:
        return schedule(MIXINGS[rule](TOPOLOGIES[topology](n)))
    except MixingError:
        pytest.skip("the rule does not fit the graph")


@pytest.mark.parametrize("rule", sorted(set(MIXINGS) - {"fastest", "max_degree"}))
@pytest.mark.parametrize("topology", sorted(set(TOPOLOGIES) - {"file", "hypercube"}))
def test_many_agents_have_the_gap_that_all_eigenvalues_give(
    topology, rule, monkeypatch
):
    given = matrices(topology, rule)
    exact = second_modulus(given)
    monkeypatch.setattr(_spectrum, "_MOST_AT_ONCE", 8)
    assert second_modulus(given) == pytest.approx(exact, abs=1e-9)
    # The gap, 1 - |lambda_2|, has the same digits every time.
    assert 1 - second_modulus(given) == 1 - second_modulus(given)


@pytest.mark.parametrize(
    ("topology", "rule"), [("random_regular", "uniform"), ("exponential", "lazy")]
)
def test_iterations_do_without_all_eigenvalues(topology, rule, monkeypatch):
    given = matrices(topology, rule)
    exact = second_modulus(given)
    monkeypatch.setattr(_spectrum, "_MOST_AT_ONCE", 8)
    for solve in ("eigvals", "eigvalsh"):
        monkeypatch.delattr(np.linalg, solve)
    assert second_modulus(given) == pytest.approx(exact, abs=1e-9)


def test_exact_consensus_after_a_period_is_seen_by_many_agents(monkeypatch):
    monkeypatch.setattr(_spectrum, "_MOST_AT_ONCE", 8)
    given = matrices("one_peer_exponential", "uniform", 128)
    assert second_modulus(given) == pytest.approx(0, abs=1e-9)


def test_agents_that_only_swap_never_agree(monkeypatch):
    swap = np.roll(np.eye(100), 1, axis=0)[None]
    monkeypatch.setattr(_spectrum, "_MOST_AT_ONCE", 8)
    assert second_modulus(swap) == pytest.approx(1)
    # Two groups that nothing connects have the eigenvalue 1 twice.
    apart = np.kron(np.eye(2), np.full((50, 50), 0.02))[None]
    assert second_modulus(apart) == 1
