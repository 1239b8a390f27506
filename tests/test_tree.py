from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat_jax import tree


class Pair(NamedTuple):
    first: Any
    second: Any


@flax.struct.dataclass
class Layer:
    """A layer whose leaves are attributes, as those of an Equinox module."""

    weight: Any
    bias: Any


@pytest.mark.parametrize(
    ("nested", "paths"),
    [
        ({"params": {"Conv_0": {"kernel": 1}}}, ["params/Conv_0/kernel"]),
        ({"layers": [1, (2, 3)]}, ["layers/0", "layers/1/0", "layers/1/1"]),
        (Pair({"a": 1}, [2]), ["first/a", "second/0"]),
        ([Layer(1, 2)], ["0/weight", "0/bias"]),
        (
            {"layers": {0: 1, 1: Layer(2, 3)}},
            ["layers/0", "layers/1/weight", "layers/1/bias"],
        ),
        ({"none": None, "b": 1}, ["b"]),
        (1, [""]),
    ],
)
def test_a_path_joins_keys_indices_fields_and_attributes(nested, paths):
    assert list(tree.flatten(nested)) == paths


def test_paths_reach_into_optax_states():
    state = optax.chain(optax.clip(1.0), optax.adam(1e-3)).init({"w": jnp.ones(2)})
    assert list(tree.flatten(state)) == ["1/0/count", "1/0/mu/w", "1/0/nu/w"]


def test_flatten_keeps_the_order_of_the_leaves():
    nested = {"b": [1, {"z": 2, "a": 3}], "a": Pair(4, 5)}
    assert list(tree.flatten(nested).values()) == jax.tree.leaves(nested)


def test_map_with_path_gives_the_path_and_all_leaves():
    first, second = {"a": [1, 2], "b": 3}, {"a": [10, 20], "b": 30}
    mapped = tree.map_with_path(lambda path, x, y: (path, x + y), first, second)
    assert mapped == {"a": [("a/0", 11), ("a/1", 22)], "b": ("b", 33)}


shapes = st.sampled_from([(), (2,), (2, 3), (0,)])
dtypes = st.sampled_from([np.float32, np.int32, np.bool_])


@settings(max_examples=30)
@given(size=st.integers(1, 4), shape=shapes, dtype=dtypes, seed=st.integers(0, 99))
def test_stack_and_unstack_are_inverse(size, shape, dtype, seed):
    rng = np.random.default_rng(seed)
    trees = [
        {"a": Pair(rng.normal(size=shape).astype(dtype), [rng.integers(9, size=2)])}
        for _ in range(size)
    ]
    stacked = tree.stack(trees)
    assert stacked["a"].first.shape == (size, *shape)
    assert stacked["a"].first.dtype == dtype
    again = tree.unstack(stacked)
    assert len(again) == size
    for one, other in zip(trees, again, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_unstack_refuses_leaves_that_disagree_on_how_many_there_are():
    with pytest.raises(ValueError):
        tree.unstack({"a": jnp.zeros((2, 3)), "b": jnp.zeros((3, 2))})


def test_take_indexes_the_leading_axis():
    stacked = {"a": np.arange(6).reshape(3, 2), "b": np.arange(3)}
    assert tree.take(stacked, 1)["b"] == 1
    taken = tree.take(stacked, np.array([2, 0]))
    np.testing.assert_array_equal(taken["a"], [[4, 5], [0, 1]])
    np.testing.assert_array_equal(taken["b"], [2, 0])


@pytest.mark.parametrize(
    ("leaf", "expected"),
    [
        (np.float32(1), True),
        (np.float64(1), True),
        (jnp.zeros(2, jnp.bfloat16), True),
        (jnp.zeros(2, jnp.complex64), True),
        (1.5, True),
        (np.int32(1), False),
        (jnp.zeros(2, bool), False),
        (3, False),
        (jax.random.key(0), False),
        (jax.ShapeDtypeStruct((2,), jnp.float32), True),
    ],
)
def test_only_real_and_complex_numbers_are_inexact(leaf, expected):
    assert tree.is_inexact(leaf) is expected


def test_nbytes_adds_up_what_the_leaves_hold():
    arrays = {
        "a": np.zeros((3, 4), np.float32),
        "b": [jnp.zeros(5, jnp.bfloat16), np.zeros((), np.int8)],
        "empty": np.zeros((0, 7)),
    }
    assert tree.nbytes(arrays) == 3 * 4 * 4 + 5 * 2 + 1
    assert tree.nbytes({}) == 0


def test_nbytes_is_an_exact_python_int_beyond_every_fixed_width():
    huge = [
        jax.ShapeDtypeStruct((2**31,), jnp.float32),
        jax.ShapeDtypeStruct((2**40, 2**40), jnp.bfloat16),
        jax.ShapeDtypeStruct((3,), jnp.int8),
    ]
    counted = tree.nbytes(huge)
    assert type(counted) is int
    assert counted == 2**33 + 2**81 + 3
