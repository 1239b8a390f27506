"""Tests of properties that only one architecture has."""

from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dimat_jax import permutation
from dimat_jax.errors import UserError
from dimat_jax.models import MODELS, ModelError, permutation_spec
from dimat_jax.models._norm import n_norm_groups
from dimat_jax.models._settings import scaled
from dimat_jax.models.classifier import (
    activations,
    batch_statistics,
    forward,
    init,
)
from dimat_jax.models.gpt import GPT
from dimat_jax.models.resnet import ResNet
from dimat_jax.models.vgg import VGG
from dimat_jax.permutation import PermutationSpecError, Product, group_sizes
from dimat_jax.tree import flatten


def shapes_of(model: nn.Module, *input_shape: int) -> dict:
    inputs = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    if isinstance(model, GPT):  # It reads texts.
        inputs = jax.ShapeDtypeStruct((1, input_shape[0]), jnp.int32)
    return jax.eval_shape(lambda x: init(model, jax.random.key(0), x), inputs)


def taps_of(model: nn.Module, *input_shape: int) -> dict[str, Any]:
    inputs = jax.ShapeDtypeStruct((2, *input_shape), jnp.float32)
    variables = shapes_of(model, *input_shape)
    return jax.eval_shape(activations(model), variables, inputs)


def sizes_of(model: nn.Module, *input_shape: int) -> dict[str, int]:
    return group_sizes(permutation_spec(model), shapes_of(model, *input_shape))


def n_params(variables: Any) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(variables))


# Settings =============================================================================


@pytest.mark.parametrize("name", MODELS)
def test_an_integer_width_is_that_float(name):
    assert MODELS[name](n_classes=2, width=2) == MODELS[name](n_classes=2, width=2.0)


@pytest.mark.every_nth(9)
@pytest.mark.parametrize("name", MODELS)
def test_a_quarter_of_the_width_is_a_quarter_of_every_group(name):
    narrow, full = (MODELS[name](n_classes=2, width=w) for w in (0.25, 1.0))
    narrow, full = sizes_of(narrow, 32, 32, 3), sizes_of(full, 32, 32, 3)
    assert narrow.keys() == full.keys()
    for group, size in full.items():
        unscaled = group.endswith("/heads")
        assert narrow[group] == (size if unscaled else size / 4), group


def test_channels_are_rounded_only_from_what_floats_make_of_whole_numbers():
    assert 0.07 * 100 != 7
    assert scaled(0.07, 100, 200) == (7, 14)
    assert all(type(n) is int for n in scaled(0.5, 16))
    with pytest.raises(ModelError, match="makes 1.01 units of 101"):
        scaled(0.01, 101)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "resnet20",
            {"width": 0.1},
            "width 0.1 makes 1.6 units of 16; .* whole number",
        ),
        (
            "vgg16",
            {"width": 1e-9},
            "width 1e-09 makes 6.4e-08 units of 64; .*at least 1",
        ),
        ("mlp", {"width": 0, "hidden": ()}, "width is 0; it must be above 0"),
        ("mlp", {"width": -1}, "width is -1; it must be above 0"),
        ("mlp", {"width": float("nan")}, "width is nan; it must be above 0"),
        ("mlp", {"width": float("inf")}, "width is inf; it must be above 0"),
        ("vit", {"width": 1 / 64}, "2 dimensions cannot be split over 4 heads"),
        ("resnet20", {"norm": "none"}, "norm is 'none'; allowed: batch, group, layer"),
        ("mlp", {"norm": "group"}, "norm is 'group'; allowed: batch, layer, none"),
        ("vgg16", {"norm": "bach"}, "allowed: batch, .*; did you mean 'batch'"),
        ("resnet50", {"stem": "image"}, "stem is 'image'; allowed: cifar, imagenet"),
    ],
)
def test_settings_that_make_no_network_are_refused(name, settings, message):
    with pytest.raises(UserError, match=message):
        MODELS[name](n_classes=2, **settings)


@pytest.mark.parametrize("field", ["block", "stem", "shortcut", "norm"])
def test_a_resnet_of_unknown_parts_is_refused(field):
    part: dict[str, Any] = {field: "other"}
    with pytest.raises(ModelError, match=f"{field} is 'other'; allowed: "):
        ResNet((1,), (4,), 2, **part)


def test_a_module_from_elsewhere_has_no_declared_spec():
    with pytest.raises(KeyError):
        permutation_spec(nn.Dense(3))


# Norms ================================================================================


