"""Tests that `verify` accepts symmetries that hold and names mistakes in others."""

import dataclasses
import re
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dimat_jax import permutation
from dimat_jax.models import MODELS, permutation_spec
from dimat_jax.models.classifier import both_modes, forward, init
from dimat_jax.permutation import (
    Axis,
    Concat,
    PermutationSpec,
    PermutationSpecError,
    Product,
    group_sizes,
    validate,
    verify,
)
from dimat_jax.permutation._verify import InconclusiveError, Verification
from dimat_jax.tree import PyTree, map_with_path


def key(seed: int = 0) -> jax.Array:
    return jax.random.key(seed)


# The bundled models ===================================================================

# All numbers of inputs, units and logits are equal, so that no size reveals a mistake.
MLP = MODELS["mlp"](n_classes=6, hidden=(6, 6))
RESNET20 = MODELS["resnet20"](n_classes=5)
SPECS = {
    name: permutation_spec(m) for name, m in [("mlp", MLP), ("resnet20", RESNET20)]
}


class Subject(NamedTuple):
    forward: Callable[[PyTree, jax.Array], PyTree]
    fresh: PyTree
    inputs: jax.Array

    def verify(self, spec: PermutationSpec, variables: PyTree = None) -> None:
        variables = self.fresh if variables is None else variables
        verify(spec, self.forward, variables, self.inputs, key())


@cache
def subject(name: str) -> Subject:
    """A model with its `forward`, which all tests share, so that it compiles once."""
    model, shape = {"mlp": (MLP, (3, 2, 1)), "resnet20": (RESNET20, (8, 8, 1))}[name]
    inputs = jax.random.normal(key(1), (6, *shape))
    fresh = jax.jit(partial(init, model))(key(2), inputs)
    return Subject(both_modes(model), fresh, inputs)


def with_axis(
    spec: PermutationSpec, leaf: str, dimension: int, axis: Axis
) -> PermutationSpec:
    axes = list(spec.axes[leaf])
    axes[dimension] = axis
    return dataclasses.replace(spec, axes={**spec.axes, leaf: tuple(axes)})


def says(error, leaf: str, dimension: int, declared: Axis, right: Axis) -> bool:
    return (
        f"{leaf!r} axis {dimension} is declared {declared!r}, and should be {right!r}"
    ) in str(error.value)


# The ResNet is tested at the stem, the head and one block with a shortcut, because all
# other blocks are similar.
ALL_AXES = [
    pytest.param(name, leaf, dimension, id=f"{name}-{leaf}-{dimension}")
    for name, spec in SPECS.items()
    for leaf, axes in spec.axes.items()
    for dimension, axis in enumerate(axes)
    if axis is not None
    and re.search("^[a-z_]+/(hidden.|conv0|norm0|stage1_block0|head)/", leaf)
]


@pytest.mark.every_nth(2)
@pytest.mark.parametrize("name", SPECS)
def test_declared_symmetries_of_fresh_networks_hold(name):
    subject(name).verify(SPECS[name])


@pytest.mark.every_nth(2)
@pytest.mark.parametrize("name", SPECS)
def test_declared_symmetries_of_trained_networks_hold(name):
    # As after training, no leaf is constant and no leaf has its initial value.
    rng = np.random.default_rng(0)

    def trained(path, leaf):
        if path.endswith(("/var", "/scale")):
            return jnp.asarray(rng.uniform(0.5, 2, leaf.shape), jnp.float32)
        return leaf + jnp.asarray(rng.normal(0, 0.1, leaf.shape), jnp.float32)

    subject(name).verify(SPECS[name], map_with_path(trained, subject(name).fresh))


@pytest.mark.every_nth(16)
@pytest.mark.parametrize(("name", "leaf", "dimension"), ALL_AXES)
def test_an_axis_in_a_wrong_group_of_the_same_size_is_named(name, leaf, dimension):
    spec = SPECS[name]
    sizes = group_sizes(spec, subject(name).fresh)
    right = spec.axes[leaf][dimension]
    wrong = next(g for g, n in sizes.items() if g != right and n == sizes[right])
    with pytest.raises(PermutationSpecError) as error:
        subject(name).verify(with_axis(spec, leaf, dimension, wrong))
    assert says(error, leaf, dimension, wrong, right)


@pytest.mark.every_nth(8)
@pytest.mark.parametrize(("name", "leaf", "dimension"), ALL_AXES)
def test_an_axis_left_out_of_its_group_is_named(name, leaf, dimension):
    group = SPECS[name].axes[leaf][dimension]
    with pytest.raises(PermutationSpecError) as error:
        subject(name).verify(with_axis(SPECS[name], leaf, dimension, None))
    assert says(error, leaf, dimension, None, group)
    assert f"group {group!r}" in str(error.value)


