"""Tests placement on 1, 2 and 5 host devices.

JAX fixes the number of host devices when it starts. So this file is also a program. It
runs in a process of its own with a given number of devices, computes the results that
the tests compare, and saves them.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dimat_jax import _devices
from dimat_jax import placement as placement_module
from dimat_jax.algorithms.base import Task
from dimat_jax.algorithms.local import local
from dimat_jax.data.pipeline import Batch, Reader, place_pool
from dimat_jax.data.sources import Split
from dimat_jax.evaluate import Evaluator
from dimat_jax.ledger import Messages
from dimat_jax.mixing import mix, uniform
from dimat_jax.network import Links, Network
from dimat_jax.permutation import PermutationSpec
from dimat_jax.placement import (
    Placement,
    PlacementError,
    place,
    request_cpu_devices,
)
from dimat_jax.topology import TOPOLOGIES

ROOT = Path(__file__).parents[1]
N_AGENTS = 5
# Five agents share one device, share two devices with a slot left over, or have a
# device each.
DEVICES = [1, 2, 5]
BATCHINGS = ["vmap", "unroll", "chunks"]
N_STEPS = 20

RNG = np.random.default_rng(0)
STACKED = {
    "x": RNG.normal(size=(N_AGENTS, 4, 3)).astype(np.float32),
    "n": np.arange(N_AGENTS, dtype=np.int32),
}
SHARED = RNG.normal(size=(3, 2)).astype(np.float32)


def one_agent(own: dict, shared, key) -> dict:
    noise = jax.random.normal(key, (4, 2))
    return {"y": jnp.tanh(own["x"] @ shared) + noise, "n": own["n"] + 1}


# A small convolutional classifier, as a task


def init_cnn(key) -> dict:
    conv_key, head_key = jax.random.split(key)
    return {
        "params": {
            "conv": 0.3 * jax.random.normal(conv_key, (3, 3, 1, 8)),
            "head": 0.3 * jax.random.normal(head_key, (4 * 4 * 8, 3)),
        },
        "running": {"mean": jnp.zeros(8)},
    }


def logits(variables: dict, inputs):
    params = variables["params"]
    hidden = jax.lax.conv_general_dilated(
        inputs,
        params["conv"],
        window_strides=(2, 2),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return jax.nn.relu(hidden).reshape(len(inputs), -1) @ params["head"]


def loss(variables: dict, batch: Batch, key):
    kept = jax.random.bernoulli(key, 0.9, batch.inputs.shape)
    outputs = logits(variables, batch.inputs * kept)
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, batch.labels)
    value = jnp.where(batch.mask, losses, 0).sum() / jnp.maximum(batch.mask.sum(), 1)
    running = {"mean": 0.9 * variables["running"]["mean"] + 0.1 * batch.inputs.mean()}
    return value, ({"running": running}, {"loss": value})


def training_batch(step: int) -> Batch:
    """The agents' batch. Agent 4 idles in each third step; agent 3 has half a batch."""
    rng = np.random.default_rng([1, step])
    mask = np.ones((N_AGENTS, 6), bool)
    mask[3, 3:] = False
    mask[4] = step % 3 > 0
    labels = rng.integers(3, size=mask.shape)
    inputs = rng.normal(size=(*mask.shape, 8, 8, 1)) + labels[..., None, None, None]
    return Batch(
        jnp.asarray(inputs, jnp.float32),
        jnp.asarray(labels, jnp.int32),
        jnp.asarray(mask),
    )


def trained(placement: Placement) -> tuple[dict, np.ndarray]:
    """The variables and the last losses after some steps of `local`."""
    task = Task(loss, PermutationSpec({}))
    algorithm = local(task, optax.sgd(0.1, momentum=0.9), placement)
    initial = [init_cnn(jax.random.key(agent)) for agent in range(N_AGENTS)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *initial)
    state = algorithm.init(placement.put(stacked))
    network = placement.replicate(ring_network(placement))
    step = placement.jit(algorithm.step)
    metrics = {}
    for number in range(N_STEPS):
        key = jax.random.fold_in(jax.random.key(9), number)
        batch = placement.put(training_batch(number))
        state, metrics = step(state, batch, network, key)
    assert algorithm.messages(state) == Messages()
    variables = placement.gather(algorithm.variables(state))
    return variables, placement.gather(metrics["loss"])


