import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat_jax.data.partition import (
    PARTITIONS,
    PartitionError,
    class_counts,
    partition,
    set_aside,
)
from dimat_jax.errors import UserError
from dimat_jax.options import OptionError

# Classes have different sizes, their labels have gaps, and there may be more agents
# than classes.
labels_of = st.lists(
    st.sampled_from([0, 0, 0, 1, 2, 5, 6, 200]), min_size=1, max_size=80
).map(lambda labels: np.array(labels, np.int32))
seeds = st.integers(0, 2**32)

# "classes_per_agent" refuses classes that it cannot divide among the agents.
SPLITS_ANYTHING = sorted(PARTITIONS.keys() - {"classes_per_agent"})


@pytest.mark.parametrize("name", SPLITS_ANYTHING)
@given(labels=labels_of, n_agents=st.integers(1, 12), seed=seeds)
def test_every_sample_is_in_exactly_one_sorted_shard(name, labels, n_agents, seed):
    shards = PARTITIONS[name](labels, n_agents, seed=seed)
    assert len(shards) == n_agents
    for shard in shards:
        assert shard.dtype == np.int64
        assert np.all(np.diff(shard) > 0)
    np.testing.assert_array_equal(
        np.sort(np.concatenate(shards)), np.arange(len(labels))
    )


@pytest.mark.parametrize("name", SPLITS_ANYTHING)
@given(labels=labels_of, n_agents=st.integers(1, 12), seed=seeds)
def test_the_seed_alone_decides(name, labels, n_agents, seed):
    np.random.seed(0)
    first = PARTITIONS[name](labels, n_agents, seed=seed)
    drawn = np.random.random()
    np.random.seed(0)
    # The partition has not used NumPy's global state.
    assert drawn == np.random.random()
    np.random.seed(1)
    second = PARTITIONS[name](labels, n_agents, seed=seed)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", SPLITS_ANYTHING)
@given(labels=labels_of, n_agents=st.integers(1, 12), seed=seeds)
def test_no_agent_is_left_empty_without_an_error(name, labels, n_agents, seed):
    if all(map(len, PARTITIONS[name](labels, n_agents, seed=seed))):
        assert len(partition(name, labels, n_agents, seed=seed)) == n_agents
    else:
        with pytest.raises(PartitionError):
            partition(name, labels, n_agents, seed=seed)


@pytest.mark.parametrize(
    ("name", "n_agents"), [("iid", 5), ("by_class", 20), ("classes_per_agent", 7)]
)
def test_another_seed_gives_other_shards_of_the_same_sizes(name, n_agents):
    labels = np.repeat(np.arange(10), 30)
    first, second = (partition(name, labels, n_agents, seed=s) for s in (0, 1))
    assert [len(s) for s in first] == [len(s) for s in second]
    assert any(np.any(a != b) for a, b in zip(first, second, strict=True))


@given(labels=labels_of, n_agents=st.integers(1, 12), seed=seeds)
def test_iid_is_even_in_every_class_and_in_all(labels, n_agents, seed):
    shards = PARTITIONS["iid"](labels, n_agents, seed=seed)
    counts = class_counts(labels, shards)
    assert np.ptp(counts, axis=0).max() <= 1
    assert np.ptp(counts.sum(axis=1)) <= 1


def test_iid_is_a_fifth_of_every_class_where_that_is_possible():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(100), 500))
    counts = class_counts(labels, partition("iid", labels, 5, seed=0))
    np.testing.assert_array_equal(counts, np.full((5, 100), 100))


@given(labels=labels_of, data=st.data(), seed=seeds)
def test_by_class_gives_class_c_to_agent_c_mod_n(labels, data, seed):
    n_agents = data.draw(st.integers(1, len(np.unique(labels))))
    shards = PARTITIONS["by_class"](labels, n_agents, seed=seed)
    for agent, shard in enumerate(shards):
        assert np.all(labels[shard] % n_agents == agent)


@given(labels=labels_of, more=st.integers(1, 20), seed=seeds)
def test_by_class_shares_a_class_evenly_when_agents_outnumber_classes(
    labels, more, seed
):
    classes = np.unique(labels)
    shards = PARTITIONS["by_class"](labels, len(classes) + more, seed=seed)
    sizes = np.array([len(shard) for shard in shards])
    for agent, shard in enumerate(shards):
        assert np.all(labels[shard] == classes[agent % len(classes)])
    for rank in range(len(classes)):
        assert np.ptp(sizes[rank :: len(classes)]) <= 1


def test_by_class_shares_at_random_and_not_in_stored_order():
    labels = np.zeros(100, np.int32)
    first, _ = partition("by_class", labels, 2, seed=0)
    assert not np.array_equal(first, np.arange(50))
    assert not np.array_equal(first, np.arange(0, 100, 2))


