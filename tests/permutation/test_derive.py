"""Tests that `derive` finds the symmetry of models that it knows nothing about."""

import contextlib
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dimat_jax import permutation
from dimat_jax.matching import activation_matching
from dimat_jax.models import MODELS, permutation_spec
from dimat_jax.models.classifier import both_modes, forward, init
from dimat_jax.models.gpt import GPT
from dimat_jax.permutation import (
    Concat,
    PermutationSpec,
    PermutationSpecError,
    PermutationSpecWarning,
    Product,
    derive,
    permute_leaf,
    verify,
)
from dimat_jax.tree import PyTree, map_with_path, stack
from tests.models.test_model_conformance import CASES
from tests.reference.symmetry import differences, same_symmetry


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


# The bundled models ===================================================================


def shapes_of(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Of a batch and of the variables: tracing needs no numbers."""
    dtype = jnp.int32 if isinstance(model, GPT) else jnp.float32
    inputs = jax.ShapeDtypeStruct((2, *input_shape), dtype)
    return inputs, jax.eval_shape(partial(init, model), jax.random.key(0), inputs)


@pytest.mark.every_nth(6)
@pytest.mark.parametrize("mode", [forward, both_modes])
@pytest.mark.parametrize("case", CASES)
def test_what_is_derived_is_what_is_declared(case, mode):
    model, input_shape, _ = CASES[case]
    inputs, variables = shapes_of(model, input_shape)
    none = pytest.warns(PermutationSpecWarning, match="no units that may be permuted")
    with none if case == "linear" else contextlib.nullcontext():
        spec = derive(mode(model), variables, inputs, strict=True)
    declared = permutation_spec(model)
    assert not differences(declared, spec, variables)
    assert spec.statistics == declared.statistics


@pytest.mark.every_nth(8)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_derived_is_what_is_declared_at_full_size(name):
    model = MODELS[name](n_classes=10)
    input_shape = (64,) if isinstance(model, GPT) else (64, 64, 3)
    inputs, variables = shapes_of(model, input_shape)
    spec = derive(forward(model), variables, inputs, strict=True)
    assert not differences(permutation_spec(model), spec, variables)


def test_two_symmetries_are_told_apart():
    model, input_shape, _ = CASES["resnet"]
    _, variables = shapes_of(model, input_shape)
    spec = permutation_spec(model)
    for leaf, axes in spec.axes.items():
        for d, axis in enumerate(axes):
            if axis is not None:
                for wrong in (None, "another"):
                    changed = (*axes[:d], wrong, *axes[d + 1 :])
                    other = PermutationSpec({**spec.axes, leaf: changed})
                    assert not same_symmetry(spec, other, variables)
                    assert not same_symmetry(other, spec, variables)


# Models that the library has never seen ===============================================


class Model(NamedTuple):
    """A model, and the number of its groups that have more than one unit."""

    forward: Callable[[PyTree, Any], Any]
    variables: PyTree
    inputs: Any
    sizes: list[int]


def trained_like(path: str, leaf: Any) -> Any:
    """Variables without constant leaves. At init, scales and biases are constant."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    rng = np.random.default_rng(list(path.encode()))
    if len(leaf.shape) > 1:
        values = rng.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape)
    else:
        values = rng.uniform(0.5, 1.5, leaf.shape)  # a variance stays one
    return jnp.asarray(values, leaf.dtype)


class EquinoxCNN(eqx.Module):
    """A CNN for one example, channels first, with layers and functions in one list."""

    layers: list

    def __init__(self, key):
        keys = jax.random.split(key, 5)
        self.layers = [
            eqx.nn.Conv2d(1, 6, 3, key=keys[0]),
            jax.nn.relu,
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Conv2d(6, 6, 3, padding=1, key=keys[1]),
            eqx.nn.LayerNorm((6, 3, 3)),
            eqx.nn.PReLU(),
            eqx.nn.ConvTranspose2d(6, 6, 2, key=keys[2]),
            eqx.nn.AvgPool2d(2, 2),
            jnp.ravel,
            eqx.nn.Linear(6 * 2 * 2, 6, key=keys[3]),
            eqx.nn.Dropout(0.5, inference=True),
            jax.nn.gelu,
            eqx.nn.Linear(6, 6, key=keys[4]),
        ]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def equinox(vmapped: bool) -> Model:
    params, static = eqx.partition(EquinoxCNN(jax.random.key(0)), eqx.is_inexact_array)

    def forward(params, x):
        model = eqx.combine(params, static)
        return jax.vmap(model)(x) if vmapped else model(x)

    inputs = normal(4, 1, 8, 8) if vmapped else normal(1, 8, 8)
    return Model(forward, params, inputs, [6, 6, 6, 6])


