"""Tests what devices send each other.

Whether XLA gathers all agents' arrays on every device shows in its programs alone. So
this file is also a program. It runs in a process of its own, in which XLA writes down
all programs that it compiles, and trains and merges agents that have a device each.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat_jax import models
from dimat_jax.algorithms import MergeData, Task
from dimat_jax.algorithms.cdsgd import cdsgd
from dimat_jax.data.pipeline import Batch
from dimat_jax.mixing import mix
from dimat_jax.models import classifier
from dimat_jax.models.resnet import ResNet
from dimat_jax.placement import Placement, place
from dimat_jax.tree import take
from tests.algorithms.cases import CASES, case_of, links, on_placement
from tests.algorithms.problems import N_AGENTS, PROBLEMS, mlp, shared_images

ROOT = Path(__file__).parents[1]

layouts = st.tuples(st.integers(1, 7), st.integers(1, 5))


def placed(layout: tuple[int, int]) -> Placement:
    """Agents on some devices; with two devices or more for each, in two parts."""
    n_agents, n_devices = layout
    return place(n_agents, jax.devices()[:n_devices], "vmap", batch_size=2)


def stacked_tree(placement: Placement, seed: int) -> dict:
    """A tree with leaves of many shapes and dtypes."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.standard_normal((placement.n_agents, *shape))

    return placement.put(
        {
            "kernel": np.float32(draw(3, 2)),
            "bias": np.float32(draw(2)),
            "scalar": np.float32(draw()),
            "half": draw(4).astype(jnp.bfloat16),
            "complex": np.complex64(draw(2) + 1j * draw(2)),
            "count": np.arange(placement.n_agents, dtype=np.int32),
            "flags": draw(3) > 0,
            "empty": np.float32(draw(0)),
        }
    )


@settings(max_examples=30)
@given(layout=layouts, density=st.floats(0, 1), seed=st.integers(0, 2**16))
def test_mixing_over_devices_is_the_product_with_w(layout, density, seed):
    placement = placed(layout)
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((placement.slots,) * 2).astype(np.float32)
    W *= rng.random(W.shape) < density
    stacked = stacked_tree(placement, seed)
    found = jax.jit(lambda W, tree: mix(W, tree, placement))(W, stacked)
    for name, leaf in mix(jnp.asarray(W), take(stacked, slice(None))).items():
        assert found[name].dtype == leaf.dtype
        # Two sums in another order differ by rounding, in the leaf's own dtype.
        tolerance = 1e-2 if name == "half" else 1e-5
        np.testing.assert_allclose(
            np.asarray(found[name], complex),
            np.asarray(leaf, complex),
            rtol=tolerance,
            atol=tolerance,
        )


@pytest.mark.slow
@settings(max_examples=30)
@given(layout=layouts, seed=st.integers(0, 2**16))
def test_picking_over_devices_is_indexing(layout, seed):
    placement = placed(layout)
    indices = np.random.default_rng(seed).integers(0, placement.slots, placement.slots)
    stacked = stacked_tree(placement, seed)
    found = jax.jit(lambda tree, i: placement.pick(tree, i))(stacked, indices)
    jax.tree.map(np.testing.assert_array_equal, found, take(stacked, indices))


def test_what_no_agent_needs_is_not_sent():
    """Agent 0 is not finite; it spoils only those that give it a weight."""
    placement = placed((4, 4))
    x = placement.put(np.array([np.nan, 1, 2, 3], np.float32))
    W = np.eye(4, dtype=np.float32)
    W[1, 1] = W[1, 0] = 0.5
    mixed = placement.gather(jax.jit(lambda W, x: mix(W, x, placement))(W, x))
    np.testing.assert_array_equal(mixed, [np.nan, np.nan, 2, 3])


# Several devices for each agent =======================================================


def test_a_batch_is_split_over_the_devices_of_its_agent():
    placement = place(2, jax.devices()[:5], "vmap", batch_size=6)
    assert dict(placement.mesh.shape) == {"agents": 2, "batch": 2}
    stacked = placement.put(np.zeros((2, 6, 3), np.float32))
    split = jax.jit(placement.split_batch)(stacked)
    assert {shard.data.shape for shard in split.addressable_shards} == {(1, 3, 3)}
    shared = jax.jit(lambda x: placement.split_batch(x, shared=True))(np.zeros((6, 3)))
    assert {shard.data.shape for shard in shared.addressable_shards} == {(3, 3)}
    # Five examples cannot be shared out evenly.
    odd = placement.put(np.zeros((2, 5, 3), np.float32))
    assert jax.jit(placement.split_batch)(odd).sharding == odd.sharding


@pytest.mark.parametrize(
    ("n_devices", "batch_size", "expected"),
    [(3, 4, (2, 1)), (4, 4, (2, 2)), (5, 3, (2, 1)), (5, 1, (2, 1)), (1, 4, (1, 1))],
)
def test_agents_come_before_batches(n_devices, batch_size, expected):
    placement = place(2, jax.devices()[:n_devices], batch_size=batch_size)
    shape = placement.mesh.shape
    assert (shape["agents"], shape.get("batch", 1)) == expected