def test_by_class_takes_labels_of_a_narrow_type():
    labels = np.arange(256, dtype=np.uint8)
    shards = partition("by_class", labels, 256, seed=0)
    np.testing.assert_array_equal(np.concatenate(shards), labels)


@pytest.mark.parametrize("name", ["dirichlet", "quantity_skew"])
@pytest.mark.parametrize("alpha", [1e-6, 0.01, 0.5, 100.0])
@pytest.mark.parametrize("n_agents", [1, 5, 40])
def test_no_alpha_leaves_an_agent_empty(name, alpha, n_agents):
    labels = np.random.default_rng(0).integers(0, 10, 200)
    for seed in range(5):
        shards = partition(name, labels, n_agents, seed=seed, alpha=alpha)
        assert min(map(len, shards)) > 0
        np.testing.assert_array_equal(np.sort(np.concatenate(shards)), np.arange(200))


def test_a_small_alpha_gives_classes_to_few_and_a_large_one_to_all():
    labels = np.repeat(np.arange(10), 500)

    def largest_share(alpha):
        shards = partition("dirichlet", labels, 5, seed=0, alpha=alpha)
        return (class_counts(labels, shards).max(axis=0) / 500).mean()

    assert largest_share(0.01) > 0.9
    assert largest_share(1e4) < 0.22
    assert largest_share(0.01) > largest_share(0.5) > largest_share(10)


def test_dirichlet_proportions_have_the_moments_they_should():
    # A share has the mean 1/N and the variance (1/N)(1 - 1/N) / (N alpha + 1).
    labels = np.repeat(np.arange(400), 100)
    shares = class_counts(labels, partition("dirichlet", labels, 4, seed=0)) / 100
    np.testing.assert_allclose(shares.mean(axis=1), 1 / 4, atol=0.05)
    np.testing.assert_allclose(shares.var(axis=1), (3 / 16) / 3, rtol=0.2)


def test_quantity_skew_is_iid_in_shards_of_different_sizes():
    labels = np.tile(np.arange(2), 5000)
    shards = partition("quantity_skew", labels, 4, seed=1, alpha=0.3)
    sizes = np.array([len(shard) for shard in shards])
    assert sizes.max() > 3 * sizes.min()
    shards = [shard for shard in shards if len(shard) > 1000]
    assert len(shards) > 1
    for shard in shards:
        assert abs(labels[shard].mean() - 0.5) < 0.05


@given(
    n_classes=st.integers(1, 9), n_agents=st.integers(1, 12), data=st.data(), seed=seeds
)
def test_every_agent_holds_its_classes_and_shares_them_evenly(
    n_classes, n_agents, data, seed
):
    least = -(-n_classes // n_agents)
    classes = data.draw(st.integers(least, n_classes))
    labels = np.random.default_rng(seed).permutation(
        np.arange(30 * n_classes) % n_classes
    )
    shards = partition(
        "classes_per_agent", labels, n_agents, seed=seed, classes=classes
    )
    np.testing.assert_array_equal(
        np.sort(np.concatenate(shards)), np.arange(len(labels))
    )
    counts = class_counts(labels, shards)
    np.testing.assert_array_equal((counts > 0).sum(axis=1), classes)
    holders = (counts > 0).sum(axis=0)
    assert np.ptp(holders) <= 1
    for column in counts.T:
        assert np.ptp(column[column > 0]) <= 1


def test_class_counts_has_a_column_for_every_label_up_to_the_largest():
    labels = np.array([0, 3, 3, 1])
    counts = class_counts(labels, [np.array([0, 1]), np.array([2, 3])])
    np.testing.assert_array_equal(counts, [[1, 0, 0, 1], [0, 1, 0, 1]])


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("name", "labels", "n_agents", "message"),
    [
        (
            "byclass",
            [0, 1],
            2,
            "'byclass'; allowed: by_class, .*; .* 'by_class'",
        ),
        ("other", [0, 1], 2, r"'other'; allowed: by_class, .*, quantity_skew$"),
        ("iid", [0, 1], 0, "expected 1 to 2 agents .* got 0"),
        ("iid", [0, 1], 3, "expected 1 to 2 agents .* got 3"),
        ("iid", [[0, 1]], 1, r"expected labels int\[samples\], got int64\[1, 2\]"),
        ("iid", [0.5, 1.0], 1, r"expected labels int\[samples\], got float64\[2\]"),
        # Both classes have even labels, so agent 1 of 2 has no class.
        ("by_class", [0, 2, 2], 2, r"by_class leaves agents \[1\] of 2 without"),
        # Agents 1 and 3 share class 1, which has a single sample.
        ("by_class", [0, 0, 0, 1], 4, r"by_class leaves agents \[3\] of 4 .*2 classes"),
    ],
)
def test_what_cannot_be_split_says_why(name, labels, n_agents, message):
    with pytest.raises(PartitionError, match=message):
        partition(name, np.array(labels), n_agents, seed=0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dirichlet", {"alpha": 0.0}, "alpha is 0.0; it must be above 0"),
        ("dirichlet", {"alpha": float("nan")}, "alpha is nan; it must be above 0"),
        ("quantity_skew", {"alpha": -1.0}, "alpha is -1.0; it must be above 0"),
        ("classes_per_agent", {"classes": 0}, "from 1 to all 4 classes, not 0"),
        ("classes_per_agent", {"classes": 5}, "from 1 to all 4 classes, not 5"),
        ("classes_per_agent", {"classes": 1}, "3 agents with 1 classes each cannot"),
    ],
)
def test_an_option_that_makes_no_partition_says_why(name, options, message):
    labels = np.tile(np.arange(4), 10)
    with pytest.raises(UserError, match=message):
        partition(name, labels, 3, seed=0, **options)


