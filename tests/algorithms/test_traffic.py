"""Tests the bytes that agreeing on frames sends, by hand and by a formula."""

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimat_jax.algorithms._frames import FRAMES
from dimat_jax.algorithms._traffic import MatchingSizes, matching_sizes
from dimat_jax.permutation import PermutationSpec
from dimat_jax.topology import TOPOLOGIES

PERMS, SCORES, WEIGHTS = 10, 1000, 100_000
PATH = TOPOLOGIES["path"](3)  # 0 - 1 - 2, whose root is 0
BOTH = np.argwhere(PATH)
ONE_WAY = BOTH[BOTH[:, 0] < BOTH[:, 1]]


def traffic(frame: str, pairs=ONE_WAY, scores: int = SCORES, edges=PATH) -> np.ndarray:
    sizes = MatchingSizes(PERMS, scores, WEIGHTS)
    return FRAMES[frame].traffic(edges, pairs, sizes)


def test_sizes_of_what_matching_sends():
    spec = PermutationSpec({"params/w": (None, "a"), "params/v": ("a", "b")})
    params = {"w": np.zeros((7, 3), np.float32), "v": np.zeros((3, 2), np.float32)}
    # Indices and scores take four bytes each. The groups have 3 and 2 units.
    weights = 4 * (7 * 3 + 3 * 2)
    found = matching_sizes(spec, {"params": params}, by_activations=True)
    assert found == MatchingSizes(4 * (3 + 2), 4 * (3**2 + 2**2), weights)
    found = matching_sizes(spec, {"params": params}, by_activations=False)
    assert found == MatchingSizes(4 * (3 + 2), 0, weights)
    nothing = matching_sizes(
        PermutationSpec({}), {"params": params}, by_activations=True
    )
    assert nothing == MatchingSizes(0, 0, weights)


def test_agents_that_stay_in_their_own_frames_send_nothing():
    assert not traffic("own").any()


def test_on_a_path_to_a_reference_frame():
    # Agent 0 finds agent 1's permutations and sends them to it, and 1 does the same for
    # 2. Then the ends of each link send each other their permutations.
    assert traffic("reference").tolist() == [
        [0, PERMS, 0],
        [2 * PERMS, 0, PERMS],
        [0, 2 * PERMS, 0],
    ]


def test_on_a_path_to_a_joint_frame_with_scores():
    # Agent 0 has the scores of 0 and 1; agent 1 sends it those of 1 and 2. Agent 0
    # sends the permutations of 1 to it, and those of 2 by way of 1. Then the ends of
    # each link send each other their permutations.
    assert traffic("joint").tolist() == [
        [0, SCORES + PERMS, 0],
        [3 * PERMS, 0, PERMS],
        [0, 2 * PERMS, 0],
    ]
    # On own data every receiver has scores of its senders: agent 2 has one pair's
    # scores, and agent 1 has two.
    assert traffic("joint", BOTH).tolist() == [
        [0, 3 * SCORES + PERMS, 0],
        [3 * PERMS, 0, SCORES + PERMS],
        [0, 2 * PERMS, 0],
    ]


def test_on_a_path_to_a_joint_frame_with_weights():
    assert traffic("joint", scores=0).tolist() == [
        # Agents 0 and 1 have the weights of their neighbours anyway, so only agent 2's
        # weights are sent on, from 1 to 0.
        [0, WEIGHTS + PERMS, 0],
        [3 * PERMS, 0, PERMS],
        [0, 2 * PERMS, 0],
    ]


@given(n=st.integers(1, 8), density=st.floats(0, 1), seed=st.integers(0, 2**31))
@settings(max_examples=60)
@pytest.mark.parametrize("frame", ["reference", "joint"])
@pytest.mark.parametrize("scores", [0, SCORES])
def test_everything_takes_the_shortest_way_to_the_root_of_its_part(
    frame, scores, n, density, seed
):
    upper = np.triu(np.random.default_rng(seed).random((n, n)) < density, 1)
    edges = upper | upper.T
    pairs = np.argwhere(np.triu(edges))
    found = traffic(frame, pairs, scores, edges)
    assert not found[~edges].any()
    graph = nx.from_numpy_array(edges)
    hops = np.array(
        [
            nx.shortest_path_length(graph, agent, min(part))
            for agent in range(n)
            for part in nx.connected_components(graph)
            if agent in part
        ]
    )
    to_neighbours = PERMS * edges.sum()
    if frame == "reference":
        assert found.sum() == to_neighbours + PERMS * (hops > 0).sum()
    else:
        receivers = pairs[:, 0]
        if scores:
            sent = (np.bincount(receivers, minlength=n) * scores * hops).sum()
        else:
            sent = (WEIGHTS * np.maximum(hops - 1, 0)).sum()
        assert found.sum() == to_neighbours + PERMS * hops.sum() + sent
