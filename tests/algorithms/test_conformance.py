"""Laws that every registered algorithm keeps, on a convex problem and on a small MLP.

The convex problem is least squares on each agent's own examples: no hidden units, so an
empty permutation spec, and a known optimum.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dimat_jax import models, permutation
from dimat_jax.algorithms import (
    ALGORITHMS,
    WATCHING,
    MergeData,
    MergeOptions,
    Options,
    Task,
)
from dimat_jax.data.pipeline import Batch, Samples
from dimat_jax.mixing import MIXINGS
from dimat_jax.models import classifier
from dimat_jax.network import Network, static
from dimat_jax.optimizers import OPTIMIZERS, SCHEDULES, with_clocks_of
from dimat_jax.permutation import PermutationSpec
from dimat_jax.placement import Placement, place
from dimat_jax.topology import TOPOLOGIES
from dimat_jax.tree import nbytes, take

N_AGENTS, DIM, BATCH = 5, 3, 4
KEY = jax.random.key(0)


def least_squares(variables, batch, key):
    """Half the mean squared error of a linear model."""
    del key
    error = batch.inputs @ variables["params"]["x"] - batch.labels
    weights = batch.mask / jnp.maximum(batch.mask.sum(), 1)
    value = 0.5 * (weights * error**2).sum()
    return value, ({}, {"loss": value, "accuracy": 1 - value})


CONVEX = Task(loss=least_squares, spec=PermutationSpec({"params/x": (None,)}))


def adam() -> optax.GradientTransformation:
    schedule = SCHEDULES["exponential"](
        0.05, decay=0.9, steps_per_epoch=2, total_steps=10
    )
    return OPTIMIZERS["adam"](schedule, momentum=0.9, weight_decay=0.0)


def network(topology: str, placement: Placement) -> Network:
    adjacency = TOPOLOGIES[topology](placement.n_agents)
    return static(MIXINGS["uniform"](adjacency), adjacency, placement.slots)


def start(placement: Placement, seed: int = 0, same: bool = False):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((placement.n_agents, DIM)).astype(np.float32)
    return placement.put({"params": {"x": x[:1].repeat(len(x), axis=0) if same else x}})


def batches(placement: Placement, n: int, same: bool = False) -> list[Batch]:
    """Stacked batches; agent 1's last entry is padding, and counts nowhere."""
    rng = np.random.default_rng(7)
    agents = placement.n_agents
    result = []
    for _ in range(n):
        inputs = rng.standard_normal((agents, BATCH, DIM)).astype(np.float32)
        labels = rng.standard_normal((agents, BATCH)).astype(np.float32)
        mask = np.ones((agents, BATCH), bool)
        if same:
            inputs[:], labels[:] = inputs[0], labels[0]
        elif agents > 1:
            mask[1, -1] = False
        result.append(Batch(*placement.put((inputs, labels, mask))))
    return result


def make(name: str, placement: Placement, opt_state: Any = "keep", task=CONVEX):
    options = Options(MergeOptions(opt_state=opt_state))
    return ALGORITHMS[name](task, adam(), placement, options)


def run(algorithm, variables, data: list[Batch], net: Network, every: int = 2):
    """Communicates before every `every` steps, as a run does."""
    step = jax.jit(algorithm.step)
    state = algorithm.init(variables)
    for number, batch in enumerate(data):
        if number % every == 0:
            state, _ = algorithm.communicate(state, MergeData(), net, KEY)
        state, _ = step(state, batch, net, jax.random.fold_in(KEY, number))
    return state


def plain_optax(x, data: list[Batch], agent: int) -> np.ndarray:
    """One agent's training, without anything of ours but the loss."""
    tx = adam()
    params: Any = {"x": jnp.asarray(x)}
    opt_state = tx.init(params)
    for batch in data:
        own = take(batch, agent)
        grads = jax.grad(lambda p, b: least_squares({"params": p}, b, None)[0])(
            params, own
        )
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    return np.asarray(params["x"])


@pytest.fixture(params=ALGORITHMS)
def name(request) -> str:
    return request.param


@pytest.fixture
def placement() -> Placement:
    return place(N_AGENTS, jax.devices()[:1], "vmap")


