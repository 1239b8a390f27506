"""What is particular to one architecture."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dimat_jax.models import MODELS, permutation_spec
from dimat_jax.models.classifier import activations, batch_statistics, init
from dimat_jax.permutation import group_sizes
from dimat_jax.tree import flatten


def shapes_of(model: nn.Module, *input_shape: int) -> dict:
    inputs = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    return jax.eval_shape(lambda x: init(model, jax.random.key(0), x), inputs)


def n_params(variables: dict) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(variables))


def test_an_mlp_is_as_wide_as_it_is_told():
    model = MODELS["mlp"](n_classes=10, hidden=(8, 6), width=3)
    variables = shapes_of(model, 8, 8, 1)
    sizes = group_sizes(permutation_spec(model), variables)
    assert sizes == {"hidden0": 24, "hidden1": 18}
    assert n_params(variables) == 65 * 24 + 25 * 18 + 19 * 10


def test_an_mlp_normalises_no_batches():
    assert batch_statistics(MODELS["mlp"](n_classes=10)) is None
    assert set(shapes_of(MODELS["mlp"](n_classes=10), 8, 8, 1)) == {"params"}


def test_a_model_without_taps_has_no_activations():
    model = MODELS["mlp"](n_classes=3, hidden=())
    inputs = jnp.ones((2, 4))
    assert activations(model)(init(model, jax.random.key(0), inputs), inputs) == {}


def test_resnet20_is_the_papers():
    # He et al. count 0.27 million with parameterless shortcuts; 3x3 ones add these two.
    variables = shapes_of(MODELS["resnet20"](n_classes=10), 32, 32, 3)
    shortcuts = 9 * 16 * 32 + 9 * 32 * 64 + 2 * (32 + 64)
    convolutions = 9 * (3 * 16 + 6 * 16**2 + 16 * 32 + 5 * 32**2 + 32 * 64 + 5 * 64**2)
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    assert n_params(variables["params"]) == convolutions + norms + 650 + shortcuts
    kernels = [leaf for leaf in flatten(variables) if leaf.endswith("/kernel")]
    assert len([leaf for leaf in kernels if "shortcut" not in leaf]) == 20


@pytest.mark.parametrize("width", [1, 2, 8])
def test_resnet20_has_a_group_for_each_stream_and_each_block(width):
    model = MODELS["resnet20"](n_classes=10, width=width)
    spec = permutation_spec(model)
    sizes = group_sizes(spec, shapes_of(model, 32, 32, 3))
    streams = {g: n for g, n in sizes.items() if g.startswith("stream")}
    assert list(streams.values()) == [16 * width, 32 * width, 64 * width]
    assert len(sizes) == len(streams) + 9
    # The stem, and behind every block of its stage.
    assert [len(spec.taps_of(stream)) for stream in streams] == [4, 3, 3]


def test_resnet20_halves_the_feature_maps_twice():
    model = MODELS["resnet20"](n_classes=10)
    variables = shapes_of(model, 32, 32, 3)
    inputs = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    seen = jax.eval_shape(activations(model), variables, inputs)
    assert seen["stem"].shape == (2, 32, 32, 16)
    assert seen["stage0_block2/stream"].shape == (2, 32, 32, 16)
    assert seen["stage1_block0/inner"].shape == (2, 16, 16, 32)
    assert seen["stage2_block2/stream"].shape == (2, 8, 8, 64)


def test_a_module_from_elsewhere_has_no_declared_spec():
    with pytest.raises(KeyError):
        permutation_spec(nn.Dense(3))
