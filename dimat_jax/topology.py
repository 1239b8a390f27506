"""Who talks to whom: communication graphs as adjacency matrices.

`adjacency[i, j]` says that agent i receives from agent j. There are no self-loops: an
agent always has its own weights.
"""

from collections.abc import Callable

import networkx as nx
import numpy as np
from jaxtyping import Bool

from dimat_jax.errors import UserError

__all__ = [
    "TOPOLOGIES",
    "Adjacency",
    "TopologyError",
    "from_graph",
    "components",
    "is_connected",
]

Adjacency = Bool[np.ndarray, "agents agents"]


class TopologyError(UserError):
    """A graph that cannot be built, or is not fit for its use."""


def from_graph(graph: nx.Graph) -> Adjacency:
    """The adjacency matrix of any networkx graph, in the order of its nodes.

    In a directed graph the edge u -> v means that u sends to v: `adjacency[v, u]`.
    """
    # NaN marks what is no edge: an edge may well have the weight 0.
    matrix = ~np.isnan(nx.to_numpy_array(graph, nonedge=np.nan)).T
    np.fill_diagonal(matrix, False)
    return matrix


def _fully_connected(n_agents: int) -> nx.Graph:
    return nx.complete_graph(n_agents)


def _ring(n_agents: int) -> nx.Graph:
    # networkx gives a cycle of one node a self-loop, which `from_graph` drops.
    return nx.cycle_graph(n_agents)


def _disconnected(n_agents: int) -> nx.Graph:
    return nx.empty_graph(n_agents)


def _named(build: Callable[[int], nx.Graph]) -> Callable[[int], Adjacency]:
    def topology(n_agents: int) -> Adjacency:
        if n_agents < 1:
            raise TopologyError(f"expected at least 1 agent, got {n_agents}")
        return from_graph(build(n_agents))

    return topology


TOPOLOGIES: dict[str, Callable[[int], Adjacency]] = {
    "fully_connected": _named(_fully_connected),
    "ring": _named(_ring),
    "disconnected": _named(_disconnected),
}


def components(adjacency: Adjacency) -> list[list[int]]:
    """The (weakly) connected components, each sorted, in the order of their least."""
    graph = nx.from_numpy_array(adjacency | adjacency.T)
    return sorted(sorted(component) for component in nx.connected_components(graph))


def is_connected(adjacency: Adjacency) -> bool:
    """Whether information from every agent can reach every other."""
    return nx.is_strongly_connected(
        nx.from_numpy_array(adjacency.T, create_using=nx.DiGraph)
    )
