"""One merge round as plain loops over agents, edges, groups and leaves, in NumPy.

Written from the equations (DIMAT, arXiv 2404.08079, section 3), for agents that are a
list of dicts {leaf path: array}; as slow and as obvious as can be. Float64.
"""

import networkx as nx
import numpy as np
from scipy.optimize import linear_sum_assignment


def permute(axes, perms, leaf):
    """Permutes one array; plain group names are all that these networks need."""
    for dimension, group in enumerate(axes):
        if group is not None:
            leaf = np.take(leaf, perms[group], axis=dimension)
    return leaf


def permute_all(spec, perms, agent):
    """Permutes one agent's leaves."""
    return {path: permute(spec.axes[path], perms, leaf) for path, leaf in agent.items()}


def match(spec, reference, permutee, stay):
    """Assigns units by their correlation, averaged over a group's taps.

    `reference` and `permutee` are {tap: activations[..., units]} on the same examples.
    """
    perms = {}
    for group in spec.groups:
        scores = []
        for tap in spec.taps_of(group):
            a = reference[tap].reshape(-1, reference[tap].shape[-1]).astype(np.float64)
            b = permutee[tap].reshape(-1, permutee[tap].shape[-1]).astype(np.float64)
            a, b = a - a.mean(axis=0), b - b.mean(axis=0)
            norms = np.outer(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=0))
            products = a.T @ b
            scores.append(
                np.divide(products, norms, np.zeros_like(norms), where=norms > 0)
            )
        score = np.mean(scores, axis=0) + stay * np.eye(len(scores[0]))
        perms[group] = linear_sum_assignment(score, maximize=True)[1]
    return perms


def merge_own_frame(spec, W, agents, watch, stay=0.0):
    """x_i <- sum_j W_ij P_ij x_j. `watch(i, j)` is j's activations on i's examples."""
    merged = []
    for i, own in enumerate(agents):
        total = {path: W[i, i] * leaf.astype(np.float64) for path, leaf in own.items()}
        for j, other in enumerate(agents):
            if i == j or W[i, j] == 0:
                continue
            perms = match(spec, watch(i, i), watch(i, j), stay)
            for path, leaf in permute_all(spec, perms, other).items():
                total[path] += W[i, j] * leaf
        merged.append(total)
    return merged


def merge_reference_frame(spec, W, agents, watch, stay=0.0):
    """x_i <- sum_j W_ij P_j x_j, P_j along a breadth-first tree from agent 0."""
    graph = nx.from_numpy_array((W != 0) & ~np.eye(len(W), dtype=bool))
    in_root_frame = {0: agents[0]}
    to_root: dict = {0: None}
    for parent, child in nx.bfs_edges(graph, 0, sort_neighbors=sorted):
        perms = match(spec, watch(parent, parent), watch(parent, child), stay)
        moved = permute_all(spec, perms, agents[child])
        ancestors = to_root[parent]
        if ancestors is None:
            to_root[child] = perms
        else:
            moved = permute_all(spec, ancestors, moved)
            to_root[child] = {g: perms[g][ancestors[g]] for g in perms}
        in_root_frame[child] = moved
    return [
        {
            path: sum(W[i, j] * in_root_frame[j][path] for j in range(len(agents)))
            for path in agents[0]
        }
        for i in range(len(agents))
    ]


def recalibrate(statistics, counts):
    """The mean of the batches' statistics, weighted by how many examples they had."""
    return {
        path: sum(n * batch[path] for n, batch in zip(counts, statistics, strict=True))
        / sum(counts)
        for path in statistics[0]
    }
