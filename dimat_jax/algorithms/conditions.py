"""The conditions under which an algorithm can use a network.

Each function checks one condition. It raises a NetworkError that says what is needed.
"""

from collections.abc import Callable

import numpy as np

from dimat_jax.network import Links, NetworkError
from dimat_jax.topology import is_connected, is_undirected

__all__ = [
    "Condition",
    "anything",
    "averaging",
    "balanced",
    "connected",
    "no_negative_weights",
    "pushing",
    "symmetric",
    "tree",
    "two_way",
    "undirected",
]

Condition = Callable[[str, Links], None]
"""A function `check(name, links)`; `name` is the algorithm's name for the message."""


def anything(name: str, links: Links) -> None:
    """Every network is allowed."""


def connected(name: str, links: Links) -> None:
    """Information from every agent reaches every other agent at some time.

    A network without any edge is allowed too: it serves as a control.
    """
    if links.edges.any() and not is_connected(links.edges):
        raise NetworkError(
            f"{name} needs a connected network, in which information from every agent "
            "reaches every other agent at some time"
        )


def balanced(name: str, links: Links) -> None:
    """W is doubly stochastic at all times, so that mixing preserves the mean."""
    connected(name, links)
    if not links.doubly_stochastic:
        raise NetworkError(
            f"{name} needs a mixing matrix whose rows and columns sum to 1, at all "
            "times: uniform or metropolis_hastings weights on an undirected graph. "
            "On other graphs, and where links of a directed one fail, sgp with "
            "column_stochastic weights is right"
        )


def pushing(name: str, links: Links) -> None:
    """W is column-stochastic at all times, so that mixing preserves the sum."""
    connected(name, links)
    if not links.column_stochastic or (links.mixing_matrix < 0).any():
        raise NetworkError(
            f"{name} needs a mixing matrix without negative weights whose columns sum "
            "to 1, e.g. column_stochastic weights"
        )
    own = np.diagonal(links.mixing_matrix, axis1=-2, axis2=-1)
    if (own <= 0).any():
        agent = int(np.argmax((own <= 0).any(axis=0)))
        raise NetworkError(
            f"{name} needs every agent to have a weight for itself, but W[{agent}, "
            f"{agent}] is {own[:, agent].min():g}"
        )


def averaging(name: str, links: Links) -> None:
    """The weights of every receiver sum to more than 0, so that it has an average."""
    received = links.mixing_matrix.sum(axis=-1)
    if (received <= 0).any():
        agent = int(np.argmax((received <= 0).any(axis=0)))
        raise NetworkError(
            f"{name} averages what an agent receives, but the weights of agent {agent} "
            f"sum to {received[:, agent].min():g}"
        )


def no_negative_weights(name: str, links: Links) -> None:
    """No weight is negative, so that averages of variances are not negative either."""
    if (links.mixing_matrix < 0).any():
        raise NetworkError(
            f"{name} needs a mixing matrix without negative weights (fastest weights "
            "have some, on graphs like a star): averages of variances would not all "
            "be positive"
        )


def undirected(name: str, links: Links) -> None:
    """W is doubly stochastic, and every edge goes both ways (`balanced`, `two_way`)."""
    balanced(name, links)
    two_way(name, links)


def two_way(name: str, links: Links) -> None:
    """Every edge goes both ways, so that a receiver can answer its sender."""
    if not is_undirected(links.adjacency):
        raise NetworkError(
            f"{name} needs an undirected network: every receiver must be able to "
            "answer its sender"
        )


def tree(name: str, links: Links) -> None:
    """The graph is a tree: there is exactly one way from an agent to another one.

    W does not matter. A network without any edge is allowed too, as a control.
    """
    connected(name, links)
    two_way(name, links)
    n_links = np.count_nonzero(links.edges) // 2
    if n_links and n_links != len(links.edges) - 1:
        raise NetworkError(
            f"{name} needs a tree: path, star, binary_tree, or another connected graph "
            f"with one link less than agents. This one has {n_links} links between "
            f"{len(links.edges)} agents"
        )


def symmetric(name: str, links: Links) -> None:
    """W is symmetric: both ends of a link have the same weight (and `undirected`)."""
    undirected(name, links)
    W = links.mixing_matrix
    if not np.allclose(W, np.swapaxes(W, -1, -2)):
        raise NetworkError(f"{name} needs a symmetric mixing matrix")
