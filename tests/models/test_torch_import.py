"""Tests that imported PyTorch weights give equal networks, and which are refused."""

import pickle
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dimat_jax.models import MODELS
from dimat_jax.models.classifier import forward, init
from dimat_jax.models.torch_import import (
    ARCHITECTURES,
    TorchImportError,
    from_torch,
    infer_arguments,
    infer_model,
    to_torch,
)
from dimat_jax.tree import PyTree, flatten, map_with_path

# What PyTorch computes ================================================================


class Case(NamedTuple):
    """A network as PyTorch code writes it, and the arguments that its weights tell."""

    name: str
    build: Callable[[], Any]
    image_size: int
    arguments: dict[str, Any]


def resnet(*blocks: int, **settings: Any) -> Callable[[], Any]:
    def build():
        from tests.reference.torch_models import ResNet

        return ResNet(blocks, n_classes=5, **settings)

    return build


def vgg(*layers: int, **settings: Any) -> Callable[[], Any]:
    def build():
        from tests.reference.torch_models import VGG

        return VGG(layers, n_classes=5, **settings)

    return build


torchvision = {"shortcut": ("downsample", 1), "head": "fc"}

CASES = {
    "resnet20": Case(
        "resnet20", resnet(3, 3, 3, width=8), 32, {"width": 0.5, "shortcut": "conv3x3"}
    ),
    "resnet20, 1x1 shortcuts": Case(
        "resnet20",
        resnet(3, 3, 3, width=16, **torchvision),
        32,
        {"width": 1, "shortcut": "conv1x1"},
    ),
    "resnet20, shortcuts without weights": Case(
        "resnet20",
        resnet(3, 3, 3, width=8, shortcut=("shortcut", 0)),
        32,
        {"width": 0.5, "shortcut": "pad"},
    ),
    "resnet18, CIFAR names": Case(
        "resnet18",
        resnet(2, 2, 2, 2, width=8, shortcut=("shortcut", 1)),
        32,
        {"width": 1 / 8, "stem": "cifar"},
    ),
    "resnet50": Case(
        "resnet50",
        resnet(3, 4, 6, 3, width=8, bottleneck=True, stem=7, **torchvision),
        64,
        {"width": 1 / 8, "stem": "imagenet"},
    ),
    "resnet50, CIFAR stem": Case(
        "resnet50",
        resnet(3, 4, 6, 3, width=8, bottleneck=True, **torchvision),
        32,
        {"width": 1 / 8, "stem": "cifar"},
    ),
    "vgg16, 32 x 32": Case(
        "vgg16", vgg(2, 2, 3, 3, 3, width=8), 32, {"width": 1 / 8, "norm": "batch"}
    ),
    "vgg16, 64 x 64": Case(
        "vgg16",
        vgg(2, 2, 3, 3, 3, width=8, image_size=64),
        64,
        {"width": 1 / 8, "norm": "batch"},
    ),
    "vgg16 without BatchNorm": Case(
        "vgg16",
        vgg(2, 2, 3, 3, 3, width=8, image_size=64, batch_norm=False),
        64,
        {"width": 1 / 8, "norm": "none"},
    ),
}
FULL_SIZE = {
    "wide_resnet50_2": Case(
        "wide_resnet50_2",
        resnet(3, 4, 6, 3, width=16, bottleneck=True, wide=True, stem=7, **torchvision),
        64,
        {"width": 1 / 4, "stem": "imagenet"},
    ),
    "resnet50": Case(
        "resnet50",
        resnet(3, 4, 6, 3, width=64, bottleneck=True, stem=7, **torchvision),
        96,
        {"width": 1, "stem": "imagenet"},
    ),
    "vgg16": Case(
        "vgg16",
        vgg(2, 2, 3, 3, 3, width=64, image_size=96),
        96,
        {"width": 1, "norm": "batch"},
    ),
}

every_case = pytest.mark.parametrize("case", CASES)


class Original(NamedTuple):
    module: Any
    images: np.ndarray
    logits: np.ndarray


@cache
def original(case: str) -> Original:
    return run(CASES[case])


