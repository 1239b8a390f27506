from functools import cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dimat_jax import merge, permutation
from dimat_jax.data import sources
from dimat_jax.data.pipeline import Batch
from dimat_jax.errors import UserError
from dimat_jax.matching import activation_matching
from dimat_jax.models import classifier, permutation_spec
from dimat_jax.models.mlp import MLP
from dimat_jax.models.resnet import ResNet
from dimat_jax.models.vgg import VGG
from dimat_jax.models.vit import ViT
from dimat_jax.tree import PyTree, flatten, map_with_path

# Averages =============================================================================


def model(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "kernel": rng.normal(size=(3, 4)).astype(np.float32),
        "half": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
        "steps": np.int32(seed),
    }


def test_an_average_is_the_weighted_mean_of_every_real_leaf():
    models = [model(seed) for seed in range(3)]
    weights = [0.5, 0.3, 0.2]
    merged = merge.average(models, weights)
    for name in ("kernel", "half"):
        expected = sum(
            w * np.asarray(m[name], np.float64)
            for w, m in zip(weights, models, strict=True)
        )
        assert merged[name].dtype == models[0][name].dtype
        rounding = 2**-9 if name == "half" else 1e-6
        np.testing.assert_allclose(
            np.asarray(merged[name], np.float64), expected, rtol=rounding, atol=1e-6
        )
    assert merged["steps"] == 0  # an integer is no weight; the first one's stays


def test_an_average_is_taken_in_float32():
    # In bfloat16, 256 + 1 is 256, so each addition would lose its term.
    models = [{"x": jnp.asarray(x, jnp.bfloat16)} for x in (768, 3, 3, 3, 3, 3)]
    exact = jnp.asarray((768 + 15) / 6, jnp.bfloat16)
    assert merge.average(models)["x"] == exact


def test_weights_are_relative():
    models = [model(seed) for seed in range(3)]
    shares = merge.average(models, [0.5, 0.25, 0.25])["kernel"]
    np.testing.assert_array_equal(merge.average(models, [2, 1, 1])["kernel"], shares)
    mean = np.mean([m["kernel"] for m in models], axis=0)
    np.testing.assert_allclose(merge.average(models)["kernel"], mean, rtol=1e-5)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_shares_are_proportional_and_sum_to_one(weights):
    shares = merge.check_weights(weights, len(weights))
    assert sum(shares) == pytest.approx(1)
    np.testing.assert_allclose(shares, np.divide(weights, sum(weights)), rtol=1e-12)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "1 weights for 2 models"),
        ([1.0, 1.0, 1.0], "3 weights for 2 models"),
        ([1.0, -0.5], "at least 0"),
        ([1.0, np.nan], "finite"),
        ([1.0, np.inf], "finite"),
        ([0.0, 0.0], "not all 0"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, message):
    with pytest.raises(UserError, match=message):
        merge.average([model(0), model(1)], weights)


def test_a_model_without_a_share_does_not_count_even_if_it_is_infinite():
    broken = {**model(1), "kernel": np.full((3, 4), np.inf, np.float32)}
    merged = merge.average([model(0), broken], [1, 0])
    np.testing.assert_array_equal(merged["kernel"], model(0)["kernel"])


def test_models_with_other_leaves_are_refused_and_the_leaf_is_named():
    other = model(1)
    del other["half"]
    with pytest.raises(UserError, match="model 0 has a leaf 'half', which model 1 la"):
        merge.average([model(0), other])
    with pytest.raises(UserError, match="model 1 has a leaf 'half', which model 0 la"):
        merge.average([other, model(0)])
    wide = {**model(2), "kernel": np.zeros((3, 5), np.float32)}
    with pytest.raises(UserError, match=r"'kernel' is of shape \(3, 4\) in model 0.*2"):
        merge.average([model(0), model(1), wide])
    with pytest.raises(UserError, match="no models"):
        merge.average([])


def test_the_ends_of_the_line_are_the_models_themselves():
    a, b = model(0), model(1)
    for t, end in ((0, a), (1, b)):
        for name in ("kernel", "half"):
            point = merge.interpolate(a, b, t)
            np.testing.assert_array_equal(point[name], end[name])
    between = merge.interpolate(a, b, 0.25)["kernel"]
    expected = 0.75 * a["kernel"] + 0.25 * b["kernel"]
    np.testing.assert_allclose(between, expected, rtol=1e-6)


