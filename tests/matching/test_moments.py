"""Correlations, streamed over batches: as if all samples were seen at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat_jax.matching._moments import (
    Moments,
    centre,
    correlation,
    empty_moments,
    group_scores,
    update_moments,
)
from dimat_jax.matching._taps import tap_units
from dimat_jax.permutation import PermutationSpec, PermutationSpecError, Product

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
@settings(max_examples=40)
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
    assert float(moments.n_samples) == mask.sum()
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
@settings(max_examples=40)
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
    early, late, other = (
        streamed(*samples(30, seed=seed), [np.ones(30)]) for seed in range(3)
    )
    scores = group_scores(
        {"stream": {"early": early, "late": late}, "inner": {"other": other}}
    )
    assert scores.keys() == {"stream", "inner"}
    expected = (correlation(early) + correlation(late)) / 2
    np.testing.assert_allclose(scores["stream"], expected, atol=1e-6)
    np.testing.assert_allclose(scores["inner"], correlation(other))


SIZES = {"a": 3, "b": 2}


def shown(axes, array) -> dict[str, np.ndarray]:
    """What a tap with these axes shows of each of its groups."""
    spec = PermutationSpec({"leaf": ("a", "b")}, {"tap": axes})
    units = tap_units(spec, SIZES, {"tap": jnp.asarray(array), "other": jnp.zeros(1)})
    assert all(taps.keys() <= {"tap"} for taps in units.values())
    return {group: np.asarray(taps["tap"]) for group, taps in units.items() if taps}


@pytest.mark.parametrize(
    ("axes", "dimension", "shape"),
    [
        ("a", 3, (2, 4, 5, 3)),
        (("a", None, None), 1, (2, 3, 4, 5)),
        ((None, "a", None, None), 1, (2, 3, 4, 5)),
        (("a",), 1, (5, 3)),
    ],
)
def test_every_position_of_a_feature_map_is_a_sample_of_its_example(
    axes, dimension, shape
):
    maps = np.arange(np.prod(shape)).reshape(shape)
    units = np.moveaxis(maps, dimension, -1)
    # Example by example: masks are repeated accordingly.
    expected = [unit for example in units for unit in example.reshape(-1, 3)]
    found = shown(axes, maps)
    assert found.keys() == {"a"}
    np.testing.assert_array_equal(found["a"], expected)


@pytest.mark.parametrize("axes", [(None, "a", "b"), ("a", "b")])
def test_each_of_several_groups_is_seen_as_the_mean_over_the_others(axes):
    array = np.random.default_rng(0).normal(size=(4, 5, 3, 2)).astype(np.float32)
    found = shown(axes, array)
    np.testing.assert_allclose(found["a"], array.mean(axis=3).reshape(20, 3), atol=1e-6)
    np.testing.assert_allclose(found["b"], array.mean(axis=2).reshape(20, 2), atol=1e-6)


@pytest.mark.parametrize(
    ("axis", "shape"),
    [
        (Product("a", "b"), (3, 2)),
        (Product("b", None, "a"), (2, 5, 3)),
        (Product(5, "a"), (5, 3)),
        (Product("a", None), (3, 7)),
    ],
)
def test_products_are_seen_as_their_factors_on_axes_of_their_own(axis, shape):
    array = np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float32)
    flat, split = array.reshape(4, -1), (None, *axis.factors)
    split = tuple(None if isinstance(axis, int) else axis for axis in split)
    found, expected = shown((None, axis), flat), shown(split, array)
    assert found.keys() == expected.keys() == set(axis.factors) & set(SIZES)
    for group, units in found.items():
        assert units.shape[-1] == SIZES[group]
        np.testing.assert_array_equal(units, expected[group])


def test_means_over_other_groups_are_taken_in_float32():
    array = np.ones((1, 3, 2), np.float32) * [[[1], [2], [3]]] + [[[0, 1 / 64]]]
    found = shown(("a", "b"), jnp.asarray(array, jnp.bfloat16))
    assert found["a"].dtype == np.float32
    np.testing.assert_array_equal(found["a"], [[1 + 1 / 128, 2 + 1 / 128, 3 + 1 / 128]])


def test_a_tap_without_activations_is_named():
    spec = PermutationSpec({"kernel": ("a",)}, {"relu": "a"})
    with pytest.raises(PermutationSpecError, match=r"tap 'relu'.*\['rellu'\]"):
        tap_units(spec, SIZES, {"rellu": jnp.zeros((2, 3))})


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        ("a", (5, 4)),
        ((None, "a"), (3,)),
        (("a", Product(None, "b")), (2, 3, 5)),
        ((Product("a", "b"),), (2, 5)),
    ],
)
def test_activations_that_do_not_have_the_taps_axes_are_refused(axes, shape):
    with pytest.raises(PermutationSpecError, match="tap 'tap'"):
        shown(axes, np.zeros(shape))
