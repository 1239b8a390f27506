"""What algorithms ask of a network. A check raises NetworkError, and says why."""

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
    "two_way",
    "undirected",
]

Condition = Callable[[str, Links], None]
"""`check(algorithm's name, links)`."""


def anything(name: str, links: Links) -> None:
    """No condition."""


def connected(name: str, links: Links) -> None:
    """Everyone hears of everyone in time. (Nobody hearing of anybody is a control.)"""
    if links.edges.any() and not is_connected(links.edges):
        raise NetworkError(
            f"{name} needs a connected network, in which everyone hears of everyone "
            "in time"
        )


def balanced(name: str, links: Links) -> None:
    """W is doubly stochastic at all times, so that the mean over agents stays."""
    connected(name, links)
    if not links.doubly_stochastic:
        raise NetworkError(
            f"{name} needs a mixing matrix whose rows and columns sum to 1, at all "
            "times: uniform or metropolis_hastings weights on an undirected graph. "
            "On other graphs, and where links of a directed one fail, sgp with "
            "column_stochastic weights is right"
        )


def pushing(name: str, links: Links) -> None:
    """W is column-stochastic at all times: what is pushed is conserved."""
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
            f"{name} needs agents that keep a part of what they have, but W[{agent}, "
            f"{agent}] is {own[:, agent].min():g}"
        )


def averaging(name: str, links: Links) -> None:
    """Whatever an agent receives has an average: its weights sum to more than 0."""
    received = links.mixing_matrix.sum(axis=-1)
    if (received <= 0).any():
        agent = int(np.argmax((received <= 0).any(axis=0)))
        raise NetworkError(
            f"{name} averages what an agent receives, but the weights of agent {agent} "
            f"sum to {received[:, agent].min():g}"
        )


def no_negative_weights(name: str, links: Links) -> None:
    """An average of what is not negative is not, either."""
    if (links.mixing_matrix < 0).any():
        raise NetworkError(
            f"{name} needs a mixing matrix without negative weights (fastest weights "
            "have some, on graphs like a star): averages of variances would not all "
            "be positive"
        )


def undirected(name: str, links: Links) -> None:
    """`balanced`, and `two_way`."""
    balanced(name, links)
    two_way(name, links)


def two_way(name: str, links: Links) -> None:
    """Whoever hears an agent can answer it."""
    if not is_undirected(links.adjacency):
        raise NetworkError(
            f"{name} needs an undirected network: who receives has to answer"
        )


def symmetric(name: str, links: Links) -> None:
    """`undirected`, and both ends of a link weigh it alike."""
    undirected(name, links)
    W = links.mixing_matrix
    if not np.allclose(W, np.swapaxes(W, -1, -2)):
        raise NetworkError(f"{name} needs a symmetric mixing matrix")
