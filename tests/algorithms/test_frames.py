"""Tests the records of frames: the edges to match, the conditions, and the merges."""

from typing import Any

import jax
import networkx as nx
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat_jax import permutation
from dimat_jax.algorithms import MergeData
from dimat_jax.algorithms._edges import MOST_NEIGHBOURS, EdgePerms
from dimat_jax.algorithms._frames import (
    AS_THEY_ARE,
    FRAMES,
    Exchanged,
    Frame,
    Views,
)
from dimat_jax.algorithms._merging import FRAME, OPT_STATE, merging
from dimat_jax.algorithms._traffic import MatchingSizes
from dimat_jax.algorithms.dimat import dimat
from dimat_jax.algorithms.local import local
from dimat_jax.algorithms.wa import wa
from dimat_jax.algorithms.wm import wm
from dimat_jax.compression import COMPRESSORS
from dimat_jax.mixing import uniform
from dimat_jax.network import Links
from dimat_jax.options import OptionError, Record
from dimat_jax.placement import place
from dimat_jax.topology import TOPOLOGIES, components
from dimat_jax.tree import PyTree, stack, take
from tests.algorithms.cases import KEY, Layout, links, placed
from tests.algorithms.problems import N_AGENTS, PROBLEMS, shared_images

ALL = {"as they are": AS_THEY_ARE, **FRAMES}
every_frame = pytest.mark.parametrize("frame", ALL.values(), ids=ALL)
PLACEMENT = placed(Layout())
DEEP = PROBLEMS["deep mlp"]
LOCAL = local(DEEP.task, optax.sgd(0.1), PLACEMENT)


@st.composite
def graphs(draw: st.DrawFn, directed: bool = False) -> np.ndarray:
    n = draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    edges = rng.random((n, n)) < draw(st.floats(0, 1))
    np.fill_diagonal(edges, False)
    return edges if directed else edges | edges.T


# Records ==============================================================================


def test_the_frames_of_a_config_are_the_records_by_name():
    assert {name: frame.name for name, frame in FRAMES.items()} == {
        name: name for name in ("own", "reference", "joint")
    }
    assert FRAME.choices is FRAMES
    assert AS_THEY_ARE.name not in FRAMES
    for frame in ALL.values():
        assert isinstance(frame, Record)
        assert frame.meaning.startswith("x_i <- sum_j W_ij")
        assert not frame.reads


@every_frame
def test_frames_that_agents_share_need_answers_and_the_others_do_not(frame: Frame):
    assert frame.two_way == (frame.name in ("reference", "joint"))
    assert frame.joint == (frame.name == "joint")


@given(active=graphs(directed=True))
@settings(max_examples=60)
def test_own_frames_match_every_active_edge(active):
    expected = {(i, j) for i, j in np.argwhere(active).tolist()}
    for name in ("own", "joint"):
        edges = FRAMES[name].edges(active)
        assert edges.shape == (active.sum(), 2)
        assert set(map(tuple, edges.tolist())) == expected


@given(
    n=st.integers(1, 40),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    directed=st.booleans(),
)
@settings(max_examples=60)
def test_a_joint_frame_matches_few_edges_that_connect_what_the_graph_connects(
    n, density, seed, directed
):
    active = np.random.default_rng(seed).random((n, n)) < density
    np.fill_diagonal(active, False)
    active = active if directed else active | active.T
    kept = matched_jointly(active)
    assert not kept[~active].any()
    assert components(kept) == components(active)
    linked, links = active | active.T, kept | kept.T
    # An edge and its opposite are kept or left out together.
    np.testing.assert_array_equal(kept, links & active)
    degree, possible = links.sum(axis=1), linked.sum(axis=1)
    # Besides the chosen neighbours there are at most the edges of a tree.
    beyond = np.maximum(degree - MOST_NEIGHBOURS, 0).sum() / 2
    assert beyond <= n - len(components(active))
    if (possible <= MOST_NEIGHBOURS).all():
        np.testing.assert_array_equal(kept, active)
    # No link is left out if both of its agents have room for it.
    room = degree < MOST_NEIGHBOURS
    assert not (linked & ~links & room & room[:, None]).any()


@pytest.mark.parametrize("n", [10, 13, 20, 40, 64, 300])
def test_in_a_fully_connected_graph_the_ways_along_matched_edges_are_short(n):
    kept = matched_jointly(TOPOLOGIES["fully_connected"](n))
    assert kept.sum(axis=1).max() == MOST_NEIGHBOURS
    assert kept.sum() >= MOST_NEIGHBOURS * n - 2
    # Eight neighbours reach everyone in about 4 n^(1/4) hops and not in n / 8.
    assert nx.diameter(nx.from_numpy_array(kept)) <= 2 * n**0.25 + 2


