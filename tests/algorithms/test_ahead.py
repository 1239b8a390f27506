"""Tests Algorithm 1 of the DIMAT paper as printed: the gradient of before the merge."""

from typing import Any

import jax
import numpy as np
import pytest

from dimat_jax import permutation
from dimat_jax.algorithms import ALGORITHMS, MergeData
from dimat_jax.algorithms._merge_times import Part, parts_of_round
from dimat_jax.config import ConfigError, check, default_config
from dimat_jax.data.pipeline import Batch
from dimat_jax.errors import UserError
from dimat_jax.network import Absence, Faults, Network
from dimat_jax.optimizers import OPTIMIZERS, with_clocks_of
from dimat_jax.tree import PyTree, flatten, stack, take
from tests.algorithms.cases import (
    KEY,
    Built,
    Case,
    Layout,
    case_of,
    links,
    make,
    on_placement,
    placed,
)
from tests.algorithms.problems import (
    N_AGENTS,
    PROBLEMS,
    START,
    convex_variables,
    gradient,
    shared_images,
    whole_batch,
)
from tests.reference.agents import Alone
from tests.reference.agents import path as run
from tests.reference.gossip import Cdmsgd, Cdsgd

DEEP = PROBLEMS["deep mlp"]
PLACEMENT = placed(Layout())
EVERYONE_AS_THE_FIRST = np.zeros(N_AGENTS, int)
ALPHA, N_STEPS = 0.1, 12
GRAPHS = ["ring", "star", "exponential"]


def looking_ahead(name: str, problem: str = "convex", **options: Any) -> Built:
    case = case_of(name, gradient="before_merge", **options)
    return on_placement(case, problem, PLACEMENT)


def jitted(subject: Built) -> Any:
    assert subject.algorithm.ahead is not None
    return jax.jit(subject.algorithm.ahead)


def merge_and_step(
    subject: Built,
    state: Any,
    batch: Batch,
    network: Network,
    data: MergeData = MergeData(),  # noqa: B008
) -> Any:
    """Computes a step, merges, and takes the step."""
    state, metrics = jitted(subject)(state, batch, network, KEY)
    assert {"loss", "score", "examples"} <= metrics.keys()
    state, _ = subject.algorithm.communicate(state, data, network, KEY)
    return state


def path_of(case: Case, graph: str, faults: Faults = Faults()) -> np.ndarray:  # noqa: B008
    """Runs a merging algorithm that merges with every step on least squares."""
    algorithm = make(case, "convex", PLACEMENT, ALPHA)
    assert algorithm.ahead is not None
    ahead, batch = jax.jit(algorithm.ahead), whole_batch(PLACEMENT)
    state = algorithm.init(PLACEMENT.put(convex_variables(START)))
    network, path = links(graph, faults=faults), [START]
    for t in range(N_STEPS):
        now = network.at_round(1 + t, PLACEMENT.slots)
        state, _ = ahead(state, batch, now, KEY)
        state, _ = algorithm.communicate(state, MergeData(), now, KEY)
        path.append(np.asarray(algorithm.variables(state)["params"]["x"]))
    return np.stack(path)


@pytest.mark.every_nth(6)
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("opt_state", ["reset", "keep", "merge"])
@pytest.mark.parametrize("name", ["dimat", "wm", "wa"])
def test_where_nothing_permutes_algorithm_1_is_cdsgd(name, opt_state, graph):
    options = (("gradient", "before_merge"), ("opt_state", opt_state))
    path = path_of(Case(name, "sgd", options=options), graph)
    W = [links(graph).mixing_matrix[0]] * N_STEPS
    expected = run(Cdsgd(START), gradient, W, ALPHA)
    np.testing.assert_allclose(path, expected, rtol=0, atol=1e-5)
    # With the gradient of after the merge, the very first step differs already.
    merged = W[0] @ START
    after = run(Alone(merged), gradient, W[:1], ALPHA)[1]
    assert np.abs(expected[1] - after).max() > 0.05


def test_with_momentum_algorithm_1_is_cdmsgd():
    options = (("gradient", "before_merge"), ("opt_state", "keep"))
    path = path_of(Case("wa", "heavy_ball", options=options), "ring")
    W = [links("ring").mixing_matrix[0]] * N_STEPS
    expected = run(Cdmsgd(START), gradient, W, ALPHA)
    np.testing.assert_allclose(path, expected, rtol=0, atol=1e-5)


