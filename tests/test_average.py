"""The average of the agents' models: aligned, recalibrated and evaluated."""

from typing import Any

import jax
import numpy as np
import pytest

from dimat_jax import permutation
from dimat_jax._average import Average, AverageModel
from dimat_jax.algorithms import Task
from dimat_jax.algorithms._recalibration import Recalibrator
from dimat_jax.data.pipeline import Reader, Samples, place_pool
from dimat_jax.data.sources import Split
from dimat_jax.evaluate import Evaluator
from dimat_jax.models import classifier
from dimat_jax.permutation import PermutationSpec
from dimat_jax.placement import Placement, place
from dimat_jax.tree import flatten, stack, take
from tests.algorithms.problems import CNN, CNN_SPEC, PROBLEMS

N_SAMPLES = 23
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (N_SAMPLES, 4, 4, 1), dtype=np.uint8)
LABELS = RNG.integers(3, size=N_SAMPLES).astype(np.int32)
CNN_TASK = PROBLEMS["cnn"].task


def shared(placement: Placement, batch_size: int, n: int = N_SAMPLES) -> Samples:
    pool = place_pool(
        Split(IMAGES, LABELS), np.array([120.0]), np.array([50.0]), placement
    )
    return Reader(pool, placement).shared(np.arange(n), batch_size)


@pytest.fixture(
    params=[
        (3, 1, "vmap"),
        (3, 1, "chunks"),
        (3, 2, "vmap"),  # one slot only fills up a device
        (5, 5, "vmap"),
        (1, 1, "vmap"),
    ],
    ids=str,
)
def placement(request) -> Placement:
    n_agents, devices, batching = request.param
    return place(n_agents, jax.devices()[:devices], batching)


def linear(variables: Any, inputs):
    params = variables["params"]
    return inputs.reshape(len(inputs), -1) @ params["w"] + params["b"][None, :]


LINEAR = Task(
    loss=lambda *args: NotImplemented,
    spec=PermutationSpec({"params/w": (None, None), "params/b": (None,)}),
)


@pytest.mark.parametrize("batch_size", [4, 100])
def test_the_average_is_evaluated_on_every_sample_once(placement, batch_size):
    rng = np.random.default_rng(1)
    w = rng.normal(size=(placement.n_agents, 16, 3)).astype(np.float32)
    b = rng.normal(size=(placement.n_agents, 3)).astype(np.float32)
    evaluate = AverageModel(linear, LINEAR, shared(placement, batch_size), placement)
    found = evaluate(placement.put({"params": {"w": w, "b": b}}), {}, None)

    x = (IMAGES.reshape(N_SAMPLES, -1) - 120.0) / 50.0
    logits = x @ w.mean(axis=0, dtype=np.float64) + b.mean(axis=0, dtype=np.float64)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(N_SAMPLES), LABELS]
    flat = np.concatenate([w.reshape(len(w), -1), b], axis=1)
    distance = np.sqrt(((flat - flat.mean(axis=0)) ** 2).sum(axis=1).mean())
    assert found.metric == pytest.approx((logits.argmax(axis=1) == LABELS).mean())
    assert found.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert found.consensus_distance == pytest.approx(distance, rel=1e-5, abs=1e-6)


def cnn_agents(n_agents: int) -> Any:
    """Draws agents whose running statistics differ too."""
    variables, rng = PROBLEMS["cnn"].variables(n_agents), np.random.default_rng(2)
    statistics = jax.tree.map(
        lambda x: (x + rng.uniform(0, 1, x.shape)).astype(np.float32),
        variables["batch_stats"],
    )
    return {**variables, "batch_stats": statistics}


def recalibrator(placement: Placement) -> Recalibrator:
    assert CNN_TASK.batch_statistics is not None
    return Recalibrator(CNN_TASK.batch_statistics, placement)


@pytest.mark.every_nth(3)
def test_one_model_is_recalibrated_like_an_agent_on_the_same_batches(placement):
    """The agents share out the batches: 23 images in batches of 4, the last of 3."""
    one = take(cnn_agents(1), 0)
    recalibrate = recalibrator(placement)
    samples = shared(placement, 4)
    expected = recalibrate(placement.put(stack([one] * placement.n_agents)), samples)
    expected = take(placement.gather(expected), 0)
    found = recalibrate.of_one_model(placement.replicate(one), samples)
    for path, leaf in flatten(expected).items():
        np.testing.assert_allclose(
            flatten(found)[path], leaf, rtol=1e-5, atol=1e-5, err_msg=path
        )


@pytest.mark.slow
def test_shuffled_copies_are_one_model_once_they_are_aligned():
    """Permutations change the distance of the params, but no prediction."""
    placement = place(5, jax.devices()[:2])
    one, samples = take(cnn_agents(1), 0), shared(placement, 8)
    perms = [
        permutation.random(CNN_SPEC, one, key)
        for key in jax.random.split(jax.random.key(1), 5)
    ]
    shuffled = placement.put(
        stack([permutation.apply(CNN_SPEC, each, one) for each in perms])
    )
    rows = stack([perms[slot % 5] for slot in range(placement.slots)])
    back = jax.tree.map(lambda p: np.argsort(p, axis=1).astype(np.int32), rows)
    evaluate = AverageModel(classifier.forward(CNN()), CNN_TASK, samples, placement)
    agents = Evaluator(classifier.forward(CNN()), samples, placement)(shuffled)
    aligned, plain = evaluate(shuffled, back, None), evaluate(shuffled, {}, None)
    assert agents.disagreement == 0 and agents.consensus_distance > 0.1
    assert plain.consensus_distance == pytest.approx(agents.consensus_distance)
    assert aligned.consensus_distance == pytest.approx(0, abs=1e-6)
    assert aligned.metric == pytest.approx(agents.accuracy[0])
    assert aligned.loss == pytest.approx(agents.loss[0], rel=1e-5)
    assert plain.loss != pytest.approx(agents.loss[0], rel=1e-3)


@pytest.mark.slow
def test_with_examples_the_average_has_statistics_of_its_own():
    placement = place(3, jax.devices()[:1])
    samples, variables = shared(placement, 8), cnn_agents(3)
    evaluate = AverageModel(classifier.forward(CNN()), CNN_TASK, samples, placement)
    model = jax.tree.map(lambda x: x.mean(axis=0), variables)
    single = place(1, jax.devices()[:1])
    alone = Evaluator(classifier.forward(CNN()), shared(single, 8), single)
    recalibrate = recalibrator(placement)
    mended = recalibrate.of_one_model(placement.replicate(model), samples)

    def expected(one: Any) -> Average:
        found = alone(jax.tree.map(lambda x: np.asarray(x)[None], one))
        return Average(found.accuracy[0], found.loss[0], 0.0)

    put = placement.put(variables)
    for calibration, one in ((None, model), (samples, mended)):
        found = evaluate(put, {}, calibration)
        assert found.metric == pytest.approx(expected(one).metric)
        assert found.loss == pytest.approx(expected(one).loss, rel=1e-5)
    assert evaluate(put, {}, None).loss != evaluate(put, {}, samples).loss