def test_a_hub_keeps_all_agents_that_have_no_other_neighbour():
    star = TOPOLOGIES["star"](30)
    np.testing.assert_array_equal(matched_jointly(star), star)
    # With two hubs every agent is linked with one of them, and a few with both.
    bipartite = matched_jointly(TOPOLOGIES["bipartite"](30))
    assert 2 * 29 <= bipartite.sum() <= 2 * (29 + MOST_NEIGHBOURS)


def matched_jointly(active: np.ndarray) -> np.ndarray:
    kept = np.zeros_like(active)
    kept[tuple(FRAMES["joint"].edges(active).T)] = True
    return kept


@given(active=graphs())
@settings(max_examples=60)
def test_a_reference_frame_matches_a_tree_of_every_component(active):
    edges = FRAMES["reference"].edges(active)
    parts = components(active)
    assert edges.shape == (len(active) - len(parts), 2)
    assert all(active[parent, child] for parent, child in edges.tolist())
    # Parents come before their children, from each component's lowest agent on.
    reached = {part[0] for part in parts}
    for parent, child in edges.tolist():
        assert parent in reached and child not in reached
        reached.add(child)
    assert reached == set(range(len(active)))


@given(active=graphs(directed=True))
@settings(max_examples=20)
def test_weight_averaging_matches_no_edge(active):
    assert AS_THEY_ARE.edges(active).shape == (0, 2)


@every_frame
@given(active=graphs())
@settings(max_examples=30)
def test_only_frames_that_need_answers_send_anything_to_be_matched(frame, active):
    pairs = np.argwhere(np.triu(active))
    sent = frame.traffic(active, pairs, MatchingSizes(1, 2, 3))
    assert sent.shape == active.shape
    assert (sent.sum() > 0) == (frame.two_way and active.any())
    assert not sent[~active].any()


# Merging, given the permutations ======================================================


def variables() -> PyTree:
    return DEEP.variables(N_AGENTS)


def random_perms(edges: np.ndarray, agreeing: bool = False) -> EdgePerms:
    """Draws permutations for every edge; those that agree have P_ij = Q_i^-1 Q_j."""
    one = take(variables(), 0)

    def drawn(seed: int) -> dict[str, np.ndarray]:
        perms = permutation.random(DEEP.task.spec, one, jax.random.key(seed))
        return {group: np.asarray(perm) for group, perm in perms.items()}

    def of_edge(i: int, j: int) -> dict[str, np.ndarray]:
        if not agreeing:
            return drawn(10 * i + j)
        Q_i, Q_j = drawn(i), drawn(j)
        return {group: Q_j[group][np.argsort(Q_i[group])] for group in Q_i}

    return {(i, j): of_edge(i, j) for i, j in edges.tolist()}


def merged_by(frame: Frame, views: Views, perms: EdgePerms, W) -> tuple[Any, PyTree]:
    exchanged = Exchanged(lambda state: state.variables, LOCAL.with_variables)
    merge = frame.build(LOCAL, exchanged, PLACEMENT)
    views, merged = merge(views, perms, W)
    return views, PLACEMENT.gather(merged)


def changed(tree: PyTree) -> PyTree:
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda x: np.float32(x + 0.1 * rng.standard_normal(x.shape)), tree
    )


@pytest.mark.every_nth(3)
@pytest.mark.parametrize("lossy", [False, True])
@pytest.mark.parametrize("topology", ["ring", "star", "disconnected"])
@every_frame
def test_merging_is_the_sum_of_weighted_permuted_networks(frame, topology, lossy):
    """Computes sum_j W_ij P_ij x_j by loops.

    An agent's own x is exact, and those of its neighbours are the announced ones.
    """
    network = links(topology).at_round(1, PLACEMENT.slots)
    W, active = np.asarray(network.W), np.asarray(network.active_edges)
    own = LOCAL.init(PLACEMENT.put(variables()))
    known = LOCAL.init(PLACEMENT.put(changed(variables())))
    perms = random_perms(frame.edges(active), agreeing=frame.joint)
    spec, apply = DEEP.task.spec, permutation.apply
    views, merged = merged_by(frame, Views(own, known if lossy else None), perms, W)

    identity = permutation.identity(spec, take(variables(), 0))
    to_root = {part[0]: identity for part in components(active)}
    if frame.name == "reference":
        for parent, child in frame.edges(active).tolist():
            to_root[child] = permutation.compose(perms[parent, child], to_root[parent])
    for i in range(N_AGENTS):
        terms = []
        for j in np.flatnonzero(W[i]).tolist():
            state = known if lossy and j != i else own
            x = take(state.variables, j)
            if frame.name == "reference":
                x = apply(spec, to_root[j], x)
            elif i != j and frame.name != "as they are":
                x = apply(spec, perms[i, j], x)
            terms.append(jax.tree.map(lambda leaf, w=W[i, j]: w * leaf, x))
        expected = jax.tree.map(lambda *leaves: sum(leaves), *terms)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
            take(merged, i),
            expected,
        )
        # Only a reference frame moves agents, and the neighbours' estimates of them.
        for before, after in zip((own, known), views, strict=True):
            if after is not None:
                moved = take(before.variables, i)
                if frame.name == "reference":
                    moved = apply(spec, to_root[i], moved)
                jax.tree.map(
                    np.testing.assert_array_equal, take(after.variables, i), moved
                )
    assert (views.announced is None) == (not lossy)


