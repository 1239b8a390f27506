"""Tests what `find_mistakes` reports if a declared symmetry is not the derived one."""

import numpy as np
import pytest

from dimat_jax.permutation import Axis, Concat, PermutationSpec, Product
from dimat_jax.permutation._mistakes import correct_spec, find_mistakes
from dimat_jax.permutation._spec import Axes

# The leaves of an attention with 2 heads on a stream of 6, and of two norms.
SHAPES = {"q": (6, 2, 3), "k": (6, 2, 3), "v": (6, 6), "out": (6, 6), "n1": 6, "n2": 6}
VARIABLES = {leaf: np.zeros(shape) for leaf, shape in SHAPES.items()}
V = Product("h", "v")
DERIVED: dict[str, Axes] = {
    "q": ("s", "h", "qk"),
    "k": ("s", "h", "qk"),
    "v": ("s", V),
    "out": (V, "s"),
    "n1": ("s",),
    "n2": ("s",),
}
SIZES = {"v": 3}


def mistakes_of(axes: dict[str, Axes], derived: dict[str, Axes] = DERIVED) -> set:
    sizes = {"v": 3} if "v" in PermutationSpec(axes).groups else {}
    declared = PermutationSpec(axes, sizes=sizes)
    found = find_mistakes(declared, PermutationSpec(derived, sizes=SIZES), VARIABLES)
    for mistake in found:
        assert mistake.declared == axes[mistake.leaf][mistake.dimension]
    # The corrected spec has no mistakes left.
    again = correct_spec(declared, found)
    again = PermutationSpec(again.axes, sizes={g: 3 for g in again.groups if g == "v"})
    assert not find_mistakes(again, PermutationSpec(derived, sizes=SIZES), VARIABLES)
    return {(mistake.leaf, mistake.dimension, mistake.right) for mistake in found}


def renamed(axes: dict[str, Axes], names: dict[str, str | None]) -> dict[str, Axes]:
    def rename(axis: Axis) -> Axis:
        if isinstance(axis, Product):
            return Product(*(names.get(f, f) for f in axis.factors))  # pyright: ignore
        return names.get(axis, axis) if isinstance(axis, str) else axis

    return {leaf: tuple(map(rename, leaf_axes)) for leaf, leaf_axes in axes.items()}


def test_names_do_not_matter():
    names = {"s": "stream", "h": "heads", "qk": "keys"}
    declared = renamed(DERIVED, names)  # pyright: ignore[reportArgumentType]
    assert mistakes_of(declared) == set()


@pytest.mark.parametrize("group", ["s", "h", "qk", "v"])
def test_a_group_may_be_left_aside(group):
    declared = renamed(DERIVED, {group: None})
    if group == "v":
        declared |= {"v": ("s", Product("h", 3)), "out": (Product("h", 3), "s")}
    assert mistakes_of(declared) == set()


def test_two_groups_may_be_permuted_alike():
    assert mistakes_of(renamed(DERIVED, {"qk": "v"})) == set()


def test_an_axis_left_out_is_found():
    assert mistakes_of({**DERIVED, "n1": (None,)}) == {("n1", 0, "s")}
    assert mistakes_of({**DERIVED, "k": ("s", "h", None)}) == {("k", 2, "qk")}
    assert mistakes_of({**DERIVED, "out": (None, "s")}) == {("out", 0, V)}


def test_several_mistakes_are_all_found():
    declared = {**DERIVED, "n1": (None,), "q": ("s", None, "qk"), "n2": ("other",)}
    assert mistakes_of(declared) == {("n1", 0, "s"), ("n2", 0, "s"), ("q", 1, "h")}


def test_an_axis_that_is_fixed_is_found():
    fixed = {**DERIVED, "n1": (None,)}
    assert mistakes_of(DERIVED, fixed) == {("n1", 0, None)}
    assert mistakes_of({**DERIVED, "n1": ("own",)}, fixed) == {("n1", 0, None)}


def test_an_axis_with_another_structure_is_found():
    for wrong in ("s", Product("v", "h"), Product(2, "v"), Concat(("v", 3), ("v", 3))):
        assert mistakes_of({**DERIVED, "v": ("s", wrong)}) == {("v", 1, V)}


def test_units_that_are_no_single_group_are_described_as_what_they_are():
    declared: dict[str, Axes] = {**DERIVED, "v": ("s", "one"), "out": ("one", "s")}
    assert mistakes_of(declared) == {("v", 1, V), ("out", 0, V)}


def test_a_concatenation_is_what_its_spelling_out_is():
    derived = {**DERIVED, "n1": (Concat((None, 1), ("own", 4), (None, 1)),)}
    nested = Concat((Concat((None, 1), ("own", 4)), 5), (None, 1))
    assert mistakes_of({**derived, "n1": (nested,)}, derived) == set()
    short = Concat((None, 2), ("own", 4))
    assert mistakes_of({**derived, "n1": (short,)}, derived) == {
        ("n1", 0, derived["n1"][0])
    }
