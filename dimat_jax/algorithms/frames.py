"""In whose frame agents meet: three ways to average permuted networks.

A hidden layer's units have no order of their own; a frame is an agent's choice of one.
A `Meeting` brings the exchanged part of every state together over the network:

    meet(state, network, match) -> (state, merged, perms)

`match(state, edge_waves)` finds the permutations along edges (see `EdgeMatcher`);
`merged` is what becomes of the exchanged part; the returned state lives in the frame
that `merged` lives in; `perms` are the permutations that were found, for each edge.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np

from dimat_jax import permutation
from dimat_jax.algorithms.base import Algorithm, State
from dimat_jax.algorithms.edges import Wave, waves
from dimat_jax.mixing import mix
from dimat_jax.network import Network
from dimat_jax.permutation import Perms
from dimat_jax.topology import Adjacency, components
from dimat_jax.tree import PyTree, is_inexact, stack, take

__all__ = ["MEETINGS", "Meeting", "same_frame"]

EdgePerms = dict[tuple[int, int], Perms]
"""For every edge (receiver, sender), what aligns the sender with the receiver."""

Match = Callable[[State, Sequence[Wave]], Sequence[Mapping[str, Any]]]
Meeting = Callable[[State, Network, Match], tuple[State, PyTree, EdgePerms]]
Exchanged = Callable[[State], PyTree]


def same_frame(inner: Algorithm, exchanged: Exchanged) -> Meeting:
    """x_i <- sum_j W_ij x_j: no permutations (weight averaging)."""
    del inner
    average = jax.jit(lambda state, W: mix(W, exchanged(state)))

    def meet(state, network, match):
        del match
        return state, average(state, network.W), {}

    return meet


def own_frame(inner: Algorithm, exchanged: Exchanged) -> Meeting:
    """x_i <- W_ii x_i + sum_j W_ij P_ij x_j: everyone stays in its own frame.

    One assignment problem for each edge and group (DIMAT, arXiv 2404.08079, eq. 4).
    """

    @jax.jit
    def own_share(state, W):
        def weigh(leaf):
            weights = jnp.diagonal(W).reshape(-1, *[1] * (leaf.ndim - 1))
            return (weights * leaf).astype(leaf.dtype) if is_inexact(leaf) else leaf

        return jax.tree.map(weigh, exchanged(state))

    @jax.jit
    def receive(merged, state, W, perms, wave):
        receivers, senders, real = wave
        sent = exchanged(inner.aligned(take(state, senders), perms))
        weights = jnp.where(jnp.arange(len(senders)) < real, W[receivers, senders], 0.0)

        def add(total, leaf):
            if not is_inexact(leaf):
                return total
            share = weights.reshape(-1, *[1] * (leaf.ndim - 1)) * leaf
            return total.at[receivers].add(share.astype(total.dtype))

        return jax.tree.map(add, merged, sent)

    def meet(state, network, match):
        edge_waves = waves(np.argwhere(network.active_edges), len(network.present))
        perms = match(state, edge_waves)
        merged = own_share(state, network.W)
        for wave, wave_perms in zip(edge_waves, perms, strict=True):
            merged = receive(merged, state, network.W, wave_perms, wave)
        return state, merged, _by_edge(edge_waves, perms)

    return meet


def reference_frame(inner: Algorithm, exchanged: Exchanged) -> Meeting:
    """x_i <- sum_j W_ij P_j x_j: everyone moves into the frame of a root and stays.

    P_j is composed along a spanning tree, from j to the least agent of its connected
    component, so N - 1 edges are matched, and everybody's P_j is the same for all.
    """
    align = jax.jit(inner.aligned)
    average = jax.jit(lambda state, W: mix(W, exchanged(state)))

    def meet(state, network, match):
        slots = len(network.present)
        tree = _spanning_forest(np.asarray(network.active_edges))
        edge_waves = waves(np.array(tree, np.int32).reshape(-1, 2), slots)
        perms = _by_edge(edge_waves, match(state, edge_waves))
        if tree:
            state = align(state, _to_roots(tree, perms, slots))
        return state, average(state, network.W), perms

    return meet


MEETINGS: dict[str, Callable[[Algorithm, Exchanged], Meeting]] = {
    "own": own_frame,
    "reference": reference_frame,
}


def _spanning_forest(adjacency: Adjacency) -> list[tuple[int, int]]:
    """Edges (parent, child) away from each component's least agent, breadth first."""
    graph = nx.from_numpy_array(adjacency | adjacency.T)
    return [
        edge
        for component in components(adjacency)
        for edge in nx.bfs_edges(graph, component[0], sort_neighbors=sorted)
    ]


def _to_roots(tree: list[tuple[int, int]], perms: EdgePerms, slots: int) -> Perms:
    """Stacked permutations into the roots' frames; the identity for the roots."""
    some = next(iter(perms.values()))
    identity: Perms = {group: jnp.arange(len(perm)) for group, perm in some.items()}
    to_root = [identity] * slots
    for parent, child in tree:
        # To the parent first, then, as the parent itself, on to the root.
        to_root[child] = permutation.compose(perms[parent, child], to_root[parent])
    return stack(to_root)


def _by_edge(
    edge_waves: Sequence[Wave], perms: Sequence[Mapping[str, Any]]
) -> EdgePerms:
    return {
        (int(receiver), int(sender)): take(wave_perms, e)
        for (receivers, senders, real), wave_perms in zip(
            edge_waves, perms, strict=True
        )
        for e, (receiver, sender) in enumerate(
            zip(receivers[:real], senders[:real], strict=True)
        )
    }