def ring_network(placement: Placement) -> Network:
    adjacency = TOPOLOGIES["ring"](N_AGENTS)
    return Links(adjacency, uniform).at_round(1, placement.slots)


def evaluation_samples(placement: Placement):
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (10, 8, 8, 1), dtype=np.uint8)
    split = Split(images, rng.integers(3, size=10).astype(np.int32))
    pool = place_pool(split, np.array([100.0]), np.array([60.0]), placement)
    return Reader(pool, placement).shared(np.arange(10), batch_size=4)


def compute(placement: Placement) -> dict[str, np.ndarray]:
    """Computes results that must not depend on the placement of the agents."""
    lifted = placement.per_agent(one_agent, in_axes=(0, None, 0))
    keys = placement.keys(jax.random.key(3))
    stacked = placement.put(STACKED)
    outputs = placement.jit(lifted)(stacked, placement.replicate(SHARED), keys)
    n_shards = len({shard.device for shard in outputs["y"].addressable_shards})

    network = placement.replicate(ring_network(placement))
    mixed = jax.jit(mix)(network.W, stacked)

    variables, losses = trained(placement)
    evaluator = Evaluator(logits, evaluation_samples(placement), placement)
    evaluation = evaluator(placement.put(variables))
    return {
        "slots": np.array(placement.slots),
        "n_shards": np.array(n_shards),
        "fetched": placement.fetch(stacked)["x"],
        "gathered": placement.gather(stacked)["x"],
        "keys": np.array(jax.random.key_data(keys))[:N_AGENTS],
        "y": placement.gather(outputs)["y"],
        "n": placement.gather(outputs)["n"],
        "mixed": placement.gather(mixed)["x"],
        "conv": variables["params"]["conv"],
        "head": variables["params"]["head"],
        "running": variables["running"]["mean"],
        "losses": losses,
        "accuracy": evaluation.accuracy,
        "test_loss": evaluation.loss,
        "consensus_distance": np.array(evaluation.consensus_distance),
    }


def compute_all(n_devices: int, out: str) -> None:
    request_cpu_devices(n_devices)
    assert jax.device_count() == n_devices
    assert place(2).mesh.size == min(2, n_devices)  # at most one device for each agent
    results = {}
    for batching in BATCHINGS:
        placement = place(N_AGENTS, batching=batching)
        for name, array in compute(placement).items():
            results[f"{batching}/{name}"] = array
    np.savez(out, **results)


def run_alone(
    command: list[str], timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess:
    """Runs Python in a process of its own, without a setting for threads."""
    inherited = {k: v for k, v in os.environ.items() if k != "PJRT_NPROC"}
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=timeout,
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
    )