@pytest.mark.parametrize("name", SPECS)
def test_every_leaf_left_out_of_the_spec_is_named(name):
    spec, fresh = SPECS[name], subject(name).fresh
    for leaf in spec.axes:
        fewer = {other: axes for other, axes in spec.axes.items() if other != leaf}
        with pytest.raises(PermutationSpecError, match=f"cover the leaf '{leaf}'"):
            validate(PermutationSpec(fewer, spec.taps), fresh)


@pytest.mark.parametrize("name", SPECS)
def test_permuted_logits_are_noticed(name):
    spec = with_axis(SPECS[name], "params/head/kernel", 1, "classes")
    spec = with_axis(spec, "params/head/bias", 0, "classes")
    with pytest.raises(PermutationSpecError) as error:
        subject(name).verify(spec)
    assert "group 'classes'" in str(error.value)
    assert "'params/head/kernel' axis 1" in str(error.value)
    assert "'params/head/bias' axis 0" in str(error.value)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    ("leaf", "dimension"), [("params/head/kernel", 1), ("params/head/bias", 0)]
)
def test_partly_permuted_logits_are_noticed(name, leaf, dimension):
    spec = with_axis(SPECS[name], leaf, dimension, "classes")
    with pytest.raises(PermutationSpecError) as error:
        subject(name).verify(spec)
    assert says(error, leaf, dimension, "classes", None)


def test_permuted_inputs_are_noticed():
    spec = with_axis(SPECS["mlp"], "params/hidden0/kernel", 0, "pixels")
    with pytest.raises(PermutationSpecError) as error:
        subject("mlp").verify(spec)
    assert says(error, "params/hidden0/kernel", 0, "pixels", None)


@pytest.mark.every_nth(2)
@pytest.mark.parametrize("statistic", ["mean", "var"])
@pytest.mark.parametrize("norm", ["norm0", "stage2_block2/norm1"])
def test_a_statistic_left_out_is_noticed_though_a_fresh_network_hides_it(
    norm, statistic
):
    leaf = f"batch_stats/{norm}/{statistic}"
    spec = with_axis(SPECS["resnet20"], leaf, 0, None)
    model, fresh, inputs = subject("resnet20")
    logits = model(fresh, inputs)["eval"]
    perms = permutation.random(spec, fresh, key())
    permuted = permutation.apply(spec, perms, fresh)
    np.testing.assert_allclose(model(permuted, inputs)["eval"], logits, atol=1e-4)
    with pytest.raises(PermutationSpecError) as error:
        subject("resnet20").verify(spec)
    assert says(error, leaf, 0, None, SPECS["resnet20"].axes[leaf][0])


def test_a_shortcut_in_a_wrong_residual_stream_is_named():
    leaf = "params/stage1_block0/shortcut_conv/kernel"
    spec = with_axis(SPECS["resnet20"], leaf, 3, "stage1_block2/inner")
    with pytest.raises(PermutationSpecError) as error:
        subject("resnet20").verify(spec)
    assert says(error, leaf, 3, "stage1_block2/inner", "stream1")


def test_a_block_with_a_residual_stream_of_its_own_is_named_leaf_by_leaf():
    spec = SPECS["resnet20"]
    own = [
        (leaf, len(axes) - 1)
        for leaf, axes in spec.axes.items()
        if re.search("stage0_block1/(conv2|norm2)/", leaf)
    ]
    for leaf, dimension in own:
        spec = with_axis(spec, leaf, dimension, "own")
    with pytest.raises(PermutationSpecError) as error:
        subject("resnet20").verify(spec)
    assert "groups 'own', 'stream0'" in str(error.value)
    for leaf, dimension in own:
        assert says(error, leaf, dimension, "own", "stream0")
    assert str(error.value).count("is declared") == len(own) == 5


@pytest.mark.parametrize("name", SPECS)
def test_two_mistakes_at_once_are_both_named(name):
    first, second = {
        "mlp": (("params/hidden0/bias", 0), ("params/hidden1/bias", 0)),
        "resnet20": (
            ("batch_stats/norm0/var", 0),
            ("params/stage2_block1/conv2/kernel", 2),
        ),
    }[name]
    spec = with_axis(with_axis(SPECS[name], *first, None), *second, None)
    with pytest.raises(PermutationSpecError) as error:
        subject(name).verify(spec)
    for leaf, dimension in (first, second):
        assert says(error, leaf, dimension, None, SPECS[name].axes[leaf][dimension])
    assert str(error.value).count("is declared") == 2


# Any network ==========================================================================


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = normal(5, 4)
WEIGHTS = {"first": normal(4, 4), "second": normal(4, 4, seed=1)}