def test_complex_leaves_are_averaged_with_both_their_parts():
    a, b = np.array([[1 + 2j, -3j], [4, 0.5 - 1j]], np.complex64)
    mean = merge.average([{"w": a}, {"w": b}], [3, 1])["w"]
    assert mean.dtype == np.complex64
    np.testing.assert_allclose(mean, 0.75 * a + 0.25 * b, rtol=1e-6)


def test_every_leaf_may_have_weights_of_its_own():
    models = [model(seed) for seed in range(2)]
    merged = merge.average(models, lambda p: [1, 3] if p == "kernel" else None)
    for name, share in (("kernel", 0.25), ("half", 0.5)):
        first, second = (np.asarray(m[name], np.float64) for m in models)
        np.testing.assert_allclose(
            np.asarray(merged[name], np.float64),
            share * first + (1 - share) * second,
            atol=2**-7 if name == "half" else 1e-6,
        )
    with pytest.raises(UserError, match="3 weights for 2 models"):
        merge.average(models, lambda path: [1, 1, 1])


def test_what_fits_is_averaged_and_the_rest_is_the_first_models():
    a, b = model(0), model(1) | {"head": np.ones(3)}
    a["head"] = np.zeros(2)
    del b["half"]
    merged = merge.average([a, b], mismatched="first")
    mean = (a["kernel"] + b["kernel"]) / 2
    np.testing.assert_allclose(merged["kernel"], mean, rtol=1e-6)
    assert merged["head"] is a["head"] and merged["half"] is a["half"]
    with pytest.raises(UserError, match="no models"):
        merge.average([], mismatched="first")


def test_tensors_of_pytorch_and_leaves_that_are_no_arrays_are_averaged_as_well():
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    models = [{"w": torch.nn.Parameter(torch.tensor(v)), "act": "relu"} for v in values]
    merged = merge.average(models)
    np.testing.assert_allclose(merged["w"], values.mean(0), rtol=1e-6)
    assert merged["act"] == "relu"


@pytest.mark.parametrize("t", [-0.1, 1.1, np.nan])
def test_there_is_no_line_beyond_its_ends(t):
    with pytest.raises(UserError, match="0 <= t <= 1"):
        merge.interpolate(model(0), model(1), t)


# Networks to be merged ================================================================


class Trained(NamedTuple):
    """Two networks of one architecture, trained on digits from different seeds."""

    module: nn.Module
    spec: permutation.PermutationSpec
    models: tuple[PyTree, PyTree]
    batches: list[jax.Array]
    test: Batch

    def loss_and_accuracy(self, variables: PyTree) -> tuple[float, float]:
        loss, accuracy = judge(self.module, variables, self.test)
        return float(loss), float(accuracy)

    def aligned(self) -> list[PyTree]:
        a, b = self.models
        watch = classifier.activations(self.module)
        perms = activation_matching(self.spec, watch, a, b, self.batches)
        return [a, permutation.apply(self.spec, perms, b)]


@jax.jit(static_argnums=0)
def judge(module, variables, batch):
    logits = classifier.forward(module)(variables, batch.inputs)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return losses.mean(), (logits.argmax(axis=-1) == batch.labels).mean()


@cache
def digits() -> tuple[Batch, Batch]:
    dataset = sources.load("digits")
    train, test = (
        Batch(
            jnp.asarray((split.images - dataset.mean) / dataset.std, jnp.float32),
            jnp.asarray(split.labels),
            jnp.ones(len(split.labels), bool),
        )
        for split in (dataset.train, dataset.test)
    )
    return train, test


KINDS = {
    "mlp": (MLP((32, 32), 10), 60),
    "mlp with batch norm": (MLP((32, 32), 10, norm="batch"), 60),
    "vgg without norm": (VGG(((16, 16), (32,)), 10, norm="none"), 60),
}