Results = Callable[[int, str], dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Returns `results(n_devices, batching)`, the results of `compute` with these."""
    saved: dict[int, Any] = {}

    def of(n_devices: int, batching: str) -> dict[str, np.ndarray]:
        if n_devices not in saved:
            out = tmp_path_factory.mktemp("placement") / "results.npz"
            done = run_alone([__file__, str(n_devices), str(out)])
            assert done.returncode == 0, done.stderr
            saved[n_devices] = dict(np.load(out))
        prefix = f"{batching}/"
        return {
            name.removeprefix(prefix): array
            for name, array in saved[n_devices].items()
            if name.startswith(prefix)
        }

    return of


everywhere = pytest.mark.parametrize("n_devices", DEVICES)
both_batchings = pytest.mark.parametrize("batching", BATCHINGS)


@pytest.mark.every_nth(9)
@everywhere
@both_batchings
def test_per_agent_is_a_loop_over_agents(results, n_devices, batching):
    there = results(n_devices, batching)
    key = jax.random.key(3)
    for agent in range(N_AGENTS):
        own = {name: leaf[agent] for name, leaf in STACKED.items()}
        expected = one_agent(own, SHARED, jax.random.fold_in(key, agent))
        np.testing.assert_allclose(there["y"][agent], expected["y"], atol=1e-5)
        assert there["n"][agent] == expected["n"]
    assert there["n"].dtype == np.int32


@pytest.mark.every_nth(12)
@everywhere
@both_batchings
def test_agents_are_spread_over_all_devices(results, n_devices, batching):
    assert results(n_devices, batching)["n_shards"] == n_devices


@everywhere
def test_put_fills_up_with_copies_that_gather_cuts_off(results, n_devices):
    there = results(n_devices, "unroll")
    x, slots = STACKED["x"], -(-N_AGENTS // n_devices) * n_devices
    assert there["slots"] == slots
    np.testing.assert_array_equal(there["fetched"], np.concatenate([x, x])[:slots])
    np.testing.assert_array_equal(there["gathered"], x)


@everywhere
def test_keys_differ_by_agent_and_not_by_device_count(results, n_devices):
    keys = results(n_devices, "unroll")["keys"]
    np.testing.assert_array_equal(keys, results(1, "unroll")["keys"])
    assert len(np.unique(keys, axis=0)) == N_AGENTS


@everywhere
def test_mix_of_sharded_agents_is_the_matrix_product(results, n_devices):
    matrix = uniform(TOPOLOGIES["ring"](N_AGENTS))
    expected = np.einsum("ij,jkl->ikl", matrix, STACKED["x"].astype(np.float64))
    np.testing.assert_allclose(
        results(n_devices, "unroll")["mixed"], expected, atol=1e-6
    )


@everywhere
@both_batchings
def test_training_is_the_same_wherever_agents_live(results, n_devices, batching):
    here, there = results(1, "vmap"), results(n_devices, batching)
    for name in ("conv", "head", "running", "losses"):
        np.testing.assert_allclose(there[name], here[name], atol=1e-4, err_msg=name)


def test_training_moved_what_is_compared(results):
    here = results(1, "vmap")
    initial = [init_cnn(jax.random.key(agent)) for agent in range(N_AGENTS)]
    for agent, variables in enumerate(initial):
        moved = here["head"][agent] - variables["params"]["head"]
        assert np.abs(moved).max() > 0.1
    assert (here["accuracy"] > 0).any() and np.isfinite(here["losses"]).all()


@everywhere
@both_batchings
def test_evaluation_is_of_the_agents_alone(results, n_devices, batching):
    # With two devices the sixth slot holds a copy of agent 0.
    here, there = results(1, "vmap"), results(n_devices, batching)
    assert there["accuracy"].shape == (N_AGENTS,)
    np.testing.assert_array_equal(there["accuracy"], here["accuracy"])
    np.testing.assert_allclose(there["test_loss"], here["test_loss"], rtol=1e-4)
    params = [there["conv"].reshape(5, -1), there["head"].reshape(5, -1)]
    agents = np.concatenate(params, axis=1).astype(np.float64)
    squares = ((agents - agents.mean(axis=0)) ** 2).sum()
    np.testing.assert_allclose(
        there["consensus_distance"], np.sqrt(squares / N_AGENTS), rtol=1e-5
    )


# Properties of every placement, tested on this process's own devices


@pytest.fixture(params=BATCHINGS)
def placement(request) -> Placement:
    return place(3, jax.devices()[:1], batching=request.param)


@pytest.mark.parametrize("in_axes", [0, (0, 0)])
def test_per_agent_takes_one_axis_for_all_arguments(placement, in_axes):
    x, y = np.arange(6.0).reshape(3, 2), np.ones((3, 2))
    total = placement.per_agent(lambda x, y: (x * y).sum(), in_axes)(x, y)
    np.testing.assert_array_equal(total, [1, 5, 9])


@pytest.mark.parametrize("in_axes", [None, (None,)])
def test_an_argument_shared_by_all_gives_everyone_the_same(placement, in_axes):
    squares = placement.per_agent(lambda x: x**2, in_axes)(np.arange(2.0))
    np.testing.assert_array_equal(squares, [[0, 1]] * 3)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("in_axes", [1, -1, True, (0, 1), (0, (0, None)), "0", 0.0])
def test_agents_are_stacked_on_leading_axes_alone(placement, in_axes):
    with pytest.raises(PlacementError, match="each entry of in_axes is 0 .* or None"):
        placement.per_agent(lambda x, y: x + y, in_axes)


def test_every_argument_has_its_axis(placement):
    x = np.ones((3, 2), np.float32)
    for in_axes in [(), (0,), (0, None, 0)]:
        lifted = placement.per_agent(lambda x, y: x + y, in_axes)
        with pytest.raises(PlacementError, match=f"{len(in_axes)} entries for 2 arg"):
            lifted(x, x)


def test_per_agent_can_be_differentiated(placement):
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    lifted = placement.per_agent(lambda x: (x**3).sum())
    np.testing.assert_allclose(jax.grad(lambda x: lifted(x).sum())(x), 3 * x**2)


def test_gather_gives_arrays_that_no_later_step_overwrites(placement):
    stacked = placement.put(np.arange(3.0))
    gathered = placement.gather(stacked)
    assert not np.shares_memory(gathered, np.asarray(stacked))
    jax.jit(lambda x: x + 1, donate_argnums=0)(stacked)
    np.testing.assert_array_equal(gathered, [0, 1, 2])
    gathered[0] = 5  # the array may be written to


def test_replicated_trees_keep_shapes_and_dtypes(placement):
    tree = {"a": np.arange(3, dtype=np.uint8), "b": np.float32(2)}
    replicated = placement.replicate(tree)
    assert replicated["a"].dtype == np.uint8 and replicated["b"].shape == ()
    np.testing.assert_array_equal(replicated["a"], tree["a"])


@pytest.mark.parametrize("shape", [(2, 3), (4,), ()])
def test_put_refuses_what_is_not_stacked_over_the_agents(placement, shape):
    with pytest.raises(ValueError, match="leading axis of 3 agents, got"):
        placement.put({"ok": np.zeros(3), "wrong": np.zeros(shape)})


def test_agents_run_one_by_one_where_they_share_a_device_and_are_not_batched():
    (device,) = jax.devices()[:1]
    assert place(3, [device], "unroll").one_by_one
    assert place(3, [device], "chunks").one_by_one
    assert not place(3, [device], "chunks", 2).one_by_one
    assert not place(3, [device], "vmap").one_by_one


def test_auto_is_chunks_on_a_cpu_and_vmap_elsewhere():
    on_cpu = jax.devices()[0].platform == "cpu"
    assert place(2).batching == ("chunks" if on_cpu else "vmap")


def test_there_must_be_an_agent():
    with pytest.raises(ValueError, match="at least 1 agent, got 0"):
        place(0)


def test_batching_is_one_of_the_layouts():
    with pytest.raises(
        ValueError,
        match="batching is 'scan'; allowed: auto, chunks, .* unroll, vmap",
    ):
        place(2, batching="scan")


# Host devices and the thread pool that they share


def gather_activations() -> None:
    """Dispatches forward passes and all-gathers of their results without waiting."""
    request_cpu_devices(N_AGENTS)
    placement = place(N_AGENTS)
    rng = np.random.default_rng(0)
    kernel = placement.put(rng.normal(size=(N_AGENTS, 3, 3, 8, 8)).astype(np.float32))
    inputs = placement.put(rng.normal(size=(N_AGENTS, 8, 8, 8, 8)).astype(np.float32))

    def activations(kernel, x):
        for _ in range(2):
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x)
        return x.reshape(-1, x.shape[-1])

    def all_pairs(a):
        return jnp.einsum("isu,jsv->ijuv", a, a)

    forward = placement.per_agent(activations)
    in_one = jax.jit(lambda kernel, x: all_pairs(forward(kernel, x)))
    first, then = jax.jit(forward), jax.jit(all_pairs)
    for lowered in (in_one.lower(kernel, inputs), then.lower(first(kernel, inputs))):
        assert "all-gather" in str(lowered.compile().as_text())
    jax.block_until_ready([in_one(kernel, inputs) for _ in range(10)])
    # A deadlock takes two programs: with 9 threads these two do deadlock.
    jax.block_until_ready([then(first(kernel, inputs)) for _ in range(100)])
    print("came through")


def test_collectives_of_more_devices_than_cores_do_not_deadlock():
    done = run_alone([__file__, "gather_activations"], timeout=120)
    assert done.stdout == "came through\n", done.stderr


@pytest.fixture
def requested(monkeypatch) -> list[tuple[str, Any]]:
    """Records the settings of `request_cpu_devices`, as if JAX had not started."""
    calls: list[tuple[str, Any]] = []
    config = SimpleNamespace(update=lambda *change: calls.append(change))
    monkeypatch.setattr(_devices, "jax", SimpleNamespace(config=config))
    return calls


@pytest.mark.parametrize(
    ("cores", "nproc", "expected"),
    [
        (2, "", "10"),
        (9, "", "10"),
        (10, "", ""),  # the pool is large enough
        (2, "16", "16"),
        (64, "3", "10"),
    ],
)
def test_requested_devices_get_two_threads_each(
    requested, monkeypatch, cores, nproc, expected
):
    monkeypatch.setenv("PJRT_NPROC", nproc)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    request_cpu_devices(5)
    assert requested == [("jax_num_cpu_devices", 5)]
    assert os.environ["PJRT_NPROC"] == expected


def test_a_request_that_comes_too_late_changes_nothing(monkeypatch):
    jax.devices()
    monkeypatch.setenv("PJRT_NPROC", "")
    with pytest.raises(RuntimeError):
        request_cpu_devices(jax.device_count() + 7)
    assert os.environ["PJRT_NPROC"] == ""


def test_there_must_be_a_device():
    with pytest.raises(ValueError, match="at least 1 CPU device, got 0"):
        request_cpu_devices(0)


def host_devices(n: int, process: int = 0) -> list[Any]:
    return [SimpleNamespace(platform="cpu", process_index=process) for _ in range(n)]


@pytest.mark.parametrize(("cores", "nproc"), [(9, ""), (64, "9"), (2, "")])
def test_host_devices_that_would_deadlock_are_refused(monkeypatch, cores, nproc):
    monkeypatch.setenv("PJRT_NPROC", nproc)
    # The process may use only some cores of a large machine.
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    message = (
        f"5 host devices share a pool of {nproc or cores} threads.*deadlock.*"
        "request_cpu_devices before JAX starts, or set PJRT_NPROC=10"
    )
    with pytest.raises(ValueError, match=message):
        place(5, host_devices(5))


@pytest.mark.usefixtures("without_type_checks")
def test_host_devices_with_threads_enough_are_accepted(monkeypatch):
    monkeypatch.setattr(placement_module, "Mesh", lambda devices, *_, **__: devices)
    monkeypatch.setenv("PJRT_NPROC", "10")
    assert place(5, host_devices(5)).mesh.shape == (5,)
    # Every process has its own pool of threads.
    devices = host_devices(5) + host_devices(5, process=1)
    assert place(10, devices).mesh.shape == (10,)
    # A single device takes part in no collective.
    monkeypatch.setenv("PJRT_NPROC", "1")
    assert place(5, host_devices(1)).mesh.shape == (1,)


def test_devices_that_nobody_made_threads_for_are_refused_in_earnest():
    code = """
import jax
from dimat_jax.placement import place
jax.config.update("jax_num_cpu_devices", 5)
place(5)
"""
    done = run_alone(["-c", code], PJRT_NPROC="9")
    assert "PlacementError: 5 host devices share a pool of 9 threads" in done.stderr


if __name__ == "__main__":
    if sys.argv[1] == "gather_activations":
        gather_activations()
    else:
        compute_all(int(sys.argv[1]), sys.argv[2])