def run(case: Case) -> Original:
    torch = pytest.importorskip("torch")
    from tests.reference.torch_models import randomise

    shape = (8, 3, case.image_size, case.image_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    module = randomise(case.build(), images)
    with torch.no_grad():
        logits = module(images).numpy()
    return Original(module, images.permute(0, 2, 3, 1).numpy(), logits)


@pytest.mark.every_nth(3)
@every_case
def test_logits_are_those_of_pytorch(case):
    check_logits(CASES[case], original(case))


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL_SIZE)
def test_logits_are_those_of_pytorch_at_full_size(case):
    check_logits(FULL_SIZE[case], run(FULL_SIZE[case]))


def check_logits(case: Case, original: Original):
    # Without this check, networks that ignore their inputs would pass.
    assert original.logits.std(axis=0).min() > 0.05
    variables = from_torch(case.name, original.module.state_dict())
    model = infer_model(case.name, variables)
    logits = jax.jit(forward(model))(variables, original.images)
    np.testing.assert_allclose(logits, original.logits, rtol=0, atol=1e-4)


@pytest.mark.every_nth(3)
@every_case
def test_arguments_follow_from_the_weights(case):
    variables = from_torch(CASES[case].name, original(case).module.state_dict())
    arguments = {"n_classes": 5, **CASES[case].arguments}
    assert infer_arguments(CASES[case].name, variables) == arguments


@pytest.mark.every_nth(3)
@every_case
def test_pytorch_loads_what_to_torch_makes_of_its_weights(case):
    torch = pytest.importorskip("torch")
    name, module = CASES[case].name, original(case).module
    state_dict = module.state_dict()
    back = to_torch(name, from_torch(name, state_dict))
    # Two cases use the names of the other family.
    respelt = {
        "resnet20, 1x1 shortcuts": [("shortcut", "downsample"), ("linear", "fc")],
        "resnet18, CIFAR names": [("downsample", "shortcut"), ("fc", "linear")],
    }
    for ours, theirs in respelt.get(case, []):
        assert any(ours in key for key in back)
        back = {key.replace(ours, theirs): array for key, array in back.items()}
    counters = {key for key in state_dict if key.endswith("num_batches_tracked")}
    assert back.keys() == state_dict.keys() - counters
    for key, array in back.items():
        np.testing.assert_array_equal(array, state_dict[key].numpy(), err_msg=key)
    empty = CASES[case].build().eval()
    empty.load_state_dict({k: torch.from_numpy(v) for k, v in back.items()})
    images = torch.from_numpy(original(case).images).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = empty(images).numpy()
    np.testing.assert_allclose(logits, original(case).logits, rtol=0, atol=1e-6)


# There and back =======================================================================


@cache
def variables_of(name: str, image_size: int = 32, **arguments: Any) -> PyTree:
    """Variables of a narrow network. All of their numbers are different."""
    model = MODELS[name](**{"n_classes": 3, "width": 1 / 8, **arguments})
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    shapes = jax.eval_shape(partial(init, model), jax.random.key(0), image)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        return rng.normal(size=leaf.shape).astype(np.float32)

    return map_with_path(draw, shapes)


def state_dict_of(name: str, **arguments: Any) -> dict[str, np.ndarray]:
    return to_torch(name, variables_of(name, **arguments))


def test_every_convolutional_architecture_has_pytorch_names():
    families = ("resnet", "vgg", "wide_resnet")
    assert {name for name in MODELS if name.startswith(families)} == set(ARCHITECTURES)


# All other architectures differ only in the number of blocks, and tracing them is slow.
QUICK = {"resnet18", "resnet20", "resnet50", "vgg11", "vgg16"}


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in ARCHITECTURES
    ],
)
def test_from_torch_is_the_inverse_of_to_torch(name):
    settings = ARCHITECTURES[name].settings
    ((setting, values),) = settings.items()
    for value in values:
        arguments = {setting: value, "image_size": 64}
        variables = variables_of(name, **arguments)
        state_dict = state_dict_of(name, **arguments)
        assert all(array.flags.c_contiguous for array in state_dict.values())
        assert_equal(from_torch(name, state_dict), variables)
        inferred = {"n_classes": 3, "width": 1 / 8, setting: value}
        assert infer_arguments(name, variables) == inferred


