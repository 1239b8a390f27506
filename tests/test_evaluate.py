from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dimat_jax.data.pipeline import Reader, place_pool
from dimat_jax.data.sources import Split
from dimat_jax.evaluate import (
    Evaluation,
    Evaluator,
    deviation,
    disagreement,
    local_accuracy,
)
from dimat_jax.placement import Placement, place

N_AGENTS, N_SAMPLES, N_CLASSES = 3, 11, 4
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (N_SAMPLES, 2, 2, 1), dtype=np.uint8)
LABELS = RNG.integers(N_CLASSES, size=N_SAMPLES).astype(np.int32)
MEAN, STD = 120.0, 50.0


def forward(variables: Any, inputs):
    params = variables["params"]
    return inputs.reshape(len(inputs), -1) @ params["w"] + params["b"][None, :]


def agents(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    params = {
        "w": rng.normal(size=(N_AGENTS, 4, N_CLASSES)).astype(np.float32),
        "b": rng.normal(size=(N_AGENTS, N_CLASSES)).astype(np.float32),
    }
    # Other collections do not count for the distance.
    statistics = {"mean": rng.normal(size=(N_AGENTS, 3)).astype(np.float32)}
    return {"params": params, "batch_stats": statistics}


def in_numpy(variables: Any, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Computes the accuracy and the loss of every agent in float64."""
    x = (IMAGES[samples].reshape(len(samples), -1) - MEAN) / STD
    w, b = (variables["params"][name].astype(np.float64) for name in "wb")
    logits = np.einsum("sd,adc->asc", x, w) + b[:, None]
    labels = LABELS[samples]
    accuracy = (logits.argmax(axis=-1) == labels).mean(axis=1)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return accuracy, -log_probabilities[:, np.arange(len(labels)), labels].mean(axis=1)


@pytest.fixture
def placement() -> Placement:
    return place(N_AGENTS, jax.devices()[:1])


def evaluate(
    placement: Placement,
    variables: Any,
    batch_size: int = 4,
    samples: np.ndarray | None = None,
    forward: Any = forward,
) -> Evaluation:
    split = Split(IMAGES, LABELS)
    pool = place_pool(split, np.array([MEAN]), np.array([STD]), placement)
    samples = np.arange(N_SAMPLES) if samples is None else samples
    reader = Reader(pool, placement)
    evaluator = Evaluator(forward, reader.shared(samples, batch_size), placement)
    return evaluator(placement.put(variables))


@pytest.mark.parametrize("batching", ["vmap", "unroll"])
@pytest.mark.parametrize("batch_size", [1, 4, 11, 100])
def test_accuracy_and_loss_are_means_over_all_samples(batching, batch_size):
    # With batch sizes of 4 and 100, the last batch must be filled up.
    placement = place(N_AGENTS, jax.devices()[:1], batching)
    variables = agents()
    result = evaluate(placement, variables, batch_size)
    accuracy, loss = in_numpy(variables, np.arange(N_SAMPLES))
    np.testing.assert_allclose(result.accuracy, accuracy, rtol=1e-12)
    np.testing.assert_allclose(result.loss, loss, rtol=1e-5)
    # With equal accuracies, the test would not notice agents in a wrong order.
    assert len(set(accuracy)) > 1


def test_only_the_given_samples_count(placement):
    variables, samples = agents(), np.array([10, 3, 5, 7, 0])
    result = evaluate(placement, variables, samples=samples)
    accuracy, loss = in_numpy(variables, samples)
    np.testing.assert_allclose(result.accuracy, accuracy, rtol=1e-12)
    np.testing.assert_allclose(result.loss, loss, rtol=1e-5)


def test_results_are_of_the_host(placement):
    result = evaluate(placement, agents())
    assert isinstance(result.accuracy, np.ndarray)
    assert result.accuracy.shape == result.loss.shape == (N_AGENTS,)
    assert type(result.consensus_distance) is float


def test_evaluating_again_starts_from_nothing(placement):
    split = Split(IMAGES, LABELS)
    pool = place_pool(split, np.array([MEAN]), np.array([STD]), placement)
    samples = Reader(pool, placement).shared(np.arange(N_SAMPLES), 4)
    traces = []

    def counted(variables, inputs):
        traces.append(inputs.shape)
        return forward(variables, inputs)

    evaluator = Evaluator(counted, samples, placement)
    first = evaluator(placement.put(agents(0)))
    n_traces = len(traces)
    evaluator(placement.put(agents(1)))
    again = evaluator(placement.put(agents(0)))
    np.testing.assert_array_equal(again.accuracy, first.accuracy)
    np.testing.assert_array_equal(again.loss, first.loss)
    assert len(traces) == n_traces  # nothing was compiled again


def test_a_filled_up_entry_that_is_not_finite_counts_nowhere(placement):
    def forward_of_black(variables, inputs):
        # A batch of 20 holds 11 samples, followed by copies of sample 0.
        first = (IMAGES[0].reshape(1, -1) - MEAN) / STD
        flat = inputs.reshape(len(inputs), -1)
        is_first = jnp.isclose(flat, jnp.asarray(first, flat.dtype)).all(axis=1)
        seen_before = jnp.cumsum(is_first) > 1
        return jnp.where(seen_before[:, None], jnp.nan, forward(variables, inputs))

    variables = agents()
    result = evaluate(placement, variables, 20, forward=forward_of_black)
    accuracy, loss = in_numpy(variables, np.arange(N_SAMPLES))
    np.testing.assert_allclose(result.accuracy, accuracy, rtol=1e-12)
    np.testing.assert_allclose(result.loss, loss, rtol=1e-5)


def test_losses_that_are_not_finite_are_not_hidden(placement):
    variables = agents()
    variables["params"]["w"][1] = np.nan
    result = evaluate(placement, variables)
    np.testing.assert_array_equal(np.isfinite(result.loss), [True, False, True])


# The consensus distance


def test_the_distance_is_the_root_mean_square_over_agents(placement):
    variables = agents()
    params = variables["params"]
    flat = np.concatenate(
        [leaf.reshape(N_AGENTS, -1) for leaf in params.values()], axis=1
    ).astype(np.float64)
    from_mean = np.linalg.norm(flat - flat.mean(axis=0), axis=1)
    expected = np.sqrt((from_mean**2).mean())
    distance = evaluate(placement, variables).consensus_distance
    assert distance == pytest.approx(expected, rel=1e-6)


def test_two_camps_are_half_their_difference_away_from_the_mean():
    placement = place(2, jax.devices()[:1])
    params = {"w": np.zeros((2, 4, N_CLASSES)), "b": np.array([[3.0] * 4, [-3.0] * 4])}
    distance = evaluate(placement, {"params": params}).consensus_distance
    assert distance == pytest.approx(3 * np.sqrt(4))


def test_at_consensus_the_distance_is_zero(placement):
    variables = agents()
    same = jax.tree.map(lambda x: np.stack([x[0]] * N_AGENTS), variables)
    # The running statistics differ, but they do not count for the distance.
    same["batch_stats"] = variables["batch_stats"]
    assert evaluate(placement, same).consensus_distance == pytest.approx(0, abs=1e-6)


def test_the_distance_grows_with_the_disagreement_and_ignores_the_common_part(
    placement,
):
    variables = agents()
    moved, doubled = (jax.tree.map(np.copy, variables) for _ in range(2))
    moved["params"]["b"] += 5
    doubled["params"] = jax.tree.map(lambda x: 2 * x, doubled["params"])
    distance, shifted, twice = (
        evaluate(placement, v).consensus_distance for v in (variables, moved, doubled)
    )
    assert shifted == pytest.approx(distance, rel=1e-5)
    assert twice == pytest.approx(2 * distance, rel=1e-6)


def test_the_distance_of_complex_params_counts_both_their_parts(placement):
    w = jnp.asarray(RNG.normal(size=(N_AGENTS, 2, 2, 2)), jnp.float32)
    params = agents()["params"]
    parts = {"params": {**params, "re": w[..., 0], "im": w[..., 1]}}
    whole = {"params": {**params, "z": jax.lax.complex(w[..., 0], w[..., 1])}}
    distance, expected = (
        evaluate(placement, variables).consensus_distance
        for variables in (whole, parts)
    )
    assert distance == pytest.approx(expected, rel=1e-6)


def test_deviations_are_those_of_samples_and_0_for_a_single_agent():
    assert deviation(np.array([0.1, 0.4, 0.7])) == pytest.approx(0.3)
    assert deviation(np.array([0.4])) == 0.0


# By class, local, and disagreement


def predictions_of(variables: Any) -> np.ndarray:
    """Returns the agents' predictions on all samples, `[agents, samples]`."""
    x = (IMAGES.reshape(N_SAMPLES, -1) - MEAN) / STD
    w, b = (variables["params"][name].astype(np.float64) for name in "wb")
    return (np.einsum("sd,adc->asc", x, w) + b[:, None]).argmax(axis=-1)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_accuracy_by_class_is_of_the_samples_of_a_class(placement, batch_size):
    variables, samples = agents(), np.flatnonzero(LABELS != 1)
    result = evaluate(placement, variables, batch_size, samples)
    correct = (predictions_of(variables) == LABELS)[:, samples]
    there, by_class = np.unique(LABELS[samples]), result.accuracy_by_class
    assert len(there) > 1 and 1 not in there and by_class is not None
    for label in range(N_CLASSES):
        found = by_class[:, label]
        if label in there:
            of_class = correct[:, LABELS[samples] == label]
            np.testing.assert_allclose(found, of_class.mean(axis=1))
        else:
            assert np.isnan(found).all()
    assert len(np.unique(by_class[:, there])) > 2


def test_local_accuracy_weights_classes_as_the_shard_does():
    by_class = np.array([[1.0, 0.5, np.nan], [1.0, 0.5, np.nan], [0.0, 0.25, np.nan]])
    # No agent has images of the last class, so its column is missing.
    counts = np.array([[3, 1], [0, 5], [2, 2]])
    np.testing.assert_allclose(local_accuracy(by_class, counts), [0.875, 0.5, 0.125])


def test_local_accuracy_leaves_out_classes_without_samples():
    by_class = np.array([[np.nan, 0.5], [np.nan, 0.5]])
    local = local_accuracy(by_class, np.array([[9, 1], [4, 0]]))
    np.testing.assert_array_equal(local, [0.5, np.nan])


@pytest.mark.parametrize("seed", range(5))
def test_disagreement_is_the_mean_over_all_pairs_of_agents(seed):
    rng = np.random.default_rng(seed)
    predictions = rng.integers(0, 3, (2 + seed, 7))
    pairs = [
        (predictions[i] != predictions[j]).mean()
        for i in range(len(predictions))
        for j in range(i)
    ]
    assert disagreement(predictions) == pytest.approx(np.mean(pairs))
    assert disagreement(np.stack([predictions[0]] * 4)) == 0
    assert disagreement(predictions[:1]) == 0


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_agents_disagree_as_their_predictions_do(devices):
    placement = place(N_AGENTS, jax.devices()[:devices])
    variables = agents()
    expected = disagreement(predictions_of(variables))
    assert evaluate(placement, variables).disagreement == pytest.approx(expected)
    assert 0 < expected < 1
