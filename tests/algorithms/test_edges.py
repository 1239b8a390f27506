"""Tests that matching along a graph's edges equals matching them one by one."""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat_jax import permutation
from dimat_jax._stopwatch import Stopwatch
from dimat_jax.algorithms import MergeData
from dimat_jax.algorithms._edges import EdgePerms, Matcher, match_edges, waves
from dimat_jax.algorithms._matchers import ActivationMatcher, WeightMatcher
from dimat_jax.data.pipeline import Reader, Samples, place_pool
from dimat_jax.data.sources import Split
from dimat_jax.matching import activation_matching, weight_matching
from dimat_jax.models import MODELS, permutation_spec
from dimat_jax.models.classifier import activations, init
from dimat_jax.permutation import (
    Perms,
    PermutationSpec,
    PermutationSpecError,
    Product,
)
from dimat_jax.placement import Placement, place
from dimat_jax.topology import TOPOLOGIES, from_graph
from dimat_jax.tree import PyTree

# Waves ================================================================================


def edges_of(adjacency) -> np.ndarray:
    return np.argwhere(adjacency)


def assert_each_edge_is_in_one_wave(edges: np.ndarray, slots: int) -> None:
    found = []
    edge_waves = waves(edges, slots)
    for receivers, senders, real in edge_waves:
        assert receivers.shape == senders.shape == (slots,)
        assert receivers.dtype == senders.dtype == np.int32
        assert 0 < real <= slots
        found += zip(receivers[:real].tolist(), senders[:real].tolist(), strict=True)
        loops = np.arange(real, slots)  # each filling slot looks at itself
        assert (receivers[real:] == loops).all() and (senders[real:] == loops).all()
    assert sorted(found) == sorted(map(tuple, edges.tolist()))
    assert len(edge_waves) == -(-len(edges) // slots)


@given(
    n_agents=st.integers(1, 9),
    spare=st.integers(0, 3),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_waves_hold_each_edge_of_any_graph_exactly_once(n_agents, spare, density, seed):
    adjacency = np.random.default_rng(seed).random((n_agents, n_agents)) < density
    np.fill_diagonal(adjacency, False)
    assert_each_edge_is_in_one_wave(edges_of(adjacency), n_agents + spare)


@pytest.mark.parametrize("n_agents", [3, 4, 5, 8])
@pytest.mark.parametrize("spare", [0, 2])
def test_waves_hold_each_edge_of_the_usual_graphs_exactly_once(n_agents, spare):
    for adjacency in (
        TOPOLOGIES["ring"](n_agents),
        TOPOLOGIES["fully_connected"](n_agents),
        from_graph(nx.star_graph(n_agents - 1)),
    ):
        assert_each_edge_is_in_one_wave(edges_of(adjacency), n_agents + spare)


@pytest.mark.parametrize("n_agents", [3, 4, 5, 8])
def test_rings_and_full_graphs_make_few_waves_of_every_receiver_in_order(n_agents):
    for topology, n_waves in (("ring", 2), ("fully_connected", n_agents - 1)):
        edge_waves = waves(edges_of(TOPOLOGIES[topology](n_agents)), n_agents)
        assert len(edge_waves) == n_waves
        for receivers, senders, real in edge_waves:
            assert real == n_agents
            np.testing.assert_array_equal(receivers, np.arange(n_agents))
            np.testing.assert_array_equal(np.sort(senders), np.arange(n_agents))


@pytest.mark.parametrize("n_agents", [3, 4, 5, 8])
def test_a_star_makes_two_waves(n_agents):
    star = from_graph(nx.star_graph(n_agents - 1))
    assert len(waves(edges_of(star), n_agents)) == 2


def test_no_edges_make_no_waves():
    assert waves(np.zeros((0, 2), np.int64), 4) == []


# Matching =============================================================================

N_AGENTS = 4
GRAPHS = {
    "ring": TOPOLOGIES["ring"](N_AGENTS),
    "fully connected": TOPOLOGIES["fully_connected"](N_AGENTS),
    "star": from_graph(nx.star_graph(N_AGENTS - 1)),
    "one way": from_graph(nx.DiGraph([(0, 1), (1, 2), (0, 3), (3, 1), (3, 0)])),
}
BATCH = 8
# No shard fills its last batch, and some agents have fewer batches than others.
SHARDS = [np.arange(0, 9), np.arange(9, 36), np.arange(36, 50), np.arange(50, 71)]
PROXY = np.arange(20, 50)
IMAGES = np.random.default_rng(0).integers(0, 256, (71, 4, 4, 3), np.uint8)
MEAN, STD = np.full(3, 120.0), np.full(3, 70.0)


def maps_of(variables: PyTree, inputs: jax.Array) -> dict[str, jax.Array]:
    """A model with two taps of feature maps, one of which has its channels first."""
    units = jnp.tanh(inputs @ variables["kernel"])
    return {"last": units, "first": jnp.moveaxis(jax.nn.relu(units + 0.2), -1, 1)}


class Agents(NamedTuple):
    spec: PermutationSpec
    activations: Callable[[PyTree, Any], dict[str, jax.Array]]
    each: list[PyTree]
    placement: Placement
    matcher: Matcher

    def match(self, adjacency, samples: Samples | None, **settings: Any) -> EdgePerms:
        stacked = self.placement.put(jax.tree.map(lambda *x: np.stack(x), *self.each))
        found, similarity, _ = match_edges(
            self.matcher,
            stacked,
            edges_of(adjacency),
            MergeData(match=samples),
            placement=self.placement,
            key=jax.random.key(0),
            **{"stopwatch": Stopwatch(), **settings},
        )
        assert similarity is not None and -1 <= similarity <= 1
        return found


@cache
def agents(kind: str) -> Agents:
    keys = jax.random.split(jax.random.key(0), N_AGENTS)
    if kind == "mlp":
        model = MODELS["mlp"](n_classes=3, hidden=(10, 7))
        spec, observe = permutation_spec(model), activations(model)
        fresh = jax.jit(partial(init, model))
        each = [fresh(key, jnp.float32(IMAGES[:1])) for key in keys]
        placement = place(N_AGENTS, jax.devices()[:1], batching="unroll")
    else:
        spec = PermutationSpec(
            {"kernel": (None, "units")},
            {"last": "units", "first": (None, "units", None, None)},
        )
        observe = maps_of
        each = [{"kernel": jax.random.normal(key, (3, 12))} for key in keys]
        placement = place(N_AGENTS, jax.devices()[:1], batching="vmap")
    return Agents(
        spec, observe, each, placement, ActivationMatcher(spec, observe, placement)
    )


@cache
def samples(kind: str, whose: str) -> Samples:
    placement = agents(kind).placement
    labels = np.zeros(len(IMAGES), np.int32)
    pool = place_pool(Split(IMAGES, labels), MEAN, STD, placement)
    reader = Reader(pool, placement)
    return reader.own(SHARDS, BATCH) if whose == "own" else reader.shared(PROXY, BATCH)


@cache
def alone(kind: str, whose: str, receiver: int, sender: int) -> Perms:
    """Matches one pair on all examples at once, without padding or masks."""
    indices = SHARDS[receiver] if whose == "own" else PROXY
    inputs = jnp.asarray((IMAGES[indices] - MEAN) / STD, jnp.float32)
    spec, observe, each, *_ = agents(kind)
    # The call is not jitted, because every call would compile anew.
    with jax.disable_jit():
        return activation_matching(
            spec, observe, each[receiver], each[sender], [inputs]
        )


@pytest.mark.every_nth(6)
@pytest.mark.parametrize("whose", ["shared", "own"])
@pytest.mark.parametrize(
    ("kind", "graph"), [*(("mlp", graph) for graph in GRAPHS), ("maps", "one way")]
)
def test_every_edge_is_matched_as_its_two_agents_alone(kind, graph, whose):
    found = agents(kind).match(GRAPHS[graph], samples(kind, whose))
    assert set(found) == set(map(tuple, edges_of(GRAPHS[graph])))
    for (receiver, sender), perms in found.items():
        expected = alone(kind, whose, receiver, sender)
        assert perms.keys() == expected.keys()
        for group, perm in perms.items():
            assert perm.dtype == np.int32
            np.testing.assert_array_equal(perm, expected[group], f"{receiver}{sender}")


@pytest.mark.slow
def test_the_pairs_to_be_matched_differ():
    # Some units move. Otherwise wrong edges, directions or samples would go unnoticed.
    pairs = [("shared", 0, 1), ("shared", 1, 0), ("shared", 2, 1), ("own", 0, 1)]
    for kind in ("mlp", "maps"):
        perms = [np.concatenate([*alone(kind, *pair).values()]) for pair in pairs]
        assert len({tuple(perm.tolist()) for perm in perms}) == len(pairs)


@pytest.mark.parametrize("whose", ["shared", "own"])
def test_a_large_stay_keeps_every_unit_of_every_agent(whose):
    found = agents("mlp").match(GRAPHS["ring"], samples("mlp", whose), stay=2)
    for perms in found.values():
        for perm in perms.values():
            np.testing.assert_array_equal(perm, np.arange(len(perm)))


@pytest.mark.parametrize("batching", ["vmap", "unroll"])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("whose", ["shared", "own"])
def test_examples_are_read_as_needed_on_every_edge(whose, joint, batching):
    """Agents that are copies of one agent are matched alike by any two batches.

    The units of these maps vary on every batch. A unit that is dead on the first batch
    alone would be matched at random, and a second batch would gain something.
    """
    spec, observe, (agent, *_), *_ = agents("maps")
    placement = place(N_AGENTS, jax.devices()[:1], batching)
    matcher = ActivationMatcher(spec, observe, placement)
    keys = jax.random.split(jax.random.key(3), N_AGENTS)
    perms = [permutation.random(spec, agent, key) for key in keys]
    copies = [permutation.apply(spec, perm, agent) for perm in perms]
    variables = placement.put(jax.tree.map(lambda *x: np.stack(x), *copies))
    data = dataclasses.replace(samples("maps", whose), as_needed=True)

    def match(examples: Samples):
        return match_edges(
            matcher,
            variables,
            edges_of(GRAPHS["ring"]),
            MergeData(match=examples),
            placement=placement,
            joint=joint,
            key=jax.random.key(0),
            stopwatch=Stopwatch(),
        )

    few, whole = match(data), match(samples("maps", whose))
    assert few.n_batches == 2 < whole.n_batches == len(data.indices)
    two = dataclasses.replace(data, indices=data.indices[:2], mask=data.mask[:2])
    expected = match(dataclasses.replace(two, as_needed=False))
    assert few.perms.keys() == whole.perms.keys() == expected.perms.keys()
    for edge, found in few.perms.items():
        for group, perm in found.items():
            np.testing.assert_array_equal(perm, expected.perms[edge][group])


def test_every_phase_is_timed():
    stopwatch = Stopwatch()
    agents("mlp").match(GRAPHS["ring"], samples("mlp", "own"), stopwatch=stopwatch)
    assert set(stopwatch.seconds) == {"activations", "correlations", "assignment"}
    assert min(stopwatch.seconds.values()) > 0


# Joint matching, and matching by weights ==============================================


def assert_cycles_are_identities(found: EdgePerms) -> None:
    graph = nx.DiGraph(list(found))
    cycles = list(nx.simple_cycles(graph))
    assert cycles
    for cycle in cycles:
        for group in next(iter(found.values())):
            # The permutations go along the cycle, from the first agent back to itself.
            unit = identity = np.arange(len(found[next(iter(found))][group]))
            for edge in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
                unit = found[edge][group][unit]
            np.testing.assert_array_equal(unit, identity, f"{cycle} {group}")


@pytest.mark.parametrize("graph", ["ring", "fully connected", "one way"])
@pytest.mark.parametrize("whose", ["shared", "own", "weights"])
def test_jointly_found_permutations_agree_round_every_cycle(graph, whose):
    matcher = agents("mlp")
    if whose == "weights":
        matcher = by_weights(matcher)
    data = None if whose == "weights" else samples("mlp", whose)
    found = matcher.match(GRAPHS[graph], data, joint=True)
    assert set(found) == set(map(tuple, edges_of(GRAPHS[graph])))
    assert_cycles_are_identities(found)
    moved = [
        perm != np.arange(len(perm)) for p in found.values() for perm in p.values()
    ]
    assert np.concatenate(moved).any()


def test_pairwise_matched_permutations_need_not_agree():
    # If they always agreed, the tests of joint matching would prove nothing.
    found = agents("mlp").match(GRAPHS["ring"], samples("mlp", "shared"))
    with pytest.raises(AssertionError):
        assert_cycles_are_identities(found)


def test_edges_that_tell_each_other_are_matched_once():
    matched = []

    class Recording(ActivationMatcher):
        def scorers(self, variables, edge_waves, data, stopwatch):
            for references, permutees, real in edge_waves:
                matched.extend(
                    zip(
                        references[:real].tolist(),
                        permutees[:real].tolist(),
                        strict=True,
                    )
                )
            return super().scorers(variables, edge_waves, data, stopwatch)

    subject = agents("mlp")
    matcher = Recording(subject.spec, subject.activations, subject.placement)
    for graph in GRAPHS.values():
        matched.clear()
        subject._replace(matcher=matcher).match(graph, samples("mlp", "shared"))
        expected = {frozenset(edge) for edge in edges_of(graph).tolist()}
        assert len(matched) == len(expected)
        assert {frozenset(edge) for edge in matched} == expected
    # On own data the two directions of an edge have different scores.
    matched.clear()
    subject._replace(matcher=matcher).match(GRAPHS["ring"], samples("mlp", "own"))
    assert sorted(matched) == sorted(map(tuple, edges_of(GRAPHS["ring"]).tolist()))


@given(order=st.permutations(range(N_AGENTS)), graph=st.sampled_from(sorted(GRAPHS)))
@settings(max_examples=10)
def test_matching_is_equivariant_to_relabelling_the_agents(order, graph):
    subject, order = agents("mlp"), np.array(order)
    adjacency = GRAPHS[graph]
    relabelled = subject._replace(each=[subject.each[i] for i in order])
    found = subject.match(adjacency, samples("mlp", "shared"))
    again = relabelled.match(adjacency[np.ix_(order, order)], samples("mlp", "shared"))
    assert len(again) == len(found)
    for (i, j), perms in again.items():
        for group, perm in perms.items():
            expected = found[int(order[i]), int(order[j])][group]
            np.testing.assert_array_equal(perm, expected)


def by_weights(subject: Agents) -> Agents:
    return subject._replace(matcher=WeightMatcher(subject.spec, subject.placement))


@cache
def copies(n_devices: int, batching: Any) -> Agents:
    """Makes noisy, shuffled copies of one network with known best permutations."""
    base = agents("mlp").each[0]
    rng = np.random.default_rng(0)
    each = [
        permutation.apply(
            agents("mlp").spec,
            permutation.random(agents("mlp").spec, base, jax.random.key(seed)),
            jax.tree.map(
                lambda x: x + 0.01 * rng.normal(size=x.shape).astype(np.float32), base
            ),
        )
        for seed in range(N_AGENTS)
    ]
    placement = place(N_AGENTS, jax.devices()[:n_devices], batching)
    spec = agents("mlp").spec
    return Agents(spec, maps_of, each, placement, WeightMatcher(spec, placement))


@pytest.mark.every_nth(6)
@pytest.mark.parametrize(
    ("n_devices", "batching"), [(1, "vmap"), (1, "unroll"), (2, "vmap"), (3, "vmap")]
)
@pytest.mark.parametrize("joint", [False, True])
def test_every_edge_is_matched_by_weights_on_any_devices(n_devices, batching, joint):
    subject = copies(n_devices, batching)
    for graph in ("ring", "one way"):
        found = subject.match(GRAPHS[graph], None, joint=joint)
        assert set(found) == set(map(tuple, edges_of(GRAPHS[graph])))
        for edge, perms in found.items():
            for group, perm in alone_by_weights(*edge).items():
                assert perms[group].dtype == np.int32
                np.testing.assert_array_equal(perms[group], perm, str(edge))


@cache
def alone_by_weights(receiver: int, sender: int) -> Perms:
    each = copies(1, "vmap").each
    return weight_matching(
        agents("mlp").spec, each[receiver], each[sender], key=jax.random.key(7)
    )


def test_an_agent_with_weights_that_are_not_finite_is_named():
    subject = copies(1, "vmap")
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), subject.each[2])
    subject = subject._replace(each=[*subject.each[:2], broken, subject.each[3]])
    with pytest.raises(ValueError, match="'params/.*agent 2"):
        subject.match(GRAPHS["ring"], None)


