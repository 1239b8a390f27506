"""Mixing matrices for the agents and links that are there, from the rules' papers."""

import numpy as np


def uniform(graph):
    """1 / (largest degree + 1) for every neighbour; the rest stays."""
    return _with_rest(graph / (graph.sum(axis=1).max() + 1))


def metropolis_hastings(graph):
    """Xiao, Boyd & Kim 2007: 1 / (1 + the larger degree) for every neighbour."""
    degree = graph.sum(axis=1)
    return _with_rest(graph / (1 + np.maximum(degree[:, None], degree[None, :])))


def lazy(graph):
    """(I + W) / 2 for uniform weights W: no eigenvalue is negative."""
    return (np.eye(len(graph)) + uniform(graph)) / 2


def column_stochastic(graph):
    """Assran et al. 2019: a sender divides itself by its receivers and itself."""
    sent = graph + np.eye(len(graph))
    return sent / sent.sum(axis=0)


def _with_rest(weights):
    return weights + np.diag(1 - weights.sum(axis=1))


RULES = {
    rule.__name__: rule
    for rule in (uniform, metropolis_hastings, lazy, column_stochastic)
}


def mixing_matrix(rule: str, graph, present, arrives):
    """W for one step.

    The present agents of an undirected graph apply the rule to the graph that is left.
    Other weights whose messages do not arrive go back: in an undirected graph to both
    ends, in a directed one to the sender.

    Args:
        rule: a name in `RULES`.
        graph: `graph[i, j]` says that j sends to i.
        present: which agents are present.
        arrives: which messages arrive.
    """
    if (graph == graph.T).all():
        graph = graph & present[:, None] & present[None, :]
    W = RULES[rule](graph)
    for receiver, sender in np.argwhere(graph & ~arrives):
        W[sender, sender] += W[receiver, sender]
        W[receiver, sender] = 0
    return W
