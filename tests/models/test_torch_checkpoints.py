"""Tests that weights are found in checkpoints as people have them, and go home again.

The networks are narrow, and all of their numbers are different, so an array that comes
from a wrong place, or goes to one, is noticed.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dimat_jax.models.torch_import import (
    Flattened,
    TorchImportError,
    from_torch,
    infer_arguments,
    infer_image_shape,
    save_safetensors,
    to_torch,
)
from dimat_jax.tree import PyTree, flatten, map_with_path
from tests.models.test_torch_import import state_dict_of, variables_of

NAME = "resnet20"


@pytest.fixture(scope="module")
def variables() -> PyTree:
    return variables_of(NAME)


@pytest.fixture(scope="module")
def plain() -> dict[str, np.ndarray]:
    """The state dict of the variables, by the names of DIMAT's code."""
    return state_dict_of(NAME)


def assert_equal(tree: PyTree, expected: PyTree) -> None:
    leaves, others = flatten(tree), flatten(expected)
    assert leaves.keys() == others.keys()
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, others[path], err_msg=path)


def respelt(state_dict: Mapping[str, Any], *pairs: tuple[str, str]) -> dict[str, Any]:
    found = dict(state_dict)
    for old, new in pairs:
        assert any(old in key for key in found)
        found = {key.replace(old, new): value for key, value in found.items()}
    return found


