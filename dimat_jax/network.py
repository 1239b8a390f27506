"""What the network is like in one round, and what has crossed it."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dimat_jax.mixing import MixingMatrix
from dimat_jax.topology import Adjacency
from dimat_jax.tree import PyTree, nbytes

__all__ = ["Ledger", "Messages", "Network", "static"]


class Network(NamedTuple):
    """A round's network. Arrays, so that changing them never retraces a program.

    Attributes:
        W: the mixing matrix, float32; row i holds what agent i makes of the others.
        active_edges: `[i, j]` whether j's message reaches i this round.
        present: which agents take part. The slots that only fill up devices never do.
    """

    W: Float[Array, "agents agents"]
    active_edges: Bool[Array, "agents agents"]
    present: Bool[Array, " agents"]


def static(mixing_matrix: MixingMatrix, adjacency: Adjacency, slots: int) -> Network:
    """The same network every round, filled up to `slots` with agents who are absent."""
    n_agents = len(adjacency)
    W = np.eye(slots, dtype=np.float32)
    W[:n_agents, :n_agents] = mixing_matrix
    active_edges = np.zeros((slots, slots), bool)
    active_edges[:n_agents, :n_agents] = adjacency
    return Network(
        jnp.asarray(W), jnp.asarray(active_edges), jnp.arange(slots) < n_agents
    )


class Messages(NamedTuple):
    """What one agent sends one neighbour, as trees of `jax.ShapeDtypeStruct`.

    Attributes:
        step: with every local step; None where nothing is sent.
        round: with every communication; None where nothing is sent.
    """

    step: PyTree = None
    round: PyTree = None


@dataclasses.dataclass
class Ledger:
    """Bytes and rounds so far, in Python numbers (they outgrow int32).

    Attributes:
        bytes_sent: over all links, in both directions.
        comm_rounds: as the paper counts: one exchange with one neighbour is one round;
            the mean over agents where their degrees differ.
    """

    bytes_sent: int = 0
    comm_rounds: float = 0.0

    def record(self, message: PyTree, adjacency: Adjacency, times: int = 1) -> None:
        """Books `times` exchanges of one message along every edge."""
        if not jax.tree.leaves(message):
            return
        edges = int(adjacency.sum())
        self.bytes_sent += times * edges * nbytes(message)
        self.comm_rounds += times * edges / len(adjacency)
