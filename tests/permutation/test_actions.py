"""Tests that permutations act as a group, on every kind of axis."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat_jax import permutation
from dimat_jax.permutation import (
    Axis,
    Concat,
    Perms,
    PermutationSpec,
    PermutationSpecError,
    Product,
)
from dimat_jax.tree import stack, take

GROUPS = {"a": 2, "b": 3, "c": 4}
# The size of the factor None of a Product.
OPEN = 2


def length(axis: Axis, fixed: int = 3) -> int:
    match axis:
        case str():
            return GROUPS[axis]
        case Product(factors):
            return int(np.prod([factor_length(f) for f in factors]))
        case Concat(parts):
            return sum(size for _, size in parts)
        case _:
            return fixed


def factor_length(factor: None | int | str) -> int:
    if factor is None:
        return OPEN
    return GROUPS[factor] if isinstance(factor, str) else factor


def sources(axis: Axis, size: int, perms: Mapping[str, Any]) -> list[int]:
    """Computes from which index each index of an axis comes, by the definition."""
    match axis:
        case str():
            return [int(unit) for unit in perms[axis]]
        case Product(factors):
            shape = [factor_length(factor) for factor in factors]
            result = []
            for index in np.ndindex(*shape):
                source = 0
                for i, factor, n in zip(index, factors, shape, strict=True):
                    unit = int(perms[factor][i]) if isinstance(factor, str) else i
                    source = source * n + unit
                result.append(source)
            return result
        case Concat(parts):
            result, offset = [], 0
            for part, part_size in parts:
                result += [offset + s for s in sources(part, part_size, perms)]
                offset += part_size
            return result
        case _:
            return list(range(size))


def permuted_by_loop(
    axes: tuple[Axis, ...], perms: Mapping[str, Any], leaf: np.ndarray
) -> np.ndarray:
    tables = [sources(a, n, perms) for a, n in zip(axes, leaf.shape, strict=True)]
    result = np.empty_like(leaf)
    for index in np.ndindex(*leaf.shape):
        result[index] = leaf[tuple(t[i] for t, i in zip(tables, index, strict=True))]
    return result


groups = st.sampled_from(sorted(GROUPS))
products = st.one_of(
    st.lists(st.one_of(groups, st.just(2)), min_size=1, max_size=2),
    st.permutations([None, "a"]),
    st.permutations([None, "b", 2]),
).map(lambda factors: Product(*factors))
plain_axes = st.one_of(st.none(), groups, products)


def concatenations(parts: st.SearchStrategy[Axis]) -> st.SearchStrategy[Concat]:
    return st.lists(parts.map(lambda a: (a, length(a))), min_size=1, max_size=3).map(
        lambda parts: Concat(*parts)
    )


axes_of_any_kind = st.one_of(
    plain_axes,
    concatenations(plain_axes),
    concatenations(st.one_of(plain_axes, concatenations(groups))),
)


class Case(NamedTuple):
    spec: PermutationSpec
    variables: dict[str, np.ndarray]
    perms: list[dict[str, Any]]


@st.composite
def cases(draw, n_perms: int = 1) -> Case:
    axes = {f"sizes/{group}": (group,) for group in GROUPS}
    leaves = draw(
        st.lists(st.lists(axes_of_any_kind, max_size=2), min_size=1, max_size=3)
    )
    axes |= {f"leaf{i}": tuple(leaf) for i, leaf in enumerate(leaves)}
    # All entries differ, so that the tests notice an entry in a wrong place.
    variables = {
        leaf: np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        for leaf, shape in (
            (leaf, [length(axis) for axis in axes[leaf]]) for leaf in axes
        )
    }
    spec = PermutationSpec(axes)
    perms = [
        {g: np.array(draw(st.permutations(range(n))), np.int32) for g, n in sizes}
        for sizes in [GROUPS.items()] * n_perms
    ]
    return Case(spec, variables, perms)


def assert_same(tree: Any, other: Any) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for leaf, expected in zip(*map(jax.tree.leaves, (tree, other)), strict=True):
        assert leaf.dtype == expected.dtype
        np.testing.assert_array_equal(leaf, expected)


# The group action =====================================================================


@given(case=cases())
@settings(max_examples=40)
def test_apply_permutes_as_the_definition_says(case):
    spec, variables, (perms,) = case
    permutation.validate(spec, variables)
    expected = {
        leaf: permuted_by_loop(spec.axes[leaf], perms, array)
        for leaf, array in variables.items()
    }
    assert_same(permutation.apply(spec, perms, variables), expected)


@given(case=cases())
@settings(max_examples=15)
def test_the_identity_leaves_everything_where_it_is(case):
    spec, variables, _ = case
    identity = permutation.identity(spec, variables)
    assert_same(permutation.apply(spec, identity, variables), variables)


@given(case=cases(n_perms=2))
@settings(max_examples=25)
def test_applying_a_composition_is_applying_one_after_the_other(case):
    spec, variables, (first, then) = case
    at_once = permutation.apply(spec, permutation.compose(first, then), variables)
    in_turn = permutation.apply(spec, then, permutation.apply(spec, first, variables))
    assert_same(at_once, in_turn)


@given(case=cases())
@settings(max_examples=25)
def test_the_inverse_undoes(case):
    spec, variables, (perms,) = case
    inverse = permutation.invert(perms)
    there = permutation.apply(spec, perms, variables)
    assert_same(permutation.apply(spec, inverse, there), variables)
    identity = permutation.identity(spec, variables)
    assert_same(permutation.compose(perms, inverse), identity)
    assert_same(permutation.compose(inverse, perms), identity)


@given(case=cases(n_perms=3))
@settings(max_examples=10)
def test_composition_is_associative_and_has_the_identity(case):
    spec, variables, (a, b, c) = case
    compose, identity = permutation.compose, permutation.identity(spec, variables)
    assert_same(compose(compose(a, b), c), compose(a, compose(b, c)))
    assert_same(compose(a, identity), a)
    assert_same(compose(identity, a), a)


def test_the_convention_is_take_and_compose_indexes_first_with_then():
    spec = PermutationSpec({"weight": (None, "units")})
    weight = jnp.arange(6.0).reshape(2, 3)
    first = {"units": jnp.array([1, 2, 0], jnp.int32)}
    then = {"units": jnp.array([0, 2, 1], jnp.int32)}
    permuted = permutation.apply(spec, first, {"weight": weight})["weight"]
    np.testing.assert_array_equal(permuted, jnp.take(weight, first["units"], axis=1))
    np.testing.assert_array_equal(permuted, [[1, 2, 0], [4, 5, 3]])
    composed = permutation.compose(first, then)["units"]
    np.testing.assert_array_equal(composed, [1, 0, 2])  # first[then[u]]
    np.testing.assert_array_equal(permutation.invert(first)["units"], [2, 0, 1])


# One spec with every kind of axis =====================================================

SPEC = PermutationSpec(
    {
        "kernel": (None, None, "a", "b"),
        "dense": (Product(None, "b"), "c"),
        "joined": (Concat(("b", 3), (Product(2, "a"), 4), (None, 1)),),
        "step": (),
        "scale": ("c",),
    }
)
VARIABLES = {
    "kernel": np.arange(36, dtype=np.float32).reshape(3, 2, 2, 3),
    "dense": np.arange(24).astype(jnp.bfloat16).reshape(6, 4),
    "joined": np.arange(8, dtype=np.float32),
    "step": np.int32(7),
    "scale": np.arange(4, dtype=np.int32),
}


def some_perms(seed: int) -> Perms:
    return permutation.random(SPEC, VARIABLES, jax.random.key(seed))


def test_structure_shapes_and_dtypes_are_kept():
    permuted = permutation.apply(SPEC, some_perms(0), VARIABLES)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), permuted) == jax.tree.map(
        lambda x: (x.shape, x.dtype), VARIABLES
    )


def test_all_permutations_are_int32_and_permute_every_group():
    perms = some_perms(0)
    wide = {group: np.asarray(perm, np.int64) for group, perm in perms.items()}
    for result in (
        perms,
        permutation.identity(SPEC, VARIABLES),
        permutation.invert(perms),
        permutation.invert(wide),
        permutation.compose(perms, some_perms(1)),
    ):
        assert {g: len(perm) for g, perm in result.items()} == GROUPS
        for perm in result.values():
            assert perm.dtype == jnp.int32
            np.testing.assert_array_equal(np.sort(perm), np.arange(len(perm)))


def test_random_permutations_are_a_function_of_the_key_and_differ_between_groups():
    spec = PermutationSpec({"weight": ("a", "b")})
    variables = {"weight": jnp.zeros((50, 50))}
    first, again, other = (
        permutation.random(spec, variables, jax.random.key(seed)) for seed in (0, 0, 1)
    )
    assert_same(first, again)
    assert (first["a"] != other["a"]).any()
    assert (first["a"] != first["b"]).any()


def test_random_permutations_are_uniform():
    spec = PermutationSpec({"weight": ("a",)})
    keys = jax.random.split(jax.random.key(0), 6000)
    perms = jax.vmap(
        lambda key: permutation.random(spec, {"weight": jnp.zeros(3)}, key)["a"]
    )(keys)
    _, counts = np.unique(perms, axis=0, return_counts=True)
    assert len(counts) == 6
    np.testing.assert_allclose(counts / 6000, 1 / 6, atol=0.03)


def test_all_actions_work_under_jit():
    perms, then = some_perms(0), some_perms(1)

    @jax.jit
    def act(perms, then, variables, key):
        return (
            permutation.apply(SPEC, perms, variables),
            permutation.compose(perms, then),
            permutation.invert(perms),
            permutation.identity(SPEC, variables),
            permutation.random(SPEC, variables, key),
        )

    assert_same(
        act(perms, then, VARIABLES, jax.random.key(2)),
        (
            permutation.apply(SPEC, perms, VARIABLES),
            permutation.compose(perms, then),
            permutation.invert(perms),
            permutation.identity(SPEC, VARIABLES),
            permutation.random(SPEC, VARIABLES, jax.random.key(2)),
        ),
    )


def test_vmapped_actions_equal_the_loop_over_agents():
    perms, then = ([some_perms(s) for s in seeds] for seeds in ((0, 1, 2), (3, 4, 5)))
    agents = [
        jax.tree.map(lambda x, i=i: jnp.asarray(x) + i, VARIABLES) for i in range(3)
    ]

    def act(perms, then, variables):
        return (
            permutation.apply(SPEC, perms, variables),
            permutation.compose(perms, then),
            permutation.invert(perms),
        )

    stacked = jax.vmap(act)(stack(perms), stack(then), stack(agents))
    for i, one in enumerate(zip(perms, then, agents, strict=True)):
        assert_same(take(stacked, i), act(*one))


# What is refused ======================================================================


def test_a_group_without_a_permutation_is_refused():
    perms = some_perms(0)
    del perms["b"]
    with pytest.raises(PermutationSpecError, match="'b'"):
        permutation.apply(SPEC, perms, VARIABLES)


def test_a_leaf_that_the_spec_does_not_cover_is_refused():
    with pytest.raises(PermutationSpecError, match="'more'"):
        permutation.apply(SPEC, some_perms(0), {**VARIABLES, "more": jnp.zeros(2)})


@pytest.mark.parametrize("units", [2, 4])
@pytest.mark.parametrize(
    "axis", ["units", Product(2, "units"), Concat(("units", 3), (None, 3))]
)
def test_a_permutation_of_the_wrong_length_is_refused(axis, units):
    # With these, jnp.take would cut the leaf short or read past its end.
    spec = PermutationSpec({"weight": (None, axis)})
    perms = {"units": jnp.arange(units, dtype=jnp.int32)}
    with pytest.raises(PermutationSpecError, match="'weight': axis 1 has size 6"):
        permutation.apply(spec, perms, {"weight": jnp.zeros((2, 6))})


def test_stacked_variables_are_not_mistaken_for_one_networks():
    spec = PermutationSpec({"weight": ("a", None)})
    perms = {"a": jnp.array([1, 0], jnp.int32)}
    with pytest.raises(PermutationSpecError, match="'weight'"):
        permutation.apply(spec, perms, {"weight": jnp.zeros((2, 2, 3))})


def test_permutations_of_different_groups_do_not_compose():
    perms = some_perms(0)
    fewer = {group: perm for group, perm in perms.items() if group != "c"}
    with pytest.raises(PermutationSpecError, match="'c'"):
        permutation.compose(perms, fewer)