# Setting aside =======================================================================


@given(
    n_agents=st.integers(1, 6),
    amount=st.one_of(st.floats(0.02, 0.6), st.integers(1, 40)),
    seed=st.integers(0, 100),
)
@settings(max_examples=50)
def test_what_is_set_aside_is_like_each_shard_and_nobody_has_it(n_agents, amount, seed):
    labels = np.random.default_rng(seed).integers(4, size=120)
    shards = partition("dirichlet", labels, n_agents, seed=seed, alpha=1.0)
    left, taken = set_aside(shards, labels, amount, seed=[seed])
    share = amount if amount < 1 else amount / 120
    for shard, kept, out in zip(shards, left, taken, strict=True):
        np.testing.assert_array_equal(np.sort(np.concatenate([kept, out])), shard)
        assert (np.diff(kept) > 0).all() and (np.diff(out) > 0).all()
        assert len(kept) >= 1
        assert len(out) >= min(1, len(shard) - 1)
        assert abs(len(out) - share * len(shard)) <= 1
        for label in range(4):
            of_class = (labels[shard] == label).sum()
            assert abs((labels[out] == label).sum() - share * of_class) <= 2


def test_without_an_amount_nothing_is_set_aside():
    shards = partition("iid", np.arange(20) % 4, 2, seed=0)
    left, taken = set_aside(shards, np.arange(20) % 4, 0.0, seed=[0])
    assert [shard.tolist() for shard in left] == [shard.tolist() for shard in shards]
    assert [len(out) for out in taken] == [0, 0]


def test_an_agent_keeps_something_to_train_on():
    shards = [np.arange(10), np.array([10])]
    labels = np.zeros(11, int)
    left, taken = set_aside(shards, labels, 0.3, seed=[0])
    assert [len(shard) for shard in left] == [7, 1]
    assert [len(out) for out in taken] == [3, 0]
    with pytest.raises(PartitionError, match="is 11, but there are only 11 samples"):
        set_aside(shards, labels, 11, seed=[0])


@pytest.mark.parametrize("name", ["dirichlet", "quantity_skew"])
@given(
    labels=labels_of, n_agents=st.integers(1, 8), seed=seeds, least=st.integers(1, 12)
)
def test_no_agent_gets_fewer_samples_than_it_has_to(
    name, labels, n_agents, seed, least
):
    options = {"seed": seed, "alpha": 0.1}
    if n_agents > len(labels):
        return
    if least > 1 and least * n_agents > len(labels):
        with pytest.raises(PartitionError, match=f"{least}, but {len(labels)} samples"):
            partition(name, labels, n_agents, min_samples=least, **options)
        return
    shards = partition(name, labels, n_agents, min_samples=least, **options)
    assert min(map(len, shards)) >= least
    np.testing.assert_array_equal(
        np.sort(np.concatenate(shards)), np.arange(len(labels))
    )
    free = partition(name, labels, n_agents, **options)
    for shard, other in zip(shards, free, strict=True):
        if len(other) < least:  # It keeps what it had, and is filled up.
            assert len(shard) == least and set(other) <= set(shard)
        else:  # Others lose samples, and get none.
            assert set(shard) <= set(other)


def test_the_largest_shards_give_samples_at_random():
    labels = np.repeat([0, 1], 500)
    options = {"seed": 0, "alpha": 0.05}
    free = partition("quantity_skew", labels, 10, **options)
    filled = partition("quantity_skew", labels, 10, min_samples=40, **options)
    given = [
        np.setdiff1d(a, b) for a, b in zip(free, filled, strict=True) if len(a) > len(b)
    ]
    assert sum(map(len, given)) >= 100
    # The samples that move are of both classes.
    moved = labels[np.concatenate(given)]
    assert 0.3 < moved.mean() < 0.7
    with pytest.raises(OptionError, match="min_samples is 0; it must be at least 1"):
        partition("dirichlet", labels, 4, seed=0, min_samples=0)