def test_without_neighbours_agents_train_as_optax_does(name, placement):
    variables, data = start(placement), batches(placement, 5)
    algorithm = make(name, placement)
    state = run(algorithm, variables, data, network("disconnected", placement))
    trained = placement.gather(algorithm.variables(state))["params"]["x"]
    initial = placement.gather(variables)["params"]["x"]
    for agent in range(N_AGENTS):
        expected = plain_optax(initial[agent], data, agent)
        np.testing.assert_allclose(trained[agent], expected, atol=1e-6)


def test_one_agent_is_plain_optax_training(name):
    placement = place(1)
    variables, data = start(placement), batches(placement, 5)
    algorithm = make(name, placement)
    state = run(algorithm, variables, data, network("fully_connected", placement))
    trained = placement.gather(algorithm.variables(state))["params"]["x"][0]
    initial = placement.gather(variables)["params"]["x"][0]
    np.testing.assert_allclose(trained, plain_optax(initial, data, 0), atol=1e-6)


@pytest.mark.parametrize("opt_state", ["reset", "keep", "merge"])
def test_identical_agents_with_identical_data_stay_identical(
    name, placement, opt_state
):
    algorithm = make(name, placement, opt_state)
    data = batches(placement, 4, same=True)
    state = run(
        algorithm, start(placement, same=True), data, network("ring", placement)
    )
    x = placement.gather(algorithm.variables(state))["params"]["x"]
    np.testing.assert_allclose(x, x[:1].repeat(N_AGENTS, axis=0), atol=1e-6)


@pytest.mark.parametrize("opt_state", ["reset", "keep", "merge"])
def test_states_keep_their_structure_and_steps_trace_once(name, placement, opt_state):
    algorithm = make(name, placement, opt_state)
    traces = 0

    @jax.jit
    def step(state, batch, net, key):
        nonlocal traces
        traces += 1
        return algorithm.step(state, batch, net, key)

    def signature(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    state = algorithm.init(start(placement))
    expected = signature(state)
    for batch, topology in zip(
        batches(placement, 3), ("ring", "fully_connected", "disconnected"), strict=True
    ):
        net = network(topology, placement)
        state, metrics = algorithm.communicate(state, MergeData(), net, KEY)
        assert signature(state) == expected
        assert isinstance(metrics, dict)
        state, metrics = step(state, batch, net, KEY)
        assert signature(state) == expected
        assert {"loss", "accuracy", "examples"} <= metrics.keys()
        assert metrics["loss"].shape == (placement.slots,)
    assert traces == 1


def test_what_is_evaluated_is_what_was_put_in(name, placement):
    algorithm, variables = make(name, placement), start(placement)
    state = algorithm.init(variables)
    jax.tree.map(np.testing.assert_array_equal, algorithm.variables(state), variables)
    other = start(placement, seed=1)
    replaced = algorithm.variables(algorithm.with_variables(state, other))
    jax.tree.map(np.testing.assert_array_equal, replaced, other)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_communication_preserves_the_mean(name, placement, topology):
    algorithm, variables = make(name, placement), start(placement)
    state = algorithm.init(variables)
    net = network(topology, placement)
    state, _ = algorithm.communicate(state, MergeData(), net, KEY)
    mean = placement.gather(algorithm.variables(state))["params"]["x"].mean(axis=0)
    expected = placement.gather(variables)["params"]["x"].mean(axis=0)
    np.testing.assert_allclose(mean, expected, atol=1e-6)


def test_idle_agents_keep_their_state(name, placement):
    algorithm = make(name, placement)
    state = algorithm.init(start(placement))
    (batch,) = batches(placement, 1)
    idle = batch._replace(mask=batch.mask.at[2].set(False))
    new, metrics = jax.jit(algorithm.step)(
        state, idle, network("disconnected", placement), KEY
    )
    # All but the clock: schedules count everybody's steps.
    kept = with_clocks_of(take(new, 2), take(state, 2))
    jax.tree.map(np.testing.assert_array_equal, kept, take(state, 2))
    clocks = optax.tree.get(new, "count", filtering=_is_schedule)
    assert clocks.tolist() == [1] * N_AGENTS
    x, before = algorithm.variables(new), algorithm.variables(state)
    assert not np.allclose(x["params"]["x"][0], before["params"]["x"][0])
    assert metrics["examples"].tolist() == [4, 3, 0, 4, 4]


def test_the_layout_over_devices_changes_nothing(name):
    results = []
    layouts: Any = ((1, "vmap"), (1, "unroll"), (2, "vmap"), (5, "auto"))
    for devices, batching in layouts:
        placement = place(N_AGENTS, jax.devices()[:devices], batching)
        algorithm = make(name, placement, opt_state="merge")
        data, net = batches(placement, 4), network("ring", placement)
        state = run(algorithm, start(placement), data, net)
        results.append(placement.gather(algorithm.variables(state))["params"]["x"])
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], atol=1e-6)