def two_layers(variables, x):
    return jax.nn.relu(x @ variables["first"]) @ variables["second"]


TWO_LAYERS = PermutationSpec({"first": (None, "units"), "second": ("units", None)})


def test_verify_leaves_the_variables_as_they_are():
    variables = {"w": np.ones((4, 4), np.float32), "b": np.zeros(4, np.float32)}
    spec = PermutationSpec({"w": (None, "units"), "b": ("units",)})
    verify(spec, lambda v, x: (x @ v["w"] + v["b"]).sum(-1), variables, X, key())
    np.testing.assert_array_equal(variables["w"], np.ones((4, 4)))
    np.testing.assert_array_equal(variables["b"], np.zeros(4))


def test_the_structure_is_checked_first():
    def forward(variables, inputs):
        raise AssertionError("not to be called")

    with pytest.raises(PermutationSpecError, match="'second'"):
        verify(PermutationSpec({"first": (None, "u")}), forward, WEIGHTS, X, key())


@pytest.mark.parametrize(
    ("leaf", "dimension"), [("first", 1), ("second", 0)], ids=["out", "in"]
)
def test_the_axis_left_out_is_named_where_its_group_has_but_one_other(leaf, dimension):
    spec = with_axis(TWO_LAYERS, leaf, dimension, None)
    with pytest.raises(PermutationSpecError) as error:
        verify(spec, two_layers, WEIGHTS, X, key())
    assert says(error, leaf, dimension, None, "units")


def test_every_group_is_moved_even_if_its_random_permutation_is_the_identity():
    # For a group of two units, half of all keys draw the identity.
    variables = {"w": jnp.array([1.0, 2.0])}
    spec = PermutationSpec({"w": ("units",)})
    for seed in range(6):
        with pytest.raises(PermutationSpecError):
            verify(spec, lambda v, _: v["w"], variables, X, key(seed))


def test_several_networks_are_verified_by_one_program():
    traced = []

    def forward(variables, x):
        traced.append(variables)
        return jnp.tanh(x @ variables["first"]) @ variables["second"]

    check = Verification(TWO_LAYERS, forward, X)
    for seed in range(3):
        check({leaf: w + seed for leaf, w in WEIGHTS.items()}, key(seed))
    assert len(traced) == 1


def test_groups_that_only_move_the_outputs_together_are_noticed():
    # One group alone does not change the output, because its difference is multiplied
    # by that of the other group, which is 0.
    def forward(variables, x):
        a, b = (jnp.abs(variables[g] - jnp.arange(1.0, 5.0)).sum() for g in "ab")
        return x.sum() + a * b

    variables = {g: jnp.arange(1.0, 5.0) for g in "ab"}
    spec = PermutationSpec({"a": ("a",), "b": ("b",)})
    with pytest.raises(PermutationSpecError, match="groups 'a', 'b'") as error:
        verify(spec, forward, variables, X, key())
    for group in "ab":
        assert says(error, group, 0, group, None)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outputs_that_are_not_finite_are_refused(bad):
    second = WEIGHTS["second"].copy()
    second[0, 0] = bad
    variables = {**WEIGHTS, "second": second}
    with pytest.raises(InconclusiveError, match="not finite"):
        verify(TWO_LAYERS, two_layers, variables, X, key())


def test_outputs_that_a_permutation_makes_nan_are_noticed():
    # Comparisons with NaN are false: it exceeds no tolerance, and no other change.
    variables = {"w": jnp.array([1.0, 2.0, -3.0, -4.0])}
    spec = PermutationSpec({"w": ("units",)})

    def forward(variables, x):
        return {"a": x, "b": jnp.log(variables["w"] * jnp.array([1, 1, -1, -1]))}

    with pytest.raises(PermutationSpecError, match="by inf of the largest") as error:
        verify(spec, forward, variables, X, key(1))
    assert says(error, "w", 0, "units", None)


def test_the_tolerance_is_relative_to_the_largest_output():
    spec = PermutationSpec({"w": ("units",)})
    variables = {"w": jnp.array([1.0, 2.0, 3.0])}

    def forward(variables, x):
        return jnp.append(variables["w"], 1e3)

    verify(spec, forward, variables, X, key(), tolerance=3e-3)
    with pytest.raises(PermutationSpecError, match="allowed: 5e-04"):
        verify(spec, forward, variables, X, key(), tolerance=5e-4)