def test_the_names_are_dimats_for_resnet20():
    keys = set(state_dict_of("resnet20"))
    expected = {"conv1.weight", "linear.weight", "linear.bias", *norm("bn1")}
    for layer in (1, 2, 3):
        for i in range(3):
            for part in (1, 2):
                expected |= {f"layer{layer}.{i}.conv{part}.weight"}
                expected |= norm(f"layer{layer}.{i}.bn{part}")
    for layer in (2, 3):
        expected |= {f"layer{layer}.0.shortcut.0.weight"}
        expected |= norm(f"layer{layer}.0.shortcut.1")
    assert keys == expected


def test_the_names_are_torchvisions_for_resnet50():
    keys = set(state_dict_of("resnet50"))
    expected = {"conv1.weight", "fc.weight", "fc.bias", *norm("bn1")}
    for layer, n_blocks in enumerate((3, 4, 6, 3), start=1):
        for i in range(n_blocks):
            for part in (1, 2, 3):
                expected |= {f"layer{layer}.{i}.conv{part}.weight"}
                expected |= norm(f"layer{layer}.{i}.bn{part}")
        expected |= {f"layer{layer}.0.downsample.0.weight"}
        expected |= norm(f"layer{layer}.0.downsample.1")
    assert keys == expected


# The numbers of layers in torchvision's vgg16 and vgg16_bn.
VGG16_CONVS = {
    "none": [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28],
    "batch": [0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40],
}


@pytest.mark.parametrize("kind", VGG16_CONVS)
def test_the_names_are_torchvisions_for_vgg16(kind):
    expected = {"classifier.weight", "classifier.bias"}
    for i in VGG16_CONVS[kind]:
        expected |= {f"features.{i}.weight", f"features.{i}.bias"}
        if kind == "batch":
            expected |= norm(f"features.{i + 1}")
    assert set(state_dict_of("vgg16", norm=kind)) == expected


def norm(layer: str) -> set[str]:
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{layer}.{part}" for part in parts}


# What weights come in =================================================================


@pytest.fixture
def variables():
    return variables_of("resnet20")


@pytest.fixture
def state_dict():
    return dict(state_dict_of("resnet20"))


def assert_equal(tree: PyTree, expected: PyTree, cast: Any = np.float32) -> None:
    leaves, expected_leaves = flatten(tree), flatten(expected)
    assert leaves.keys() == expected_leaves.keys()
    for path, leaf in leaves.items():
        assert leaf.dtype == jnp.float32, path
        rounded = np.asarray(expected_leaves[path]).astype(cast).astype(np.float32)
        np.testing.assert_array_equal(leaf, rounded, err_msg=path)


def test_a_safetensors_file(tmp_path, state_dict, variables):
    safetensors = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "weights.safetensors"
    safetensors.save_file(state_dict, path)
    assert_equal(from_torch("resnet20", path), variables)
    assert_equal(from_torch("resnet20", str(path)), variables)


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("kind", ["safetensors", "pth", "tensors"])
def test_any_precision_becomes_float32(
    tmp_path, state_dict, variables, precision, kind
):
    torch = pytest.importorskip("torch")
    tensors = {
        key: torch.from_numpy(array).to(getattr(torch, precision))
        for key, array in state_dict.items()
    }
    tensors["bn1.num_batches_tracked"] = torch.tensor(3)
    source = tensors
    if kind == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(
            tensors, source := tmp_path / "weights.safetensors"
        )
    elif kind == "pth":
        torch.save(tensors, source := tmp_path / "weights.pth")
    cast = jnp.bfloat16 if precision == "bfloat16" else precision
    assert_equal(from_torch("resnet20", source), variables, cast)


def test_numpys_precisions_become_float32_too(state_dict, variables):
    for dtype in (np.float16, jnp.bfloat16, np.float64):
        rounded = {key: array.astype(dtype) for key, array in state_dict.items()}
        assert_equal(from_torch("resnet20", rounded), variables, dtype)