@pytest.mark.parametrize("batching", ["vmap", "unroll"])
def test_a_split_batch_trains_as_a_whole_one(batching):
    """BatchNorm sees the statistics of the whole batch, of which two entries are
    masked."""
    model = ResNet(blocks=(1,), channels=(4,), n_classes=3)
    task = Task(loss=classifier.loss(model), spec=models.permutation_spec(model))
    rng = np.random.default_rng(0)
    mask = np.arange(8) < np.array([[8], [6]])
    data = (
        np.float32(rng.standard_normal((2, 8, 8, 8, 3))),
        rng.integers(0, 3, (2, 8)).astype(np.int32),
        mask,
    )
    agents = [
        classifier.init(model, jax.random.key(i), np.zeros((1, 8, 8, 3)))
        for i in range(2)
    ]
    network = links("fully_connected", n_agents=2).at_round(1, 2)

    def train(n_devices):
        placement = place(2, jax.devices()[:n_devices], batching, batch_size=8)
        algorithm = cdsgd(task, optax.sgd(0.1), placement)

        @jax.jit
        def step(state, batch, network):
            batch = placement.split_batch(batch)
            return algorithm.step(state, batch, network, jax.random.key(0))[0]

        state = algorithm.init(
            placement.put(jax.tree.map(lambda *x: np.stack(x), *agents))
        )
        for _ in range(2):
            state = step(state, Batch(*placement.put(data)), network)
        return placement.gather(algorithm.variables(state))

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        train(4),
        train(1),
    )


# What XLA sends =======================================================================

FRAMES = {
    f"{name}, {frame}": case_of(name, frame=frame)
    for name, frame in (("dimat", "reference"), ("dimat", "joint"))
}
# Algorithms that differ in what they send. Their other variants send it alike.
SENDERS = (
    "cdsgd",
    "cga",
    "choco, top_k",
    "d2",
    "dimat",
    "dsgt",
    "relaysgd",
    "scaffold",
    "sgp",
    "wa",
    "wa, int8",
    "wm",
    *FRAMES,
)
# The hidden layers of the model. Nothing but weights has a product of them as its size.
HIDDEN = (200, 150)


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> dict[str, str]:
    """All programs that this file compiles when it runs as a program, by name."""
    folder = tmp_path_factory.mktemp("programs")
    environment = {
        name: value for name, value in os.environ.items() if "JAX" not in name
    }
    # The modules that this program imports compute something, so it is too late for
    # `request_cpu_devices` then.
    environment["JAX_NUM_CPU_DEVICES"] = str(N_AGENTS)
    environment["PJRT_NPROC"] = str(2 * N_AGENTS)
    environment["XLA_FLAGS"] = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
    subprocess.run(
        [sys.executable, "-m", "tests.test_passing"],
        cwd=ROOT,
        env=environment,
        check=True,
    )
    found = {
        path.name: path.read_text()
        for path in folder.glob("*after_optimizations.txt")
        if "spmd" not in path.name
    }
    assert found
    return found


def sizes(program: str, operation: str) -> list[int]:
    """The numbers of elements of all results of an operation."""
    pattern = rf"= \(?\w+\[([\d,]*)\][^=]* {operation}(?:-start)?\("
    return [
        int(np.prod([int(x) for x in shape.split(",") if x]))
        for shape in re.findall(pattern, program)
    ]


@pytest.mark.slow
def test_no_device_receives_the_weights_of_all_agents(programs):
    weights = N_AGENTS * HIDDEN[0] * HIDDEN[1]
    for name, program in programs.items():
        gathered = sizes(program, "all-gather") + sizes(program, "all-to-all")
        assert max(gathered, default=0) < weights, name


@pytest.mark.slow
def test_weights_pass_from_device_to_device(programs):
    passed = [
        size
        for program in programs.values()
        for size in sizes(program, "collective-permute")
    ]
    assert max(passed) >= HIDDEN[0] * HIDDEN[1]


def main() -> None:
    """Trains and merges with every algorithm, on a device for each agent."""
    PROBLEMS["wide"] = problem = mlp(*HIDDEN)
    placement = place(N_AGENTS, jax.devices(), "vmap")
    variables = problem.variables(N_AGENTS)
    (batch,) = problem.batches(placement, 1)
    ring = links("ring")
    for name in SENDERS:
        subject = on_placement(CASES.get(name) or FRAMES[name], "wide", placement)
        state = subject.algorithm.init(placement.put(variables))
        key, network = jax.random.key(0), ring.at_round(1, placement.slots)
        data = MergeData(match=shared_images())
        state, _ = subject.algorithm.communicate(state, data, network, key)
        subject.step(state, batch, network, key)


if __name__ == "__main__":
    main()
