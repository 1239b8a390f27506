"""Correlations, streamed over batches: as if all samples were seen at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat_jax.matching.activation import (
    Moments,
    centre,
    correlation,
    empty_moments,
    group_scores,
    units_last,
    update_moments,
)
from dimat_jax.permutation import PermutationSpec, PermutationSpecError

UNITS = 6


@jax.jit
def add(moments, reference, permutee, weights):
    return update_moments(
        moments, centre(reference, weights), centre(permutee, weights)
    )


def samples(n: int, *, mean=0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of correlated units: float32, of mean +-`mean` and deviation 1."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(n, UNITS))

    def units():
        mixed = common @ rng.normal(size=(UNITS, UNITS)) + rng.normal(size=(n, UNITS))
        offset = mean * rng.choice([-1, 1], UNITS)
        return (mixed / mixed.std(axis=0) + offset).astype(np.float32)

    return units(), units()


def exact(reference: np.ndarray, permutee: np.ndarray) -> np.ndarray:
    both = np.concatenate([reference, permutee], axis=1).astype(np.float64)
    return np.asarray(np.corrcoef(both, rowvar=False))[:UNITS, UNITS:]


def streamed(reference, permutee, masks) -> Moments:
    """One batch for each mask; all of the same shape, so that all share a program."""
    moments = empty_moments(UNITS)
    for mask in masks:
        moments = add(moments, reference, permutee, np.asarray(mask))
    return moments


@pytest.mark.parametrize("mean", [0, 1, 1e3])
@pytest.mark.parametrize("n_batches", [1, 7])
def test_streamed_correlations_are_those_of_all_samples(mean, n_batches):
    reference, permutee = samples(140, mean=mean)
    moments = empty_moments(UNITS)
    for batch in zip(
        np.split(reference, n_batches), np.split(permutee, n_batches), strict=True
    ):
        moments = add(moments, *batch, np.ones(len(batch[0])))
    assert moments.n_samples == 140
    np.testing.assert_allclose(
        correlation(moments), exact(reference, permutee), rtol=0, atol=1e-4
    )


def test_large_means_do_no_harm_in_a_batch_of_many_positions():
    # As of feature maps: a hundred images of 32 x 32.
    reference, permutee = samples(102_400, mean=1e3)
    moments = streamed(reference, permutee, np.ones((2, len(reference))))
    np.testing.assert_allclose(
        correlation(moments), exact(reference, permutee), rtol=0, atol=1e-4
    )


def test_batches_whose_means_differ_are_weighed_by_their_sizes():
    reference, permutee = samples(60)
    reference[:20] += 50
    permutee[:20] -= 30
    moments = empty_moments(UNITS)
    for batch in (slice(0, 20), slice(20, 25), slice(25, 60)):
        moments = add(
            moments, reference[batch], permutee[batch], np.ones(len(reference[batch]))
        )
    assert (exact(reference, permutee) < -0.9).all()
    np.testing.assert_allclose(
        correlation(moments), exact(reference, permutee), rtol=0, atol=1e-4
    )


@given(
    batch_of=st.lists(st.integers(0, 4), min_size=16, max_size=16),
    mean=st.sampled_from([0, 1e3]),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=40)
def test_correlations_do_not_depend_on_the_split_into_batches(batch_of, mean, seed):
    # Some batches are empty; a batch is what its mask leaves of all samples.
    reference, permutee = samples(16, mean=mean, seed=seed)
    moments = streamed(reference, permutee, [np.equal(batch_of, b) for b in range(5)])
    assert moments.n_samples == 16
    np.testing.assert_allclose(
        correlation(moments), exact(reference, permutee), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("garbage", [1e6, np.nan, np.inf])
def test_masked_samples_count_nowhere(garbage):
    reference, permutee = samples(40, mean=1e3)
    mask = np.arange(40) % 3 > 0
    expected = exact(reference[mask], permutee[mask])
    reference[~mask] = permutee[~mask] = garbage
    first = np.arange(40) < 17
    moments = streamed(reference, permutee, [mask & first, mask & ~first])
    assert moments.n_samples == mask.sum()
    np.testing.assert_allclose(correlation(moments), expected, rtol=0, atol=1e-4)


def test_no_weights_count_every_sample():
    units = jnp.asarray(samples(10)[0])
    for one, other in zip(centre(units), centre(units, jnp.ones(10)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_bfloat16_activations_are_summed_in_float32():
    reference, permutee = (jnp.asarray(x, jnp.bfloat16) for x in samples(500))
    moments = update_moments(empty_moments(UNITS), centre(reference), centre(permutee))
    assert {leaf.dtype for leaf in moments} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(
        correlation(moments),
        exact(np.asarray(reference), np.asarray(permutee)),
        rtol=0,
        atol=1e-4,
    )


# Dead units ===========================================================================


@given(
    level=st.one_of(st.just(0.0), st.floats(-1e4, 1e4, width=32)),
    mean=st.sampled_from([0, 1e3]),
)
@settings(deadline=None, max_examples=40)
def test_units_that_never_vary_correlate_with_nothing(level, mean):
    reference, permutee = samples(64, mean=mean)
    reference[:, 2], permutee[:, [1, 3]] = level, level
    alive = np.ones((UNITS, UNITS), bool)
    alive[2], alive[:, [1, 3]] = False, False
    with np.errstate(invalid="ignore"):
        expected = np.where(alive, exact(reference, permutee), 0)
    first = np.arange(64) < 23
    found = correlation(streamed(reference, permutee, [first, ~first]))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(found)[~alive], 0)


def test_a_unit_that_varies_a_little_is_no_dead_one():
    reference, permutee = samples(64)
    expected = exact(reference, permutee)
    small = streamed(1e-6 * reference, 1e-6 * permutee, [np.ones(64)])
    np.testing.assert_allclose(correlation(small), expected, rtol=0, atol=1e-4)
    offset = streamed(1e-2 * reference + 1, permutee, [np.ones(64)])
    np.testing.assert_allclose(correlation(offset), expected, rtol=0, atol=1e-4)


def test_no_samples_at_all_correlate_with_nothing():
    moments = streamed(*samples(4), [np.zeros(4, bool)])
    assert moments.n_samples == 0
    np.testing.assert_array_equal(correlation(moments), 0)


# Groups and taps ======================================================================


def test_a_groups_score_is_the_mean_over_its_taps():
    spec = PermutationSpec(
        {"a": ("stream",), "b": ("inner",)},
        {"early": "stream", "late": (None, "stream"), "other": "inner"},
    )
    moments = {
        tap: streamed(*samples(30, seed=seed), [np.ones(30)])
        for seed, tap in enumerate(spec.taps)
    }
    scores = group_scores(spec, moments)
    assert scores.keys() == {"stream", "inner"}
    expected = (correlation(moments["early"]) + correlation(moments["late"])) / 2
    np.testing.assert_allclose(scores["stream"], expected, atol=1e-6)
    np.testing.assert_allclose(scores["inner"], correlation(moments["other"]))


def test_a_group_without_a_tap_is_named():
    spec = PermutationSpec({"a": ("stream",), "b": ("inner",)}, {"tap": "stream"})
    moments = {"tap": empty_moments(UNITS)}
    with pytest.raises(PermutationSpecError, match="group 'inner' has no tap"):
        group_scores(spec, moments)


@pytest.mark.parametrize(
    ("axes", "dimension"), [("units", 3), ((None, "units", None, None), 1)]
)
def test_every_position_of_a_feature_map_is_a_sample_of_its_example(axes, dimension):
    spec = PermutationSpec({"kernel": ("units",)}, {"tap": axes})
    maps = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    flat = units_last(spec, {"tap": jnp.asarray(maps), "other": jnp.zeros(1)})
    assert flat.keys() == {"tap"}
    units = np.moveaxis(maps, dimension, -1)
    # Example by example: masks are repeated accordingly.
    expected = [
        unit for example in units for unit in example.reshape(-1, units.shape[-1])
    ]
    np.testing.assert_array_equal(flat["tap"], expected)


def test_a_tap_without_activations_is_named():
    spec = PermutationSpec({"kernel": ("units",)}, {"relu": "units"})
    with pytest.raises(PermutationSpecError, match=r"tap 'relu'.*\['rellu'\]"):
        units_last(spec, {"rellu": jnp.zeros((2, 3))})
