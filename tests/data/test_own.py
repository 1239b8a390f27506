"""Every device holds the images of its own agents, and reads their batches there."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat_jax.data._own import Holdings, OwnReader, load_own, place_own_pool
from dimat_jax.data.pipeline import Augmentation, Reader, place_pool
from dimat_jax.data.sources import Split
from dimat_jax.placement import place

MEAN, STD = np.array([100.0, 50.0]), np.array([40.0, 20.0])
N_IMAGES = 40
RNG = np.random.default_rng(0)
SPLIT = Split(
    RNG.integers(0, 256, (N_IMAGES, 5, 4, 2), dtype=np.uint8),
    RNG.integers(10, size=N_IMAGES).astype(np.int32),
)
# Five agents with shards of unequal sizes, in no order.
SHARDS = np.split(RNG.permutation(N_IMAGES), [3, 15, 16, 30])
OTHERS = np.split(RNG.permutation(N_IMAGES), [8, 16, 24, 32])


def test_a_device_holds_what_its_agents_own_in_any_phase():
    placement = place(5, jax.devices()[:2])
    holdings = Holdings(SHARDS, OTHERS, placement=placement)
    for held, agents in zip(holdings.of_device, ([0, 1, 2], [3, 4]), strict=True):
        owned = [shards[a] for shards in (SHARDS, OTHERS) for a in agents]
        assert held.tolist() == sorted(set(np.concatenate(owned).tolist()))
    pool = place_own_pool(SPLIT, MEAN, STD, holdings)
    assert pool.images.dtype == np.uint8
    for shard in pool.images.addressable_shards:
        held = holdings.of_device[shard.index[0].start]
        assert shard.data.shape == (1, holdings.most, 5, 4, 2)
        np.testing.assert_array_equal(shard.data[0, : len(held)], SPLIT.images[held])
        assert not np.asarray(shard.data[0, len(held) :]).any()


def test_one_device_holds_the_split_as_it_is():
    holdings = Holdings(SHARDS, placement=place(5, jax.devices()[:1]))
    assert holdings.of_device[0].tolist() == list(range(N_IMAGES))
    for rows, shard in zip(holdings.rows(SHARDS), SHARDS, strict=True):
        np.testing.assert_array_equal(rows, shard)


@settings(max_examples=20)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    n_devices=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_rows_lead_to_the_images_of_the_shard(sizes, n_devices, seed):
    order = np.random.default_rng(seed).permutation(sum(sizes))
    shards = np.split(order, np.cumsum(sizes)[:-1])
    placement = place(len(sizes), jax.devices()[:n_devices])
    holdings = Holdings(shards, placement=placement)
    n_local = placement.slots // placement.mesh.size
    for agent, rows in enumerate(holdings.rows(shards)):
        held = holdings.of_device[agent // n_local]
        np.testing.assert_array_equal(held[rows], shards[agent])


@pytest.mark.parametrize("n_devices", [1, 2, 5])
def test_agents_read_the_same_from_their_device_as_from_all_images(n_devices):
    placement = place(5, jax.devices()[:n_devices])
    whole = Reader(place_pool(SPLIT, MEAN, STD, placement), placement)
    holdings = Holdings(SHARDS, placement=placement)
    own = OwnReader(place_own_pool(SPLIT, MEAN, STD, holdings), placement)
    ours, theirs = own(holdings.rows(SHARDS), 4), whole.own(SHARDS, 4)
    assert not ours.shared and ours.indices.shape == theirs.indices.shape
    for batch, expected in zip(ours, theirs, strict=True):
        for leaf, other in zip(batch, expected, strict=True):
            assert leaf.dtype == other.dtype
            np.testing.assert_array_equal(leaf[:5], other[:5])
        # Copies of agents may see other images, but only finite ones.
        assert np.isfinite(batch.inputs).all()


def test_augmentation_depends_on_the_agents_keys_alone():
    def read(n_devices):
        placement = place(5, jax.devices()[:n_devices], "vmap")
        holdings = Holdings(SHARDS, placement=placement)
        pool = place_own_pool(SPLIT, MEAN, STD, holdings)
        rows = np.stack([rows[[0, 0, 0]] for rows in holdings.rows(SHARDS)])
        indices = placement.put(rows.astype(np.int32))
        mask = placement.put(np.ones((5, 3), bool))
        augmentation = Augmentation(flip=True, pad=2)

        @jax.jit
        def batch(pool, indices, mask):
            keys = placement.keys(jax.random.key(0))
            return load_own(placement, pool, indices, mask, keys, augmentation)

        # Pixels are whole numbers, whatever rounding has done to the inputs.
        return np.rint(np.asarray(batch(pool, indices, mask).inputs)[:5] * STD + MEAN)

    one = read(1)
    np.testing.assert_array_equal(read(2), one)
    assert (one[:, 0] != one[:, 1]).any()