def test_trainable_parameters(state_dict, variables):
    torch = pytest.importorskip("torch")
    parameters = {
        key: torch.nn.Parameter(torch.from_numpy(array))
        for key, array in state_dict.items()
    }
    assert_equal(from_torch("resnet20", parameters), variables)


def test_the_weights_are_copies(state_dict, variables):
    state_dict = {key: array.copy() for key, array in state_dict.items()}
    imported = from_torch("resnet20", state_dict)
    for array in state_dict.values():
        array[...] = 0
    assert_equal(imported, variables)
    exported = to_torch("resnet20", imported)
    for array in exported.values():
        array[...] = 0
    assert_equal(imported, variables)


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.module."])
def test_what_all_keys_begin_with_is_taken_off(state_dict, variables, prefix):
    prefixed = {prefix + key: array for key, array in state_dict.items()}
    assert_equal(from_torch("resnet20", prefixed), variables)


@pytest.mark.parametrize("entry", ["state_dict", "model", "net"])
def test_the_one_state_dict_of_a_checkpoint_is_taken(
    tmp_path, state_dict, variables, entry
):
    torch = pytest.importorskip("torch")
    tensors = {key: torch.from_numpy(array) for key, array in state_dict.items()}
    checkpoint = {
        entry: tensors,
        "epoch": 3,
        "best_accuracy": torch.tensor(0.7),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []},
    }
    assert_equal(from_torch("resnet20", checkpoint), variables)
    torch.save(checkpoint, tmp_path / "checkpoint.pth.tar")
    assert_equal(from_torch("resnet20", tmp_path / "checkpoint.pth.tar"), variables)


@pytest.mark.parametrize("spelling", ["classifier.0", "classifier.1"])
def test_the_head_of_a_vgg_may_be_in_a_sequence(spelling):
    state_dict = {
        key.replace("classifier", spelling): array
        for key, array in state_dict_of("vgg11").items()
    }
    assert_equal(from_torch("vgg11", state_dict), variables_of("vgg11"))


def test_the_model_computes_in_the_dtype_that_is_asked_for(variables):
    assert infer_model("resnet20", variables).dtype == jnp.float32
    assert infer_model("resnet20", variables, dtype=jnp.bfloat16).dtype == jnp.bfloat16


# What does not fit ====================================================================


def refuse(name: str, source: Any, *parts: str) -> None:
    """Checks that `from_torch` refuses weights, and that its message has all parts."""
    with pytest.raises(TorchImportError) as caught:
        from_torch(name, source)
    for part in parts:
        assert part in str(caught.value)


def test_missing_and_unexpected_keys_are_named(state_dict):
    del state_dict["layer2.0.shortcut.1.running_var"]
    state_dict["aux.weight"] = np.zeros((2, 3), np.float32)
    refuse(
        "resnet20",
        state_dict,
        "missing: layer2.0.shortcut.1.running_var",
        "unexpected: aux.weight (2, 3)",
    )


def test_keys_are_named_even_where_sizes_cannot_be_told(state_dict):
    del state_dict["conv1.weight"], state_dict["linear.weight"]
    state_dict["layer1.0.conv1.weight"] = np.zeros((3, 3), np.float32)
    refuse(
        "resnet20",
        state_dict,
        "missing: conv1.weight, linear.weight;",
        "layer1.0.conv1.weight (3, 3), expected 4 axes",
    )


def test_wrong_shapes_are_named_with_the_right_ones(state_dict):
    state_dict["layer1.1.conv2.weight"] = np.zeros((2, 2, 5, 5), np.float32)
    state_dict["bn1.bias"] = np.zeros(3, np.float32)
    refuse(
        "resnet20",
        state_dict,
        "n_classes=3, width=0.125",
        "layer1.1.conv2.weight (2, 2, 5, 5), expected (2, 2, 3, 3)",
        "bn1.bias (3,), expected (2,)",
    )


@pytest.mark.parametrize(
    "key, shape",
    [
        ("conv1.weight", (2, 3, 7, 7)),
        ("conv1.weight", (3, 3, 3, 3)),
        ("conv1.weight", (2, 3)),
        ("conv1.weight", (0, 3, 3, 3)),
        ("linear.weight", (3,)),
        ("linear.weight", (3, 9)),
        ("linear.weight", (3, 32)),
        ("linear.weight", (4, 8)),
        ("linear.bias", ()),
    ],
)
def test_no_wrong_shape_slips_through(state_dict, key, shape):
    state_dict[key] = np.zeros(shape, np.float32)
    refuse("resnet20", state_dict, "of another shape")