def equinox_lstm() -> Model:
    """An LSTM for one sequence. Its four gates are one array."""
    model = (
        eqx.nn.LSTMCell(3, 5, key=jax.random.key(0)),
        eqx.nn.Linear(5, 5, key=jax.random.key(1)),
    )
    params, static = eqx.partition(model, eqx.is_array)

    def forward(params, x):
        cell, head = eqx.combine(params, static)
        zeros = jnp.zeros(5)
        (h, _), _ = jax.lax.scan(lambda c, t: (cell(t, c), None), (zeros, zeros), x)
        return head(h)

    return Model(forward, params, normal(7, 3), [5])


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.up = nnx.Linear(8, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.down(self.dropout(nnx.relu(self.up(self.norm(x)))))


class NNXMLP(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, 8, rngs=rngs)
        self.blocks = nnx.List([NNXBlock(rngs) for _ in range(2)])
        self.last = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(nnx.relu(x))


def nnx_mlp() -> Model:
    """An MLP whose variables hold all its state, also random keys and counters."""
    graph, state = nnx.split(NNXMLP(nnx.Rngs(0)))

    def forward(state, x):
        model = nnx.merge(graph, state)
        model.eval()
        return model(x)

    return Model(forward, state, normal(6, 8), [8, 8, 8])


def linen(module: nn.Module, inputs: jax.Array, sizes: list[int]) -> Model:
    shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)
    return Model(module.apply, map_with_path(trained_like, shapes), inputs, sizes)