@cache
def trained(kind: str) -> Trained:
    module, steps = KINDS[kind]
    train, test = digits()
    tx = optax.adam(3e-3)
    loss = classifier.loss(module)

    @jax.jit
    def step(variables, opt_state, batch):
        def of_params(params):
            value, (state, _) = loss(
                {**variables, "params": params}, batch, jax.random.key(0)
            )
            return value, state

        grads, state = jax.grad(of_params, has_aux=True)(variables["params"])
        updates, opt_state = tx.update(grads, opt_state)
        params = optax.apply_updates(variables["params"], updates)
        return {**variables, **state, "params": params}, opt_state

    init = jax.jit(lambda key: classifier.init(module, key, train.inputs[:1]))
    models = []
    for seed in range(2):
        variables = init(jax.random.key(seed))
        opt_state = tx.init(variables["params"])
        rng = np.random.default_rng(seed)
        for _ in range(steps):
            chosen = rng.integers(len(train.labels), size=100)
            batch = jax.tree.map(lambda x, i=chosen: x[i], train)
            variables, opt_state = step(variables, opt_state, batch)
        models.append(variables)
    spec = permutation_spec(module)
    batches = [train.inputs[:100], train.inputs[100:250]]
    return Trained(module, spec, (models[0], models[1]), batches, test)


def test_a_permuted_copy_has_a_barrier_before_alignment_and_none_after():
    net = trained("mlp")
    a = net.models[0]
    perms = permutation.random(net.spec, a, jax.random.key(5))
    b = permutation.apply(net.spec, perms, a)
    before = merge.barrier(net.loss_and_accuracy, a, b, [0, 0.25, 0.5, 0.75, 1])
    watch = classifier.activations(net.module)
    found = activation_matching(net.spec, watch, a, b, net.batches)
    after = merge.barrier(
        net.loss_and_accuracy, a, permutation.apply(net.spec, found, b)
    )
    assert before.barrier > 0.1
    assert before.accuracies[2] < before.accuracies[0] - 0.02
    assert after.barrier < 1e-4
    assert np.ptp(after.accuracies) == 0


def test_networks_from_different_seeds_merge_better_aligned():
    net = trained("mlp")
    plain = merge.average(net.models)
    aligned = merge.average(net.aligned())
    assert net.loss_and_accuracy(aligned)[0] < net.loss_and_accuracy(plain)[0] / 2


# Recalibration ========================================================================


def test_recalibration_averages_batch_statistics_by_examples():
    def batch_statistics(variables, inputs, mask):
        assert mask.shape == (len(inputs),)
        return {"mean": variables["params"] * inputs.mean(axis=0)}

    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(n, 3)).astype(np.float32) for n in (5, 2, 1)]
    variables = {
        "params": jnp.full(3, 2.0),
        "batch_stats": {"mean": jnp.zeros(3)},
        "other": jnp.ones(1),
    }
    result = merge.recalibrate(batch_statistics, variables, batches)
    expected = 2 * np.concatenate(batches).mean(axis=0)
    np.testing.assert_allclose(result["batch_stats"]["mean"], expected, rtol=1e-5)
    assert (
        result["params"] is variables["params"]
        and result["other"] is variables["other"]
    )


def test_statistics_need_a_batch():
    with pytest.raises(UserError, match="at least one batch"):
        merge.recalibrate(lambda v, x, m: {}, {"batch_stats": {}}, [])


def test_a_batch_without_examples_adds_nothing():
    total, count = merge.add_batch(jnp.ones(2), 4.0, jnp.full(2, jnp.nan), 0.0)
    np.testing.assert_array_equal(total, [1, 1])
    assert count == 4


def test_recalibration_compiles_once_for_all_points_of_a_line():
    traces = []

    def batch_statistics(variables, inputs, mask):
        traces.append(inputs.shape)
        return {"mean": variables["params"] * inputs.mean(axis=0)}

    for scale in range(3):
        variables = {"params": jnp.full(3, float(scale)), "batch_stats": None}
        merge.recalibrate(batch_statistics, variables, [np.ones((4, 3), np.float32)])
    assert len(traces) == 1


def test_a_merged_network_with_batch_norm_is_worth_more_recalibrated():
    net = trained("mlp with batch norm")
    statistics = classifier.batch_statistics(net.module)
    assert statistics is not None
    merged = merge.average(net.aligned())
    recalibrated = merge.recalibrate(statistics, merged, net.batches)
    before, after = (net.loss_and_accuracy(m)[0] for m in (merged, recalibrated))
    assert after < before - 0.02


