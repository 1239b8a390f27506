"""Wrong labels: how many, of which samples, and of which classes."""

import numpy as np
import pytest

from dimat_jax.data._label_noise import with_label_noise
from dimat_jax.errors import UserError
from dimat_jax.options import OptionError

CLASSES = 5
LABELS = np.arange(6000, dtype=np.int32) % CLASSES
# The last samples belong to no agent: they are kept back for validation.
SHARDS = [np.arange(0, 4000, 2), np.arange(1, 4000, 2), np.arange(4000, 4010)]
KEPT_BACK = np.arange(4010, 6000)


def noisy(rate: float, seed: int = 0) -> np.ndarray:
    return with_label_noise(LABELS, SHARDS, CLASSES, rate, [seed, 0])


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_every_agent_has_the_same_share_of_wrong_labels(rate):
    wrong = noisy(rate) != LABELS
    for shard in SHARDS:
        assert wrong[shard].sum() == round(rate * len(shard))
    assert not wrong[KEPT_BACK].any()


def test_all_other_classes_are_equally_likely():
    labels = noisy(1.0)
    for label in range(CLASSES):
        own = labels[SHARDS[0][LABELS[SHARDS[0]] == label]]
        counts = np.bincount(own, minlength=CLASSES)
        assert counts[label] == 0
        # 400 samples in four classes: three standard deviations are 26.
        np.testing.assert_allclose(np.delete(counts, label), 100, atol=30)


def test_the_seed_decides_and_the_true_labels_stay():
    before = LABELS.copy()
    first, again, other = noisy(0.3), noisy(0.3), noisy(0.3, seed=1)
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.2
    np.testing.assert_array_equal(LABELS, before)
    assert first.dtype == np.int32
    assert noisy(0.0) is LABELS


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_rates_that_are_no_shares_are_refused(rate):
    with pytest.raises(OptionError, match=r"label_noise is .*; it must be at least 0 "):
        noisy(rate)


def test_a_single_class_cannot_have_wrong_labels():
    with pytest.raises(UserError, match="there is only one class"):
        with_label_noise(LABELS * 0, SHARDS, 1, 0.5, [0])
