"""The frames in which agents merge.

The units of a hidden layer have no natural order; a frame is the order that an agent
uses. Averaging weights makes sense only in a common frame, and there are several ways
to reach one. Each way is a `Frame`: a record that says which edges are matched, how
agents merge once the permutations are found, and what matching sends.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from dimat_jax.algorithms._edges import (
    EdgePerms,
    Edges,
    every_edge,
    no_edges,
    spanning_forest,
    sparse_edges,
    stack_wave,
    waves,
)
from dimat_jax.algorithms._traffic import (
    Traffic,
    joint_traffic,
    no_traffic,
    reference_traffic,
)
from dimat_jax.algorithms.base import Algorithm, State
from dimat_jax.mixing import mix
from dimat_jax.options import Record, Registry, registry
from dimat_jax.placement import Placement
from dimat_jax.topology import Adjacency
from dimat_jax.tree import PyTree, is_inexact

__all__ = [
    "AS_THEY_ARE",
    "FRAMES",
    "Exchanged",
    "Frame",
    "Merge",
    "StackedPerms",
    "Views",
    "to_roots",
]


class Views(NamedTuple):
    """All agents' states, as the agents have them and as their neighbours know them.

    Attributes:
        own: the exact states, stacked.
        announced: the states as the neighbours know them, if messages are compressed
            and lose something; None if the neighbours know the exact states.
    """

    own: State
    announced: State | None

    @property
    def known(self) -> State:
        """The states as the neighbours know them."""
        return self.own if self.announced is None else self.announced


class Exchanged(NamedTuple):
    """The part of a state that agents send, align and average.

    Attributes:
        part: `part(state)` returns this part of a state.
        with_part: `with_part(state, part)` returns the state with another such part.
    """

    part: Callable[[State], PyTree]
    with_part: Callable[[State, PyTree], State]


Merge = Callable[[Views, EdgePerms, Array | np.ndarray], tuple[Views, PyTree]]
"""`merge(views, perms, W) -> (views, merged)`.