class DenseNet(nn.Module):
    """Depthwise convolutions on concatenated feature maps, and a flattened head."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3))(x)
        for _ in range(2):
            y = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            y = nn.Conv(y.shape[-1], (3, 3), feature_group_count=y.shape[-1])(y)
            x = jnp.concatenate([x, nn.Conv(6, (1, 1))(y)], axis=-1)
        x = nn.avg_pool(x, (2, 2), (2, 2))
        channels = x.shape[-1]
        x = nn.Conv(2 * channels, (3, 3), feature_group_count=channels)(x)
        x = nn.relu(nn.Dense(6)(x.reshape(len(x), -1)))
        return nn.Dense(6)(x)


class OptionA(nn.Module):
    """He et al.'s shortcuts without weights: every second pixel, and padding with 0."""

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Conv(4, (3, 3))(x))
        for channels, stride in ((4, 1), (8, 2), (14, 2)):
            y = nn.LayerNorm()(nn.Conv(channels, (3, 3), strides=stride)(x))
            y = nn.Conv(channels, (3, 3))(nn.gelu(y))
            more = channels - x.shape[-1]
            shortcut = x[:, ::stride, ::stride]
            shortcut = jnp.pad(shortcut, (*[(0, 0)] * 3, (more // 2, more - more // 2)))
            x = nn.gelu(shortcut + y)
        return nn.Dense(4)(x.mean(axis=(1, 2)))


class FusedAttention(nn.Module):
    """Causal attention. One dense layer makes its queries, keys and values."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x)
        q, k, v = jnp.split(nn.Dense(3 * 8)(nn.RMSNorm()(x)), 3, axis=-1)
        q, k, v = (y.reshape(*y.shape[:-1], 2, 4) for y in (q, k, v))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = x + nn.Dense(8)(y)
        return nn.Dense(8)(x.mean(axis=1))


class TiedLanguageModel(nn.Module):
    """A model of tokens whose head is the transposed embedding."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(8, 8)
        x = embed(tokens) + self.param("place", nn.initializers.normal(), (6, 8))
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return embed.attend(nn.LayerNorm()(x))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        sequence: Any = nn.RNN(nn.OptimizedLSTMCell(5))(x)
        sequence = nn.RNN(nn.GRUCell(5))(sequence)
        return nn.Dense(5)(sequence[:, -1])


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.gelu(nn.Dense(6)(nn.LayerNorm()(x)))
        return x + nn.Dense(6)(y), None


class Scanned(nn.Module):
    """A scan over three layers with stacked weights. Gradients recompute the layers."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Layer),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = layers()(nn.Dense(6)(x), None)
        return nn.Dense(6)(x)


class GroupNormed(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.GroupNorm(2)(nn.Conv(8, (3, 3))(x)))
        return nn.Dense(8)(x.reshape(len(x), -1))


IMAGES = (3, 4, 4, 3)
UNSEEN: dict[str, Callable[[], Model]] = {
    "equinox": partial(equinox, vmapped=False),
    "equinox, vmapped": partial(equinox, vmapped=True),
    "equinox LSTM": equinox_lstm,
    "nnx": nnx_mlp,
    "densenet": lambda: linen(DenseNet(), normal(*IMAGES), [6, 6, 6, 2, 6]),
    # The stream grows from 4 to 2 + 4 + 2 and then to 3 + 8 + 3 channels.
    "option A": lambda: linen(OptionA(), normal(*IMAGES), [4, 4, 8, 2, 2, 14, 3, 3]),
    # The groups are the stream; the heads; the dimensions of queries and keys; and
    # those of values.
    "fused attention": lambda: linen(FusedAttention(), normal(3, 5, 8), [8, 2, 4, 4]),
    "tied language model": lambda: linen(
        TiedLanguageModel(), jnp.arange(12).reshape(2, 6) % 8, [8, 2, 4, 4]
    ),
    "recurrent": lambda: linen(Recurrent(), normal(3, 4, 5), [5, 5]),
    "scanned": lambda: linen(Scanned(), normal(3, 6), [6, 6]),
    "group norm": lambda: linen(GroupNormed(), normal(*IMAGES), [2, 4, 2, 4]),
}

unseen = pytest.mark.parametrize("name", UNSEEN)


class Derived(NamedTuple):
    model: Model
    spec: PermutationSpec
    activations: Callable[[PyTree, Any], dict[str, jax.Array]]
    variables: PyTree
    run: Callable[[permutation.Perms, Any], tuple[Any, dict[str, jax.Array]]]

    @property
    def identity(self) -> permutation.Perms:
        return permutation.identity(self.spec, self.variables)

    def perms(self, seed: int) -> permutation.Perms:
        """Random permutations. Each of them moves some units, even if there are few."""
        perms = permutation.random(self.spec, self.variables, jax.random.key(seed))
        return {
            group: jnp.where(
                (perm == jnp.arange(perm.shape[-1])).all(-1, keepdims=True),
                jnp.roll(perm, 1, axis=-1),
                perm,
            )
            for group, perm in perms.items()
        }


@cache
def derived(name: str) -> Derived:
    model = UNSEEN[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # derive knows all operations
        spec, activations = derive(
            model.forward, model.variables, model.inputs, with_activations=True
        )
    variables = map_with_path(trained_like, model.variables)

    # There are many tiny programs: compiling them takes longer than running them.
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(perms, inputs):
        """The outputs of the permuted model, and the activations at its taps."""
        permuted = permutation.apply(spec, perms, variables)
        return model.forward(permuted, inputs), activations(permuted, inputs)

    return Derived(model, spec, activations, variables, run)


@pytest.mark.every_nth(4)
@unseen
def test_an_unseen_model_has_the_groups_that_it_should_have(name):
    model, spec, *_ = derived(name)
    permutation.validate(spec, model.variables)
    sizes = permutation.group_sizes(spec, model.variables)
    assert sorted(sizes.values()) == sorted(model.sizes)


@pytest.mark.every_nth(4)
@unseen
def test_what_was_derived_of_an_unseen_model_holds_and_its_taps_show_it(name):
    subject = derived(name)
    spec, inputs = subject.spec, subject.model.inputs
    perms = subject.perms(1)
    outputs, before = subject.run(subject.identity, inputs)
    permuted_outputs, after = subject.run(perms, inputs)
    assert distance(permuted_outputs, outputs) < 1e-4
    assert before.keys() == spec.taps.keys()
    for group in spec.groups:
        assert spec.taps_of(group), group
    for tap, units in before.items():
        expected = permute_leaf(spec.tap_axes(tap, units.ndim), perms, units)
        assert distance(after[tap], expected) < 1e-4, tap
        # Without this check, a tap that shows nothing would pass.
        assert distance(after[tap], units) > 1e-3, tap


@pytest.mark.every_nth(2)
@pytest.mark.parametrize("name", ["equinox", "nnx", "densenet"])
def test_what_was_derived_of_an_unseen_model_is_verified(name):
    model, spec, *_ = derived(name)
    verify(spec, model.forward, model.variables, model.inputs, jax.random.key(0))


@unseen
def test_what_was_derived_of_an_unseen_model_is_saved_as_json(name):
    spec = derived(name).spec
    assert permutation.spec_from_json(permutation.spec_to_json(spec)) == spec


def distance(units: jax.Array, others: jax.Array | np.ndarray) -> float:
    """The largest difference, relative to the largest entry."""
    return float(jnp.abs(units - others).max() / jnp.abs(others).max())


@pytest.mark.every_nth(4)
@pytest.mark.parametrize(
    "name", ["equinox, vmapped", "nnx", "densenet", "option A", "scanned"]
)
def test_a_permutation_that_was_planted_in_an_unseen_model_is_found(name):
    subject = derived(name)
    spec, inputs = subject.spec, subject.model.inputs
    planted = subject.perms(2)
    permutee = permutation.apply(spec, planted, subject.variables)
    # There are enough examples to tell the units apart.
    batches = [normal(64, *inputs.shape[1:], seed=1)]
    found = activation_matching(
        spec, subject.activations, subject.variables, permutee, batches
    )
    both = permutation.compose(planted, found)
    for group, perm in both.items():
        expected = np.broadcast_to(np.arange(perm.shape[-1]), perm.shape)
        np.testing.assert_array_equal(perm, expected, group)


@pytest.mark.parametrize("name", ["densenet", "recurrent", "scanned"])
def test_activations_of_other_batches_and_of_stacked_agents(name):
    subject = derived(name)
    inputs = subject.model.inputs
    n_examples = len(inputs)
    _, expected = subject.run(subject.identity, inputs)
    _, doubled = subject.run(subject.identity, jnp.concatenate([inputs, inputs]))
    agents = stack([subject.variables, subject.variables])
    stacked = jax.jit(jax.vmap(subject.activations, (0, None)))(agents, inputs)
    for tap, seen in expected.items():
        # The axis of the examples comes first, that of a scan's steps behind it.
        assert len(seen) == n_examples
        for again in (
            doubled[tap][:n_examples],
            doubled[tap][n_examples:],
            *stacked[tap],
        ):
            assert distance(again, seen) < 1e-4, tap


# What a spec says =====================================================================


def test_groups_are_named_after_the_leaf_that_makes_their_units():
    spec = derived("nnx").spec
    assert list(spec.groups) == [
        "first/kernel/value:1",
        "blocks/0/up/kernel/value:1",
        "blocks/1/up/kernel/value:1",
    ]
    assert spec.taps["blocks/0/up/kernel/value:1#0"] == (
        None,
        "blocks/0/up/kernel/value:1",
    )


def test_concatenations_are_not_nested():
    spec = derived("option A").spec
    (axis,) = spec.axes["params/Conv_6/bias"]
    assert isinstance(axis, Concat)
    assert [size for _, size in axis.parts] == [3, 2, 4, 2, 3]
    assert all(isinstance(part, str) for part, _ in axis.parts)


def test_a_flattened_concatenation_is_spelt_out():
    spec = derived("densenet").spec
    axis, _ = spec.axes["params/Dense_0/kernel"]
    assert isinstance(axis, Concat)
    # The convolution makes two channels of each of three times six, at four pixels.
    assert [size for _, size in axis.parts] == [12, 12, 12] * 4
    assert all(isinstance(part, Product) for part, _ in axis.parts)


def test_sizes_are_given_where_no_axis_tells_them():
    spec = derived("group norm").spec
    assert sorted(spec.sizes.values()) == [2, 2, 4, 4]
    assert not derived("nnx").spec.sizes


def test_a_concatenation_within_units_that_move_is_left_aside():
    # A spec cannot declare a product of two groups of which one is a concatenation.
    variables = {"w": normal(3, 2), "b": normal(4), "c": normal(6)}

    def forward(v, x):
        within = jnp.concatenate([v["b"], v["b"][:2]])
        pairs = (x @ v["w"])[:, :, None] * within
        return pairs.reshape(len(x), -1) @ (v["w"][0, :, None] * v["c"]).reshape(-1)

    spec = derive(forward, variables, normal(5, 3))
    assert spec.axes["w"] == (None, "w:1")
    verify(spec, forward, variables, normal(5, 3), jax.random.key(0))


@pytest.mark.parametrize(
    "leaf",
    [jnp.zeros(4), jnp.zeros((4, 4)), jnp.arange(4), jax.random.key(0), np.float32(1)],
)
def test_a_leaf_that_no_output_depends_on_is_fixed(leaf):
    variables = {"unused": leaf, "used": normal(4)}
    spec = derive(lambda v, x: x * v["used"].sum(), variables, normal(2))
    assert spec.axes == {"unused": (None,) * jnp.ndim(leaf), "used": ("used:0",)}


def test_random_keys_and_whole_numbers_may_be_leaves():
    variables = {"key": jax.random.key(0), "count": jnp.int32(3), "w": normal(4, 4)}

    def forward(v, x):
        noise = jax.random.normal(jax.random.fold_in(v["key"], v["count"]))
        return noise + (x @ v["w"]).sum(axis=-1)

    spec = derive(forward, variables, normal(3, 4), strict=True)
    assert spec.axes == {"key": (), "count": (), "w": (None, "w:1")}


def test_shapes_suffice():
    def forward(v, x):
        return jnp.tanh(x @ v["a"]) @ v["b"]

    variables = {"a": normal(3, 4), "b": normal(4, 2)}
    shapes = jax.eval_shape(lambda: variables)
    inputs = jax.ShapeDtypeStruct((5, 3), jnp.float32)
    spec = derive(forward, shapes, inputs)
    assert spec == derive(forward, variables, normal(5, 3))
    assert spec.axes == {"a": (None, "a:1"), "b": ("a:1", None)}


# What cannot be done ==================================================================


def fourier(v, x):
    return jnp.fft.fft(jnp.tanh(x @ v["a"]) @ v["b"]).real @ v["c"]


FOURIER = {"a": normal(3, 6), "b": normal(6, 5), "c": normal(5, 5)}


def test_an_operation_that_is_not_known_fixes_what_it_touches_and_says_so():
    # The type checks of the tests add a caller, which the warning would name.
    plain_derive = getattr(derive, "__wrapped__", derive)
    with pytest.warns(UserWarning) as caught:
        spec = plain_derive(fourier, FOURIER, normal(4, 3))
    assert spec.axes == {"a": (None, "a:1"), "b": ("a:1", None), "c": (None, None)}
    (warning,) = caught
    assert warning.filename == __file__
    assert str(warning.message) == (
        "derive does not know the operation 'fft', and fixes what it touches: 'b' axis "
        "1, 'c' axis 0"
    )


def test_with_strict_it_raises():
    with pytest.raises(PermutationSpecError, match="operation 'fft'.*'b' axis 1"):
        derive(fourier, FOURIER, normal(4, 3), strict=True)


def test_an_unknown_operation_that_costs_nothing_is_not_mentioned():
    def forward(v, x):
        return jnp.tanh(jnp.fft.fft(x).real @ v["a"]) @ v["b"]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec = derive(forward, FOURIER, normal(4, 3), strict=True)
    assert spec.axes["a"] == (None, "a:1")


def test_dropout_ties_units_to_their_places_and_is_named():
    def forward(v, x):
        h = jnp.tanh(x @ v["a"])
        return (h * jax.random.bernoulli(jax.random.key(0), 0.5, h.shape)) @ v["b"]

    with pytest.warns(UserWarning, match="'random_bits'.*'a' axis 1.*without drop"):
        spec = derive(forward, FOURIER, normal(4, 3))
    assert not spec.groups


@pytest.mark.parametrize("leaf", [1.5, "relu", jax.nn.relu])
def test_a_leaf_that_is_no_array_is_named(leaf):
    variables = {"w": normal(3, 4), "other": [leaf]}
    with pytest.raises(PermutationSpecError, match="'other/0' is no array, but "):
        derive(lambda v, x: x @ v["w"], variables, normal(5, 3))


def test_activations_of_inputs_that_trace_otherwise_are_refused():
    def forward(v, x):
        return jnp.tanh(x @ v["a"]) @ v["b"] if x.ndim == 2 else v["b"].sum()

    _, activations = derive(forward, FOURIER, normal(4, 3), with_activations=True)
    with pytest.raises(PermutationSpecError, match="derive it again"):
        activations(FOURIER, normal(3))


def test_activations_do_not_mind_what_changes_nothing():
    # Numbers of weak type, as the slope of Equinox's PReLU, are converted; other
    # numbers are not.
    def forward(v, x):
        h = jnp.tanh(x @ v["a"])
        return (h * v["slope"] if len(x) % 2 else v["slope"] * (h + 0)) @ v["b"]

    weak = FOURIER | {"slope": jnp.asarray(0.5)}
    strong = FOURIER | {"slope": jnp.ones(())}
    spec, activations = derive(forward, weak, normal(4, 3), with_activations=True)
    for variables in (weak, strong):
        for n_examples in (4, 5):
            seen = activations(variables, normal(n_examples, 3))
            assert {tap: units.shape for tap, units in seen.items()} == {
                "a:1#0": (n_examples, 6)
            }
    assert spec.taps == {"a:1#0": (None, "a:1")}