def test_messages_are_counted_from_shapes_alone(name, placement):
    algorithm = make(name, placement, opt_state="merge")
    state = jax.eval_shape(algorithm.init, start(placement))
    messages = algorithm.messages(state)
    sent = {"dimat": 1, "wa": 1, "wm": 1, "local": 0, "centralized": 0}
    # x and Adam's two moments, float32, and its int32 counters.
    expected = sent[name] * (3 * 4 * DIM + 2 * 4)
    assert nbytes(messages.round) == expected
    assert nbytes(messages.step) == 0


MODEL = models.MODELS["mlp"](n_classes=3, hidden=(6, 5))
MLP = Task(
    loss=classifier.loss(MODEL),
    spec=models.permutation_spec(MODEL),
    activations=classifier.activations(MODEL),
)


def _mlp_agents(placement: Placement):
    keys = jax.random.split(jax.random.key(3), placement.n_agents)
    agents = [classifier.init(MODEL, key, np.zeros((1, 2, 2, 1))) for key in keys]
    return placement.put(jax.tree.map(lambda *x: np.stack(x), *agents))


def _mlp_batches(placement: Placement, n: int) -> list[Batch]:
    rng = np.random.default_rng(0)
    shape = (placement.n_agents, 8)
    return [
        Batch(
            *placement.put(
                (
                    rng.standard_normal((*shape, 2, 2, 1)).astype(np.float32),
                    rng.integers(0, 3, shape).astype(np.int32),
                    np.ones(shape, bool),
                )
            )
        )
        for _ in range(n)
    ]


def test_training_commutes_with_permuting_the_agents_frames(name, placement):
    """Momenta and all: a field that `aligned` forgets would lead elsewhere."""
    algorithm = make(name, placement, task=MLP)
    step = jax.jit(algorithm.step)
    net = network("disconnected", placement)
    first, second, third = _mlp_batches(placement, 3)
    variables = _mlp_agents(placement)
    perms = jax.vmap(lambda key: permutation.random(MLP.spec, take(variables, 0), key))(
        jax.random.split(jax.random.key(5), placement.slots)
    )

    state, _ = step(algorithm.init(variables), first, net, KEY)
    aligned = jax.jit(algorithm.aligned)
    ways = []
    for before in (True, False):
        moved = aligned(state, perms) if before else state
        for batch in (second, third):
            moved, _ = step(moved, batch, net, KEY)
        ways.append(moved if before else aligned(moved, perms))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ways[0], ways[1]
    )


def _samples(placement: Placement) -> Samples:
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.standard_normal((40, 2, 2, 1)), jnp.float32)

    def load(indices, mask):
        return Batch(inputs[indices], jnp.zeros(len(indices), jnp.int32), mask)

    indices = np.arange(40).reshape(2, 20)
    return Samples(load, indices, np.ones_like(indices, bool), shared=True)


def test_fully_connected_weight_averaging_reaches_consensus_at_once(placement):
    algorithm = make("wa", placement, task=MLP)
    state = algorithm.init(_mlp_agents(placement))
    net = network("fully_connected", placement)
    state, _ = algorithm.communicate(state, MergeData(), net, KEY)
    for leaf in jax.tree.leaves(algorithm.variables(state)["params"]):
        np.testing.assert_allclose(
            leaf, np.broadcast_to(leaf[:1], leaf.shape), atol=1e-6
        )


