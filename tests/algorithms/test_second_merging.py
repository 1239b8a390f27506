"""Tests that merging with matched units equals its second implementation.

The agents' networks have one hidden layer of four units. The second implementation
finds the best permutations by trying all of them.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from dimat_jax import models
from dimat_jax.algorithms import ALGORITHMS, MergeData
from dimat_jax.data.pipeline import Batch, Samples, own_samples
from tests.algorithms.problems import N_AGENTS, classify
from tests.algorithms.scenarios import CLASSES, IMAGES, LABELS, PIXELS, SCENARIOS
from tests.algorithms.twofold import First, Problem, Variant, assert_agree, merging
from tests.reference import messages, optimizers
from tests.reference.matching import Model

UNITS, SIDE = 4, 2
SHAPE = (SIDE, SIDE, 1)
# The images on which units are compared: each agent's own ones, or the same for all.
OWN = [np.arange(5 * i, 5 * i + 16 + i) for i in range(N_AGENTS)]
SHARED = np.arange(8, 36)


def model(images=None) -> Model:
    """The network; `images[i]` are the images on which agent i compares units."""
    seen = None if images is None else lambda i: IMAGES[images[i]]
    return Model(PIXELS, UNITS, CLASSES, seen)


def shuffled_copies() -> np.ndarray:
    """Makes agents that are noisy copies of one network, with units in any order.

    The best permutations are then clear, but those of some pairs of agents contradict
    each other: see below. The biases keep all units alive.
    """
    rng = np.random.default_rng(2)
    parts = [rng.standard_normal(shape) for shape in model().shapes]
    parts[2] = np.ones(UNITS)
    one = np.concatenate([part.ravel() for part in parts])
    noisy = one + 0.7 * rng.standard_normal((N_AGENTS, len(one)))
    return np.stack([model().permute(rng.permutation(UNITS), x) for x in noisy])


def variables(start: np.ndarray):
    head_bias, head, bias, kernel = (
        np.stack([model().split(x)[part] for x in start]).astype(np.float32)
        for part in range(4)
    )
    return {
        "params": {
            "head": {"bias": head_bias, "kernel": head},
            "hidden0": {"bias": bias, "kernel": kernel},
        }
    }


def gradient(x: np.ndarray, examples: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return model().gradient(x, IMAGES[examples], LABELS[examples], weights)


PIXELS_OF = IMAGES.reshape(-1, *SHAPE).astype(np.float32)
_MLP = models.MODELS["mlp"](n_classes=CLASSES, hidden=(UNITS,))
NETWORKS = Problem(
    classify(_MLP, models.permutation_spec(_MLP), SHAPE).task,
    shuffled_copies(),
    variables,
    PIXELS_OF,
    LABELS.astype(np.int32),
    gradient,
)


def load(indices: np.ndarray, mask: np.ndarray) -> Batch:
    labels = jnp.zeros(indices.shape, jnp.int32)
    return Batch(jnp.asarray(PIXELS_OF[indices]), labels, jnp.asarray(mask))


SAMPLES = {
    "own": own_samples(load, OWN, 8),
    "shared": Samples(
        load, SHARED.reshape(2, -1), np.ones((2, len(SHARED) // 2), bool), shared=True
    ),
}


def matching(
    name: str, data: str = "own", optimizer: str = "", compressor: str = "", **options
) -> Variant:
    by_weights = not ALGORITHMS[name].matches_activations
    images = OWN if data == "own" else [SHARED] * N_AGENTS
    given = {"model": model(None if by_weights else images), **options}
    if "gradient" in given:
        given["before_merge"] = given.pop("gradient") == "before_merge"
    if optimizer:
        given["optimizer"] = {"sgd": optimizers.Sgd}[optimizer]
    if compressor:
        given["compress"] = getattr(messages, compressor)
    return Variant(
        merging(name, "local", optimizer, compressor, **options),
        given,
        data=MergeData() if by_weights else MergeData(match=SAMPLES[data]),
    )


VARIANTS = {
    "dimat": matching("dimat"),
    "dimat, shared images": matching("dimat", "shared", opt_state="merge"),
    "dimat, reference": matching(
        "dimat", frame="reference", opt_state="keep", gradient="before_merge"
    ),
    "dimat, joint": matching("dimat", frame="joint", opt_state="merge"),
    "dimat, top_k": matching("dimat", "own", "sgd", "top_k"),
    "wm": matching("wm", opt_state="merge"),
    "wm, joint": matching("wm", frame="joint"),
    "wm, reference, float16": matching(
        "wm", "own", "sgd", "float16", frame="reference"
    ),
}


@functools.cache
def implementation(name: str) -> First:
    return First(VARIANTS[name], NETWORKS)


@pytest.mark.every_nth(6)
@pytest.mark.parametrize(
    ("name", "scenario"),
    [
        (name, scenario)
        for name, variant in VARIANTS.items()
        for scenario, found in SCENARIOS.items()
        if variant.accepts(found)
    ],
)
def test_both_implementations_agree(name, scenario):
    assert_agree(implementation(name), VARIANTS[name], NETWORKS, SCENARIOS[scenario])


def test_every_algorithm_that_aligns_is_compared():
    aligning = {name for name, record in ALGORITHMS.items() if record.aligns}
    assert aligning == {variant.case.name for variant in VARIANTS.values()}


@pytest.mark.parametrize("images", [OWN, [SHARED] * N_AGENTS, None])
def test_permutations_of_pairs_need_not_agree_on_cycles(images):
    """Otherwise nothing would tell a joint frame from the agents' own frames."""
    agents = dict(enumerate(shuffled_copies()))
    graph = np.argwhere(SCENARIOS["full batches"].adjacency[0])
    pairs = [(i, j) for i, j in graph.tolist()]
    network = model(images)
    to_root = network.together(agents, pairs)
    assert any(
        (
            network.best(network.scores(agents, i, j))
            != to_root[j][to_root[i].argsort()]
        ).any()
        for i, j in pairs
    )