@pytest.mark.parametrize(
    ("name", "norm", "normalises_batches"),
    [
        ("mlp", "none", False),
        ("mlp", "batch", True),
        ("mlp", "layer", False),
        ("resnet20", "batch", True),
        ("resnet20", "layer", False),
        ("vgg11", "group", False),
        ("vgg11", "none", False),
    ],
)
def test_only_batch_norm_has_batch_statistics(name, norm, normalises_batches):
    model = MODELS[name](n_classes=2, norm=norm)
    assert (batch_statistics(model) is not None) == normalises_batches
    assert ("batch_stats" in shapes_of(model, 32, 32, 3)) == normalises_batches


def test_a_vision_transformer_has_no_batch_statistics():
    assert batch_statistics(MODELS["vit"](n_classes=2)) is None


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(1, 1), (2, 1), (4, 2), (6, 2), (7, 1), (8, 4), (12, 4), (16, 8), (2048, 8)],
)
def test_group_norm_makes_at_most_8_groups_of_at_least_two_channels(channels, groups):
    assert n_norm_groups(channels) == groups


def test_group_norm_ties_channels_to_their_norm_group():
    model = MODELS["vgg11"](n_classes=5, norm="group")
    spec, sizes = permutation_spec(model), sizes_of(model, 32, 32, 3)
    units = Product("conv7/groups", "conv7/within")
    assert spec.axes["params/conv7/kernel"][-1] == units
    assert spec.axes["params/norm7/scale"] == (units,)
    assert spec.axes["params/head/kernel"] == (Product(None, *units.factors), None)
    assert spec.taps["relu7"] == (None, None, None, units)
    assert (sizes["conv7/groups"], sizes["conv7/within"]) == (8, 64)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({}, "the size of group 'conv0/groups' cannot be told: .*spec.sizes"),
        ({"conv0/groups": 3}, "'params/conv0/kernel' axis 3 has size 8"),
        ({"conv0/blocks": 4}, "size of group 'conv0/blocks', which no leaf has"),
    ],
)
def test_group_norms_sizes_must_be_told_and_fit(sizes, message):
    model = VGG(((8,),), 3, norm="group")
    spec = replace(permutation_spec(model), sizes=sizes)
    with pytest.raises(PermutationSpecError, match=message):
        permutation.validate(spec, shapes_of(model, 8, 8, 3))


@pytest.mark.slow
def test_all_permutations_of_the_channels_are_too_many_for_group_norm():
    model = VGG(((8,), (8,)), 3, norm="group")
    inputs = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    variables = jax.jit(partial(init, model))(jax.random.key(1), inputs)
    one_group_each = permutation_spec(model.clone(norm="layer"))
    with pytest.raises(PermutationSpecError, match="moves the outputs"):
        permutation.verify(
            one_group_each, forward(model), variables, inputs, jax.random.key(2)
        )


# Multilayer perceptrons ===============================================================


def test_an_mlp_is_as_wide_as_it_is_told():
    model = MODELS["mlp"](n_classes=10, hidden=(8, 6), width=3)
    assert sizes_of(model, 8, 8, 1) == {"hidden0": 24, "hidden1": 18}
    assert n_params(shapes_of(model, 8, 8, 1)) == 65 * 24 + 25 * 18 + 19 * 10


def test_an_mlp_has_no_norm_unless_it_is_told():
    assert set(flatten(shapes_of(MODELS["mlp"](n_classes=10), 8, 8, 1))) == {
        f"params/{layer}/{leaf}"
        for layer in ("hidden0", "hidden1", "head")
        for leaf in ("kernel", "bias")
    }


def test_a_model_without_taps_has_no_activations():
    model = MODELS["mlp"](n_classes=3, hidden=())
    inputs = jnp.ones((2, 4))
    assert activations(model)(init(model, jax.random.key(0), inputs), inputs) == {}


# Residual networks ====================================================================


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("wide_resnet50_2", 68_883_240),
        pytest.param("resnet152", 60_192_808, marks=pytest.mark.slow),
        pytest.param("wide_resnet101_2", 126_886_696, marks=pytest.mark.slow),
    ],
)
def test_imagenet_resnets_have_as_many_parameters_as_torchvisions(name, published):
    model = MODELS[name](n_classes=1000)
    assert n_params(shapes_of(model, 224, 224, 3)["params"]) == published


@pytest.mark.parametrize(
    ("name", "layers", "published"),
    [
        # He et al. (2016) state these numbers of parameters, in millions, for shortcuts
        # without parameters.
        ("resnet20", 20, 0.27),
        ("resnet32", 32, 0.46),
        ("resnet44", 44, 0.66),
        ("resnet56", 56, 0.85),
    ],
)
def test_cifar_resnets_have_as_many_parameters_as_he_et_als(name, layers, published):
    variables = shapes_of(MODELS[name](n_classes=10), 32, 32, 3)
    shortcuts = 9 * 16 * 32 + 9 * 32 * 64 + 2 * (32 + 64)
    assert (n_params(variables["params"]) - shortcuts) / 1e6 == pytest.approx(
        published, abs=0.006
    )
    kernels = [leaf for leaf in flatten(variables) if leaf.endswith("/kernel")]
    assert len([leaf for leaf in kernels if "shortcut" not in leaf]) == layers


