"""One merge round as plain loops over agents, edges, groups and leaves, in NumPy.

The loops are written from the equations (DIMAT, arXiv 2404.08079, section 3), as simply
as possible and without regard to speed. Agents are a list of dicts {leaf path: array}.
Everything is float64.
"""

import networkx as nx
import numpy as np
from scipy.optimize import linear_sum_assignment


def permute(axes, perms, leaf):
    """Permutes one array. Its axes are group names or None."""
    for dimension, group in enumerate(axes):
        if group is not None:
            leaf = np.take(leaf, perms[group], axis=dimension)
    return leaf


def permute_all(spec, perms, agent):
    """Permutes one agent's leaves."""
    return {path: permute(spec.axes[path], perms, leaf) for path, leaf in agent.items()}


def activation_scores(spec, reference, permutee, stay=0.0):
    """Computes the correlations of each group's units, averaged over the group's taps.

    `reference` and `permutee` are {tap: activations[..., units]} on the same examples.
    """
    result = {}
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
        result[group] = np.mean(scores, axis=0) + stay * np.eye(len(scores[0]))
    return result


def weight_scores(spec, reference, permutee, perms, group, matched, stay=0.0):
    """The score of matching each two units of a group, the others matched by `perms`.

    A leaf counts if its other groups are matched, and if it is no running statistic.
    """
    rows = []
    for path, axes in spec.axes.items():
        others = [g for g in axes if g not in (None, group)]
        if group in axes and matched.issuperset(others) and "batch_stats" not in path:
            only_others = [None if g == group else g for g in axes]
            moved = permute(only_others, perms, permutee[path].astype(np.float64))
            rows.append(
                [
                    np.moveaxis(leaf, axes.index(group), 0).reshape(
                        len(perms[group]), -1
                    )
                    for leaf in (reference[path].astype(np.float64), moved)
                ]
            )
    a, b = (np.concatenate([pair[side] for pair in rows], axis=1) for side in (0, 1))
    scale = np.linalg.norm(a) * np.linalg.norm(b) / len(a)
    return a @ b.T + stay * scale * np.eye(len(a))


def weight_norm(spec, agent):
    """The norm of all weights that count for the scores."""
    return np.sqrt(
        sum((agent[path] ** 2).sum() for path in spec.axes if "batch_stats" not in path)
    )


def alone(scores):
    """{edge: scores} -> {edge: perm}: the best assignment for every edge alone."""
    return {
        edge: linear_sum_assignment(score, maximize=True)[1]
        for edge, score in scores.items()
    }


def together(scores):
    """{edge: scores} -> {edge: perm}: P_ij = Q_i^T Q_j, with permutation matrices Q_i.

    The Q_i start from a breadth-first tree and are then improved agent by agent, which
    is possible because <C_ij, Q_i^T Q_j> is linear in Q_i.
    """
    graph = nx.Graph(list(scores))
    Q = {}
    agents = sorted(graph)
    for parent, child in [(None, agents[0]), *nx.bfs_edges(graph, agents[0])]:
        if parent is None:
            Q[child] = np.eye(len(next(iter(scores.values()))))
            continue
        places = np.zeros_like(Q[parent])
        if (parent, child) in scores:
            places += Q[parent] @ scores[parent, child]
        if (child, parent) in scores:
            places += Q[parent] @ scores[child, parent].T
        Q[child] = np.eye(len(places))[linear_sum_assignment(places, maximize=True)[1]]
    for _ in range(10):
        for i in agents:
            places = np.zeros_like(Q[i])
            for (a, b), score in scores.items():
                if i in (a, b):
                    places += Q[b] @ score.T if a == i else Q[a] @ score
            Q[i] = np.eye(len(places))[linear_sum_assignment(places, maximize=True)[1]]
    return {(i, j): (Q[i].T @ Q[j]).argmax(axis=1) for i, j in scores}


def match_activations(spec, edges, observe, solve=alone, stay=0.0):
    """{edge: perms}. `observe(i, j)` is j's activations on i's examples."""
    scores = {
        (i, j): activation_scores(spec, observe(i, i), observe(i, j), stay)
        for i, j in edges
    }
    solved = {g: solve({e: scores[e][g] for e in edges}) for g in spec.groups}
    return {e: {g: solved[g][e] for g in spec.groups} for e in edges}


def match_weights(spec, edges, agents, solve=alone, stay=0.0):
    """{edge: perms}: one pass over the groups in their order, followed by sweeps."""
    sizes = {g: agents[0][m[0][0]].shape[m[0][1]] for g, m in spec.groups.items()}
    perms = {e: {g: np.arange(n) for g, n in sizes.items()} for e in edges}
    norms = [weight_norm(spec, agent) for agent in agents]
    matched = set()
    for _ in range(10):
        for group in spec.groups:
            scores = {
                (i, j): weight_scores(
                    spec, agents[i], agents[j], perms[i, j], group, matched, stay
                )
                / (norms[i] * norms[j])
                for i, j in edges
            }
            for edge, perm in solve(scores).items():
                perms[edge][group] = perm
            matched.add(group)
    return perms


def both_ways(perms):
    """Adds the inverted permutations for the opposite edges."""
    return perms | {
        (j, i): {g: np.argsort(perm) for g, perm in of_edge.items()}
        for (i, j), of_edge in perms.items()
    }


def merge_own_frame(spec, W, agents, perms):
    """x_i <- sum_j W_ij P_ij x_j."""
    merged = []
    for i, own in enumerate(agents):
        total = {path: W[i, i] * leaf.astype(np.float64) for path, leaf in own.items()}
        for j, other in enumerate(agents):
            if i == j or W[i, j] == 0:
                continue
            for path, leaf in permute_all(spec, perms[i, j], other).items():
                total[path] += W[i, j] * leaf
        merged.append(total)
    return merged


def merge_reference_frame(spec, W, agents, perms):
    """x_i <- sum_j W_ij P_j x_j, P_j along a breadth-first tree from agent 0."""
    graph = nx.from_numpy_array((W != 0) & ~np.eye(len(W), dtype=bool))
    in_root_frame = {0: agents[0]}
    to_root: dict = {0: None}
    for parent, child in nx.bfs_edges(graph, 0, sort_neighbors=sorted):
        to_parent = perms[parent, child]
        moved = permute_all(spec, to_parent, agents[child])
        ancestors = to_root[parent]
        if ancestors is None:
            to_root[child] = to_parent
        else:
            moved = permute_all(spec, ancestors, moved)
            to_root[child] = {g: to_parent[g][ancestors[g]] for g in to_parent}
        in_root_frame[child] = moved
    return [
        {
            path: sum(W[i, j] * in_root_frame[j][path] for j in range(len(agents)))
            for path in agents[0]
        }
        for i in range(len(agents))
    ]


def recalibrate(statistics, counts):
    """Averages the statistics of batches, weighted by their numbers of examples."""
    return {
        path: sum(n * batch[path] for n, batch in zip(counts, statistics, strict=True))
        / sum(counts)
        for path in statistics[0]
    }