# Taps =================================================================================


@pytest.mark.slow
def test_examples_that_do_not_count_are_masked_at_every_tap():
    spec = PermutationSpec(
        {"kernel": (None, Product("heads", "within"))},
        {"flat": (Product("heads", "within"),), "maps": ("heads", None, "within")},
    )

    def observe(variables, inputs):  # [batch, 4, 4, 3]
        units = jnp.tanh(inputs @ variables["kernel"])
        split = units.reshape(*units.shape[:-1], 4, 3)
        return {"flat": units, "maps": jnp.moveaxis(split, 3, 2)}

    spec = dataclasses.replace(spec, sizes={"heads": 4})
    placement = place(N_AGENTS, jax.devices()[:1], "vmap")
    keys = jax.random.split(jax.random.key(0), N_AGENTS)
    each = [{"kernel": jax.random.normal(key, (3, 12))} for key in keys]
    matcher = ActivationMatcher(spec, observe, placement)
    subject = Agents(spec, observe, each, placement, matcher)
    # The shards do not fill a batch, and the padding must not count.
    found = subject.match(GRAPHS["one way"], samples("maps", "own"))
    for (receiver, sender), perms in found.items():
        inputs = jnp.asarray((IMAGES[SHARDS[receiver]] - MEAN) / STD, jnp.float32)
        expected = activation_matching(
            spec, observe, each[receiver], each[sender], [inputs]
        )
        for group, perm in perms.items():
            np.testing.assert_array_equal(perm, expected[group])


def test_a_tap_whose_first_axis_is_not_the_examples_is_named():
    spec = PermutationSpec({"kernel": (None, "units")}, {"mean": "units"})

    def observe(variables, inputs):
        return {"mean": jnp.tanh(inputs @ variables["kernel"]).mean(axis=(0, 1))}

    placement = place(N_AGENTS, jax.devices()[:1], "vmap")
    each = [{"kernel": jnp.ones((3, 12))}] * N_AGENTS
    matcher = ActivationMatcher(spec, observe, placement)
    subject = Agents(spec, observe, each, placement, matcher)
    with pytest.raises(PermutationSpecError, match="'mean' shows 4 samples of 8"):
        subject.match(GRAPHS["ring"], samples("maps", "shared"))