def test_algorithm_1_goes_on_among_those_who_are_there():
    faults = Faults(absences=(Absence(1, 2, 5), Absence(4, 1, 3)))
    path = path_of(
        Case("wa", "sgd", options=(("gradient", "before_merge"),)), "ring", faults
    )
    network = links("ring", faults=faults)
    W = [np.asarray(network.at_round(1 + t, N_AGENTS).W) for t in range(N_STEPS)]
    present = [network.present(1 + t) for t in range(N_STEPS)]
    expected = run(Cdsgd(START), gradient, W, ALPHA, present)
    np.testing.assert_allclose(path, expected, rtol=0, atol=1e-5)


def test_with_compressed_messages_the_step_comes_after_what_was_announced():
    def largest(x):
        return np.where(np.abs(x) >= np.sort(np.abs(x))[-1], x, 0)

    options = (("gradient", "before_merge"),)
    path = path_of(Case("wa", "sgd", "top_k", options), "ring")
    W = links("ring").mixing_matrix[0]
    own = np.diag(np.diag(W))
    x, x_hat, expected = START, START.copy(), [START]
    for _ in range(N_STEPS):
        x_hat = x_hat + np.stack([largest(d) for d in x - x_hat])
        step = ALPHA * np.stack([gradient(i, x_i) for i, x_i in enumerate(x)])
        x = own @ x + (W - own) @ x_hat - step
        expected.append(x)
    np.testing.assert_allclose(path, np.stack(expected), rtol=0, atol=1e-5)


def assert_close(one: PyTree, other: PyTree, atol: float = 1e-5) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), one, other)


@pytest.mark.every_nth(3)
@pytest.mark.parametrize("frame", ["own", "reference", "joint"])
@pytest.mark.parametrize("name", ["dimat", "wm"])
def test_a_step_that_waits_moves_with_the_frame_of_its_agent(name, frame):
    """Shuffled copies of one agent merge into what they are, and take equal steps.

    With frame="reference" all agents move into the frame of the first one. A step that
    stayed behind in its agent's own frame would then be added to the wrong units.
    """
    subject = looking_ahead(name, "deep mlp", frame=frame, opt_state="keep")
    alone = on_placement(Case("local"), "deep mlp", PLACEMENT)
    one = take(DEEP.variables(N_AGENTS), EVERYONE_AS_THE_FIRST)
    batch = take(DEEP.batches(PLACEMENT, 1)[0], EVERYONE_AS_THE_FIRST)
    network = links("ring").at_round(1, PLACEMENT.slots)
    keys = jax.random.split(jax.random.key(5), PLACEMENT.slots)
    spec = DEEP.task.spec
    perms = stack([permutation.random(spec, take(one, 0), key) for key in keys])

    by_activations = ALGORITHMS[name].matches_activations
    data = MergeData(match=shared_images() if by_activations else None)
    start = subject.algorithm.init(PLACEMENT.put(one))
    state = merge_and_step(subject, subject.aligned(start, perms), batch, network, data)

    stepped, _ = alone.step(
        alone.algorithm.init(PLACEMENT.put(one)), batch, network, KEY
    )
    to = take(perms, EVERYONE_AS_THE_FIRST) if frame == "reference" else perms
    expected = alone.aligned(stepped, to)
    assert_close(subject.variables(state), alone.variables(expected))
    assert_close(state.local, expected)
    moved = flatten(alone.variables(stepped))["params/hidden0/kernel"]
    assert np.abs(moved - flatten(one)["params/hidden0/kernel"]).max() > 0.01


def test_a_step_is_taken_once_and_none_waits_after_a_merge():
    subject = looking_ahead("wa", opt_state="keep")
    batch, network = whole_batch(PLACEMENT), links("ring").at_round(1, PLACEMENT.slots)
    state = subject.algorithm.init(PLACEMENT.put(convex_variables(START)))
    waiting, _ = jitted(subject)(state, batch, network, KEY)
    # The params are as they were, and the optimizer has gone on.
    assert_close(subject.variables(waiting)["params"], {"x": START})
    assert np.asarray(waiting.memory["update"]["x"]).all()
    merged, _ = subject.algorithm.communicate(waiting, MergeData(), network, KEY)
    assert not np.asarray(merged.memory["update"]["x"]).any()
    again, _ = subject.algorithm.communicate(merged, MergeData(), network, KEY)
    W = links("ring").mixing_matrix[0]
    x = subject.variables(merged)["params"]["x"]
    assert_close(subject.variables(again)["params"]["x"], W @ x)


