"""Tests laws that hold for every algorithm, on least squares and on a small MLP."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dimat_jax import permutation
from dimat_jax.algorithms import MergeData
from dimat_jax.algorithms._announcing import AnnouncingState
from dimat_jax.algorithms.local import local_part, with_opt_state
from dimat_jax.algorithms.memory import MemoryState
from dimat_jax.algorithms.qgm import MOMENTUM
from dimat_jax.data.pipeline import Batch
from dimat_jax.mixing import MIXINGS, MixingError
from dimat_jax.network import Absence, Faults, Links
from dimat_jax.optimizers import OPTIMIZERS, with_clocks_of
from dimat_jax.placement import Placement
from dimat_jax.topology import TOPOLOGIES
from dimat_jax.tree import PyTree, flatten, nbytes, stack, take
from tests.algorithms.cases import (
    CASES,
    KEY,
    Built,
    Layout,
    built,
    case_of,
    compressor_name,
    learning_rate,
    links,
    make,
    on_placement,
    optimizer_name,
    placed,
)
from tests.algorithms.problems import (
    DIM,
    N_AGENTS,
    PROBLEMS,
    START,
    convex_variables,
    least_squares,
    without_examples,
)
from tests.reference.agents import Now
from tests.reference.gossip import Qgm

CONVEX = PROBLEMS["convex"]
VARIABLES = convex_variables(START)
EVERYONE = set(CASES)
ON_GRAPHS = {name for name in CASES if not CASES[name].served}
# The cases in which every agent draws random numbers of its own.
RANDOM = {name for name in CASES if compressor_name(CASES[name]) == "int8"}
PUSHING = {name for name in CASES if CASES[name].per_step == "sgp"}


def graph_for(name: str) -> str:
    """A topology on which a case can run."""
    return "path" if CASES[name].per_step == "relaysgd" else "ring"


def every(names):
    return pytest.mark.parametrize("name", sorted(names))


def assert_close(one: PyTree, other: PyTree, **tolerance: float) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **{"rtol": 0, **tolerance}),
        one,
        other,
    )


def assert_equal(one: PyTree, other: PyTree) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


# Alone ================================================================================


def value(x, statistics, batch):
    variables = {"params": {"x": x}, "batch_stats": statistics}
    loss, (model_state, _) = least_squares(variables, batch, None)
    return loss, model_state["batch_stats"]


@functools.cache
def own_step(optimizer_name: str):
    """A training step in plain optax: only the optimizer and the loss are shared."""
    tx = OPTIMIZERS[optimizer_name](learning_rate)

    @jax.jit
    def step(x, statistics, opt_state, batch):
        gradient, statistics = jax.grad(value, has_aux=True)(x, statistics, batch)
        updates, opt_state = tx.update(gradient, opt_state, x)
        return optax.apply_updates(x, updates), statistics, opt_state

    return step, tx.init


def now_alone(t: int, batch: Batch) -> Now:
    """What a single agent sees of step t."""
    # The running statistics are no part of the loss.
    statistics = take(VARIABLES, 0)["batch_stats"]

    def gradient(i: int, x: np.ndarray) -> np.ndarray:
        del i
        float32 = jnp.asarray(x, jnp.float32)
        return np.asarray(jax.grad(value, has_aux=True)(float32, statistics, batch)[0])

    one, nobody = np.ones(1, bool), np.zeros((1, 1), bool)
    return Now(np.eye(1), nobody, one, gradient, one, float(learning_rate(t)))


def alone(name: str, data: list[Batch], agent: int) -> PyTree:
    """Trains one agent."""
    own = take(VARIABLES, agent)
    x, statistics = own["params"]["x"], own["batch_stats"]
    batches = [jax.tree.map(np.asarray, take(batch, agent)) for batch in data]
    step, init = own_step(optimizer_name(CASES[name]))
    opt_state = init(x)
    for batch in batches:
        x, statistics, opt_state = step(x, statistics, opt_state, batch)
    if CASES[name].name == "qgm":
        momentum = dict(CASES[name].options).get("momentum", MOMENTUM.default)
        agent_alone = Qgm([own["params"]["x"]], beta=momentum)
        for t, batch in enumerate(batches):
            agent_alone.step(now_alone(t, batch))
        x = agent_alone.result(0)
    return {"params": {"x": x}, "batch_stats": statistics}


@pytest.mark.every_nth(6)
@every(ON_GRAPHS)
def test_without_neighbours_agents_train_as_each_would_alone(name):
    subject = built(name)
    data = CONVEX.batches(subject.placement, 5)
    state = subject.run(VARIABLES, data, links("disconnected"))
    trained = subject.variables(state)
    for agent in range(N_AGENTS):
        assert_close(take(trained, agent), alone(name, data, agent), atol=2e-6)


# FedProx draws an agent to its own past, and an adaptive server shortens its steps.
@pytest.mark.every_nth(3)
@every(
    name
    for name in EVERYONE - {"fedprox", "fedavg, adagrad"}
    if "with adam" not in name
)
def test_one_agent_trains_alone(name):
    subject = built(name, layout=Layout(n_agents=1))
    data = CONVEX.batches(subject.placement, 5)
    network = links("fully_connected", n_agents=1)
    state = subject.run(CONVEX.variables(1), data, network)
    trained = take(subject.variables(state), 0)
    assert_close(trained, alone(name, data, 0), atol=2e-6)


# Together =============================================================================


class SameDraws(Placement):
    """A placement in which all agents draw the same random numbers."""

    def keys(self, key):
        return jnp.broadcast_to(key, (self.slots,))


@functools.cache
def drawing_the_same(name: str) -> Built:
    if name not in RANDOM:
        return built(name)  # as they draw nothing
    layout = placed(Layout())
    placement = SameDraws(layout.n_agents, layout.mesh, layout.batching)
    return on_placement(CASES[name], "convex", placement)


@pytest.mark.every_nth(8)
@pytest.mark.parametrize(
    ("name", "topology"),
    [
        (name, topology)
        for name in sorted(EVERYONE)
        for topology in ("ring", "fully_connected", "one_peer_exponential")
        if CASES[name].accepts(links(topology))
    ],
)
def test_identical_agents_with_identical_data_stay_identical(name, topology):
    subject = drawing_the_same(name)
    same = take(VARIABLES, np.zeros(N_AGENTS, int))
    data = CONVEX.batches(subject.placement, 4, same=True)
    trained = subject.variables(subject.run(same, data, links(topology)))
    assert_close(trained, take(trained, np.zeros(N_AGENTS, int)), atol=1e-6)
    assert np.abs(trained["params"]["x"] - same["params"]["x"]).max() > 0.01


# The mean =============================================================================

# Compressed merging averages estimates of the others, which are always a little old, so
# it does not keep the mean.
KEEPING_THE_MEAN = {
    name
    for name in EVERYONE
    if not (CASES[name].merging and compressor_name(CASES[name]) != "none")
    # RelaySGD averages the first few models that arrive.
    and CASES[name].per_step != "relaysgd"
}
# A number of agents and options that fit each topology. Networks have one agent less
# than the placement has slots; the additional slot takes no part.
TOPOLOGY_OPTIONS: dict[str, tuple[int, dict[str, Any]]] = {
    **{topology: (N_AGENTS, {}) for topology in TOPOLOGIES},
    "hypercube": (4, {}),
    "torus": (4, {}),
    "random_regular": (N_AGENTS, {"degree": 2, "seed": 1}),
    "erdos_renyi": (N_AGENTS, {"edge_probability": 0.4, "seed": 1}),
}
# A matrix on a directed cycle with a chord. Its rows and columns sum to 1.
DIRECTED = 0.5 * np.eye(5) + 0.3 * np.eye(5)[[1, 2, 3, 4, 0]] + 0.2 * np.eye(5)
DIRECTED[[0, 2], [0, 2]] -= 0.1
DIRECTED[[0, 2], [2, 0]] += 0.1


@functools.cache
def nothing() -> Batch:
    return without_examples(CONVEX.batches(placed(Layout()), 1)[0])


@functools.cache
def on(topology: str, mixing: str) -> Links:
    n_agents, options = TOPOLOGY_OPTIONS[topology]
    if topology == "file":
        adjacency = (DIRECTED != 0) & ~np.eye(5, dtype=bool)
        rule = None if mixing == "uniform" else MIXINGS[mixing]
        return Links(adjacency, rule or DIRECTED)
    return links(topology, mixing, n_agents=n_agents, **options)


def can_use(name: str, topology: str, mixing: str) -> bool:
    """Whether the topology has such weights, and an algorithm can use them."""
    try:
        return CASES[name].accepts(on(topology, mixing))
    except MixingError:
        return False


def weights_for(name: str) -> str:
    # A ring of four has an eigenvalue of -1/3.
    return "lazy" if CASES[name].per_step == "d2" else "uniform"


@pytest.mark.every_nth(6)
@pytest.mark.parametrize(
    ("name", "topology"),
    [
        (name, topology)
        for name in sorted(KEEPING_THE_MEAN)
        for topology in TOPOLOGIES
        if can_use(name, topology, weights_for(name))
    ],
)
def test_without_gradients_the_mean_is_preserved(name, topology):
    subject, network = built(name), on(topology, weights_for(name))
    state = subject.run(VARIABLES, [nothing()] * 4, network)
    after, there = subject.variables(state), network.present(1)
    there = np.pad(there, (0, N_AGENTS - len(there)))
    for leaf, before in zip(
        jax.tree.leaves(after), jax.tree.leaves(VARIABLES), strict=True
    ):
        mean = before[there].mean(axis=0)
        np.testing.assert_allclose(leaf[there].mean(axis=0), mean, atol=2e-6)
        np.testing.assert_array_equal(leaf[~there], before[~there])
        # Agents that have neighbours come closer to each other.
        communicates = network.edges.any() or CASES[name].served
        spread = 0.9 if communicates and CASES[name].per_step != "local" else 1.01
        assert leaf[there].std() <= spread * before[there].std()


@pytest.mark.parametrize("topology", TOPOLOGIES)
@every(name for name in PUSHING if not CASES[name].merging)
def test_push_sum_preserves_the_weighted_mean_on_any_graph(name, topology):
    subject, network = built(name), on(topology, "column_stochastic")
    state = subject.run(VARIABLES, [nothing()] * 4, network)
    w, z = np.asarray(state.weight), subject.variables(state)["params"]["x"]
    np.testing.assert_allclose(w.sum(), N_AGENTS, rtol=1e-6)
    np.testing.assert_allclose(w @ z, VARIABLES["params"]["x"].sum(axis=0), atol=5e-6)
    irregular = {"path", "star", "binary_tree", "bipartite", "file", "erdos_renyi"}
    irregular = topology in {*irregular, "random_peers"}
    assert (np.abs(w - 1).max() > 0.1) == irregular


# States ===============================================================================

CHANGING = [
    links("ring"),
    links("fully_connected"),
    links("disconnected"),
    links("ring", "uniform", Faults(dropout=0.4, edge_loss=0.4)),
    links("ring", "uniform", Faults(absences=(Absence(2, 1),))),
]


def signature(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@every(EVERYONE)
def test_states_keep_their_structure_and_steps_trace_once(name):
    subject = built(name)
    algorithm, slots = subject.algorithm, subject.placement.slots
    traced = len(subject.traces)
    state = algorithm.init(subject.placement.put(VARIABLES))
    expected = signature(state)
    data = CONVEX.batches(subject.placement, len(CHANGING))
    for number, network in enumerate(CHANGING):
        now = network.at_round(1, slots)
        state, metrics = algorithm.communicate(state, MergeData(), now, KEY)
        assert signature(state) == expected
        assert isinstance(metrics, dict)
        now = network.at_step(number, 1, slots)
        state, metrics = subject.step(state, data[number], now, KEY)
        assert signature(state) == expected
        assert {"loss", "score", "examples"} <= metrics.keys()
        assert metrics["loss"].shape == (slots,)
        jax.tree.map(lambda x: np.testing.assert_array_less(x, np.inf), state)
    # There is no new trace if an earlier test has traced the step.
    assert len(subject.traces) <= traced + 1


@every(EVERYONE)
def test_what_is_evaluated_is_what_was_put_in(name):
    subject = built(name)
    state = subject.algorithm.init(subject.placement.put(VARIABLES))
    assert_equal(subject.variables(state), VARIABLES)
    other = convex_variables(START[::-1])
    replaced = subject.algorithm.with_variables(state, subject.placement.put(other))
    assert_equal(subject.variables(replaced), other)


@every(EVERYONE)
def test_other_running_statistics_change_nothing_else(name):
    subject = built(name)
    state = subject.run(VARIABLES, CONVEX.batches(subject.placement, 3), links("ring"))
    before = subject.variables(state)
    other = convex_variables(START[::-1])["batch_stats"]
    replace = subject.algorithm.with_statistics
    replaced = replace(state, subject.placement.put(other))
    assert signature(replaced) == signature(state)
    after = subject.variables(replaced)
    assert_close(after["batch_stats"], other, rtol=1e-6)
    assert_equal(after["params"], before["params"])
    restored = replace(replaced, subject.placement.put(before["batch_stats"]))
    assert_close(restored, state, rtol=1e-6)


@every(EVERYONE)
def test_a_merge_restarts_all_but_optimizers_and_what_others_know(name):
    subject = built(name)
    state = subject.run(VARIABLES, CONVEX.batches(subject.placement, 3), links("ring"))
    merged = subject.placement.put(convex_variables(START[::-1]))
    restarted = subject.algorithm.with_variables(state, merged)
    fresh = subject.algorithm.init(merged)
    if isinstance(state, AnnouncingState):
        assert_equal(restarted.known, state.known)
        state, restarted, fresh = state.exact, restarted.exact, fresh.exact
    if isinstance(state, MemoryState):
        fresh = fresh._replace(marks=state.marks)
    assert_equal(restarted, with_opt_state(fresh, local_part(state).opt_state))


# Absent agents ========================================================================


# The memories of these algorithms change even without examples: they record that the
# params did not move, that the gradient was 0, or an announcement.
FORGETTING = {name for name in CASES if CASES[name].per_step in ("qgm", "dsgt")} | {
    "choco, reliable"
}


# With Adam, DSGT's params go on along the moments of the tracker.
@every(EVERYONE - {"dsgt with adam"})
def test_agents_without_examples_keep_their_params_and_their_optimizers(name):
    subject = built(name)
    first, second = CONVEX.batches(subject.placement, 2)
    network = links("disconnected").at_step(0, 1, subject.placement.slots)
    state = subject.algorithm.init(subject.placement.put(VARIABLES))
    state, _ = subject.step(state, first, network, KEY)
    new, metrics = subject.step(state, without_examples(second, 2), network, KEY)
    assert metrics["examples"].tolist() == [4, 3, 0, 4, 4]
    # Only the learning-rate clocks go on: schedules count the steps of the whole run.
    assert clocks(new).tolist() == [2] * N_AGENTS
    if name not in FORGETTING:
        kept = with_clocks_of(take(new, 2), take(state, 2))
        # D2's memory is a difference, which is rounded.
        rounding = 1e-6 if CASES[name].per_step == "d2" else 0
        assert_close(kept, take(state, 2), atol=rounding)
    moved = (
        subject.variables(new)["params"]["x"] != subject.variables(state)["params"]["x"]
    )
    assert moved.any(axis=1).tolist() == [True, True, False, True, True]


def clocks(state) -> np.ndarray:
    def is_clock(path, value):
        del value
        return "ScaleByScheduleState" in str(path)

    return np.asarray(optax.tree.get(state, "count", filtering=is_clock))


@every(EVERYONE)
def test_absent_agents_keep_their_whole_state_and_nobody_hears_of_them(name):
    subject, away = built(name), 2
    slots = subject.placement.slots
    # Agent 2 leaves after the first round.
    network = links(graph_for(name), "uniform", Faults(absences=(Absence(away, 2),)))
    if not CASES[name].accepts(network):  # a changing one
        assert CASES[name].per_step == "d2"
    data = CONVEX.batches(subject.placement, 4)
    before = subject.run(VARIABLES, data[:2], network)

    def second_round(data: list[Batch]):
        state, path = before, []
        now = network.at_round(2, slots)
        state, _ = subject.algorithm.communicate(state, MergeData(), now, KEY)
        path.append(state)
        for number, batch in enumerate(data, start=2):
            now = network.at_step(number, 2, slots)
            state, metrics = subject.step(state, batch, now, KEY)
            assert metrics["examples"][away] == 0
            path.append(state)
        return path

    path = second_round(data[2:])
    for state in path:
        kept = with_clocks_of(take(state, away), take(before, away))
        assert_equal(kept, take(before, away))
    assert clocks(path[-1]).tolist() == [4] * N_AGENTS
    old, new = (subject.variables(s)["params"]["x"] for s in (before, path[-1]))
    moved = (old != new).any(axis=1)
    assert moved.tolist() == [True, True, False, True, True]

    others = [
        batch._replace(inputs=batch.inputs.at[away].multiply(100.0))
        for batch in data[2:]
    ]
    assert_equal(second_round(others)[-1], path[-1])


# Layouts ==============================================================================

# One case for each kind of communication.
SPREAD = ("cdsgd", "sgp", "compcga", "choco", "scaffold", "dimat", "wa, int8")


@pytest.mark.every_nth(7)
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, Layout(devices=2)) for name in CASES if "with adam" not in name),
        *((name, Layout(devices=5)) for name in SPREAD),
        *((name, Layout(batching="unroll")) for name in ("sgp", "wa, int8")),
    ],
)
def test_the_layout_over_devices_changes_nothing(name, layout):
    """With two devices, a sixth slot fills up the second one: it is always absent."""
    lossy = links(graph_for(name), "uniform", Faults(edge_loss=0.3))
    tolerant = CASES[name].changing and CASES[name].accepts(lossy)
    network = lossy if tolerant else links(graph_for(name))
    results = []
    for one in (built(name), built(name, layout=layout)):
        data = CONVEX.batches(one.placement, 4)
        state = one.run(VARIABLES, data, network)
        results.append((one.variables(state), one.placement.gather(state)))
    assert_close(results[1], results[0], atol=2e-6)


# Messages =============================================================================

# x and the running statistics are float32.
PARAMS, STATISTICS = 4 * DIM, 4 * DIM
VARIABLES_SENT = {"params": PARAMS, "batch_stats": STATISTICS}
SENT_WITH_STEPS = {
    "local": {},
    "cdsgd": VARIABLES_SENT,
    "cdmsgd": VARIABLES_SENT,
    "cdadam": VARIABLES_SENT,
    "sgp": {**VARIABLES_SENT, "push_sum_weight": 4},
    "d2": VARIABLES_SENT,
    "dsgt": {**VARIABLES_SENT, "tracker": PARAMS},
    "qgm": VARIABLES_SENT,
    "cga": {**VARIABLES_SENT, "gradients": PARAMS},
    "compcga": {**VARIABLES_SENT, "gradients": PARAMS},
    "choco": VARIABLES_SENT,
    "relaysgd": {**VARIABLES_SENT, "relay_count": 4},
}
# The bytes of a compressed x: signs in one byte, and int8 numbers, both with a scale of
# four bytes; one number with its place; and two bytes for each number.
COMPRESSED = {"sign": 1 + 4, "int8": DIM + 4, "top_k": 8, "float16": 2 * DIM}
COMPRESSED_KIND = {"choco": "params", "compcga": "gradients"}


@every(EVERYONE)
def test_messages_are_what_is_sent_measured_by_shapes_alone(name):
    subject, case = built(name), CASES[name]
    variables = subject.placement.put(VARIABLES)
    state = jax.eval_shape(subject.algorithm.init, variables)
    messages = subject.algorithm.messages(state)

    def sizes(message):
        by_kind = {kind: nbytes(tree) for kind, tree in message.items()}
        return {kind: size for kind, size in by_kind.items() if size}

    compressor = compressor_name(case)
    steps = dict(SENT_WITH_STEPS[case.per_step])
    if case.per_step in COMPRESSED_KIND:
        steps[COMPRESSED_KIND[case.per_step]] = COMPRESSED[compressor]
    assert sizes(messages.step) == steps
    # Only a gradient answers another message.
    assert messages.turns == (2 if "gradients" in steps else 1)
    rounds = dict(VARIABLES_SENT) if case.merging else {}
    if case.merging and compressor != "none":
        rounds["params"] = COMPRESSED[compressor]
        assert sizes(messages.whole) == VARIABLES_SENT
    else:
        assert not messages.whole
    assert sizes(messages.round) == rounds
    to_server = dict(VARIABLES_SENT) if case.served else {}
    if case.name == "scaffold":
        to_server["control"] = PARAMS
    assert sizes(messages.server) == to_server


def test_optimizers_that_are_merged_are_sent():
    case = case_of("dimat", opt_state="merge")
    subject = built("dimat")
    algorithm = make(case, "convex", subject.placement, learning_rate)
    state = jax.eval_shape(algorithm.init, subject.placement.put(VARIABLES))
    # Adam has two moments and int32 counters.
    assert nbytes(algorithm.messages(state).round["optimizer"]) == 2 * PARAMS + 2 * 4


# Frames ===============================================================================


@pytest.mark.every_nth(6)
@every(name for name in EVERYONE - RANDOM if "with adam" not in name)
def test_training_commutes_with_permuting_the_agents_frames(name):
    """This includes momenta: if `aligned` forgot a field, the results would differ.

    Agents 0 to 2, which communicate, share a frame. The others have their own frames.
    """
    subject, problem = built(name, "mlp"), PROBLEMS["mlp"]
    placement, algorithm = subject.placement, subject.algorithm
    talking = np.zeros((N_AGENTS, N_AGENTS), bool)
    talking[[0, 1, 1, 2], [1, 0, 2, 1]] = True
    network = Links(talking, MIXINGS["uniform"]).at_step(0, 1, placement.slots)
    spec, one = problem.task.spec, take(problem.variables(1), 0)
    frames = [permutation.random(spec, one, jax.random.key(i)) for i in (0, 0, 0, 1, 2)]
    perms = stack(frames)

    first, *others = problem.batches(placement, 3)
    state = algorithm.init(placement.put(problem.variables(N_AGENTS)))
    state, _ = subject.step(state, first, network, KEY)
    # All agents have one frame yet, so that a server can fill its memories.
    for _ in range(2 * CASES[name].served):
        state, _ = algorithm.communicate(state, MergeData(), network, KEY)
        state, _ = subject.step(state, first, network, KEY)
    ways = []
    for before in (True, False):
        way = subject.aligned(state, perms) if before else state
        for batch in others:
            way, _ = subject.step(way, batch, network, KEY)
        ways.append(way if before else subject.aligned(way, perms))
    assert_close(*ways, atol=1e-5)
    # The fields are not equal because they are 0: agent 1, which has two neighbours,
    # uses all of them.
    before, after = flatten(way), flatten(ways[1])
    for path in before:
        if path.endswith("hidden0/kernel"):
            assert np.abs(before[path][1] - after[path][1]).max() > 1e-6, path