@pytest.mark.parametrize(
    ("name", "known"), [("resnet20", 269_722), ("resnet56", 853_018)]
)
def test_shortcuts_without_weights_give_the_known_numbers_of_parameters(name, known):
    model = MODELS[name](n_classes=10, shortcut="pad")
    assert n_params(shapes_of(model, 32, 32, 3)["params"]) == known


def test_a_stream_goes_on_behind_shortcuts_without_weights():
    model = MODELS["resnet20"](n_classes=10, shortcut="pad")
    spec, sizes = permutation_spec(model), sizes_of(model, 32, 32, 3)
    streams = {g: n for g, n in sizes.items() if g.startswith("stream")}
    assert streams == {
        "stream0": 16,
        "stream1/low": 8,
        "stream1/high": 8,
        "stream2/low": 16,
        "stream2/high": 16,
    }
    # The first stream's taps are at the stem and behind every block.
    assert [len(spec.taps_of(stream)) for stream in streams] == [10, 6, 6, 3, 3]
    with pytest.raises(ModelError, match="norm is 'group'; allowed: batch, layer"):
        MODELS["resnet20"](n_classes=10, shortcut="pad", norm="group")


@pytest.mark.parametrize("width", [1, 2, 8])
def test_resnet20_has_a_group_for_each_stream_and_each_block(width):
    model = MODELS["resnet20"](n_classes=10, width=width)
    spec, sizes = permutation_spec(model), sizes_of(model, 32, 32, 3)
    streams = {g: n for g, n in sizes.items() if g.startswith("stream")}
    assert list(streams.values()) == [16 * width, 32 * width, 64 * width]
    assert len(sizes) == len(streams) + 9
    # The stream's taps are at the stem and behind every block of its stage.
    assert [len(spec.taps_of(stream)) for stream in streams] == [4, 3, 3]


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_resnet50_has_37_groups(stem):
    model = MODELS["resnet50"](n_classes=10, stem=stem)
    sizes = sizes_of(model, 32, 32, 3)
    assert len(sizes) == 37
    streams = {g: n for g, n in sizes.items() if g.startswith("stream")}
    assert list(streams.values()) == [64, 256, 512, 1024, 2048]
    assert sum(sizes.values()) - sum(streams.values()) == 2 * (
        3 * 64 + 4 * 128 + 6 * 256 + 3 * 512
    )


def test_resnet20_halves_the_feature_maps_twice():
    seen = taps_of(MODELS["resnet20"](n_classes=10), 32, 32, 3)
    assert seen["stem"].shape == (2, 32, 32, 16)
    assert seen["stage0_block2/stream"].shape == (2, 32, 32, 16)
    assert seen["stage1_block0/inner"].shape == (2, 16, 16, 32)
    assert seen["stage2_block2/stream"].shape == (2, 8, 8, 64)


def test_the_stride_of_a_bottleneck_is_on_its_3x3_convolution():
    seen = taps_of(MODELS["resnet50"](n_classes=10), 64, 64, 3)
    assert seen["stem"].shape == (2, 16, 16, 64)
    assert seen["stage1_block0/inner1"].shape == (2, 16, 16, 128)
    assert seen["stage1_block0/inner2"].shape == (2, 8, 8, 128)
    assert seen["stage1_block0/stream"].shape == (2, 8, 8, 512)
    assert seen["stage3_block2/stream"].shape == (2, 2, 2, 2048)


def test_a_cifar_stem_keeps_the_images_size():
    seen = taps_of(MODELS["resnet18"](n_classes=10, stem="cifar"), 32, 32, 3)
    assert seen["stem"].shape == (2, 32, 32, 64)
    assert seen["stage3_block1/stream"].shape == (2, 4, 4, 512)


@pytest.mark.parametrize(("name", "kernel"), [("resnet20", 3), ("resnet18", 1)])
def test_shortcuts_are_those_of_the_published_networks(name, kernel):
    leaves = flatten(shapes_of(MODELS[name](n_classes=10), 32, 32, 3))
    shortcuts = {
        leaf.split("/")[1]: array.shape[:2]
        for leaf, array in leaves.items()
        if leaf.endswith("shortcut_conv/kernel")
    }
    stages = {"resnet20": (1, 2), "resnet18": (1, 2, 3)}[name]
    assert shortcuts == {f"stage{s}_block0": (kernel, kernel) for s in stages}


