"""Compares a merge round of stacked, jitted agents with plain NumPy loops."""

import functools
from collections.abc import Callable

import jax
import numpy as np
import optax
import pytest

from dimat_jax import models, permutation
from dimat_jax.algorithms import ALGORITHMS, MergeData, Task
from dimat_jax.data._dataset import Split
from dimat_jax.data.pipeline import Reader, place_pool
from dimat_jax.mixing import MIXINGS
from dimat_jax.models import classifier
from dimat_jax.network import Links
from dimat_jax.placement import place
from dimat_jax.topology import TOPOLOGIES
from dimat_jax.tree import flatten, map_with_path, unstack
from tests.reference import merge_loop

N_AGENTS, N_CLASSES, BATCH = 4, 4, 8
MODELS = {
    "mlp": {"hidden": (12, 9)},
    "resnet20": {},
}


def _images(n: int, seed: int) -> Split:
    rng = np.random.default_rng(seed)
    # The images are smooth blobs, for which units of an untrained network differ more
    # than for noise.
    coarse = rng.integers(0, 256, (n, 4, 4, 3)).astype(np.uint8)
    return Split(
        coarse.repeat(2, axis=1).repeat(2, axis=2),
        rng.integers(0, N_CLASSES, n).astype(np.int32),
    )


class _World:
    """Makes agents that are noisy, shuffled copies of one network, and their data.

    They are copies, and their biases keep units alive, so that the best assignment is
    unique: float32 and float64 then find the same one.
    """

    def __init__(self, name: str):
        self.placement = place(N_AGENTS, jax.devices()[:1], "vmap")
        self.model = models.MODELS[name](n_classes=N_CLASSES, **MODELS[name])
        self.spec = models.permutation_spec(self.model)
        self.task = Task(
            loss=classifier.loss(self.model),
            spec=self.spec,
            activations=classifier.activations(self.model),
            batch_statistics=classifier.batch_statistics(self.model),
        )
        images = _images(60, seed=0)
        mean, std = np.full(3, 128.0), np.full(3, 64.0)
        self.pool = place_pool(images, mean, std, self.placement)
        self.reader = Reader(self.pool, self.placement)
        self.inputs = (images.images - mean) / std
        base = classifier.init(self.model, jax.random.key(0), np.zeros((1, 8, 8, 3)))
        base["params"] = map_with_path(
            lambda path, leaf: leaf + 1.5 if path.endswith("bias") else leaf,
            base["params"],
        )
        if self.task.batch_statistics is not None:
            # With their running statistics and these biases, all units are alive.
            base["batch_stats"] = jax.jit(self.task.batch_statistics)(
                base, self.inputs.astype(np.float32), np.ones(60, bool)
            )
        self.agents = [
            jax.tree.map(np.array, self._copy(base, seed)) for seed in range(N_AGENTS)
        ]
        self.variables = self.placement.put(
            jax.tree.map(lambda *leaves: np.stack(leaves), *self.agents)
        )
        self.observe_one = jax.jit(self.task.activations)

    def _copy(self, base, seed: int):
        rng = np.random.default_rng(seed)

        def noisy(path, leaf):
            noise = 0.01 * rng.standard_normal(leaf.shape)
            return leaf * (1.0 + noise)

        perms = permutation.random(self.spec, base, jax.random.key(seed))
        shuffled = permutation.apply(self.spec, perms, map_with_path(noisy, base))
        return jax.tree.map(np.float32, shuffled)

    def network(self, topology: str):
        adjacency = TOPOLOGIES[topology](N_AGENTS)
        W = MIXINGS["uniform"](adjacency)
        return W, Links(adjacency, W).at_round(1, self.placement.slots)

    def activations(self, agent: int, indices: np.ndarray) -> dict[str, np.ndarray]:
        seen = self.observe_one(
            self.agents[agent], self.inputs[indices].astype(np.float32)
        )
        return {tap: np.asarray(units) for tap, units in seen.items()}


@pytest.fixture(scope="module")
def worlds() -> Callable[[str], _World]:
    return functools.cache(_World)


@pytest.fixture(params=MODELS)
def world(request, worlds) -> _World:
    return worlds(request.param)


# Batches are ragged on purpose: they have 8 of 17, 18, ... examples.
OWN = [np.arange(10 * a, 10 * a + 17 + a) for a in range(N_AGENTS)]
SHARED = np.arange(20, 40)
STAY = 0.05


