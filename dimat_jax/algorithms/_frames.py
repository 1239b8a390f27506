"""In whose frame agents meet: four ways to average permuted networks.

A hidden layer's units have no order of their own; a frame is an agent's choice of one.
A `Meeting` brings the exchanged part of every state together over the network:

    meet(state, announced, network, match) -> (state, announced, merged)

`announced` is the state as the neighbours know it, where messages lose something; None:
they know it as it is. `match(state, edges, joint)` finds the permutations along edges
(see `match_edges`); `merged` is what becomes of the exchanged part; the returned states
live in the frame that `merged` lives in.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np

from dimat_jax import permutation
from dimat_jax.algorithms._edges import EdgePerms, Edges, waves
from dimat_jax.algorithms.base import Algorithm, State
from dimat_jax.matching._descent import PairPerms, Pairs
from dimat_jax.mixing import mix
from dimat_jax.network import Network
from dimat_jax.permutation import Perms
from dimat_jax.topology import Adjacency, components
from dimat_jax.tree import PyTree, is_inexact, stack, take

__all__ = ["MEETINGS", "Meeting", "same_frame", "spanning_forest"]

Match = Callable[[State, Edges, bool], EdgePerms]
Meeting = Callable[
    [State, State | None, Network, Match], tuple[State, State | None, PyTree]
]
Exchanged = Callable[[State], PyTree]


def same_frame(inner: Algorithm, exchanged: Exchanged) -> Meeting:
    """x_i <- sum_j W_ij x_j: no permutations (weight averaging)."""
    del inner
    average = _averaging(exchanged)

    def meet(state, announced, network, match):
        del match
        return state, announced, average(state, announced, network.W)

    return meet


def own_frame(inner: Algorithm, exchanged: Exchanged, joint: bool = False) -> Meeting:
    """x_i <- W_ii x_i + sum_j W_ij P_ij x_j: everyone stays in its own frame.

    One assignment problem for each edge and group (DIMAT, arXiv 2404.08079, eq. 4).
    """

    own_share = jax.jit(lambda state, W: _own_share(W, exchanged(state)))

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

    def meet(state, announced, network, match):
        known = state if announced is None else announced
        edges = np.argwhere(network.active_edges)
        merged = own_share(state, network.W)
        if len(edges):
            perms = match(known, edges, joint)
            for wave in waves(edges, len(network.present)):
                stacked = _stack_wave(perms, wave)
                merged = receive(merged, known, network.W, stacked, wave)
        return state, announced, merged

    return meet


def joint_frame(inner: Algorithm, exchanged: Exchanged) -> Meeting:
    """x_i <- sum_j W_ij Q_i^-1 Q_j x_j: everyone stays in its own frame, consistently.

    Every agent has one permutation Q_i into a frame that all who are connected share,
    found from all their edges at once; so going round any cycle is the identity.
    """
    return own_frame(inner, exchanged, joint=True)


def reference_frame(inner: Algorithm, exchanged: Exchanged) -> Meeting:
    """x_i <- sum_j W_ij P_j x_j: everyone moves into the frame of a root and stays.

    P_j is composed along a spanning tree, from j to the least agent of its connected
    component, so N - 1 edges are matched, and everybody's P_j is the same for all.
    """
    align = jax.jit(inner.aligned)
    average = _averaging(exchanged)

    def meet(state, announced, network, match):
        slots = len(network.present)
        tree = spanning_forest(np.asarray(network.active_edges))
        if tree:
            known = state if announced is None else announced
            to_roots = _to_roots(tree, match(known, np.array(tree), False), slots)
            state = align(state, to_roots)
            if announced is not None:
                announced = align(announced, to_roots)
        return state, announced, average(state, announced, network.W)

    return meet


MEETINGS: dict[str, Callable[[Algorithm, Exchanged], Meeting]] = {
    "own": own_frame,
    "reference": reference_frame,
    "joint": joint_frame,
}


def spanning_forest(adjacency: Adjacency) -> list[tuple[int, int]]:
    """Edges (parent, child) away from each component's least agent, breadth first."""
    graph = nx.from_numpy_array(adjacency | adjacency.T)
    return [
        edge
        for component in components(adjacency)
        for edge in nx.bfs_edges(graph, component[0], sort_neighbors=sorted)
    ]


def _averaging(exchanged: Exchanged):
    """sum_j W_ij x_j, of oneself as one is and of the others as they are known."""

    @jax.jit
    def average(state, announced, W):
        if announced is None:
            return mix(W, exchanged(state))
        heard = mix(W - jnp.diag(jnp.diagonal(W)), exchanged(announced))
        return jax.tree.map(
            lambda own, others: own + others if is_inexact(own) else own,
            _own_share(W, exchanged(state)),
            heard,
        )

    return average


def _own_share(W, stacked: PyTree) -> PyTree:
    """W_ii x_i; counters stay as they are."""

    def weigh(leaf):
        weights = jnp.diagonal(W).reshape(-1, *[1] * (leaf.ndim - 1))
        return (weights * leaf).astype(leaf.dtype) if is_inexact(leaf) else leaf

    return jax.tree.map(weigh, stacked)


def _to_roots(tree: list[tuple[int, int]], perms: EdgePerms, slots: int) -> Perms:
    """Stacked permutations into the roots' frames; the identity for the roots."""
    some = next(iter(perms.values()))
    identity: Perms = {group: jnp.arange(len(perm)) for group, perm in some.items()}
    to_root = [identity] * slots
    for parent, child in tree:
        # To the parent first, then, as the parent itself, on to the root.
        to_root[child] = permutation.compose(perms[parent, child], to_root[parent])
    return stack(to_root)


def _stack_wave(perms: EdgePerms, wave: Pairs) -> PairPerms:
    """The permutations of a wave's edges; identities where it is filled up."""
    some = next(iter(perms.values()))
    identity = {group: np.arange(len(perm)) for group, perm in some.items()}
    edges = zip(wave.references.tolist(), wave.permutees.tolist(), strict=True)
    rows = [perms.get(edge, identity) for edge in edges]
    return {
        group: np.stack([row[group] for row in rows]).astype(np.int32)
        for group in identity
    }


class _Shim:
    def __init__(self, two_way):
        self.two_way = two_way


FRAMES = {"own": _Shim(False), "reference": _Shim(True), "joint": _Shim(True)}