@pytest.mark.parametrize(
    ("name", "frame", "opt_state"),
    [
        *itertools.product(["dimat"], ["own", "reference"], ["reset", "keep", "merge"]),
        ("dimat", "joint", "merge"),
        ("wm", "own", "merge"),
        ("wm", "reference", "reset"),
        ("wm", "joint", "keep"),
    ],
)
def test_shuffled_copies_merge_into_what_they_are_copies_of(
    placement, name, frame, opt_state
):
    """Momenta included: they are shuffled with the weights, and must come back."""
    options = Options(MergeOptions(frame=frame, opt_state=opt_state))
    algorithm = ALGORITHMS[name](MLP, adam(), placement, options)
    one = take(_mlp_agents(placement), np.zeros(N_AGENTS, int))
    batch = take(_mlp_batches(placement, 1)[0], np.zeros(N_AGENTS, int))
    net = network("ring", placement)
    state, _ = jax.jit(algorithm.step)(algorithm.init(one), batch, net, KEY)
    perms = jax.vmap(lambda key: permutation.random(MLP.spec, take(one, 0), key))(
        jax.random.split(jax.random.key(5), placement.slots)
    )
    shuffled = jax.jit(algorithm.aligned)(state, perms)
    # Matching by weights has no need of examples.
    data = MergeData(match=_samples(placement) if name in WATCHING else None)
    merged, metrics = algorithm.communicate(shuffled, data, net, KEY)
    assert metrics["moved_units"] > 0
    assert 0.5 < metrics["match_similarity"] <= 1 + 1e-6

    # Undoing the frame's own shuffle: everyone's own, or the root's for all.
    root_for_all = take(perms, np.zeros(N_AGENTS, int))
    frames = root_for_all if frame == "reference" else perms
    expected = jax.jit(algorithm.aligned)(state, frames)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        algorithm.variables(merged),
        algorithm.variables(expected),
    )
    if opt_state == "reset":
        clock = optax.tree.get(merged, "count", filtering=_is_schedule)
        assert clock.tolist() == [1] * N_AGENTS
        for moments in optax.tree.get_all_with_path(merged, "mu"):
            assert all((x == 0).all() for x in jax.tree.leaves(moments[1]))
    else:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, expected
        )


def _is_schedule(path, value) -> bool:
    del value
    return "ScaleByScheduleState" in str(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (MergeOptions(frame="mine"), "frame is one of"),
        (MergeOptions(stay=-0.1), "stay must be at least 0"),
        (MergeOptions(opt_state="lose"), "opt_state is one of"),  # type: ignore
    ],
)
def test_merging_refuses_what_it_does_not_know(placement, options, message):
    with pytest.raises(ValueError, match=message):
        ALGORITHMS["dimat"](MLP, adam(), placement, Options(options))


def test_weights_are_matched_at_least_once(placement):
    options = Options(MergeOptions(restarts=0))
    with pytest.raises(ValueError, match="restarts must be at least 1"):
        ALGORITHMS["wm"](MLP, adam(), placement, options)


@pytest.mark.parametrize("frame", ["own", "reference", "joint"])
def test_weight_matching_needs_no_activations_at_all(placement, frame):
    spec = PermutationSpec(MLP.spec.axes)  # without taps
    task = Task(loss=MLP.loss, spec=spec)
    algorithm = ALGORITHMS["wm"](
        task, adam(), placement, Options(MergeOptions(frame=frame))
    )
    state = algorithm.init(_mlp_agents(placement))
    results = [
        algorithm.communicate(state, MergeData(), network("ring", placement), key)
        for key in (KEY, KEY, jax.random.key(1))
    ]
    # The round's key draws the orders: with the same key the same happens.
    first, again, _ = (placement.gather(algorithm.variables(s)) for s, _ in results)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert {"scores", "assignment", "mix"} == results[0][1]["merge_seconds"].keys()


def test_matching_without_examples_says_so(placement):
    algorithm = make("dimat", placement, task=MLP)
    state = algorithm.init(_mlp_agents(placement))
    with pytest.raises(ValueError, match="MergeData.match"):
        algorithm.communicate(state, MergeData(), network("ring", placement), KEY)