def prefixed(prefix: str, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    return {prefix + key: value for key, value in state_dict.items()}


# Checkpoints ==========================================================================

EXTRA = {"loss.weight": np.ones(10, np.float32), "queue": np.ones((4, 5), np.float32)}

# For each kind of checkpoint, a function that makes it, and where the weights are.
FOUND = {
    "Lightning": (
        lambda sd: {
            "state_dict": {**prefixed("model.", sd), **EXTRA},
            "epoch": 3,
            "optimizer_states": [{"state": {0: {"exp_avg": np.ones(3)}}}],
        },
        {},
    ),
    "an optimizer's state beside": (
        lambda sd: {
            "net": sd,
            "optimizer": {"state": {0: {"a": np.ones(3), "b": np.ones((3, 3))}}},
        },
        {},
    ),
    "MoCo, the query encoder": (
        lambda sd: {
            "arch": "resnet18",
            "state_dict": {
                **prefixed("module.encoder_q.", sd),
                **prefixed("module.encoder_k.", {k: 0 * v for k, v in sd.items()}),
                **prefixed("module.", EXTRA),
            },
        },
        {"prefix": "module.encoder_q."},
    ),
    "the same prefix, without wrapper and dot": (
        lambda sd: {
            **prefixed("module.encoder_q.", sd),
            **prefixed("module.encoder_k.", {k: 0 * v for k, v in sd.items()}),
        },
        {"prefix": "encoder_q"},
    ),
    "a mean of the weights beside": (
        lambda sd: {"model_ema": {k: 0 * v for k, v in sd.items()}, "model": sd},
        {"entry": "model"},
    ),
    "nested": (lambda sd: {"model": {"state_dict": sd, "step": 1}}, {}),
    "nested, both entries": (
        lambda sd: {"a": {"x": sd, "y": {k: 0 * v for k, v in sd.items()}}},
        {"entry": ("a", "x")},
    ),
    "nested, the outer entry": (
        lambda sd: {"a": {"x": sd}, "b": {"x": {k: 0 * v for k, v in sd.items()}}},
        {"entry": "a"},
    ),
    "DataParallel of a part": (
        lambda sd: respelt(sd, ("layer2.", "layer2.module.")),
        {},
    ),
    "torchvision's names": (
        lambda sd: respelt(sd, ("linear", "fc"), ("shortcut", "downsample")),
        {},
    ),
    "compiled": (lambda sd: prefixed("_orig_mod.", sd), {}),
    "a student beside its teacher": (
        lambda sd: {
            **prefixed("student.", sd),
            **prefixed("teacher.", respelt(sd, ("layer3.2.", "layer3.3."))),
            **prefixed("teacher.", sd),
        },
        {},
    ),
    "a head in a sequence": (lambda sd: respelt(sd, ("linear.", "linear.1.")), {}),
    "names of one's own": (
        lambda sd: respelt(sd, ("linear.", "top.0."), ("conv1.w", "conv1.conv.w")),
        {
            "names": {
                # One is named as in this library, the others as PyTorch code is.
                "head": "top.0",
                "conv1": "conv1.conv",
                **{
                    f"layer{layer}.{i}.conv1": f"layer{layer}.{i}.conv1.conv"
                    for layer in (1, 2, 3)
                    for i in (0, 1, 2)
                },
            }
        },
    ),
}


@pytest.mark.parametrize("kind", FOUND)
def test_weights_are_found_and_go_home(kind, plain, variables):
    make, arguments = FOUND[kind]
    checkpoint = make(plain)
    assert_equal(from_torch(NAME, checkpoint, **arguments), variables)
    # The very state dict comes back, with what stands beside the weights.
    home = to_torch(NAME, variables, like=checkpoint, **arguments)
    assert any(same(home, original) for original in state_dicts_in(checkpoint))
    doubled = jax.tree.map(lambda x: 2 * x, variables)
    back = to_torch(NAME, doubled, like=checkpoint, **arguments)
    assert_equal(from_torch(NAME, back, **without_entry(arguments)), doubled)
    changed = [key for key in home if not np.array_equal(back[key], home[key])]
    assert len(changed) == len(plain)


def same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    return found.keys() == expected.keys() and all(
        array.dtype == expected[key].dtype and np.array_equal(array, expected[key])
        for key, array in found.items()
    )


def without_entry(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name != "entry"}


def state_dicts_in(checkpoint: Mapping[Any, Any]) -> list[Mapping[str, Any]]:
    inner = [value for value in checkpoint.values() if isinstance(value, Mapping)]
    if not inner:
        return [checkpoint]
    return [found for each in inner for found in state_dicts_in(each)]


AMBIGUOUS = {
    "two entries": (
        lambda sd: {"model": sd, "model_ema": sd},
        {},
        "['model'], the state dict['model_ema']; choose one with entry=",
    ),
    "two prefixes": (
        lambda sd: {**prefixed("encoder_q.", sd), **prefixed("encoder_k.", sd)},
        {},
        "begin with 'encoder_q.'), the state dict (its keys that begin with 'encoder_k",
    ),
    "one within the other": (
        lambda sd: {**sd, **prefixed("ema.", sd)},
        {},
        "the state dict, the state dict (its keys that begin with 'ema.')",
    ),
    "no such entry": (
        lambda sd: {"model": sd},
        {"entry": "modle"},
        "has no entry 'modle'; allowed: model; did you mean 'model'?",
    ),
    "an entry that is no mapping": (
        lambda sd: {"model": sd, "epoch": 3},
        {"entry": "epoch"},
        "['epoch']: expected a state dict, found int",
    ),
    "no such prefix": (
        lambda sd: prefixed("model.", sd),
        {"prefix": "net."},
        "no key begins with 'net.'; they begin with model.",
    ),
    "a layer that is not there": (
        lambda sd: sd,
        {"names": {"fcc": "top"}},
        "names: resnet20 has no layer 'fcc'; ",
    ),
}


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_a_choice_that_only_the_user_can_make_is_asked_for(kind, plain):
    make, arguments, message = AMBIGUOUS[kind]
    with pytest.raises(TorchImportError) as error:
        from_torch(NAME, make(plain), **arguments)
    assert message in str(error.value)


# Variants =============================================================================


def test_a_dense_layer_without_a_bias_computes_the_same_with_zeros(plain, variables):
    checkpoint = {key: value for key, value in plain.items() if key != "linear.bias"}
    found = from_torch(NAME, checkpoint)
    assert not np.any(found["params"]["head"]["bias"])
    assert to_torch(NAME, found, like=checkpoint).keys() == checkpoint.keys()
    with pytest.raises(
        TorchImportError, match="no 'linear.bias', but 'params/head/bias'"
    ):
        to_torch(NAME, variables, like=checkpoint)
    del checkpoint["linear.weight"]
    with pytest.raises(TorchImportError, match=r"missing: linear.weight, linear.bias"):
        from_torch(NAME, checkpoint)


def test_shortcuts_without_weights_are_option_a():
    variables = variables_of("resnet20", shortcut="pad")
    state_dict = to_torch("resnet20", variables)
    assert not any("shortcut" in key for key in state_dict)
    assert_equal(from_torch("resnet20", state_dict), variables)
    assert infer_arguments("resnet20", variables)["shortcut"] == "pad"


@pytest.mark.slow
def test_wide_resnets_are_architectures_of_their_own():
    state_dict = state_dict_of("wide_resnet50_2")
    with pytest.raises(TorchImportError, match="the names of wide_resnet50_2"):
        from_torch("resnet50", state_dict)
    assert state_dict["layer1.0.conv2.weight"].shape == (16, 16, 3, 3)
    assert state_dict["layer1.0.conv3.weight"].shape == (32, 16, 1, 1)


@pytest.mark.slow
def test_grouped_convolutions_are_refused_with_the_reason():
    state_dict = dict(state_dict_of("resnet50"))
    for layer, width in enumerate((16, 32, 64, 128), start=1):
        for key in [k for k in state_dict if k.startswith(f"layer{layer}.")]:
            if key.endswith("conv2.weight"):
                state_dict[key] = np.zeros((width, width // 4, 3, 3), np.float32)
            elif key.endswith("conv1.weight"):
                inputs = state_dict[key].shape[1]
                state_dict[key] = np.zeros((width, inputs, 1, 1), np.float32)
    with pytest.raises(TorchImportError, match="is a grouped convolution, as ResNeXt"):
        from_torch("resnet50", state_dict)


def test_the_pixels_that_a_head_reads_tell_the_size_of_images():
    assert infer_image_shape("vgg11", variables_of("vgg11", 64)) == (32, 128, 3)
    assert infer_image_shape(NAME, variables_of(NAME)) == (32, 32, 3)
    assert infer_image_shape("vgg11", variables_of("vgg11")) == (32, 32, 3)


# There and back =======================================================================


@pytest.mark.parametrize(
    "precision, kind", [("float16", "safetensors"), ("bfloat16", "pth")]
)
def test_files_go_home_in_their_own_precision(tmp_path, plain, precision, kind):
    torch = pytest.importorskip("torch")
    load = pytest.importorskip("safetensors.torch").load_file
    tensors = {
        key: torch.from_numpy(array).to(getattr(torch, precision))
        for key, array in respelt(plain, ("linear.", "head.1.")).items()
    }
    tensors["bn1.num_batches_tracked"] = torch.tensor(7)
    tensors["mask"] = torch.tensor([True, False])
    path = tmp_path / f"weights.{kind}"
    if kind == "pth":
        torch.save(tensors, path)
    else:
        save_safetensors(path, tensors)
        assert same_tensors(load(path), tensors)
    names = {"linear": "head.1"}
    # There is no model of which a mask is a part.
    with pytest.raises(TorchImportError, match="unexpected: mask"):
        from_torch(NAME, path, names=names)
    wrapped = prefixed("net.", {k: v for k, v in tensors.items() if k != "mask"})
    wrapped["mask"] = tensors["mask"]
    torch.save(wrapped, path.with_suffix(".pth"))
    found = from_torch(NAME, path.with_suffix(".pth"), names=names)
    back = to_torch(NAME, found, like=path.with_suffix(".pth"), names=names)
    assert all(isinstance(tensor, torch.Tensor) for tensor in back.values())
    assert same_tensors(back, wrapped)
    save_safetensors(tmp_path / "back.safetensors", back)
    assert same_tensors(load(tmp_path / "back.safetensors"), wrapped)


def same_tensors(found: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    return found.keys() == expected.keys() and all(
        found[key].dtype == expected[key].dtype
        and found[key].shape == expected[key].shape
        and bool((found[key] == expected[key]).all())
        for key in found
    )


def test_numbers_that_the_dtype_at_home_cannot_hold_are_refused(plain, variables):
    like = {key: array.astype(np.float16) for key, array in plain.items()}
    large = map_with_path(lambda path, leaf: leaf * np.float32(1e6), variables)
    with pytest.raises(TorchImportError, match="NaN or infinite"):
        to_torch(NAME, large, like=like)


def test_variables_of_another_size_do_not_go_home(plain, variables):
    like = {**plain, "linear.weight": np.ones((4, 8)), "linear.bias": np.ones(4)}
    with pytest.raises(TorchImportError, match=r"'linear.weight' is of shape \(4, 8\)"):
        to_torch(NAME, variables, like=like)


def test_weights_in_several_files_are_read_by_their_index(tmp_path, plain, variables):
    pytest.importorskip("safetensors")
    parts = {"model-1-of-2.safetensors": {}, "model-2-of-2.safetensors": {}}
    index = {}
    for i, (key, array) in enumerate(plain.items()):
        file = list(parts)[i % 2]
        parts[file][key] = array
        index[key] = file
    for file, tensors in parts.items():
        save_safetensors(tmp_path / file, tensors)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    # The folder does as well, as those of Hugging Face's models have one model.
    for source in (path, tmp_path):
        assert_equal(from_torch(NAME, source), variables)
    back = to_torch(NAME, variables, like=path)
    assert list(back) == list(plain)
    for key, file, message in (
        ("linear.weight", "../x.safetensors", "which is no file beside it"),
        ("linear.weight", "gone.safetensors", "there is no such file"),
        ("gone.weight", "model-1-of-2.safetensors", "is in none of its files"),
    ):
        path.write_text(json.dumps({"weight_map": {**index, key: file}}))
        with pytest.raises(TorchImportError, match=message):
            from_torch(NAME, path)
    path.write_text("{}")
    with pytest.raises(TorchImportError, match="as an index of weights it cannot be"):
        from_torch(NAME, path)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(TorchImportError, match="the folder holds none of model.safe"):
        from_torch(NAME, tmp_path)


# A model of one's own =================================================================


class Net(nn.Module):
    """What `torch_net` computes, on images [batch, height, width, channels]."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), padding=1)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1)
        x = nn.relu(nn.Dense(8)(x))
        return nn.Dense(3)(x)


NAMES = {
    "Conv_0": "body.0",
    "BatchNorm_0": "body.1",
    "Dense_0": Flattened("top.fc1", pixels=2 * 3),
    "params/Dense_1/kernel": "top.fc2.weight",
    "Dense_1": "top.fc2",
}


@pytest.fixture(scope="module")
def own():
    return jax.eval_shape(Net().init, jax.random.key(0), jnp.ones((1, 4, 6, 2)))


def torch_net():
    torch = pytest.importorskip("torch")
    layers = torch.nn
    body = layers.Sequential(
        layers.Conv2d(2, 6, 3, padding=1), layers.BatchNorm2d(6, eps=1e-5)
    )
    top = layers.ModuleDict({"fc1": layers.Linear(36, 8), "fc2": layers.Linear(8, 3)})
    net = layers.ModuleDict({"body": body, "top": top})
    with torch.no_grad():
        for tensor in body[1].state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape))
    return net.eval()


def test_a_model_of_ones_own_computes_the_same(own):
    torch = pytest.importorskip("torch")
    net = torch_net()
    x = torch.randn(5, 2, 4, 6)
    with torch.no_grad():
        y = torch.nn.functional.max_pool2d(net["body"](x).relu(), 2).flatten(1)
        expected = net["top"]["fc2"](net["top"]["fc1"](y).relu()).numpy()
    checkpoint = {"state_dict": prefixed("model.", net.state_dict()), "lr": 0.1}
    variables = from_torch(own, checkpoint, names=NAMES)
    logits = jax.jit(Net().apply)(variables, x.permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    back = to_torch(own, variables, like=checkpoint, names=NAMES)
    assert same_tensors(back, checkpoint["state_dict"])
    alone = to_torch(own, variables, names=NAMES)
    counter = "body.1.num_batches_tracked"
    assert alone.keys() == net.state_dict().keys() - {counter}


def test_without_a_model_the_state_dict_stays_as_it_is():
    torch = pytest.importorskip("torch")
    tensors = torch_net().half().state_dict()
    checkpoint = {
        "net": prefixed("module.", tensors),
        "optimizer": {"state": {0: {"momentum": torch.ones(3)}}},
    }
    found = from_torch(None, checkpoint)
    counter = "body.1.num_batches_tracked"
    assert found.keys() == tensors.keys() - {counter}
    assert {leaf.dtype for leaf in found.values()} == {jnp.dtype("float32")}
    assert same_tensors(to_torch(None, found, like=checkpoint), checkpoint["net"])
    part = from_torch(None, checkpoint, prefix="top")
    assert part.keys() == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    assert to_torch(None, found)["top.fc1.weight"].shape == (8, 36)


WRONG_TABLES = {
    "a layer without a name": (
        {k: v for k, v in NAMES.items() if k != "Conv_0"},
        "names must also tell the PyTorch name of params/Conv_0/bias, params/Conv_0/k",
    ),
    "a layer that is not there": (
        {**NAMES, "Conv_1": "body.3"},
        "the model has no layer 'Conv_1'; allowed: ",
    ),
    "a name that is not there": (
        {**NAMES, "Conv_0": "body.3"},
        "does not fit the model. missing: body.3.",
    ),
    "pixels that do not divide": (
        {**NAMES, "Dense_0": Flattened("top.fc1", pixels=7)},
        "'params/Dense_0/kernel' has 36 inputs, which are not 7 pixels",
    ),
}


@pytest.mark.parametrize("kind", WRONG_TABLES)
def test_a_table_that_does_not_fit_is_refused(kind, own):
    names, message = WRONG_TABLES[kind]
    with pytest.raises(TorchImportError) as error:
        from_torch(own, torch_net().state_dict(), names=names)
    assert message in str(error.value)


def test_several_state_dicts_without_a_model_are_ambiguous(plain):
    with pytest.raises(TorchImportError, match="several state dicts are there"):
        from_torch(None, {"model": plain, "ema": plain})