@pytest.mark.parametrize(
    ("axis", "holds"),
    [
        (Product(None, "units"), True),
        (Product(2, "units"), True),
        (Product("units", None), False),
        (Concat(("units", 3), ("units", 3)), True),
        (Concat(("units", 3), (None, 3)), False),
        (None, False),
    ],
)
def test_a_flattened_feature_map_is_a_product_with_channels_last(axis, holds):
    variables = {"features": normal(4, 3), "dense": normal(6, 2, seed=1)}

    def forward(variables, x):
        maps = jnp.stack([x, x**2], axis=1) @ variables["features"]  # [5, 2, 3]
        return jax.nn.relu(maps).reshape(len(x), -1) @ variables["dense"]

    spec = PermutationSpec({"features": (None, "units"), "dense": (axis, None)})
    if holds:
        verify(spec, forward, variables, X, key())
    else:
        with pytest.raises(PermutationSpecError, match="'units'"):
            verify(spec, forward, variables, X, key())


def test_networks_outside_flax_are_verified_alike():
    class Layer(NamedTuple):
        weight: np.ndarray

    def two(layers, x):
        return jnp.tanh(x @ layers[0].weight) @ layers[1].weight

    layers = [Layer(WEIGHTS["first"]), Layer(WEIGHTS["second"])]
    spec = PermutationSpec({"0/weight": (None, "units"), "1/weight": ("units", None)})
    verify(spec, two, layers, X, key())
    with pytest.raises(PermutationSpecError) as error:
        verify(with_axis(spec, "1/weight", 0, None), two, layers, X, key())
    assert says(error, "1/weight", 0, None, "units")


def test_a_forward_in_eval_mode_alone_is_accepted():
    inputs = subject("mlp").inputs
    verify(SPECS["mlp"], forward(MLP), subject("mlp").fresh, inputs, key())


def test_units_that_are_no_single_group_are_described_as_what_they_are():
    def forward(variables, x):
        units = (x @ variables["first"]).reshape(-1, 2, 2)
        return jax.nn.standardize(units).reshape(-1, 4) @ variables["second"]

    with pytest.raises(PermutationSpecError, match="group 'units'") as error:
        verify(TWO_LAYERS, forward, WEIGHTS, X, key())
    product = Product("first:1.0", "first:1.1")
    assert says(error, "first", 1, "units", product)
    assert says(error, "second", 0, "units", product)


# What derive cannot follow ============================================================


def hidden(units):
    """Computes `tanh` in a way that `derive` cannot follow."""
    return jax.pure_callback(np.tanh, jax.typeof(units), units)


def three_layers(variables, x):
    x = hidden(x @ variables["first"] + variables["bias"]) * variables["scale"]
    return jnp.tanh(x @ variables["second"]) @ variables["third"]


THREE_LAYERS = PermutationSpec(
    {
        "first": (None, "a"),
        "bias": ("a",),
        "scale": ("a",),
        "second": ("a", "b"),
        "third": ("b", None),
    }
)
THREE_WEIGHTS = WEIGHTS | {
    "third": normal(4, 3, seed=2),
    "bias": normal(4, seed=3),
    "scale": normal(4, seed=4),
}


def test_a_model_that_derive_cannot_follow_is_verified():
    verify(THREE_LAYERS, three_layers, THREE_WEIGHTS, X, key())


@pytest.mark.parametrize("wrong", [None, "b"])
def test_its_one_mistake_is_named(wrong):
    spec = with_axis(THREE_LAYERS, "scale", 0, wrong)
    with pytest.raises(PermutationSpecError, match="group 'a'") as error:
        verify(spec, three_layers, THREE_WEIGHTS, X, key())
    assert says(error, "scale", 0, wrong, "a")
    assert str(error.value).count("is declared") == 1


@pytest.mark.parametrize("function", [jnp.tanh, hidden], ids=["known", "unknown"])
def test_rounding_is_not_blamed_on_a_leaf(function):
    # The last digits of a sum depend on the order of its terms. Derive fixes what it
    # cannot follow, so the symmetry that it finds does hold.
    spec = PermutationSpec({"w": (None, "units"), "bias": (None,)})
    variables = {"w": normal(4, 1000), "bias": normal(5)}

    def forward(variables, x):
        return (x @ variables["w"]).sum(axis=-1) + function(variables["bias"])

    verify(spec, forward, variables, X, key())
    with pytest.raises(InconclusiveError, match="rounding.*float32") as error:
        verify(spec, forward, variables, X, key(), tolerance=1e-12)
    assert not any(name in str(error.value) for name in ("'w'", "'units'", "'bias'"))


def test_of_several_mistakes_there_it_is_said_that_derive_does_not_know_all():
    spec = with_axis(with_axis(THREE_LAYERS, "scale", 0, None), "second", 0, None)
    with pytest.raises(PermutationSpecError, match="does not know the op"):
        verify(spec, three_layers, THREE_WEIGHTS, X, key())
