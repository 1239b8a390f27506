"""Questions about graphs that are adjacency matrices: parts, trees, directions."""

import numpy as np
from jaxtyping import Bool

__all__ = [
    "Adjacency",
    "Schedule",
    "Tree",
    "components",
    "is_connected",
    "is_undirected",
    "schedule",
    "spanning_trees",
    "union",
]

Adjacency = Bool[np.ndarray, "agents agents"]
Schedule = Bool[np.ndarray, "period agents agents"]
Tree = list[tuple[int, int]]
"""The edges (parent, child) of a tree."""


def schedule(adjacency: np.ndarray) -> np.ndarray:
    """Makes a stack `[period, agents, agents]`; a single matrix has the period 1."""
    return adjacency if adjacency.ndim == 3 else adjacency[None]


def union(adjacency: Adjacency | Schedule) -> Adjacency:
    """Returns all edges that exist at any time."""
    return np.asarray(schedule(adjacency).any(axis=0))


def components(adjacency: Adjacency | Schedule) -> list[list[int]]:
    """Returns the (weakly) connected components.

    Each component is a sorted list of agents. The components are sorted by their lowest
    agent.
    """
    return [
        sorted([root, *(child for _, child in tree)])
        for root, tree in spanning_trees(adjacency).items()
    ]


def spanning_trees(adjacency: Adjacency | Schedule) -> dict[int, Tree]:
    """Returns a tree in each (weakly) connected component, breadth first, by its root.

    The root is the component's lowest agent. Parents come before their children, and
    the children of an agent are sorted.
    """
    edges = union(adjacency)
    linked, unseen = edges | edges.T, np.ones(len(edges), bool)
    # Each tree removes its agents from `unseen`.
    return {
        root: _breadth_first(linked, root, unseen)
        for root in range(len(edges))
        if unseen[root]
    }


def _breadth_first(linked: Adjacency, root: int, unseen: np.ndarray) -> Tree:
    """Finds a tree of the unseen agents that a root is linked with, and marks them."""
    # A graph object with millions of edges would take gigabytes. A row of the matrix is
    # read at once, so that this takes milliseconds.
    unseen[root] = False
    queue, tree = [root], []
    for parent in queue:
        children = np.flatnonzero(linked[parent] & unseen).tolist()
        unseen[children] = False
        queue += children
        tree += [(parent, child) for child in children]
    return tree


def is_connected(adjacency: Adjacency | Schedule) -> bool:
    """Whether information from every agent reaches every other agent at some time."""
    edges = union(adjacency)
    others = len(edges) - 1
    return all(
        len(_breadth_first(direction, 0, np.ones(len(edges), bool))) == others
        for direction in (edges, edges.T)
    )


def is_undirected(adjacency: Adjacency | Schedule) -> bool:
    """Whether every edge exists in both directions, at all times."""
    return bool((adjacency == np.swapaxes(adjacency, -1, -2)).all())