`perms` are the permutations along the frame's edges; there are none where no edge is
active. `merged` is the average of the exchanged part, for each agent. The returned
views are in the frames in which `merged` is.
"""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Frame(Record[Merge]):
    """A way to merge agents whose units are in different orders.

    `build(inner, exchanged, placement)` makes its `Merge`.

    Attributes:
        edges: `edges(active_edges)` returns the edges along which agents are matched.
        joint: whether permutations must agree, that is, whether their product along
            every cycle must be the identity.
        two_way: whether a receiver must be able to answer its sender.
        moves: whether agents leave their own frames for the frames of roots.
        traffic: the function that counts what finding the permutations sends, beyond
            the weights that are mixed.
    """

    edges: Callable[[Adjacency], Edges]
    joint: bool = False
    two_way: bool = False
    moves: bool = False
    traffic: Traffic = no_traffic


StackedPerms = dict[str, Int32[np.ndarray, "slots _units"]]
"""A permutation of each group for every agent."""

# How agents merge, given the permutations =============================================


def average_as_they_are(
    inner: Algorithm, exchanged: Exchanged, placement: Placement
) -> Merge:
    """x_i <- sum_j W_ij x_j: no unit is permuted (weight averaging)."""
    del inner
    mix_in_place = _mixing_in_place(exchanged, placement)

    def merge(views, perms, W):
        del perms
        return views, mix_in_place(views, W)

    return merge


def own_frame(inner: Algorithm, exchanged: Exchanged, placement: Placement) -> Merge:
    """x_i <- sum_j W_ij P_ij x_j: every agent stays in its own frame.

    One assignment problem is solved for each edge and group (DIMAT, arXiv 2404.08079,
    equation 4).
    """

    def align(x, P):
        return exchanged.part(inner.aligned(x, P))

    @jax.jit
    def own_share(x, W):
        return _weighted(jnp.diagonal(W), exchanged.part(x))  # W_ii x_i

    @placement.jit
    def add_wave(total, x, W, P_ij, wave):
        i, j, real = wave
        W_ij = jnp.where(jnp.arange(len(j)) < real, W[i, j], 0.0)
        aligned = align(placement.pick(x, j), P_ij)
        return _add_at(i, total, _weighted(W_ij, aligned), placement)

    def merge(views, perms, W):
        # x_i <- W_ii x_i + sum_j W_ij P_ij x_j, one wave of edges (i, j) at a time.
        merged = own_share(views.own, W)
        for wave in waves(_edges_of(perms), len(W)):
            merged = add_wave(merged, views.known, W, stack_wave(perms, wave), wave)
        return views, merged

    return merge


def reference_frame(
    inner: Algorithm, exchanged: Exchanged, placement: Placement
) -> Merge:
    """x_i <- sum_j W_ij P_j x_j: every agent moves into the frame of a root, and stays.

    The root is the lowest agent of a connected component. P_j is composed along a
    spanning tree, from j to the root. So N - 1 edges are matched, and all agents use
    the same P_j.
    """
    align = placement.jit(inner.aligned)
    mix_in_place = _mixing_in_place(exchanged, placement)

    def merge(views, perms, W):
        if perms:
            views = _moved(align, views, to_roots(perms, len(W)))
        return views, mix_in_place(views, W)

    return merge


def joint_frame(inner: Algorithm, exchanged: Exchanged, placement: Placement) -> Merge:
    """x_i <- sum_j W_ij Q_i^-1 Q_j x_j: every agent stays in its own frame.

    The permutations agree along every cycle of the network. So Q_j, which moves agent j
    into the frame of a root, can be composed along any tree, and a few matched edges
    determine the permutations of all others. Agents mix in the root's frame, and each
    result moves back: that takes as many permutations of weights as there are agents.
    """
    mix_in_place = _mixing_in_place(exchanged, placement)

    @placement.jit
    def mix_in_frame(views: Views, W: Array, to_root, from_root):
        mixed = mix_in_place(_moved(inner.aligned, views, to_root), W)
        holding = exchanged.with_part(views.own, mixed)
        return exchanged.part(inner.aligned(holding, from_root))

    def merge(views, perms, W):
        if not perms:
            return views, mix_in_place(views, W)
        to_root = to_roots(perms, len(W))
        from_root = {group: _inverse(perm) for group, perm in to_root.items()}
        return views, mix_in_frame(views, W, to_root, from_root)

    return merge


def _moved(align: Callable[..., State], views: Views, perms) -> Views:
    """Permutes the states of all agents, and what their neighbours know of them."""
    own, announced = views
    announced = None if announced is None else align(announced, perms)
    return Views(align(own, perms), announced)


def to_roots(perms: EdgePerms, slots: int) -> StackedPerms:
    """Composes the permutations into the roots' frames along spanning trees, stacked.

    The root of a connected component is its lowest agent. It has the identity.

    Args:
        perms: the permutations by edge. They agree along every cycle, or there are no
            cycles. One direction of an edge is enough.
        slots: the number of stacked agents.
    """
    some = next(iter(perms.values()))
    to_root = {
        group: np.tile(_places(perm).astype(np.int32), (slots, *[1] * perm.ndim))
        for group, perm in some.items()
    }
    matched = np.zeros((slots, slots), bool)
    matched[tuple(_edges_of(perms).T)] = True
    for parent, child in spanning_forest(matched).tolist():
        # The child is aligned with its parent, and then moves with it to the root.
        answered = (parent, child) in perms
        to_parent = perms[(parent, child) if answered else (child, parent)]
        for group, perm in to_parent.items():
            perm = perm if answered else _inverse(perm)
            moves = to_root[group][parent]
            to_root[group][child] = np.take_along_axis(perm, moves, axis=-1)
    return to_root


def _places(perm: np.ndarray) -> np.ndarray:
    """The identity, in the shape of a permutation."""
    return np.broadcast_to(np.arange(perm.shape[-1]), perm.shape)


def _inverse(perms: Int32[np.ndarray, "*batch units"]) -> np.ndarray:
    return np.argsort(perms, axis=-1).astype(np.int32)


def _mixing_in_place(exchanged: Exchanged, placement: Placement):
    """Makes `mix_in_place(views, W)`, which computes sum_j W_ij x_j for every agent i.

    The term of an agent's own x_i is exact; the others are its neighbours' x_j as the
    agent knows them.
    """

    @jax.jit
    def mix_in_place(views: Views, W: Array) -> PyTree:
        if views.announced is None:
            return mix(W, exchanged.part(views.own), placement)
        others = W - jnp.diag(jnp.diagonal(W))
        received = mix(others, exchanged.part(views.announced), placement)
        return jax.tree.map(
            lambda own, others: own + others if is_inexact(own) else own,
            _weighted(jnp.diagonal(W), exchanged.part(views.own)),
            received,
        )

    return mix_in_place


def _edges_of(perms: EdgePerms) -> Edges:
    return np.array(list(perms), np.int64).reshape(-1, 2)


def _weighted(weights: Float[Array, " agents"], stacked: PyTree) -> PyTree:
    """Multiplies each agent's leaves by the agent's weight; counters do not change."""

    def weigh(leaf):
        by_agent = weights.reshape(-1, *[1] * (leaf.ndim - 1))
        return (by_agent * leaf).astype(leaf.dtype) if is_inexact(leaf) else leaf

    return jax.tree.map(weigh, stacked)


def _add_at(
    agents: Array, total: PyTree, terms: PyTree, placement: Placement
) -> PyTree:
    """Adds the term of each slot to an agent's leaves; counters do not change."""

    def add(leaf, term):
        return leaf.at[agents].add(term) if is_inexact(leaf) else leaf

    if placement.spread:
        # Terms travel to their agents' devices as weighted sums do.
        addressed = agents[None, :] == jnp.arange(placement.slots)[:, None]
        terms = mix(addressed.astype(jnp.float32), terms, placement)

        def add(leaf, term):
            return leaf + term if is_inexact(leaf) else leaf

    return jax.tree.map(add, total, terms)


# The registry =========================================================================

AS_THEY_ARE = Frame("as they are", average_as_they_are, edges=no_edges)
"""Weight averaging: no agent is aligned with another. No config can choose it."""

FRAMES: Registry[Frame] = registry(
    Frame("own", own_frame, edges=every_edge),
    Frame(
        "reference",
        reference_frame,
        edges=spanning_forest,
        two_way=True,
        moves=True,
        traffic=reference_traffic,
    ),
    Frame(
        "joint",
        joint_frame,
        edges=sparse_edges,
        joint=True,
        two_way=True,
        traffic=joint_traffic,
    ),
)
"""The frames that a config can choose, by name."""
