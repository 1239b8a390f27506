"""Neighbour tables, for messages that differ from edge to edge."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from dimat_jax.placement import Placement
from dimat_jax.topology import Adjacency
from dimat_jax.tree import PyTree

__all__ = ["Exchange"]


class Exchange(NamedTuple):
    """The neighbours of every agent of an undirected graph, as tables.

    The tables have a row for each agent, and as many columns as the agent with the most
    neighbours needs. The other rows are filled up.

    Attributes:
        neighbours: `neighbours[i, k]` is the k-th neighbour of agent i, or i itself if
            it has none.
        place: `place[i, k]` is the place that agent i has in the row of its k-th
            neighbour.
        real: `real[i, k]` says whether agent i has a k-th neighbour.
    """

    neighbours: Int[np.ndarray, "agents most"]
    place: Int[np.ndarray, "agents most"]
    real: Bool[np.ndarray, "agents most"]

    @staticmethod
    def over(adjacency: Adjacency, slots: int) -> "Exchange":
        """Makes the tables of a graph, filled up to `slots` agents."""
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

    def answers(
        self, answered: Sequence[PyTree], k: int, placement: Placement
    ) -> PyTree:
        """Returns the answers that all agents get from their k-th neighbours, stacked.

        Args:
            answered: for each k, the answers of all agents to their own k-th
                neighbours, stacked.
            k: the column of the tables.
            placement: the devices on which the agents live.
        """
        result = answered[0]
        for place in np.unique(self.place[:, k]):
            here = self.place[:, k] == place
            # An agent whose answer is at another place asks for its own entry, which
            # costs no message.
            senders = np.where(here, self.neighbours[:, k], np.arange(len(here)))
            answers = placement.pick(answered[place], senders)
            result = jax.tree.map(
                lambda new, old, here=here: jnp.where(
                    here.reshape(-1, *[1] * (new.ndim - 1)), new, old
                ),
                answers,
                result,
            )
        return result

    def active(
        self, active_edges: Bool[Array, "agents agents"]
    ) -> Bool[Array, "agents most"]:
        """Whether the message of each agent's k-th neighbour reaches the agent."""
        return self.weights(active_edges) & self.real

    def weights(self, matrix: Array) -> Array:
        """Rearranges a matrix `[agents, agents]`: its columns become neighbours.

        The result is `[agents, most]`; entry [i, k] belongs to i's k-th neighbour.
        """
        return matrix[np.arange(len(self.neighbours))[:, None], self.neighbours]