def test_a_stage_of_the_same_shape_at_one_pixel_still_has_its_shortcut():
    # The module and its spec make the same choice for every image size.
    model = ResNet((1, 1), (4, 4), 2)
    permutation.validate(permutation_spec(model), shapes_of(model, 1, 1, 3))


# VGG ==================================================================================


@pytest.mark.parametrize(
    ("name", "published"),
    [
        # The numbers of parameters of torchvision's vgg*_bn without the classifier.
        ("vgg11", 9_225_984),
        ("vgg13", 9_410_880),
        ("vgg16", 14_723_136),
        ("vgg19", 20_035_392),
    ],
)
def test_vggs_have_as_many_parameters_as_torchvisions_features(name, published):
    params = dict(shapes_of(MODELS[name](n_classes=10), 32, 32, 3)["params"])
    assert n_params(params.pop("head")) == 512 * 10 + 10
    assert n_params(params) == published
    n_convolutions = int(name.removeprefix("vgg")) - 3
    assert set(params) == {
        f"{layer}{i}" for layer in ("conv", "norm") for i in range(n_convolutions)
    }


@pytest.mark.parametrize(
    ("height", "width", "inputs"), [(32, 32, 512), (64, 64, 4 * 512), (96, 71, 6 * 512)]
)
def test_a_vggs_head_adapts_to_the_images(height, width, inputs):
    model = MODELS["vgg16"](n_classes=10)
    variables = shapes_of(model, height, width, 3)
    assert variables["params"]["head"]["kernel"].shape == (inputs, 10)
    sizes = group_sizes(permutation_spec(model), variables)
    assert list(sizes.values()) == 2 * [64] + 2 * [128] + 3 * [256] + 6 * [512]


def test_a_vgg_does_not_pool_single_pixels():
    seen = taps_of(MODELS["vgg11"](n_classes=10), 8, 8, 1)
    maps = [seen[f"relu{i}"].shape[1:3] for i in range(8)]
    assert maps == [(8, 8), (4, 4), (2, 2), (2, 2), (1, 1), (1, 1), (1, 1), (1, 1)]


# Vision transformers ==================================================================


def test_a_vit_has_a_stream_and_four_groups_in_each_block():
    sizes = sizes_of(MODELS["vit"](n_classes=10), 32, 32, 3)
    block = {"heads": 4, "qk": 32, "v": 32, "mlp": 512}
    assert sizes == {"stream": 128} | {
        f"block{i}/{group}": size for i in range(4) for group, size in block.items()
    }


def test_a_vit_has_a_token_for_every_patch():
    model = MODELS["vit"](n_classes=10, patch=2, depth=1)
    variables, seen = shapes_of(model, 8, 6, 1), taps_of(model, 8, 6, 1)
    assert variables["params"]["position"].shape == (12, 128)
    assert variables["params"]["embed"]["kernel"].shape == (2, 2, 1, 128)
    assert seen["block0/attention"].shape == (2, 4, 12, 12)
    assert seen["block0/queries"].shape == (2, 12, 4, 32)


def test_a_vit_refuses_images_of_broken_patches():
    with pytest.raises(ModelError, match="images of 8x6 pixels .* patches of 4x4"):
        shapes_of(MODELS["vit"](n_classes=10), 8, 6, 1)


def test_a_vits_block_is_flax_attention_and_an_mlp():
    model = MODELS["vit"](n_classes=3, dim=12, heads=3, depth=1)
    inputs = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))

    def apply(layer: nn.Module, params: Any, x: jax.Array) -> Any:
        return layer.apply({"params": params}, x)

    @jax.jit
    def both(key):
        variables = init(model, key, inputs)
        seen = activations(model)(variables, inputs)
        block = variables["params"]["block0"]
        x = seen["embedded"]
        y = apply(nn.LayerNorm(epsilon=1e-5), block["norm1"], x)
        attention = {name: block[name] for name in ("query", "key", "value", "out")}
        x = x + apply(nn.MultiHeadDotProductAttention(3), attention, y)
        y = apply(nn.LayerNorm(epsilon=1e-5), block["norm2"], x)
        y = nn.gelu(apply(nn.Dense(4 * 12), block["mlp_in"], y))
        return seen, x + apply(nn.Dense(12), block["mlp_out"], y)

    seen, expected = both(jax.random.key(1))
    np.testing.assert_allclose(seen["block0/stream"], expected, rtol=0, atol=1e-5)
    assert float(jnp.abs(seen["block0/stream"] - seen["embedded"]).max()) > 0.1
    np.testing.assert_allclose(seen["block0/attention"].sum(-1), 1, rtol=1e-5)