@pytest.mark.every_nth(7)
@pytest.mark.parametrize(
    ("name", "algorithm", "topology", "frame", "policy"),
    [
        ("mlp", "dimat", "ring", "own", "shared"),
        ("mlp", "dimat", "ring", "reference", "own"),
        ("mlp", "dimat", "ring", "joint", "own"),
        ("mlp", "dimat", "fully_connected", "own", "own"),
        ("mlp", "dimat", "fully_connected", "reference", "shared"),
        ("mlp", "dimat", "fully_connected", "joint", "shared"),
        ("mlp", "wm", "ring", "own", None),
        ("mlp", "wm", "fully_connected", "reference", None),
        ("mlp", "wm", "ring", "joint", None),
        ("resnet20", "dimat", "ring", "own", "shared"),
        ("resnet20", "dimat", "ring", "reference", "own"),
        ("resnet20", "dimat", "fully_connected", "own", "own"),
        ("resnet20", "dimat", "fully_connected", "reference", "shared"),
        ("resnet20", "wm", "fully_connected", "joint", None),
    ],
)
def test_a_merge_round_agrees_with_plain_loops(
    worlds, name, algorithm, topology, frame, policy
):
    world = worlds(name)
    W, network = world.network(topology)
    samples = {
        "shared": world.reader.shared(SHARED, BATCH),
        "own": world.reader.own(OWN, BATCH),
        None: None,
    }[policy]
    ours = ALGORITHMS[algorithm](
        world.task,
        optax.sgd(0.1),
        world.placement,
        **({"frame": frame, "stay": STAY} if ALGORITHMS[algorithm].aligns else {}),
    )
    state, metrics = ours.communicate(
        ours.init(world.variables),
        MergeData(match=samples),
        network,
        jax.random.key(0),
    )

    agents = [flatten(agent) for agent in world.agents]
    edges = [(i, j) for i, j in np.argwhere(W).tolist() if i != j]
    solve = merge_loop.together if frame == "joint" else merge_loop.alone
    if algorithm == "wm":
        half = [(i, j) for i, j in edges if i < j]
        perms = merge_loop.both_ways(
            merge_loop.match_weights(world.spec, half, agents, solve, STAY)
        )
    else:

        def observe(i: int, j: int) -> dict[str, np.ndarray]:
            return world.activations(j, SHARED if policy == "shared" else OWN[i])

        perms = merge_loop.match_activations(world.spec, edges, observe, solve, STAY)
    merge = (
        merge_loop.merge_reference_frame
        if frame == "reference"
        else merge_loop.merge_own_frame
    )
    merged = unstack(world.placement.gather(ours.variables(state)))
    expected = merge(world.spec, W, agents, perms)
    for one, theirs in zip(merged, expected, strict=True):
        for path, leaf in flatten(one).items():
            np.testing.assert_allclose(
                leaf, theirs[path], rtol=1e-5, atol=1e-5, err_msg=path
            )
    assert 0 < metrics["moved_units"] <= 1
    assert 0.9 < metrics["match_similarity"] <= 1 + 1e-6


@pytest.mark.every_nth(2)
def test_weight_averaging_is_the_mixing_matrix_alone(world):
    W, network = world.network("ring")
    algorithm = ALGORITHMS["wa"](world.task, optax.sgd(0.1), world.placement)
    state = algorithm.init(world.variables)
    state, _ = algorithm.communicate(state, MergeData(), network, jax.random.key(0))
    merged = flatten(world.placement.gather(algorithm.variables(state)))
    for path, leaf in flatten(world.placement.gather(world.variables)).items():
        np.testing.assert_allclose(
            merged[path], np.tensordot(W, leaf, axes=1), atol=1e-6, err_msg=path
        )


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["shared", "own"])
def test_recalibration_averages_the_statistics_of_batches(worlds, policy):
    world = worlds("resnet20")
    _, network = world.network("disconnected")
    samples = (
        world.reader.shared(SHARED, BATCH)
        if policy == "shared"
        else world.reader.own(OWN, BATCH)
    )
    algorithm = ALGORITHMS["wa"](world.task, optax.sgd(0.1), world.placement)
    state = algorithm.init(world.variables)
    state, _ = algorithm.communicate(
        state, MergeData(recalibrate=samples), network, jax.random.key(0)
    )
    statistics_of = jax.jit(world.task.batch_statistics)
    recalibrated = unstack(world.placement.gather(algorithm.variables(state)))
    for agent in (0, 3):
        indices = SHARED if policy == "shared" else OWN[agent]
        batches = [indices[k : k + BATCH] for k in range(0, len(indices), BATCH)]
        expected = merge_loop.recalibrate(
            [
                flatten(
                    statistics_of(
                        world.agents[agent],
                        world.inputs[batch].astype(np.float32),
                        np.ones(len(batch), bool),
                    )
                )
                for batch in batches
            ],
            [len(batch) for batch in batches],
        )
        ours = flatten(recalibrated[agent]["batch_stats"])
        for path, leaf in expected.items():
            np.testing.assert_allclose(
                ours[path], leaf, rtol=1e-5, atol=1e-5, err_msg=path
            )