# REPAIR ===============================================================================

SEVERAL = {
    "mlp": MLP((9, 7), 5),
    "vgg": VGG(((4, 5), (6,)), 5, norm="none"),
    "resnet with layer norm": ResNet((1, 1), (4, 6), 5, norm="layer"),
    "vit": ViT(5, 4, 1, 8, 2, 4, 16),
}


@cache
def fresh(name: str, n_models: int) -> tuple[Any, list[PyTree], jax.Array]:
    """The function of an architecture that measures moments, networks, and inputs."""
    module = SEVERAL[name]
    noise = np.random.default_rng(1).normal(size=(12, 8, 8, 1))
    inputs = jnp.asarray(noise, jnp.float32)
    shapes = jax.eval_shape(
        lambda key: classifier.init(module, key, inputs), jax.random.key(0)
    )
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        mean = 1 if path.endswith("scale") else 0
        return rng.normal(mean, 0.3, leaf.shape).astype(np.float32)

    moments = jax.jit(classifier.unit_moments(module, permutation_spec(module)))
    models = [map_with_path(draw, shapes) for _ in range(n_models)]
    return moments, models, inputs


every_kind = pytest.mark.parametrize("name", SEVERAL)


@pytest.mark.every_nth(2)
@every_kind
def test_repaired_units_have_the_interpolated_means_and_deviations(name):
    moments, models, inputs = fresh(name, 3)
    weights = [0.5, 0.2, 0.3]
    merged = merge.average(models, weights)
    repaired = merge.repair(moments, merged, models, [inputs], weights)
    *seen, before, after = jax.device_get(
        [moments(m, inputs) for m in (*models, merged, repaired)]
    )
    biased = [leaf.removesuffix("/bias") for leaf in flatten(merged)]
    moved = 0
    for layer, (mean, variance) in after.items():
        deviation = sum(
            w * np.sqrt(m[layer].variance) for w, m in zip(weights, seen, strict=True)
        )
        scale = np.max(deviation)
        np.testing.assert_allclose(
            np.sqrt(variance), deviation, rtol=1e-3, atol=1e-4 * scale, err_msg=layer
        )
        if layer in biased:
            target = sum(w * m[layer].mean for w, m in zip(weights, seen, strict=True))
            np.testing.assert_allclose(
                mean, target, rtol=1e-3, atol=1e-3 * scale, err_msg=layer
            )
        moved += not np.allclose(before[layer].variance, variance, rtol=1e-2)
    assert moved == len(after)


@pytest.mark.every_nth(2)
@every_kind
def test_repair_leaves_a_network_alone_that_nothing_is_wrong_with(name):
    moments, models, inputs = fresh(name, 3)
    batches = [inputs[:4], inputs[4:]]
    repaired = merge.repair(moments, models[0], [models[0]] * 2, batches)
    for path, leaf in flatten(repaired).items():
        expected = flatten(models[0])[path]
        np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-5, err_msg=path)


def test_repair_touches_hidden_layers_alone():
    moments, models, inputs = fresh("mlp", 3)
    merged = merge.average(models[:2])
    assert list(moments(merged, inputs)) == ["params/hidden0", "params/hidden1"]
    repaired = flatten(merge.repair(moments, merged, models[:2], [inputs]))
    for path, leaf in flatten(merged).items():
        assert (leaf == repaired[path]).all() == ("head" in path), path


def test_the_moments_are_of_pre_activations():
    moments, (variables, *_), inputs = fresh("mlp", 3)
    layer = variables["params"]["hidden0"]
    x = np.asarray(inputs, np.float64).reshape(len(inputs), -1)
    units = x @ np.asarray(layer["kernel"], np.float64) + layer["bias"]
    seen = moments(variables, inputs)["params/hidden0"]
    np.testing.assert_allclose(seen.mean, units.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen.variance, units.var(axis=0), rtol=1e-4)


