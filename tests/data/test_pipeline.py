from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dimat_jax.data import pipeline
from dimat_jax.data.pipeline import (
    Augmentation,
    Pool,
    Reader,
    Sampler,
    Samples,
    chunked,
    draw_own,
    load,
    place_pool,
)
from dimat_jax.data.sources import Split
from dimat_jax.options import OptionError
from dimat_jax.placement import Placement, place

# The shards have different sizes and no index in common, as those of a partition.
shards_of = st.lists(st.integers(1, 20), min_size=1, max_size=4).map(
    lambda sizes: np.split(
        np.random.default_rng(sum(sizes)).permutation(sum(sizes)), np.cumsum(sizes)[:-1]
    )
)
batch_sizes = st.integers(1, 8)


# Sampler


def epoch_of(sampler: Sampler, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices and the mask of a whole epoch, both `[agents, steps, batch]`."""
    first = epoch * sampler.steps_per_epoch
    batches = [sampler.batch(first + i) for i in range(sampler.steps_per_epoch)]
    indices, mask = zip(*batches, strict=True)
    return np.stack(indices, axis=1), np.stack(mask, axis=1)


both_choices = pytest.mark.parametrize("small_shards", ["repeat", "idle"])


@both_choices
@given(shards=shards_of, batch_size=batch_sizes, epoch=st.integers(0, 3))
def test_an_epoch_has_the_steps_of_the_largest_shard_whose_agent_sees_it_all(
    small_shards, shards, batch_size, epoch
):
    sampler = Sampler(shards, batch_size, [0], small_shards)
    assert sampler.steps_per_epoch == -(-max(map(len, shards)) // batch_size)
    indices, mask = epoch_of(sampler, epoch)
    assert indices.dtype == np.int32 and mask.dtype == np.bool_
    assert indices.shape == mask.shape
    assert indices.shape == (len(shards), sampler.steps_per_epoch, batch_size)
    largest = max(range(len(shards)), key=lambda agent: len(shards[agent]))
    seen = indices[largest].ravel()[: len(shards[largest])]
    np.testing.assert_array_equal(np.sort(seen), np.sort(shards[largest]))
    for shard, own in zip(shards, indices, strict=True):
        # The indices that fill up batches are never those of another agent.
        assert np.isin(own, shard).all()


@given(shards=shards_of, batch_size=batch_sizes, epoch=st.integers(0, 3))
def test_small_shards_go_round_again_and_every_batch_is_full(shards, batch_size, epoch):
    indices, mask = epoch_of(Sampler(shards, batch_size, seed=[0]), epoch)
    assert mask.all()
    for shard, own in zip(shards, indices.reshape(len(shards), -1), strict=True):
        whole = len(own) // len(shard) * len(shard)
        for turn in own[:whole].reshape(-1, len(shard)):
            np.testing.assert_array_equal(np.sort(turn), np.sort(shard))
        assert len(np.unique(own[whole:])) == len(own) - whole


def test_each_turn_has_an_order_of_its_own_and_what_is_seen_once_more_is_random():
    sampler = Sampler([np.arange(11), np.arange(11, 71)], 10, seed=[0])
    epochs = [epoch_of(sampler, epoch)[0][0].ravel() for epoch in range(2000)]
    first, starts = epochs[:99], range(0, 55, 11)
    turns = {tuple(epoch[i : i + 11]) for epoch in first for i in starts}
    assert len(turns) == 5 * len(first)
    # 60 places are 5 turns and 5 examples more, so an example is seen 60 / 11 times.
    times = np.bincount(np.concatenate(epochs), minlength=11) / len(epochs)
    deviation = np.sqrt(5 / 11 * 6 / 11 / len(epochs))
    np.testing.assert_allclose(times, 60 / 11, atol=5 * deviation)


@given(n=st.integers(1, 20), batches=st.integers(1, 4), epoch=st.integers(0, 3))
def test_equal_shards_that_fill_their_batches_are_seen_alike_by_both(n, batches, epoch):
    shards = np.split(np.arange(3 * n * batches), 3)
    repeat, idle = (
        epoch_of(Sampler(shards, n, [4], choice), epoch)
        for choice in ("repeat", "idle")
    )
    for x, y in zip(repeat, idle, strict=True):
        np.testing.assert_array_equal(x, y)


@given(shards=shards_of, batch_size=batch_sizes)
def test_agents_with_small_shards_may_idle(shards, batch_size):
    indices, mask = epoch_of(Sampler(shards, batch_size, [0], "idle"), 0)
    for shard, own, seen in zip(shards, indices, mask, strict=True):
        np.testing.assert_array_equal(np.sort(own[seen]), np.sort(shard))
        in_order = np.arange(seen.size) < len(shard)
        np.testing.assert_array_equal(seen.ravel(), in_order)
        busy = seen.any(axis=1)
        assert busy.sum() == -(-len(shard) // batch_size)


def test_a_choice_for_small_shards_that_does_not_exist_is_refused():
    with pytest.raises(OptionError, match="small_shards is 'drop'; allowed: "):
        Sampler([np.arange(3)], 1, [0], "drop")


@given(
    shards=shards_of,
    batch_size=batch_sizes,
    steps=st.lists(st.integers(0, 40), min_size=1, max_size=10),
)
def test_a_batch_is_a_function_of_seed_and_step_alone(shards, batch_size, steps):
    sampler = Sampler(shards, batch_size, seed=[7, 1])
    for step in steps:
        fresh = Sampler(shards, batch_size, seed=[7, 1])
        for x, y in zip(sampler.batch(step), fresh.batch(step), strict=True):
            np.testing.assert_array_equal(x, y)


def test_orders_differ_by_agent_epoch_and_seed():
    shard = np.arange(50)
    sampler = Sampler([shard, shard], 50, seed=[0])
    other = Sampler([shard, shard], 50, seed=[1])
    orders = [
        s.batch(epoch)[0][a]
        for s in (sampler, other)
        for epoch in (0, 1, 2)
        for a in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert not any(np.array_equal(order, shard) for order in orders)


def test_a_batch_must_hold_an_example():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Sampler([np.arange(3)], 0, seed=[0])


def test_numpys_global_state_is_left_alone():
    np.random.seed(0)
    Sampler([np.arange(9)], 2, seed=[0]).batch(3)
    draw_own([np.arange(9)], 3, seed=[0])
    drawn = np.random.random()
    np.random.seed(0)
    assert drawn == np.random.random()


# Chunks


def test_chunks_are_filled_up_with_masked_copies_of_the_first():
    indices, mask = chunked(np.array([5, 6, 7, 8, 9]), 3)
    np.testing.assert_array_equal(indices, [[5, 6, 7], [8, 9, 5]])
    np.testing.assert_array_equal(mask, [[True] * 3, [True, True, False]])
    assert indices.dtype == np.int32 and mask.dtype == np.bool_


def test_chunks_that_fit_are_not_filled_up():
    indices, mask = chunked(np.arange(6), 3)
    np.testing.assert_array_equal(indices, [[0, 1, 2], [3, 4, 5]])
    assert mask.all()


def test_more_batches_than_it_takes_are_all_masked():
    indices, mask = chunked(np.array([4, 2]), 2, n_batches=3)
    np.testing.assert_array_equal(indices, [[4, 2], [4, 4], [4, 4]])
    np.testing.assert_array_equal(mask.sum(axis=1), [2, 0, 0])


def test_fewer_batches_than_it_takes_are_an_error():
    with pytest.raises(ValueError):
        chunked(np.arange(5), 2, n_batches=2)


# Reading

MEAN, STD = np.array([100.0, 50.0]), np.array([40.0, 20.0])


def random_split(size: int = 12, height: int = 5, width: int = 4) -> Split:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (size, height, width, 2), dtype=np.uint8)
    return Split(images, rng.integers(10, size=size).astype(np.int32))


SPLIT = random_split()


def normalised(images: np.ndarray) -> np.ndarray:
    return (images.astype(np.float32) - np.float32(MEAN)) / np.float32(STD)


@pytest.fixture
def placement() -> Placement:
    return place(3, jax.devices()[:1])


@pytest.fixture
def pool(placement) -> Pool:
    return place_pool(SPLIT, MEAN, STD, placement)


def assert_examples(batch: Any, indices: Any, mask: Any) -> None:
    """Asserts that a batch holds these examples of SPLIT wherever its mask is True."""
    assert batch.inputs.dtype == jnp.float32 and batch.labels.dtype == jnp.int32
    np.testing.assert_array_equal(batch.mask, mask)
    kept, indices = np.asarray(mask), np.asarray(indices)[np.asarray(mask)]
    np.testing.assert_allclose(
        np.asarray(batch.inputs)[kept], normalised(SPLIT.images[indices]), rtol=1e-6
    )
    np.testing.assert_array_equal(np.asarray(batch.labels)[kept], SPLIT.labels[indices])


def test_a_pool_keeps_pixels_as_they_are_stored(pool):
    assert pool.images.dtype == jnp.uint8
    np.testing.assert_array_equal(pool.images, SPLIT.images)
    np.testing.assert_array_equal(pool.labels, SPLIT.labels)
    assert pool.mean.dtype == pool.std.dtype == jnp.float32


def test_load_normalises_with_the_pools_mean_and_deviation(pool):
    indices, mask = np.array([3, 0, 3]), np.array([True, True, False])
    batch = jax.jit(load)(pool, indices, mask)
    assert batch.inputs.shape == (3, 5, 4, 2)
    np.testing.assert_allclose(
        batch.inputs, normalised(SPLIT.images[indices]), rtol=1e-6
    )
    assert_examples(batch, indices, mask)


def test_shared_samples_are_the_same_for_everyone(placement, pool):
    indices = np.array([9, 1, 5, 0, 11])
    samples = Reader(pool, placement).shared(indices, batch_size=2)
    assert samples.shared
    batches = list(samples)
    assert [batch.inputs.shape for batch in batches] == [(2, 5, 4, 2)] * 3
    assert_examples(batches[0], [9, 1], [True, True])
    assert_examples(batches[1], [5, 0], [True, True])
    assert_examples(batches[2], [11, 9], [True, False])


def test_own_samples_are_ragged_and_masked(placement, pool):
    own = [np.array([7]), np.array([1, 2, 3, 4, 5]), np.array([10, 11])]
    samples = Reader(pool, placement).own(own, batch_size=2)
    assert not samples.shared
    batches = list(samples)
    assert [batch.inputs.shape for batch in batches] == [(3, 2, 5, 4, 2)] * 3
    for agent, indices in enumerate(own):
        mask = np.stack([batch.mask[agent] for batch in batches])
        np.testing.assert_array_equal(mask.ravel(), np.arange(6) < len(indices))
        inputs = np.stack([batch.inputs[agent] for batch in batches])
        labels = np.stack([batch.labels[agent] for batch in batches])
        np.testing.assert_allclose(
            inputs[mask], normalised(SPLIT.images[indices]), rtol=1e-6
        )
        np.testing.assert_array_equal(labels[mask], SPLIT.labels[indices])


def test_own_samples_fill_all_slots(pool):
    if jax.device_count() < 2:
        pytest.skip("one device has a slot for each agent")
    placement = place(3, jax.devices()[:2])
    on_both = place_pool(SPLIT, MEAN, STD, placement)
    own = [np.array([0, 1]), np.array([2]), np.array([3])]
    (batch,) = Reader(on_both, placement).own(own, batch_size=2)
    assert batch.inputs.shape == (4, 2, 5, 4, 2)
    assert_examples(
        jax.tree.map(lambda x: x[:3], batch),
        [[0, 1], [2, 2], [3, 3]],
        [[True, True], [True, False], [True, False]],
    )


def test_agents_share_out_the_batches_of_shared_samples(placement, pool):
    """Five examples are three batches for three agents, each of which gets one."""
    reader = Reader(pool, placement)
    samples = reader.shared(np.array([9, 1, 5, 0, 11]), batch_size=2).divided(3)
    assert not samples.shared
    (batch,) = samples
    assert_examples(
        batch,
        [[9, 1], [5, 0], [11, 9]],
        [[True, True], [True, True], [True, False]],
    )
    # Other batches are smaller, and here the last agent gets none in the second turn.
    samples = reader.shared(np.array([9, 1, 5, 0, 11]), batch_size=2).divided(3, 1)
    first, second = samples
    assert_examples(first, [[9], [1], [5]], [[True]] * 3)
    assert_examples(second, [[0], [11], [9]], [[True], [True], [False]])


def test_examples_of_each_agents_own_cannot_be_divided(placement, pool):
    own = Reader(pool, placement).own([np.arange(2)] * 3, batch_size=2)
    with pytest.raises(ValueError, match="only examples of a pool that agents share"):
        own.divided(3)


@pytest.mark.parametrize("shared", [True, False])
def test_samples_can_be_passed_over_again(placement, pool, shared):
    reader = Reader(pool, placement)
    samples = (
        reader.shared(np.arange(5), 2)
        if shared
        else reader.own([np.arange(5), np.arange(2), np.arange(3)], 2)
    )
    first, second = list(samples), list(samples)
    assert len(first) == 3
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_reader_compiles_once_however_many_samples_it_makes(
    placement, pool, monkeypatch
):
    traces = []

    def counted(*arguments):
        traces.append(arguments)
        return load(*arguments)

    monkeypatch.setattr(pipeline, "load", counted)
    reader = Reader(pool, placement)

    def read_all():
        for size in (2, 5):
            list(reader.shared(np.arange(size), 2))
            list(reader.own([np.arange(size)] * 3, 2))

    read_all()
    once = len(traces)
    # The shared program is traced once, and so is what one agent does in the other.
    assert once == 2
    read_all()
    assert len(traces) == once


# Augmentation: an image of which no two windows, mirrored or not, are alike


def augmented(
    images: np.ndarray, augmentation: Augmentation, seed: int = 0
) -> np.ndarray:
    """The pixels as `load` augments them, without normalisation."""
    channels = images.shape[-1]
    pool = Pool(
        jnp.asarray(images),
        jnp.zeros(len(images), jnp.int32),
        jnp.zeros(channels),
        jnp.ones(channels),
    )
    read = jax.jit(load, static_argnames="augmentation")
    mask = np.ones(len(images), bool)
    key = jax.random.key(seed)
    batch = read(pool, np.arange(len(images)), mask, key, augmentation=augmentation)
    assert batch.inputs.shape == images.shape
    assert batch.inputs.dtype == jnp.float32
    return np.asarray(batch.inputs)


def windows(image: np.ndarray, augmentation: Augmentation) -> dict[tuple, np.ndarray]:
    """All images that augmentation can make of an image, by (mirrored, row, column)."""
    height, width, _ = image.shape
    pad = augmentation.pad
    found = {}
    for mirrored in (False, True) if augmentation.flip else (False,):
        source = image[:, ::-1] if mirrored else image
        padded = np.pad(source, ((pad, pad), (pad, pad), (0, 0)))
        for row in range(2 * pad + 1):
            for column in range(2 * pad + 1):
                window = padded[row : row + height, column : column + width]
                found[mirrored, row - pad, column - pad] = window
    return found


def drawn(images: np.ndarray, augmentation: Augmentation, seed: int = 0) -> list[tuple]:
    """Finds the window that each image has become. Exactly one window has to match."""
    result = []
    for image, outcome in zip(
        images, augmented(images, augmentation, seed), strict=True
    ):
        matches = [
            what
            for what, window in windows(image, augmentation).items()
            if np.array_equal(window, outcome)
        ]
        assert len(matches) == 1, matches
        result += matches
    return result


def distinct_images(size: int, height: int = 6, width: int = 5) -> np.ndarray:
    rng = np.random.default_rng(1)
    # The image has no black pixel, so that black pixels are those from outside.
    return rng.integers(1, 256, (size, height, width, 3), dtype=np.uint8)


def test_without_a_key_nothing_is_augmented(pool):
    indices, mask = jnp.arange(4), jnp.ones(4, bool)
    batch = load(pool, indices, mask, None, Augmentation(flip=True, pad=2))
    assert_examples(batch, indices, mask)


def test_by_default_a_key_changes_nothing(pool):
    indices, mask = jnp.arange(4), jnp.ones(4, bool)
    assert_examples(load(pool, indices, mask, jax.random.key(0)), indices, mask)


def test_a_flip_mirrors_left_and_right_with_probability_one_half():
    images = distinct_images(400)
    mirrored = [what for what, _, _ in drawn(images, Augmentation(flip=True))]
    # The tolerance is five standard deviations.
    assert abs(np.mean(mirrored) - 0.5) < 5 * 0.5 / np.sqrt(400)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("pad", [1, 2])
def test_a_crop_is_any_window_of_the_image_padded_with_black(flip, pad):
    augmentation = Augmentation(flip=flip, pad=pad)
    images = distinct_images(600)
    outcomes = drawn(images, augmentation)
    possible = windows(images[0], augmentation).keys()
    counts = np.array([outcomes.count(what) for what in possible])
    expected = len(images) / len(counts)
    # All windows are equally frequent: chi squared lies within 5 standard deviations.
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), len(counts) - 1
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)
    # Rows and columns are drawn independently of each other.
    rows, columns = np.array([what[1:] for what in outcomes]).T
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 5 / np.sqrt(len(images))


def test_a_pad_may_be_larger_than_the_image():
    images = distinct_images(50, height=2, width=3)
    outcomes = augmented(images, Augmentation(pad=4))
    possible = [windows(image, Augmentation(pad=4)).values() for image in images]
    for outcome, ones in zip(outcomes, possible, strict=True):
        assert any(np.array_equal(outcome, window) for window in ones)
    assert any(not outcome.any() for outcome in outcomes)


def test_every_example_is_augmented_in_its_own_way():
    images = np.repeat(distinct_images(1), 64, axis=0)
    outcomes = drawn(images, Augmentation(flip=True, pad=2))
    assert len(set(outcomes)) > 20


def test_the_key_decides():
    images, augmentation = distinct_images(40), Augmentation(flip=True, pad=2)
    assert drawn(images, augmentation, 0) == drawn(images, augmentation, 0)
    assert drawn(images, augmentation, 0) != drawn(images, augmentation, 1)


def test_black_pixels_are_normalised_like_any_other(pool):
    images = np.full((64, 3, 3, 1), 200, np.uint8)
    pool = Pool(
        jnp.asarray(images),
        jnp.zeros(64, jnp.int32),
        mean=jnp.array([100.0]),
        std=jnp.array([50.0]),
    )
    indices, mask = jnp.arange(64), jnp.ones(64, bool)
    batch = load(pool, indices, mask, jax.random.key(0), Augmentation(pad=1))
    np.testing.assert_array_equal(np.unique(np.asarray(batch.inputs)), [-2, 2])


def test_augmenting_agents_together_is_augmenting_each_alone():
    images, augmentation = distinct_images(12), Augmentation(flip=True, pad=2)
    keys = jax.random.split(jax.random.key(0), 3)
    alone = [
        pipeline._augment(jnp.asarray(own), augmentation, key)
        for own, key in zip(np.split(images, 3), keys, strict=True)
    ]
    together = jax.vmap(lambda x, key: pipeline._augment(x, augmentation, key))(
        jnp.asarray(images).reshape(3, 4, *images.shape[1:]), keys
    )
    np.testing.assert_array_equal(together, np.stack(alone))


# Drawing


@given(
    shards=shards_of,
    size=st.integers(0, 25),
    seed=st.lists(st.integers(0, 9), min_size=1, max_size=2),
)
def test_as_many_are_drawn_as_there_are_and_none_twice(shards, size, seed):
    parts = draw_own(shards, size, seed)
    assert len(parts) == len(shards)
    for part, shard in zip(parts, shards, strict=True):
        assert len(part) == min(size or len(shard), len(shard))
        assert len(np.unique(part)) == len(part)
        assert np.isin(part, shard).all()


def test_what_is_drawn_depends_on_seed_and_agent_alone():
    shard = np.arange(100)
    first, second, third = draw_own([shard] * 3, 20, [0])
    np.testing.assert_array_equal(draw_own([shard], 20, [0])[0], first)
    other = draw_own([shard], 20, [1])[0]
    drawn = [tuple(part) for part in (first, second, third, other)]
    assert len(set(drawn)) == 4


def test_examples_of_the_first_batches_are_counted_without_what_fills_them_up():
    def unread(indices, mask):
        raise AssertionError("counting reads no batch")

    shared = Samples(unread, *chunked(np.arange(7), 3), shared=True)
    assert [shared.n_examples(n) for n in range(4)] == [0, 3, 6, 7]
    chunks = [chunked(np.arange(n), 3, 2) for n in (6, 1)]
    indices, mask = (np.stack(x, axis=1) for x in zip(*chunks, strict=True))
    own = Samples(unread, indices, mask, shared=False)
    assert [own.n_examples(n) for n in range(3)] == [0, 2, 3.5]