def test_an_absent_agent_keeps_its_whole_state():
    subject = looking_ahead("dimat", opt_state="merge")
    network = links("ring", faults=Faults(absences=(Absence(2, 1),)))
    now = network.at_round(1, PLACEMENT.slots)
    before = subject.algorithm.init(PLACEMENT.put(convex_variables(START)))
    state = merge_and_step(subject, before, whole_batch(PLACEMENT), now)
    kept = with_clocks_of(take(state, 2), take(before, 2))
    jax.tree.map(np.testing.assert_array_equal, kept, take(before, 2))
    old, new = (s.local.variables["params"]["x"] for s in (before, state))
    moved = np.asarray(old != new)
    assert moved.all(axis=1).tolist() == [True, True, False, True, True]


def test_where_no_merge_is_due_agents_do_not_merge():
    network = links("ring").at_round(1, PLACEMENT.slots)
    for case in (
        Case("wa"),
        Case("wa", compressor="top_k"),
        Case("wa", inner="dsgt"),
    ):
        subject = on_placement(case, "convex", PLACEMENT)
        state = subject.algorithm.init(PLACEMENT.put(convex_variables(START)))
        state, _ = subject.step(state, whole_batch(PLACEMENT), network, KEY)
        new, metrics = subject.algorithm.communicate(state, None, network, KEY)
        assert metrics == {}
        jax.tree.map(np.testing.assert_array_equal, new, state)
        new, _ = subject.algorithm.communicate(state, MergeData(), network, KEY)
        x, old = (subject.variables(s)["params"]["x"] for s in (new, state))
        assert np.abs(x - old).max() > 0.1


def test_where_no_merge_is_due_what_runs_between_merges_still_communicates():
    """Trackers restart once an agent leaves, whether agents merge then or not."""
    subject = on_placement(Case("wa", inner="dsgt"), "convex", PLACEMENT)
    network = links("ring", faults=Faults(absences=(Absence(2, 2),)))
    now = network.at_round(1, PLACEMENT.slots)
    state = subject.algorithm.init(PLACEMENT.put(convex_variables(START)))
    for _ in range(2):
        state, _ = subject.step(state, whole_batch(PLACEMENT), now, KEY)
    now = network.at_round(2, PLACEMENT.slots)
    new, _ = subject.algorithm.communicate(state, None, now, KEY)
    tracker, grads = (np.asarray(new.memory[k]["x"]) for k in ("tracker", "gradient"))
    np.testing.assert_array_equal(tracker[[0, 1, 3, 4]], grads[[0, 1, 3, 4]])
    assert np.abs(np.asarray(state.memory["tracker"]["x"]) - tracker).max() > 0.01


def test_agents_that_gossip_between_merges_cannot_look_ahead():
    with pytest.raises(UserError, match="agents run cdsgd.*; inner must be 'local'"):
        ALGORITHMS["wa"](
            PROBLEMS["convex"].task,
            OPTIMIZERS["sgd"](0.1),
            PLACEMENT,
            inner="cdsgd",
            gradient="before_merge",
        )
    config = default_config()
    config.merge.gradient, config.merge.inner = "before_merge", "cdsgd"
    with pytest.raises(ConfigError, match="config.merge: gradient is 'before_merge'"):
        check(config)


# Times of merges ======================================================================


def test_by_rounds_agents_merge_in_the_first_round_and_every_so_many_later():
    parts = [list(parts_of_round(3, "rounds", n, range(4))) for n in range(1, 8)]
    assert all(len(part) == 1 and part[0].begins_round for part in parts)
    assert all(part[0].steps == range(4) for part in parts)
    assert [part[0].merge for part in parts] == [1, None, None, 2, None, None, 3]


def test_once_a_round_the_number_of_a_merge_is_that_of_the_round():
    for number in range(1, 5):
        expected = [Part(number, True, number, range(7, 9))]
        assert list(parts_of_round(1, "rounds", number, range(7, 9))) == expected


def test_by_steps_agents_merge_within_a_round_too():
    assert list(parts_of_round(3, "steps", 2, range(7, 14))) == [
        Part(2, True, 4, range(7, 10)),
        Part(2, False, 5, range(10, 13)),
        Part(2, False, 6, range(13, 14)),
    ]


@pytest.mark.parametrize("n_steps", [1, 5, 6])
@pytest.mark.parametrize("every", [1, 2, 5, 9])
def test_the_parts_of_all_rounds_are_all_steps_and_merges_count_on(every, n_steps):
    parts = [
        part
        for number in range(1, 5)
        for part in parts_of_round(
            every, "steps", number, range((number - 1) * n_steps, number * n_steps)
        )
    ]
    steps = [step for part in parts for step in part.steps]
    assert steps == list(range(4 * n_steps))
    assert [part.merge for part in parts] == list(range(1, len(parts) + 1))
    assert max(len(part.steps) for part in parts) == min(every, n_steps)
    assert sum(part.begins_round for part in parts) == 4
