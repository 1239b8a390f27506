"""Counts the bytes that matching sends on every link, beyond the mixed weights.

In agents' own frames matching sends nothing, because a receiver has the weights, and
examples to run them on. Agents that share a frame have to agree on it. (With compressed
messages, an agent that has missed some would also have to learn how frames have changed
since. This is not counted.)
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from dimat_jax.algorithms._edges import Edges, spanning_forest
from dimat_jax.permutation import PermutationSpec, group_shapes
from dimat_jax.topology import Adjacency
from dimat_jax.tree import PyTree, nbytes

__all__ = [
    "MatchingSizes",
    "Traffic",
    "joint_traffic",
    "matching_sizes",
    "no_traffic",
    "reference_traffic",
]


class MatchingSizes(NamedTuple):
    """The sizes of what matching can send, in bytes.

    Attributes:
        perms: the size of one agent's permutations.
        scores: the size of one pair's scores, which the pair's receiver has computed; 0
            if agents are matched by their weights, which determine the scores.
        weights: the size of one agent's params.
    """

    perms: int
    scores: int
    weights: int


_INDEX_BYTES = np.dtype(np.int32).itemsize
_SCORE_BYTES = np.dtype(np.float32).itemsize


def matching_sizes(
    spec: PermutationSpec, variables: PyTree, *, by_activations: bool
) -> MatchingSizes:
    """Computes the sizes of what matching can send.

    Args:
        spec: the symmetry.
        variables: one agent's variables, as arrays or as shapes and dtypes.
        by_activations: whether units are matched by their activations. Otherwise they
            are matched by their weights, and scores are not sent.
    """
    shapes = list(group_shapes(spec, variables).values()) if spec.groups else []
    units = sum(map(math.prod, shapes))
    scores = sum(math.prod(s) * s[-1] for s in shapes) if by_activations else 0
    return MatchingSizes(
        perms=_INDEX_BYTES * units,
        scores=_SCORE_BYTES * scores,
        weights=nbytes(variables["params"]),
    )


Bytes = Int[np.ndarray, "agents agents"]
"""The bytes of every link, `[receiver, sender]`."""

Traffic = Callable[[Adjacency, Edges, MatchingSizes], Bytes]
"""`traffic(active_edges, pairs, sizes)` counts the bytes of one merge's matching.

`active_edges` are undirected; `pairs` are the pairs (receiver, sender) that have been
matched.
"""


def no_traffic(active_edges: Adjacency, pairs: Edges, sizes: MatchingSizes) -> Bytes:
    """Returns 0 for every link, for frames in which matching sends nothing."""
    del pairs, sizes
    return np.zeros(active_edges.shape, np.int64)


def reference_traffic(
    active_edges: Adjacency, pairs: Edges, sizes: MatchingSizes
) -> Bytes:
    """Counts what agents send to move into a root's frame.

    A parent in the spanning tree sends its child the permutations into the root's
    frame. Every agent passes its permutations on to its neighbours, who hold its
    weights as they were.
    """
    del pairs
    traffic = sizes.perms * active_edges.astype(np.int64)
    for parent, child in spanning_forest(active_edges):
        traffic[child, parent] += sizes.perms
    return traffic


def joint_traffic(active_edges: Adjacency, pairs: Edges, sizes: MatchingSizes) -> Bytes:
    """Counts what agents send to find permutations that agree.

    The scores, or else the weights, go up the spanning tree to its root, hop by hop.
    The permutations come back the same way, and then go to the neighbours.
    """
    # The permutations' last hop to each agent, and from there to the neighbours, costs
    # as much as in a root's frame.
    traffic = reference_traffic(active_edges, pairs, sizes)
    tree = spanning_forest(active_edges).tolist()
    evidence = np.zeros(len(active_edges), np.int64)
    if sizes.scores:
        np.add.at(evidence, pairs[:, 0], sizes.scores)
    else:
        evidence[active_edges.any(axis=1)] = sizes.weights
    # What an agent and its descendants send goes through the link to its parent.
    sent, descendants = evidence.copy(), np.zeros(len(active_edges), np.int64)
    for parent, child in reversed(tree):
        sent[parent] += sent[child]
        descendants[parent] += 1 + descendants[child]
        # A parent has its child's weights already, because it merges with them.
        known = 0 if sizes.scores else evidence[child]
        traffic[parent, child] += sent[child] - known
        traffic[child, parent] += sizes.perms * descendants[child]
    return traffic
