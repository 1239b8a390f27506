"""Tests the merging of networks whose units are shuffled, in every frame."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dimat_jax import permutation
from dimat_jax.algorithms import (
    ALGORITHMS,
    MergeData,
    Task,
)
from dimat_jax.data.pipeline import Batch, Samples
from dimat_jax.network import Absence, Faults, Network
from dimat_jax.optimizers import OPTIMIZERS, with_clocks_of
from dimat_jax.permutation import PermutationSpec
from dimat_jax.topology import components
from dimat_jax.tree import PyTree, stack, take
from tests.algorithms.cases import (
    CASES,
    KEY,
    Built,
    Layout,
    case_of,
    learning_rate,
    links,
    make,
    on_placement,
    placed,
)
from tests.algorithms.problems import N_AGENTS, PROBLEMS, shared_images

DEEP = PROBLEMS["deep mlp"]
PLACEMENT = placed(Layout())
EVERYONE_AS_THE_FIRST = np.zeros(N_AGENTS, int)


def merging(name: str, **options) -> Built:
    case = case_of(name, **{"opt_state": "reset", **options})
    return on_placement(case, "deep mlp", PLACEMENT)


def now(topology: str, faults: Faults = Faults()) -> Network:  # noqa: B008
    return links(topology, "uniform", faults).at_round(1, PLACEMENT.slots)


def examples(name: str) -> MergeData:
    """Returns the data of a merge. Matching by weights needs no examples."""
    return MergeData(
        match=shared_images() if ALGORITHMS[name].matches_activations else None
    )


def random_frames(seed: int = 5) -> PyTree:
    """Draws a random permutation for every agent, stacked."""
    one = take(DEEP.variables(1), 0)
    keys = jax.random.split(jax.random.key(seed), PLACEMENT.slots)
    return stack([permutation.random(DEEP.task.spec, one, key) for key in keys])


def assert_close(one: PyTree, other: PyTree) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, other)


def test_fully_connected_weight_averaging_reaches_consensus_at_once():
    subject = merging("wa")
    state = subject.algorithm.init(PLACEMENT.put(DEEP.variables(N_AGENTS)))
    network = now("fully_connected")
    state, _ = subject.algorithm.communicate(state, MergeData(), network, KEY)
    variables = subject.variables(state)
    assert_close(variables, take(variables, EVERYONE_AS_THE_FIRST))


@pytest.mark.every_nth(3)
@pytest.mark.parametrize(
    ("name", "frame", "opt_state"),
    [
        ("dimat", "own", "reset"),
        ("dimat", "own", "merge"),
        ("dimat", "reference", "keep"),
        ("dimat", "reference", "merge"),
        ("dimat", "joint", "merge"),
        ("wm", "own", "merge"),
        ("wm", "reference", "reset"),
        ("wm", "joint", "keep"),
    ],
)
def test_shuffled_copies_merge_into_what_they_are_copies_of(name, frame, opt_state):
    """Momenta are shuffled with the weights, and must come back too."""
    subject = merging(name, frame=frame, opt_state=opt_state)
    algorithm = subject.algorithm
    one = take(DEEP.variables(N_AGENTS), EVERYONE_AS_THE_FIRST)
    batch = take(DEEP.batches(PLACEMENT, 1)[0], EVERYONE_AS_THE_FIRST)
    network, perms = now("ring"), random_frames()
    state, _ = subject.step(algorithm.init(PLACEMENT.put(one)), batch, network, KEY)
    shuffled = subject.aligned(state, perms)
    merged, metrics = algorithm.communicate(shuffled, examples(name), network, KEY)
    assert metrics["moved_units"] > 0
    assert 0.5 < metrics["match_similarity"] <= 1 + 1e-6

    # Each frame undoes a shuffle: every agent's own one, or the root's for all agents.
    root_for_all = take(perms, EVERYONE_AS_THE_FIRST)
    expected = subject.aligned(state, root_for_all if frame == "reference" else perms)
    assert_close(subject.variables(merged), subject.variables(expected))
    if opt_state == "reset":
        assert optax.tree.get(merged, "count", filtering=_is_schedule).tolist() == (
            [1] * N_AGENTS
        )
        for moments in optax.tree.get_all_with_path(merged, "mu"):
            assert all((x == 0).all() for x in jax.tree.leaves(moments[1]))
    else:
        assert_close(merged, expected)


def _is_schedule(path, value) -> bool:
    del value
    return "ScaleByScheduleState" in str(path)


@pytest.mark.every_nth(2)
@pytest.mark.parametrize("frame", ["own", "reference", "joint"])
@pytest.mark.parametrize("name", ["dimat", "wm"])
def test_where_agents_are_away_each_component_merges_by_itself(name, frame):
    """On a ring of five without 1 and 4, agent 0 is alone, and 2 and 3 are a pair."""
    faults = Faults(absences=(Absence(1, 1), Absence(4, 1)))
    network = now("ring", faults)
    edges = np.asarray(network.active_edges)
    assert components(edges) == [[0], [1], [2, 3], [4]]
    subject = merging(name, frame=frame, opt_state="keep")
    one = take(DEEP.variables(N_AGENTS), EVERYONE_AS_THE_FIRST)
    perms = random_frames()
    state = subject.aligned(subject.algorithm.init(PLACEMENT.put(one)), perms)
    data = examples(name)
    merged, metrics = subject.algorithm.communicate(state, data, network, KEY)
    # Merged copies do not change, but in a reference frame the pair is in its root's.
    roots = np.array([0, 1, 2, 2, 4]) if frame == "reference" else np.arange(N_AGENTS)
    expected = subject.aligned(
        subject.algorithm.init(PLACEMENT.put(one)), take(perms, roots)
    )
    assert_close(merged, expected)
    assert metrics["moved_units"] > 0
    assert not np.asarray(metrics["matching_bytes"])[~edges].any()
    # An absent agent keeps its state bit by bit, learning-rate clocks aside.
    for agent in (1, 4):
        kept = with_clocks_of(take(merged, agent), take(state, agent))
        jax.tree.map(np.testing.assert_array_equal, kept, take(state, agent))


@pytest.mark.parametrize("name", ["wa", "wm", "dimat"])
def test_where_nobody_hears_anybody_nothing_changes(name):
    subject = merging(name, opt_state="keep")
    state = subject.algorithm.init(PLACEMENT.put(DEEP.variables(N_AGENTS)))
    network = now("disconnected")
    merged, metrics = subject.algorithm.communicate(state, examples(name), network, KEY)
    jax.tree.map(np.testing.assert_array_equal, merged, state)
    assert metrics["moved_units"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frame": "mine"}, "frame is 'mine'; allowed: joint, own, reference"),
        ({"stay": -0.1}, "stay is -0.1; it must be at least 0"),
        ({"opt_state": "lose"}, "opt_state is 'lose'; allowed: keep, merge, reset"),
        ({"inner": "fedavg"}, "inner is 'fedavg'; allowed: .*cdsgd"),
    ],
)
def test_merging_refuses_what_it_does_not_know(options, message):
    with pytest.raises(ValueError, match=message):
        ALGORITHMS["dimat"](DEEP.task, optax.sgd(0.1), PLACEMENT, **options)


def test_weights_are_matched_at_least_once():
    with pytest.raises(ValueError, match="restarts is 0; it must be at least 1"):
        ALGORITHMS["wm"](DEEP.task, optax.sgd(0.1), PLACEMENT, restarts=0)


@pytest.mark.parametrize(
    ("name", "option"),
    [("dimat", {"restarts": 2}), ("wa", {"frame": "own"}), ("wa", {"stay": 0.0})],
)
def test_options_of_other_algorithms_are_no_arguments(name, option):
    with pytest.raises(TypeError, match=next(iter(option))):
        ALGORITHMS[name](DEEP.task, optax.sgd(0.1), PLACEMENT, **option)


@pytest.mark.parametrize("frame", ["own", "reference", "joint"])
def test_weight_matching_needs_no_activations_at_all(frame):
    spec = PermutationSpec(DEEP.task.spec.axes)  # without taps
    task = Task(loss=DEEP.task.loss, spec=spec)
    algorithm = ALGORITHMS["wm"](task, optax.sgd(0.1), PLACEMENT, frame=frame)
    state = algorithm.init(PLACEMENT.put(DEEP.variables(N_AGENTS)))
    results = [
        algorithm.communicate(state, MergeData(), now("ring"), key)
        for key in (KEY, KEY, jax.random.key(1))
    ]
    # The round's key determines the orders, so the same key gives the same result.
    first, again, _ = (PLACEMENT.gather(algorithm.variables(s)) for s, _ in results)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert {"scores", "assignment", "mix"} == results[0][1]["merge_seconds"].keys()


def test_matching_without_examples_says_so():
    algorithm = make(CASES["dimat"], "deep mlp", PLACEMENT, learning_rate)
    state = algorithm.init(PLACEMENT.put(DEEP.variables(N_AGENTS)))
    with pytest.raises(ValueError, match="MergeData.match"):
        algorithm.communicate(state, MergeData(), now("ring"), KEY)


@pytest.mark.parametrize("taps", ["all", "last"])
def test_the_taps_at_which_units_are_matched_are_an_option(taps):
    """Three taps show the same units; at the last one they are in another order."""
    rng = np.random.default_rng(0)
    early, late = rng.permutation(6), rng.permutation(6)
    weights = rng.standard_normal((3, 20, 6)).astype(np.float32)
    others = weights[..., early].copy()
    others[2] = weights[2][:, late]
    inputs = jnp.asarray(rng.standard_normal((200, 20)), jnp.float32)
    task = Task(
        PROBLEMS["convex"].task.loss,
        PermutationSpec(
            {"params/w": (None, None, "units")}, dict.fromkeys("abc", "units")
        ),
        lambda variables, x: {
            tap: x @ variables["params"]["w"][i] for i, tap in enumerate("abc")
        },
    )
    placement = placed(Layout(2))
    algorithm = ALGORITHMS["dimat"](
        task, OPTIMIZERS["sgd"](0.1), placement, frame="own", taps=taps
    )
    both = {"params": {"w": np.stack([weights, others])}}
    state = algorithm.init(placement.put(both))
    indices = np.arange(200).reshape(2, 100)
    data = MergeData(
        match=Samples(
            lambda i, mask: Batch(inputs[i], jnp.zeros(len(i), int), jnp.asarray(mask)),
            indices,
            np.ones_like(indices, bool),
            shared=True,
        )
    )
    network = links("fully_connected", n_agents=2).at_round(1, 2)
    state, _ = algorithm.communicate(state, data, network, KEY)
    merged = np.asarray(algorithm.variables(state)["params"]["w"])
    kept = [np.allclose(merged[0, i], weights[i], atol=1e-6) for i in range(3)]
    assert kept == ([False, False, True] if taps == "last" else [True, True, False])
