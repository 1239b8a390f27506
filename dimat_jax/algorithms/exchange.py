"""Who is whose how-manieth neighbour: tables for what is sent along single edges."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from dimat_jax.topology import Adjacency
from dimat_jax.tree import PyTree

__all__ = ["Exchange"]


class Exchange(NamedTuple):
    """The edges of an undirected graph, by agent. Agents with few neighbours fill up.

    Attributes:
        neighbours: the k-th neighbour of every agent; itself where there is none.
        place: which neighbour of that neighbour the agent is in turn.
        real: whether there is a k-th neighbour.
    """

    neighbours: Int[np.ndarray, "agents most"]
    place: Int[np.ndarray, "agents most"]
    real: Bool[np.ndarray, "agents most"]

    @staticmethod
    def over(adjacency: Adjacency, slots: int) -> "Exchange":
        """The tables of a graph, filled up to `slots` agents."""
        most = int(adjacency.sum(axis=1).max(initial=0))
        neighbours = np.tile(np.arange(slots)[:, None], (1, most))
        real = np.zeros((slots, most), bool)
        for agent, row in enumerate(adjacency):
            (found,) = np.nonzero(row)
            neighbours[agent, : len(found)] = found
            real[agent, : len(found)] = True
        place = np.zeros_like(neighbours)
        for agent, k in np.argwhere(real):
            back = neighbours[neighbours[agent, k]] == agent
            place[agent, k] = np.argmax(back & real[neighbours[agent, k]])
        return Exchange(neighbours, place, real)

    def answers(self, answered: Sequence[PyTree], k: int) -> PyTree:
        """What every agent gets back from its k-th neighbour, stacked.

        Args:
            answered: for each k, what every agent answers its own k-th neighbour.
            k: whose answer.
        """

        def pick(*leaves):
            return jnp.stack(leaves)[self.place[:, k], self.neighbours[:, k]]

        return jax.tree.map(pick, *answered)

    def active(
        self, active_edges: Bool[Array, "agents agents"]
    ) -> Bool[Array, "agents most"]:
        """Which neighbours can be heard at the moment."""
        return self.weights(active_edges) & self.real

    def weights(self, matrix: Array) -> Array:
        """For every agent its row of a matrix `[agents, agents]`, by neighbour."""
        return matrix[np.arange(len(self.neighbours))[:, None], self.neighbours]