def test_views_are_known_as_they_are_unless_something_else_was_announced():
    assert Views("own", None).known == "own"
    assert Views("own", "announced").known == "announced"


@pytest.mark.parametrize("lossy", [False, True])
@pytest.mark.parametrize("topology", ["fully_connected", "random_regular"])
def test_forty_agents_that_are_one_network_in_disguise_stay_as_they_are(
    topology, lossy
):
    """The edges that are not matched are aligned too: by way of the others."""
    n = 40
    many = place(n, jax.devices()[:1], "vmap")
    one, spec = take(variables(), 0), DEEP.task.spec
    disguised = [
        permutation.apply(
            spec, permutation.random(spec, one, jax.random.key(seed)), one
        )
        for seed in range(n)
    ]
    algorithm = wm(
        local(DEEP.task, optax.sgd(0.1), many),
        DEEP.task,
        many,
        frame="joint",
        compressor=COMPRESSORS["bfloat16"]() if lossy else COMPRESSORS["none"](),
    )
    options = {"degree": 10} if topology == "random_regular" else {}
    network = Links(TOPOLOGIES[topology](n, **options), uniform).at_round(1, n)
    assert network.active_edges.sum() > n * MOST_NEIGHBOURS
    state = algorithm.init(many.put(jax.tree.map(np.asarray, stack(disguised))))
    state, metrics = algorithm.communicate(state, MergeData(), network, KEY)
    merged = many.gather(algorithm.variables(state))
    for agent in range(n):
        jax.tree.map(
            lambda found, own: np.testing.assert_allclose(
                found, own, atol=2e-2 if lossy else 1e-5
            ),
            take(merged, agent),
            disguised[agent],
        )
    assert metrics["match_similarity"] > 0.999


# The three algorithms =================================================================


def communicated(algorithm, data: MergeData) -> PyTree:
    state = algorithm.init(PLACEMENT.put(variables()))
    network = links("ring").at_round(1, PLACEMENT.slots)
    state, _ = algorithm.communicate(state, data, network, KEY)
    return PLACEMENT.gather(algorithm.variables(state))


@pytest.mark.parametrize(
    ("build", "match", "options"),
    [
        (dimat, "activations", {"frame": "reference", "stay": 0.1}),
        (dimat, "activations", {}),
        (wm, "weights", {"frame": "joint", "stay": 0.01, "restarts": 2}),
        (wm, "weights", {}),
        (wa, None, {"opt_state": "keep"}),
    ],
)
def test_each_algorithm_is_merging_with_its_own_matching(build, match, options):
    data = MergeData(match=shared_images())
    found, expected = (
        communicated(algorithm, data)
        for algorithm in (
            build(LOCAL, DEEP.task, PLACEMENT, **options),
            merging(LOCAL, DEEP.task, PLACEMENT, match=match, **options),
        )
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stay": -1.0}, "stay is -1.0; it must be at least 0"),
        ({"stay": np.nan}, "stay is nan; it must be at least 0"),
        ({"frame": "hers"}, "frame is 'hers'; allowed: joint, own, reference"),
        ({"opt_state": "drop"}, "opt_state is 'drop'; allowed: keep, merge, reset"),
        ({"restarts": 0}, "restarts is 0; it must be at least 1"),
    ],
)
@pytest.mark.parametrize("match", ["activations", "weights", None])
def test_merging_refuses_what_it_cannot_do_before_anything_runs(
    match, options, message
):
    with pytest.raises(OptionError, match=message):
        merging(LOCAL, DEEP.task, PLACEMENT, match=match, **options)


def test_every_policy_for_the_optimizer_is_explained():
    policies = list(OPT_STATE.choices or ())
    assert OPT_STATE.default in policies and FRAME.default in FRAMES
    assert all(f'"{policy}"' in OPT_STATE.meaning for policy in policies)
