"""Tests for all bundled architectures. A new architecture needs only a table entry."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dimat_jax import permutation
from dimat_jax.data.pipeline import Batch
from dimat_jax.models import MODELS, permutation_spec
from dimat_jax.models.classifier import (
    activations,
    batch_statistics,
    both_modes,
    forward,
    init,
    loss,
)
from dimat_jax.models.resnet import ResNet
from dimat_jax.models.vgg import VGG
from dimat_jax.permutation import PermutationSpec, permute_leaf
from dimat_jax.tasks import CLASSIFICATION, TASKS, TaskRecord
from dimat_jax.tree import PyTree, flatten, map_with_path, stack, take

N_CLASSES = 5
BATCH = 6


class Case(NamedTuple):
    """The smallest network of an architecture that has all of its parts."""

    model: Any
    input_shape: tuple[int, ...]
    task: TaskRecord = CLASSIFICATION

    def inputs(self, n: int, seed: int, scale: float = 1, mean: float = 0) -> Any:
        """Random inputs: floats, or tokens for a language model."""
        rng = np.random.default_rng(seed)
        if self.task.labels == "tokens":
            return rng.integers(0, N_CLASSES, (n, *self.input_shape), np.int32)
        return rng.normal(mean, scale, (n, *self.input_shape)).astype(np.float32)

    def labels(self, n: int, seed: int) -> Any:
        """Random labels of the task."""
        places = self.input_shape if self.task.labels == "tokens" else ()
        rng = np.random.default_rng(seed)
        return rng.integers(0, N_CLASSES, (n, *places), np.int32)


def registered(name: str, *input_shape: int, **settings: Any) -> Case:
    return Case(MODELS[name](n_classes=N_CLASSES, **settings), input_shape)


def resnet(*input_shape: int, **settings: Any) -> Case:
    """A ResNet with both kinds of blocks: with and without a shortcut convolution."""
    return Case(ResNet((2, 1), (4, 8), N_CLASSES, **settings), input_shape)


def gpt(**settings: Any) -> Case:
    model = MODELS["gpt"](n_classes=N_CLASSES, dim=12, heads=3, depth=2, **settings)
    return Case(model, (7,), TASKS["language_modelling"])


def vgg(**settings: Any) -> Case:
    """A VGG with two stages. Its head reads a feature map of 2 x 3 pixels."""
    return Case(VGG(((8,), (8, 16)), N_CLASSES, **settings), (8, 12, 3))


# There is one case for each module, kind of block and kind of norm.
SMALL = {
    "mlp": registered("mlp", 4, 4, 1, hidden=(9, 7)),
    "mlp, batch norm": registered("mlp", 4, 4, 1, hidden=(9, 7), norm="batch"),
    "resnet": resnet(8, 8, 1),
    "resnet, bottleneck": resnet(8, 8, 1, block="bottleneck"),
    "vgg": vgg(),
    "vgg, group norm": vgg(norm="group"),
    "vit": registered("vit", 8, 8, 1, dim=12, heads=3, depth=2),
    "gpt": gpt(),
}
CASES = SMALL | {
    "mlp, width 2": registered("mlp", 4, 4, 3, hidden=(9, 7), width=2),
    "mlp, layer norm": registered("mlp", 4, 4, 1, hidden=(9, 7), norm="layer"),
    "linear": registered("mlp", 4, 4, 1, hidden=()),
    "resnet, layer norm": resnet(8, 8, 1, norm="layer"),
    "resnet, group norm": resnet(8, 8, 1, norm="group"),
    "resnet, padded shortcuts": resnet(8, 8, 1, shortcut="pad"),
    "resnet, ImageNet stem": resnet(
        32, 32, 3, block="bottleneck", stem="imagenet", shortcut="conv1x1"
    ),
    "resnet20": registered("resnet20", 8, 8, 3, width=1 / 2),
    # On 8 x 8 images, the last batch norms would have six values for each channel. The
    # 53 batch norms of this network then amplify rounding beyond the tolerance below.
    "resnet50": registered("resnet50", 16, 16, 3, width=1 / 16, stem="cifar"),
    "vgg, layer norm": vgg(norm="layer"),
    "vgg, no norm": vgg(norm="none"),
    "gpt, tied": gpt(tied=True),
    "vgg16": registered("vgg16", 32, 32, 3, width=1 / 16),
}

every_case = pytest.mark.parametrize("case", CASES)
# The cases for tests that take long to compile and do not depend on the depth.
every_small_case = pytest.mark.parametrize("case", SMALL)
every_name = pytest.mark.parametrize("name", MODELS)


class Subject(NamedTuple):
    case: Case
    model: Any
    spec: PermutationSpec
    variables: PyTree
    inputs: jax.Array
    logits: Callable[[PyTree, jax.Array], dict[str, jax.Array]]
    watch: Callable[[PyTree, jax.Array], dict[str, jax.Array]]
    learn: Callable[[PyTree, Batch], dict[str, Any]]

    def perms(self, seed: int) -> permutation.Perms:
        """Random permutations. Each of them moves some units, even if there are few."""
        perms = permutation.random(self.spec, self.variables, jax.random.key(seed))
        return {
            group: jnp.roll(perm, 1) if (perm == jnp.arange(len(perm))).all() else perm
            for group, perm in perms.items()
        }


@pytest.fixture
def subject(case: str) -> Subject:
    return build(case)


@cache
def build(case: str) -> Subject:
    model, inputs = CASES[case].model, jnp.asarray(CASES[case].inputs(BATCH, 0))
    shapes = jax.eval_shape(partial(init, model), jax.random.key(0), inputs)
    return Subject(
        CASES[case],
        model,
        permutation_spec(model),
        map_with_path(trained_like, shapes),
        inputs,
        precisely(jax.jit(both_modes(model))),
        jax.jit(activations(model)),
        jax.jit(learning(model, CASES[case].task)),
    )


def precisely(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Computes in the precision of `verify`, so that both share compiled programs."""

    def call(*args):
        with jax.default_matmul_precision("highest"):
            return fn(*args)

    return call


