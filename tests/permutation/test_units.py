"""Tests that all facts about units hold for every permutation that the units allow."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat_jax.permutation._units import (
    AxisUnits,
    Units,
    atoms,
    concatenate,
    cut,
    factors,
    fix,
    fixed,
    product,
    same,
    split,
    unknown,
)


def units(size: int) -> Units:
    node = unknown(size)
    assert node is not None
    return node


# Permutations =========================================================================


class Permutations:
    """A random permutation of every atom, and the permutations of all other units."""

    def __init__(self, seed: int):
        self._rng = np.random.default_rng(seed)
        self._of: dict[Units, np.ndarray] = {}

    def of(self, axis: AxisUnits, size: int) -> np.ndarray:
        if axis is None:
            assert size <= 1
            return np.arange(size)
        node = axis.root()
        assert node.size == size
        if node.fixed:
            return np.arange(size)
        match node.kind:
            case "atom":
                if node not in self._of:
                    self._of[node] = self._rng.permutation(size)
                return self._of[node]
            case "concat":
                return side_by_side([self.of(p, p.root().size) for p in node.parts])
            case _:
                return nested([self.of(f, f.size) for f in factors(node)])


def side_by_side(perms: Sequence[np.ndarray]) -> np.ndarray:
    offsets = itertools.accumulate([0, *map(len, perms)])
    return np.concatenate([p + n for p, n in zip(perms, offsets, strict=False)])


def nested(perms: Sequence[np.ndarray]) -> np.ndarray:
    """Combines the indices of factors, row-major: the last factor is the fastest."""
    grid = np.arange(math.prod(map(len, perms))).reshape([len(p) for p in perms])
    return grid[np.ix_(*perms)].reshape(-1)


# Each of these sizes allows many structures.
SIZES = [2, 3, 4, 6, 8, 12]


@st.composite
def lessons(draw):
    """Draws facts about a few axes of one size. Their order does not matter."""
    size = draw(st.sampled_from(SIZES))
    n_axes = draw(st.integers(1, 3))
    divisors = [n for n in range(2, size + 1) if size % n == 0]
    steps = []
    for _ in range(draw(st.integers(1, 6))):
        axis = draw(st.integers(0, n_axes - 1))
        match draw(st.sampled_from(["split", "cut", "same", "fix", "join"])):
            case "split":
                outer = draw(st.sampled_from(divisors))
                steps.append(("split", axis, [outer, size // outer]))
            case "cut":
                start = draw(st.integers(0, size))
                stop = draw(st.integers(start, size))
                steps.append(("cut", axis, [start, stop - start, size - stop]))
            case "fix":
                steps.append(("fix", axis, draw(st.integers(0, 1))))
            case kind:
                steps.append((kind, axis, draw(st.integers(0, n_axes - 1))))
    return size, n_axes, steps


@settings(max_examples=300, derandomize=True)
@given(lessons())
def test_all_that_was_learnt_holds_for_every_permutation(lesson):
    size, n_axes, steps = lesson
    axes: list[AxisUnits] = [units(size) for _ in range(n_axes)]
    pieces: list[tuple[AxisUnits, int]] = []
    learnt = []
    for kind, n, detail in steps:
        axis = axes[n]
        match kind:
            case "split":
                parts = split(axis, detail)
                learnt.append((axis, size, nested, parts, detail))
                pieces += zip(parts, detail, strict=True)
            case "cut":
                parts = cut(axis, detail)
                learnt.append((axis, size, side_by_side, parts, detail))
                pieces += zip(parts, detail, strict=True)
            case "same":
                together = same(axis, axes[detail])
                assert together is axis or together is not None
                learnt += [
                    (each, size, nested, [together], [size])
                    for each in (axis, axes[detail])
                ]
            case "fix":
                if pieces:
                    fix(pieces[-1 if detail else 0][0], "a test")
            case "join":
                # The facts come in another order, and one of them comes twice.
                both = [axis, axes[detail], axis]
                whole = concatenate(both, [size] * 3)
                learnt.append((whole, 3 * size, side_by_side, both, [size] * 3))
                whole = product(both[:2], [size] * 2)
                learnt.append((whole, size**2, nested, both[:2], [size] * 2))
    for seed in range(3):
        perms = Permutations(seed)
        for whole, whole_size, put_together, parts, sizes in learnt:
            expected = put_together(
                [perms.of(part, n) for part, n in zip(parts, sizes, strict=True)]
            )
            np.testing.assert_array_equal(perms.of(whole, whole_size), expected)


# Structures ===========================================================================


def groups(*axes: AxisUnits) -> list[int]:
    """The sizes of the different groups on these axes."""
    return [
        atom.size for atom in dict.fromkeys(a for axis in axes for a in atoms(axis))
    ]


def test_units_that_are_the_same_are_one_group():
    a, b, c = (units(4) for _ in range(3))
    same(a, b)
    same(c, None, b)
    assert groups(a, b, c) == [4]


def test_single_units_and_uniform_axes_are_no_group():
    assert unknown(1) is unknown(0) is None
    assert same(None, None) is None
    assert product([None, None], [2, 3]) is None
    assert concatenate([None], [3]) is None
    assert groups(concatenate([None, None], [1, 1])) == []


def test_uniform_factors_and_parts_may_be_permuted_each_within_itself():
    assert groups(product([None, units(3)], [2, 3])) == [2, 3]
    assert groups(concatenate([units(3), None], [3, 2])) == [3, 2]


def test_a_split_is_undone_by_a_product():
    whole = units(12)
    parts = split(whole, [2, 1, 6])
    assert parts[1] is None
    assert groups(whole) == groups(*parts) == [2, 6]
    same(product(parts, [2, 1, 6]), whole)
    assert groups(whole) == [2, 6]


def test_a_cut_is_undone_by_a_concatenation():
    whole = units(12)
    parts = cut(whole, [5, 0, 1, 6])
    assert parts[1] is parts[2] is None
    same(concatenate(parts, [5, 0, 1, 6]), whole)
    assert groups(whole) == [5, 6]


def test_products_meet_in_their_common_factors():
    a, b = units(24), units(24)
    split(a, [2, 12])
    split(b, [6, 4])
    same(a, b)
    assert groups(a) == groups(b) == groups(a, b) == [2, 3, 4]


def test_products_without_common_factors_are_fixed():
    a, b = units(6), units(6)
    split(a, [2, 3])
    split(b, [3, 2])
    same(a, b)
    assert groups(a, b) == []


def test_concatenations_meet_in_their_common_segments():
    a, b = units(6), units(6)
    cut(a, [2, 4])
    cut(b, [4, 2])
    same(a, b)
    assert groups(a, b) == [2, 2, 2]


def test_a_product_is_cut_along_its_outermost_factor():
    whole = units(12)
    split(whole, [6, 2])
    first, second = cut(whole, [4, 8])
    assert groups(whole) == [2, 4, 2]
    assert groups(first) == [2, 2]
    assert groups(second) == [4, 2]
    cut(whole, [3, 9])  # through the middle of pairs
    assert groups(whole, first, second) == []


def test_the_parts_of_a_concatenation_are_split_alike():
    # Queries, keys and values lie in one array, which is then split by heads.
    whole = units(24)
    q, k, v = cut(whole, [8, 8, 8])
    three, heads, within = split(whole, [3, 2, 4])
    assert groups(three) == []
    assert groups(q) == groups(k) == groups(v) == groups(heads, within) == [2, 4]
    split(whole, [2, 12])
    assert groups(whole, q) == []


def test_what_is_fixed_stays_fixed_with_all_its_parts():
    whole, other = units(6), units(6)
    split(whole, [2, 3])
    fix(whole, "a test")
    assert groups(whole, *split(whole, [2, 3]), *cut(whole, [1, 5])) == []
    same(whole, other)
    assert groups(other) == []
    assert other.root().fixed == {"a test"}


def test_fixing_one_factor_leaves_the_others():
    whole = units(6)
    outer, inner = split(whole, [2, 3])
    assert groups(fixed(3, "a test", inner)) == []
    assert groups(whole) == groups(outer) == [2]