@pytest.mark.parametrize("dead", ["in all", "in the merged", "in the models"])
def test_dead_units_leave_no_nan(dead):
    moments, models, inputs = fresh("mlp", 3)

    def kill(variables):
        layer = variables["params"]["hidden0"]
        kernel = jnp.asarray(layer["kernel"]).at[:, 0].set(0)
        params = {**variables["params"], "hidden0": {**layer, "kernel": kernel}}
        return {**variables, "params": params}

    merged, models = merge.average(models[:2]), models[:2]
    if dead != "in the merged":
        models = [kill(m) for m in models]
    if dead != "in the models":
        merged = kill(merged)
    repaired = merge.repair(moments, merged, models, [inputs])
    for path, leaf in flatten(repaired).items():
        assert np.isfinite(leaf).all(), path
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(repaired)) < 100
    # The unit's mean is that of the models, even if the unit cannot be made to vary.
    target = np.mean([moments(m, inputs)["params/hidden0"].mean[0] for m in models])
    seen = moments(repaired, inputs)["params/hidden0"]
    assert seen.mean[0] == pytest.approx(float(target), abs=1e-5)


def test_repair_is_not_for_networks_with_batch_norm():
    with pytest.raises(UserError, match="recalibrate"):
        merge.repair(lambda *a: {}, {"params": {}, "batch_stats": {}}, [{}], [])


def test_a_layer_that_is_called_twice_is_refused():
    class Twice(nn.Module):
        dtype: Any = jnp.float32

        @nn.compact
        def __call__(self, x, *, train):
            layer = nn.Dense(4, name="layer")
            return layer(layer(x))

    spec = permutation.PermutationSpec(
        {"params/layer/kernel": (None, "units"), "params/layer/bias": ("units",)}
    )
    x = jnp.ones((2, 4))
    variables = classifier.init(Twice(), jax.random.key(0), x)
    with pytest.raises(ValueError, match="'params/layer' is called twice"):
        classifier.unit_moments(Twice(), spec)(variables, x)


@pytest.mark.slow
def test_a_deep_network_without_norm_is_worth_more_repaired():
    net = trained("vgg without norm")
    aligned = net.aligned()
    merged = merge.average(aligned)
    moments = classifier.unit_moments(net.module, net.spec)
    repaired = merge.repair(moments, merged, aligned, net.batches)
    before, after = (net.loss_and_accuracy(m) for m in (merged, repaired))
    assert after[0] < 0.8 * before[0]
    assert after[1] > before[1] + 0.03


# Barriers =============================================================================


def on_a_hill(x: PyTree) -> tuple[float, float]:
    """A loss of 3 at t = 0 and of 1 at t = 1, with a bump of 4 t (1 - t) between."""
    t = float(x["t"])
    return 3 - 2 * t + 4 * t * (1 - t), t


ENDS = ({"t": np.float32(0)}, {"t": np.float32(1)})


def test_the_barrier_is_the_height_over_the_chord():
    line = merge.barrier(on_a_hill, *ENDS)
    assert line.barrier == pytest.approx(1)
    np.testing.assert_allclose(line.ts, np.arange(11) / 10)
    np.testing.assert_allclose(line.accuracies, line.ts, atol=1e-6)
    np.testing.assert_allclose(line.losses, [on_a_hill({"t": t})[0] for t in line.ts])
    coarse = merge.barrier(on_a_hill, *ENDS, [0, 0.25, 1])
    assert coarse.barrier == pytest.approx(0.75)


def test_a_valley_has_no_barrier():
    line = merge.barrier(lambda x: (float(x["t"]) ** 2, 1.0), *ENDS)
    assert line.barrier == 0


def test_every_point_of_the_line_is_repaired_at_its_place():
    def repair(x, t):
        assert float(x["t"]) == pytest.approx(t)
        seen.append(t)
        return {"t": np.float32(round(t))}

    seen = []
    line = merge.barrier(on_a_hill, *ENDS, [0, 0.3, 0.7, 1], repair=repair)
    assert seen == [0, 0.3, 0.7, 1]
    np.testing.assert_allclose(line.losses, [3, 3, 1, 1])


@pytest.mark.parametrize("ts", [[], [0], [0, 0.5], [0.1, 1], [0, 0.5, 0.5, 1]])
def test_points_that_do_not_go_from_end_to_end_are_refused(ts):
    with pytest.raises(UserError, match="increase from 0 to 1"):
        merge.barrier(on_a_hill, *ENDS, ts)