def test_the_head_of_a_vgg_sees_whole_pixels():
    state_dict = dict(state_dict_of("vgg11"))
    for n_inputs in (65, 60, 127):
        state_dict["classifier.weight"] = np.zeros((3, n_inputs), np.float32)
        refuse(
            "vgg11", state_dict, f"classifier.weight (3, {n_inputs}), expected (3, 64)"
        )


def test_another_architectures_weights_are_told_by_their_names(state_dict):
    refuse("resnet32", state_dict, "of resnet20. missing: layer1.3.", ", and 50 more")
    refuse("resnet18", state_dict_of("resnet34"), "names of resnet34")
    refuse("vgg16", state_dict_of("vgg13", norm="none"), "names of vgg13")


def test_wider_bottlenecks_do_not_fit():
    state_dict = dict(state_dict_of("resnet50"))
    state_dict["layer1.0.conv2.weight"] = np.zeros((16, 16, 3, 3), np.float32)
    refuse("resnet50", state_dict, "layer1.0.conv2.weight (16, 16, 3, 3), expected (8")


def test_torchvisions_three_layer_classifier_is_refused_with_the_reason():
    state_dict = dict(state_dict_of("vgg11"))
    del state_dict["classifier.weight"], state_dict["classifier.bias"]
    for layer, shape in {0: (32, 64 * 49), 3: (32, 32), 6: (3, 32)}.items():
        state_dict[f"classifier.{layer}.weight"] = np.zeros(shape, np.float32)
        state_dict[f"classifier.{layer}.bias"] = np.zeros(shape[0], np.float32)
    refuse(
        "vgg11",
        state_dict,
        "several dense layers (classifier.0, classifier.3, classifier.6)",
        "one dense layer",
    )


def test_two_spellings_at_once_are_ambiguous(state_dict):
    state_dict["fc.weight"] = state_dict["linear.weight"]
    refuse("resnet20", state_dict, "unexpected: fc.weight (3, 8)")


def test_a_batch_counter_of_no_norm_is_unexpected(state_dict):
    state_dict["bn1.num_batches_tracked"] = np.int64(3)
    from_torch("resnet20", state_dict)
    state_dict["bn9.num_batches_tracked"] = np.int64(3)
    refuse("resnet20", state_dict, "unexpected: bn9.num_batches_tracked ()")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused_in_both_directions(state_dict, bad):
    state_dict["layer3.1.bn2.running_mean"][:2] = bad
    refuse("resnet20", state_dict, "'layer3.1.bn2.running_mean' holds 2 value(s)")
    variables = map_with_path(lambda path, leaf: leaf.copy(), variables_of("resnet20"))
    variables["params"]["head"]["bias"][0] = bad
    with pytest.raises(TorchImportError, match="'params/head/bias' holds 1 value"):
        to_torch("resnet20", variables)


def test_numbers_that_float32_cannot_hold_are_refused(state_dict):
    state_dict["bn1.weight"] = np.full(2, 1e300)
    refuse("resnet20", state_dict, "'bn1.weight' holds 2 value(s)")


@pytest.mark.parametrize("dtype", [np.int8, bool, np.complex64])
def test_numbers_that_are_not_real_are_refused(state_dict, dtype):
    state_dict["bn1.weight"] = np.ones(2, dtype)
    refuse("resnet20", state_dict, "'bn1.weight' holds", np.dtype(dtype).name)


def test_entries_that_are_no_arrays_are_named(state_dict):
    refuse("resnet20", {**state_dict, "epoch": 3}, "not arrays: epoch")
    refuse("resnet20", variables_of("resnet20"), "not arrays: batch_stats, params")
    refuse("resnet20", {}, "missing: conv1.weight")


