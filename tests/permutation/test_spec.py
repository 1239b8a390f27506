"""Tests which specs are allowed, and how `validate` refuses all others."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dimat_jax import permutation
from dimat_jax.permutation import (
    Concat,
    PermutationSpec,
    PermutationSpecError,
    Product,
    group_sizes,
    validate,
)

VARIABLES = {
    "first": {"kernel": np.zeros((3, 4)), "bias": np.zeros(4)},
    "second": {"kernel": np.zeros((4, 2))},
}
AXES: dict[str, Any] = {
    "first/kernel": (None, "units"),
    "first/bias": ("units",),
    "second/kernel": ("units", None),
}


def arrays(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {leaf: np.zeros(shape) for leaf, shape in shapes.items()}


def test_a_fitting_spec_is_accepted_and_tells_the_group_sizes():
    spec = PermutationSpec(AXES, {"relu": "units", "channels_first": (None, "units")})
    validate(spec, VARIABLES)
    assert group_sizes(spec, VARIABLES) == {"units": 4}


def test_groups_are_read_off_the_axes_in_their_order():
    spec = PermutationSpec(
        {"b": (Concat(("v", 2), (Product(2, "u"), 6)), None), "a": ("u", "v")}
    )
    assert spec.groups == {"v": [("b", 0), ("a", 1)], "u": [("b", 0), ("a", 0)]}
    assert list(group_sizes(spec, arrays(b=(8, 1), a=(3, 2)))) == ["v", "u"]


def test_taps_of_a_group_are_those_that_show_its_units():
    spec = PermutationSpec(
        AXES,
        {
            "last": "units",
            "first": (None, "units", None),
            "other": "others",
            "both": (Product(None, "units"), "others"),
        },
    )
    assert spec.taps_of("units") == ["last", "first", "both"]
    assert spec.taps_of("others") == ["other", "both"]
    assert spec.taps_of("none") == []


def test_axes_of_taps_are_aligned_to_the_right():
    spec = PermutationSpec(AXES, {"last": "units", "first": ("units", None)})
    assert spec.tap_axes("last", 1) == ("units",)
    assert spec.tap_axes("last", 3) == (None, None, "units")
    assert spec.tap_axes("first", 4) == (None, None, "units", None)
    with pytest.raises(PermutationSpecError, match="'first'.*only 1 dimensions"):
        spec.tap_axes("first", 1)


@pytest.mark.parametrize(
    ("axes", "named"),
    [
        pytest.param(
            {k: v for k, v in AXES.items() if k != "first/bias"},
            ["does not cover", "'first/bias'", "(4,)"],
            id="uncovered leaf",
        ),
        pytest.param(
            {**AXES, "first/biass": ("units",)},
            ["'first/biass'", "did you mean 'first/bias'"],
            id="unknown leaf",
        ),
        pytest.param(
            {**AXES, "first/bias": (None, "units")},
            ["'first/bias'", "2 axes", "(4,)"],
            id="rank too high",
        ),
        pytest.param(
            {**AXES, "first/kernel": ("units",)},
            ["'first/kernel'", "1 axes", "(3, 4)"],
            id="rank too low",
        ),
        pytest.param(
            {**AXES, "second/kernel": (None, "units")},
            ["'units'", "4 units", "'first/kernel' axis 1", "2 at 'second/kernel'"],
            id="sizes disagree",
        ),
    ],
)
def test_an_axis_table_that_does_not_fit_is_refused_by_name(axes, named):
    with pytest.raises(PermutationSpecError) as error:
        validate(PermutationSpec(axes), VARIABLES)
    for part in named:
        assert part in str(error.value)


@pytest.mark.parametrize("axes", ["unit", ("unit",), (None, "unit")])
def test_a_tap_of_an_unknown_group_is_refused(axes):
    spec = PermutationSpec(AXES, {"relu": axes})
    with pytest.raises(PermutationSpecError, match="tap 'relu' .* 'unit'.*'units'"):
        validate(spec, VARIABLES)


TWO_GROUPS = {**AXES, "second/kernel": ("units", "outputs")}


@pytest.mark.parametrize(
    "axes",
    [
        ("units", "outputs"),
        (None, "outputs", None, "units"),
        (Product(2, "units"),),
        (None, Product("outputs", None, "units")),
    ],
)
def test_taps_may_show_several_groups_and_products(axes):
    validate(PermutationSpec(TWO_GROUPS, {"relu": axes}), VARIABLES)


@pytest.mark.parametrize(
    ("axes", "complaint"),
    [
        ((), "must show the units"),
        ((None,), "must show the units"),
        ((None, Product(2, None)), "must show the units"),
        ((Concat(("units", 4), ("outputs", 2)),), "concatenates.*tap of its own"),
        (("units", "units"), "'units' twice"),
        (("outputs", None, Product(2, "outputs")), "'outputs' twice"),
        ((Product("units", "units"),), "'units' twice"),
    ],
)
def test_a_tap_that_shows_no_units_or_mixed_ones_is_refused(axes, complaint):
    spec = PermutationSpec(TWO_GROUPS, {"relu": axes})
    with pytest.raises(PermutationSpecError, match=f"tap 'relu' .*{complaint}"):
        validate(spec, VARIABLES)


# Products =============================================================================


@pytest.mark.parametrize(
    "axis",
    [
        Product(3, "units"),
        Product("units", 3),
        Product(None, "units"),
        Product("units", None),
        Product(3, None, "units"),
        Product(12),
        Product(None),
    ],
)
def test_products_that_make_the_axis_are_accepted(axis):
    spec = PermutationSpec({"flat": (axis,), "plain": ("units",)})
    variables = arrays(flat=(12,), plain=(4,))
    assert group_sizes(spec, variables) == {"units": 4}


@pytest.mark.parametrize(
    ("axis", "size"),
    [
        (Product(3, "units"), 13),
        (Product(3, "units"), 24),
        (Product(None, "units"), 13),
        (Product(5, None, "units"), 12),
        (Product("units", "units"), 12),
        (Product(4), 12),
    ],
)
def test_products_that_do_not_make_the_axis_are_refused_by_name(axis, size):
    spec = PermutationSpec({"plain": ("units",), "flat": (axis,)})
    with pytest.raises(PermutationSpecError) as error:
        validate(spec, arrays(plain=(4,), flat=(size,)))
    assert "'flat' axis 0" in str(error.value)
    assert repr(axis) in str(error.value)


def test_a_product_alone_can_tell_a_groups_size():
    spec = PermutationSpec({"flat": (Product(3, "units"),)})
    assert group_sizes(spec, arrays(flat=(12,))) == {"units": 4}


def test_products_tell_sizes_in_any_order():
    # "c" is learnt from "b", which is learnt from "a".
    spec = PermutationSpec(
        {
            "one": (Product("c", "b"), Product(None, "c")),
            "two": (Product("b", "a"),),
            "three": ("a",),
        }
    )
    variables = arrays(one=(20, 10), two=(8,), three=(2,))
    assert group_sizes(spec, variables) == {"c": 5, "b": 4, "a": 2}


def test_an_inferred_size_is_checked_against_the_products_visited_before():
    spec = PermutationSpec({"one": (Product(None, "a"),), "two": (Product(2, "a"),)})
    with pytest.raises(PermutationSpecError, match="'one' axis 0 has size 10"):
        validate(spec, arrays(one=(10,), two=(8,)))


@pytest.mark.parametrize("axis", [Product(None, "units"), Product("units", "others")])
def test_a_size_that_no_leaf_tells_is_refused(axis):
    spec = PermutationSpec({"flat": (axis,)})
    with pytest.raises(PermutationSpecError, match="'units' cannot be told.*'flat'"):
        validate(spec, arrays(flat=(12,)))


def test_a_product_can_leave_only_one_factor_open():
    with pytest.raises(PermutationSpecError, match="more than one"):
        Product(None, "units", None)


# Concatenations =======================================================================


def test_concatenations_nest_and_hold_products():
    axis = Concat(("a", 2), (Concat((None, 1), (Product(None, "b"), 6)), 7))
    spec = PermutationSpec({"joined": (axis,), "plain": ("b",)})
    assert group_sizes(spec, arrays(joined=(9,), plain=(3,))) == {"a": 2, "b": 3}


def test_a_concatenation_alone_can_tell_a_groups_size():
    spec = PermutationSpec({"joined": (Concat((None, 2), ("a", 3)),)})
    assert group_sizes(spec, arrays(joined=(5,))) == {"a": 3}


@pytest.mark.parametrize(
    ("axis", "named"),
    [
        (Concat(("a", 2), (None, 4)), ["'joined' axis 0 has size 5", "up to 6"]),
        (Concat((Concat(("a", 2), (None, 4)), 5)), ["'joined' axis 0", "up to 6"]),
        (Concat((None, 2), ("a", 3)), ["'a' has 2 units at 'plain'", "'joined'"]),
        (Concat((Product(2, "a"), 5)), ["'joined' axis 0", "Product(2, 'a')"]),
    ],
)
def test_concatenations_that_do_not_fit_are_refused_by_name(axis, named):
    spec = PermutationSpec({"plain": ("a",), "joined": (axis,)})
    with pytest.raises(PermutationSpecError) as error:
        validate(spec, arrays(plain=(2,), joined=(5,)))
    for part in named:
        assert part in str(error.value)


# Any pytree ===========================================================================


class Layer(NamedTuple):
    weight: jax.Array
    bias: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Network:
    layers: list[Layer]
    scales: tuple[jax.Array, ...]


def test_paths_lead_through_dataclasses_lists_tuples_and_namedtuples():
    network = Network(
        layers=[
            Layer(jnp.arange(12.0).reshape(4, 3), jnp.arange(4.0)),
            Layer(jnp.arange(8.0).reshape(2, 4), jnp.arange(2.0)),
        ],
        scales=(jnp.arange(4.0) + 10,),
    )
    spec = PermutationSpec(
        {
            "layers/0/weight": ("units", None),
            "layers/0/bias": ("units",),
            "layers/1/weight": (None, "units"),
            "layers/1/bias": (None,),
            "scales/0": ("units",),
        }
    )
    validate(spec, network)
    perm = np.array([2, 0, 3, 1], np.int32)
    permuted = permutation.apply(spec, {"units": perm}, network)
    assert isinstance(permuted, Network)
    np.testing.assert_array_equal(
        permuted.layers[0].weight, network.layers[0].weight[perm]
    )
    np.testing.assert_array_equal(permuted.layers[0].bias, perm)
    np.testing.assert_array_equal(
        permuted.layers[1].weight, network.layers[1].weight[:, perm]
    )
    np.testing.assert_array_equal(permuted.layers[1].bias, network.layers[1].bias)
    np.testing.assert_array_equal(permuted.scales[0], 10 + perm)


def test_a_leaf_missing_from_a_dataclass_is_named_by_its_path():
    network = Network([Layer(jnp.zeros((4, 3)), jnp.zeros(4))], ())
    spec = PermutationSpec({"layers/0/weight": ("units", None)})
    with pytest.raises(PermutationSpecError, match="'layers/0/bias'"):
        validate(spec, network)


def test_a_spec_without_groups_is_fine():
    spec = PermutationSpec({"weight": (None, None)})
    variables = arrays(weight=(2, 3))
    validate(spec, variables)
    assert permutation.identity(spec, variables) == {}
    assert permutation.random(spec, variables, jax.random.key(0)) == {}
    permuted = permutation.apply(spec, {}, variables)
    np.testing.assert_array_equal(permuted["weight"], variables["weight"])


# Specs as keys and as text ============================================================

WHOLE = PermutationSpec(
    {
        "a": (None, "u", Product(None, "u")),
        "b": (Concat(("u", 2), (Product(3, "v"), 6), (None, 1)),),
        "mean": ("v",),
    },
    {"plain": "u", "axes": (None, Product("u", "v"))},
    {"v": 2},
    {"mean"},
)


def test_equal_specs_have_equal_hashes():
    other = dataclasses.replace(
        WHOLE,
        axes={leaf: WHOLE.axes[leaf] for leaf in sorted(WHOLE.axes, reverse=True)},
        taps={tap: WHOLE.taps[tap] for tap in sorted(WHOLE.taps)},
        statistics=["mean"],
    )
    assert other == WHOLE
    assert hash(other) == hash(WHOLE)
    assert {WHOLE: 1}[other] == 1
    for changes in (
        {"axes": {**WHOLE.axes, "mean": (None,)}},
        {"taps": {}},
        {"sizes": {"v": 3}},
        {"statistics": ()},
    ):
        assert dataclasses.replace(WHOLE, **changes) not in {WHOLE}


def test_a_spec_can_be_a_static_argument_of_a_compiled_function():
    spec = PermutationSpec(AXES)
    compiled = jax.jit(permutation.apply, static_argnums=0)
    perms = permutation.random(spec, VARIABLES, jax.random.key(0))
    jax.tree.map(
        np.testing.assert_array_equal,
        compiled(spec, perms, VARIABLES),
        permutation.apply(spec, perms, VARIABLES),
    )


@pytest.mark.parametrize(
    "spec", [WHOLE, PermutationSpec({}), PermutationSpec(AXES, {"relu": "units"})]
)
def test_a_spec_comes_back_from_json_as_it_was(spec):
    text = permutation.spec_to_json(spec)
    again = permutation.spec_from_json(text)
    assert again == spec
    assert list(again.groups) == list(spec.groups)  # in the same order
    assert permutation.spec_to_json(again) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"axes": {"a": 1}}',
        '{"axes": {"a": [1]}}',
        '{"axes": {"a": [{"sum": ["u"]}]}}',
        '{"axes": {"a": [{"product": [null, null]}]}}',
        '{"axes": {"a": [{"product": [1.5]}]}}',
        '{"axes": {"a": [{"concat": ["u"]}]}}',
        '{"axes": {"a": ["u"]}, "sizes": {"u": "many"}}',
    ],
)
def test_text_that_is_no_spec_is_refused(text):
    with pytest.raises(PermutationSpecError):
        permutation.spec_from_json(text)