def trained_like(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Variables without constant leaves, which permutations would not change."""
    rng = np.random.default_rng(list(path.encode()))
    if path.endswith(("/var", "/scale")):
        values = rng.uniform(0.5, 1.5, leaf.shape)
    elif len(leaf.shape) > 1:
        values = rng.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape)
    else:
        values = rng.uniform(-0.5, 0.5, leaf.shape)
    return jnp.asarray(values, leaf.dtype)


def learning(model, task: TaskRecord) -> Callable[[PyTree, Batch], dict[str, Any]]:
    def learn(variables, batch):
        def of_params(params):
            key = jax.random.key(0)
            return loss(model, task)({**variables, "params": params}, batch, key)

        (value, aux), grads = jax.value_and_grad(of_params, has_aux=True)(
            variables["params"]
        )
        return {"loss": value, "grads": grads, "aux": aux}

    return learn


def test_the_table_covers_all_models():
    def kind(model):
        return type(model), getattr(model, "block", None)

    covered = {kind(case.model) for case in SMALL.values()}
    assert {kind(build(n_classes=N_CLASSES)) for build in MODELS.values()} == covered


# Structure, without computing anything ================================================


@pytest.mark.every_nth(9)
@every_name
@pytest.mark.parametrize("pixels", [32, 64])
def test_the_spec_fits_the_variables_and_the_taps(name, pixels):
    model = MODELS[name](n_classes=N_CLASSES)
    inputs = jax.ShapeDtypeStruct((2, pixels, pixels, 3), jnp.float32)
    if name == "gpt":
        inputs = jax.ShapeDtypeStruct((2, pixels), jnp.int32)
    variables = jax.eval_shape(partial(init, model), jax.random.key(0), inputs)
    assert_spec_fits(model, variables, inputs)


def assert_spec_fits(model, variables, inputs):
    spec = permutation_spec(model)
    permutation.validate(spec, variables)
    for group in spec.groups:
        assert spec.taps_of(group), group
    seen = jax.eval_shape(activations(model), variables, inputs)
    assert seen.keys() == spec.taps.keys()
    perms = {
        group: np.arange(size, dtype=np.int32)
        for group, size in permutation.group_sizes(spec, variables).items()
    }
    for tap, units in seen.items():
        axes = spec.tap_axes(tap, units.ndim)
        # This refuses axes of another size than their groups.
        shape = jax.eval_shape(partial(permute_leaf, axes, perms), units).shape
        assert shape == units.shape, tap


# Symmetry =============================================================================


@pytest.mark.every_nth(3)
@every_case
def test_every_case_has_a_valid_spec_with_a_tap_for_each_group(subject):
    assert_spec_fits(subject.model, subject.variables, subject.inputs)


@pytest.mark.every_nth(9)
@every_small_case
def test_verify_finds_nothing_wrong(subject):
    permutation.verify(
        subject.spec,
        both_modes(subject.model),
        subject.variables,
        subject.inputs,
        jax.random.key(0),
    )


@pytest.mark.every_nth(6)
@every_case
def test_random_permutations_leave_logits_unchanged_in_both_modes(subject):
    before = subject.logits(subject.variables, subject.inputs)
    for seed in range(3):
        perms = subject.perms(seed)
        permuted = permutation.apply(subject.spec, perms, subject.variables)
        assert_every_permuted_leaf_moved(subject, permuted)
        after = subject.logits(permuted, subject.inputs)
        for mode in ("eval", "train"):
            assert before[mode].dtype == jnp.float32
            np.testing.assert_allclose(after[mode], before[mode], rtol=0, atol=1e-4)


def assert_every_permuted_leaf_moved(subject, permuted):
    moved = flatten(permuted)
    for path, leaf in flatten(subject.variables).items():
        if any(subject.spec.axes[path]):
            assert (moved[path] != leaf).any(), path
        else:
            np.testing.assert_array_equal(moved[path], leaf)


@pytest.mark.every_nth(9)
@every_case
def test_taps_show_the_units_of_their_groups(subject):
    perms = subject.perms(0)
    permuted = permutation.apply(subject.spec, perms, subject.variables)
    before = subject.watch(subject.variables, subject.inputs)
    after = subject.watch(permuted, subject.inputs)
    assert before.keys() == subject.spec.taps.keys()
    for tap in subject.spec.taps:
        axes = subject.spec.tap_axes(tap, before[tap].ndim)
        expected = permute_leaf(axes, perms, before[tap])
        np.testing.assert_allclose(after[tap], expected, rtol=0, atol=1e-4)
        # Without this check, a tap that shows nothing would pass.
        assert float(jnp.abs(after[tap] - before[tap]).max()) > 1e-2, tap


@pytest.mark.every_nth(3)
@every_small_case
def test_batch_statistics_are_the_batchs_own_and_permuted_alike(subject):
    statistics = batch_statistics(subject.model)
    if statistics is None:
        assert "batch_stats" not in subject.variables
        return
    statistics = jax.jit(statistics)
    mask = jnp.arange(BATCH) < BATCH - 1
    measured = statistics(subject.variables, subject.inputs, mask)
    running = jax.tree.map(lambda x: x + 1, subject.variables["batch_stats"])
    unlike = {**subject.variables, "batch_stats": running}
    assert_close(statistics(unlike, subject.inputs, mask), measured, atol=1e-6)
    others = subject.inputs.at[-1].set(100)
    assert_close(statistics(subject.variables, others, mask), measured, atol=1e-6)

    perms = subject.perms(0)
    aligned, expected = (
        permutation.apply(subject.spec, perms, variables)
        for variables in (
            subject.variables,
            {**subject.variables, "batch_stats": measured},
        )
    )
    assert_close(
        statistics(aligned, subject.inputs, mask), expected["batch_stats"], atol=1e-4
    )


# Stacked agents =======================================================================


@pytest.mark.every_nth(9)
@every_small_case
def test_vmapped_permutations_of_stacked_agents_equal_the_loop(subject):
    perms, agents = some_agents(subject)

    @jax.jit
    @jax.vmap
    def align(perms, variables):
        return permutation.apply(subject.spec, perms, variables)

    stacked = align(stack(perms), stack(agents))
    for i, (agent_perms, variables) in enumerate(zip(perms, agents, strict=True)):
        expected = permutation.apply(subject.spec, agent_perms, variables)
        assert_close(take(stacked, i), expected, atol=0)


@pytest.mark.every_nth(3)
@every_small_case
def test_vmapped_logits_of_stacked_agents_equal_the_loop(subject):
    _, agents = some_agents(subject)
    logits = jax.jit(jax.vmap(forward(subject.model), (0, None)))
    stacked = logits(stack(agents), subject.inputs)
    for i, variables in enumerate(agents):
        expected = subject.logits(variables, subject.inputs)["eval"]
        np.testing.assert_allclose(stacked[i], expected, rtol=0, atol=1e-4)


def some_agents(subject) -> tuple[list[permutation.Perms], list[PyTree]]:
    factors = (1.0, 0.9)
    return (
        [subject.perms(seed) for seed in range(len(factors))],
        [jax.tree.map(lambda x, f=f: f * x, subject.variables) for f in factors],
    )


# Precision ============================================================================


@pytest.mark.every_nth(3)
@every_small_case
def test_bfloat16_computes_in_bfloat16_from_float32_to_float32(subject):
    model = subject.model.clone(dtype=jnp.bfloat16)

    @jax.jit
    def run(variables, inputs):
        train_logits, state = model.apply(
            variables, inputs, train=True, mutable=["batch_stats", "intermediates"]
        )
        return train_logits, forward(model)(variables, inputs), state

    fresh = jax.eval_shape(partial(init, model), jax.random.key(0), subject.inputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype(jnp.float32)}
    train_logits, eval_logits, state = run(subject.variables, subject.inputs)
    for tap, units in flatten(state.get("intermediates", {})).items():
        assert units.dtype == jnp.bfloat16, tap
    for path, statistic in flatten(state.get("batch_stats", {})).items():
        assert statistic.dtype == jnp.float32, path
    exact = subject.logits(subject.variables, subject.inputs)
    for mode, rounded in (("train", train_logits), ("eval", eval_logits)):
        assert rounded.dtype == jnp.float32
        error = jnp.abs(rounded - exact[mode]).max() / jnp.abs(exact[mode]).max()
        assert 1e-5 < error < 0.1, mode


def test_the_constructor_passes_the_dtype_on():
    for name, build in MODELS.items():
        for dtype in (jnp.float32, jnp.bfloat16):
            assert build(n_classes=N_CLASSES, dtype=dtype).dtype == dtype, name
        assert build(n_classes=N_CLASSES).dtype == jnp.float32, name


# Masked examples ======================================================================


@pytest.mark.every_nth(9)
@every_small_case
def test_masked_examples_count_nowhere_in_train_mode(subject):
    inputs, labels = np.asarray(subject.inputs), subject.case.labels(BATCH, 0)
    # Masked examples lie between the others and have quite different values.
    rows = np.array([0, 2, 3, 5, 6, 8])
    padded = subject.case.inputs(9, seed=1, mean=3, scale=10)
    padded_labels = 0 * subject.case.labels(9, seed=1)
    padded[rows], padded_labels[rows] = inputs, labels

    smaller = subject.learn(
        subject.variables, batch_of(inputs, labels, np.ones(BATCH, bool))
    )
    mask = np.isin(np.arange(9), rows)
    assert_close(
        subject.learn(subject.variables, batch_of(padded, padded_labels, mask)),
        smaller,
        atol=1e-5,
    )
    # Without the mask, these examples would have changed the results.
    unmasked = subject.learn(
        subject.variables, batch_of(padded, padded_labels, mask | True)
    )
    assert abs(unmasked["loss"] - smaller["loss"]) > 1e-3


@pytest.mark.every_nth(3)
@every_small_case
def test_training_updates_the_running_statistics_alone(subject):
    labels = 0 * subject.case.labels(BATCH, seed=0)
    batch = batch_of(subject.inputs, labels, np.ones(BATCH, bool))
    state, metrics = subject.learn(subject.variables, batch)["aux"]
    others = {k: v for k, v in subject.variables.items() if k != "params"}
    assert jax.tree.structure(dict(state)) == jax.tree.structure(others)
    for path, leaf in flatten(others).items():
        assert (flatten(state)[path] != leaf).any(), path
    assert set(metrics) == {"loss", "score"}


@pytest.mark.every_nth(3)
@every_small_case
def test_dead_units_make_nothing_nan(subject):
    dead = jax.tree.map(jnp.zeros_like, subject.variables)
    logits = subject.logits(dead, subject.inputs)
    labels = 0 * subject.case.labels(BATCH, seed=0)
    batch = batch_of(subject.inputs, labels, np.ones(BATCH, bool))
    learnt = subject.learn(dead, batch)
    for path, leaf in flatten({"logits": logits, **learnt}).items():
        assert jnp.isfinite(leaf).all(), path


def batch_of(inputs: Any, labels: Any, mask: Any) -> Batch:
    return Batch(*map(jnp.asarray, (inputs, labels, mask)))


def assert_close(tree: PyTree, expected: PyTree, atol: float) -> None:
    """Compares leaf by leaf, relative to the largest entry of the leaf (or to one)."""
    leaves, expected_leaves = flatten(tree), flatten(expected)
    assert leaves.keys() == expected_leaves.keys()
    for path, leaf in leaves.items():
        expected_leaf = expected_leaves[path]
        scale = max(1.0, float(jnp.abs(expected_leaf).max()))
        np.testing.assert_allclose(
            leaf, expected_leaf, rtol=0, atol=atol * scale, err_msg=path
        )