def test_a_checkpoint_of_several_state_dicts_is_ambiguous(state_dict):
    checkpoint = {"model": state_dict, "model_ema": state_dict}
    refuse(
        "resnet20",
        checkpoint,
        "several state dicts hold a resnet20: the state dict['model'], the state dict["
        "'model_ema']; choose one with entry= or prefix=",
    )


@pytest.mark.parametrize("name", ["mlp", "resnet21"])
def test_a_name_without_pytorch_names_is_refused(name, state_dict, variables):
    refuse(name, state_dict, f"no PyTorch names for '{name}'", "allowed: resnet101")
    for function in (to_torch, infer_arguments, infer_model):
        with pytest.raises(TorchImportError, match=f"'{name}'"):
            function(name, variables)


@pytest.mark.usefixtures("without_type_checks")
def test_what_is_neither_file_nor_mapping_is_refused(tmp_path):
    refuse("resnet20", [1, 2], "module.state_dict()", "got list")
    refuse("resnet20", tmp_path / "gone.pth", "gone.pth: there is no such file")


@pytest.mark.parametrize("wrong", ["name", "width", "collection"])
def test_variables_of_another_model_are_not_written(variables, wrong):
    if wrong == "name":
        with pytest.raises(TorchImportError, match="stage0_block3/conv1/kernel"):
            to_torch("resnet32", variables)
    elif wrong == "width":
        params = {
            **variables["params"],
            "head": variables_of("vgg11")["params"]["head"],
        }
        with pytest.raises(
            TorchImportError, match=r"params/head/kernel \(64, 3\), expected \(8, 3\)"
        ):
            to_torch("resnet20", {**variables, "params": params})
    else:
        with pytest.raises(TorchImportError, match="missing: batch_stats/norm0/mean"):
            to_torch("resnet20", {"params": variables["params"]})


# Files ================================================================================


def test_a_pickle_in_a_pth_is_refused_and_not_executed(tmp_path):
    torch = pytest.importorskip("torch")
    for name, save in {
        "plain.pth": lambda content, path: path.write_bytes(pickle.dumps(content)),
        "torch.pth": torch.save,
    }.items():
        save({"conv1.weight": Trap(tmp_path / "executed")}, tmp_path / name)
        refuse("resnet20", tmp_path / name, name, "refused", "module.state_dict()")
        assert not (tmp_path / "executed").exists()
    # This shows that the trap works.
    pickle.loads((tmp_path / "plain.pth").read_bytes())
    assert (tmp_path / "executed").exists()


class Trap:
    """An object that makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


def test_a_whole_module_in_a_pth_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(2, 3), tmp_path / "module.pth")
    refuse("resnet20", tmp_path / "module.pth", "refused", "module.state_dict()")


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_broken_file_is_refused(tmp_path, name, state_dict):
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.numpy").save_file
    path = tmp_path / name
    if name.endswith(".pth"):
        torch.save({k: torch.from_numpy(v) for k, v in state_dict.items()}, path)
    else:
        save_file(state_dict, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no weights at all"):
        path.write_bytes(content)
        refuse("resnet20", path, name)


def test_a_pth_of_something_else_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    refuse("resnet20", tmp_path / "tensor.pth", "expected a state dict, found Tensor")


def test_a_safetensors_file_of_other_numbers_is_refused(tmp_path, state_dict):
    save_file = pytest.importorskip("safetensors.numpy").save_file
    state_dict["bn1.bias"] = np.ones(2, np.uint16)
    save_file(state_dict, tmp_path / "weights.safetensors")
    refuse(
        "resnet20", tmp_path / "weights.safetensors", "'bn1.bias' holds U16; allowed"
    )
    state_dict["bn1.bias"] = np.ones(2, np.int8)
    save_file(state_dict, tmp_path / "weights.safetensors")
    refuse("resnet20", tmp_path / "weights.safetensors", "'bn1.bias' holds int8")


@pytest.mark.parametrize(
    "package, name", [("torch", "weights.pth"), ("safetensors", "weights.safetensors")]
)
def test_a_reader_that_is_not_installed_is_asked_for(
    tmp_path, monkeypatch, package, name
):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).touch()
    refuse("resnet20", tmp_path / name, "pip install 'dimat_jax[torch]'")
