"""A network with one hidden layer: its loss, and the matching of its hidden units.

There are so few hidden units that the best permutation is found by trying all of them.
"""

import itertools
from collections.abc import Callable

import numpy as np

# The best permutation must beat the others by this much, so that float32 and float64
# agree on which one it is.
_MARGIN = 1e-5


class Model:
    """A network with ReLUs, whose params are one vector.

    The vector holds, one after the other, the head's bias `[classes]` and kernel
    `[units, classes]`, and the hidden layer's bias `[units]` and kernel
    `[inputs, units]`.

    Args:
        inputs: the number of inputs.
        units: the number of hidden units.
        classes: the number of classes.
        seen: `seen(i)` are the inputs on which agent i compares units,
            `[examples, inputs]`. None: units are compared by their weights.
    """

    def __init__(
        self,
        inputs: int,
        units: int,
        classes: int,
        seen: Callable[[int], np.ndarray] | None = None,
    ):
        self.shapes = (classes,), (units, classes), (units,), (inputs, units)
        self.seen = seen
        self.perms = [np.array(p) for p in itertools.permutations(range(units))]

    def split(self, x) -> list[np.ndarray]:
        ends = np.cumsum([np.prod(shape) for shape in self.shapes])[:-1]
        parts = np.split(x, ends)
        return [p.reshape(s) for p, s in zip(parts, self.shapes, strict=True)]

    def permute(self, perm, x) -> np.ndarray:
        """Moves unit perm[u] to place u; the function of the network is the same."""
        b2, W2, b1, W1 = self.split(x)
        parts = b2, W2[perm], b1[perm], W1[:, perm]
        return np.concatenate([part.ravel() for part in parts])

    # Training -------------------------------------------------------------------------

    def hidden(self, x, inputs) -> np.ndarray:
        _, _, b1, W1 = self.split(x)
        return np.maximum(inputs @ W1 + b1, 0)

    def gradient(self, x, inputs, labels, weights) -> np.ndarray:
        """The gradient of the cross-entropy; `weights` are those of the examples."""
        b2, W2, _, _ = self.split(x)
        hidden = self.hidden(x, inputs)
        logits = hidden @ W2 + b2
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        by_logit = weights[:, None] * (shares - np.eye(len(b2))[labels])
        by_unit = (by_logit @ W2.T) * (hidden > 0)
        parts = by_logit.sum(0), hidden.T @ by_logit, by_unit.sum(0), inputs.T @ by_unit
        return np.concatenate([part.ravel() for part in parts])

    # Matching -------------------------------------------------------------------------

    def scores(self, known, i: int, j: int) -> np.ndarray:
        """How well agent j's unit v fits agent i's unit u: `[units, units]`."""
        if self.seen is None:
            _, W2, b1, W1 = self.split(known[i])
            _, V2, c1, V1 = self.split(known[j])
            return W1.T @ V1 + np.outer(b1, c1) + W2 @ V2.T
        a, b = (self.hidden(known[k], self.seen(i)) for k in (i, j))
        a, b = a - a.mean(axis=0), b - b.mean(axis=0)
        return (a.T @ b) / np.outer(
            np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=0)
        )

    def totals(self, scores) -> np.ndarray:
        """The total score of each permutation, in the order of `perms`."""
        places = np.arange(len(scores))
        return np.array([scores[places, perm].sum() for perm in self.perms])

    def best(self, scores) -> np.ndarray:
        """The permutation with the largest total score."""
        totals = self.totals(scores)
        _check_margin(totals)
        return self.perms[int(np.argmax(totals))]

    def together(self, known, pairs) -> dict[int, np.ndarray]:
        """Q_i for each agent, so that all P_ij = Q_i^-1 Q_j have the largest total.

        One agent of each part of the network that is connected has the identity. All
        other combinations of permutations are tried.
        """
        result = {}
        for agents in components(pairs):
            inside = [(i, j) for i, j in pairs if i in agents]
            axis = {agent: place for place, agent in enumerate(agents[1:])}
            # Entry [p, q, ...] is the total for permutations p, q, ... of the others.
            total = np.zeros((len(self.perms),) * len(axis))
            for i, j in inside:
                table = self._table(self.scores(known, i, j))
                for agent, place in ((i, 0), (j, 1)):
                    if agent == agents[0]:  # it has the identity, the first permutation
                        table = np.take(table, [0], axis=place)
                shape = [1] * len(axis)
                for agent in (i, j):
                    if agent in axis:
                        shape[axis[agent]] = len(self.perms)
                if axis.get(i, -1) > axis.get(j, -1):
                    table = table.T
                total = total + table.reshape(shape)
            _check_margin(total.ravel())
            best = np.unravel_index(int(np.argmax(total)), total.shape)
            result[agents[0]] = self.perms[0]
            result |= {agent: self.perms[best[axis[agent]]] for agent in axis}
        return result

    def _table(self, scores) -> np.ndarray:
        """The total score of P_ij = Q_i^-1 Q_j for all Q_i and Q_j."""
        return np.array(
            [
                [scores[q_i, q_j].sum() for q_j in self.perms]
                # Unit q_i[u] of agent i and unit q_j[u] of agent j are in one place.
                for q_i in self.perms
            ]
        )

    def along_a_tree(self, known, pairs) -> dict[int, np.ndarray]:
        """The permutation of each agent into the frame of its root, breadth first."""
        result = {}
        for agents in components(pairs):
            root = agents[0]
            result[root], queue = self.perms[0], [root]
            for parent in queue:
                for child in agents:
                    if (parent, child) in pairs and child not in result:
                        onto_parent = self.best(self.scores(known, parent, child))
                        result[child] = onto_parent[result[parent]]
                        queue.append(child)
        return result


def components(pairs) -> list[list[int]]:
    """The parts of a network that are connected, each sorted."""
    parts: list[set[int]] = []
    for pair in pairs:
        touched = [part for part in parts if part & set(pair)]
        parts = [part for part in parts if not part & set(pair)]
        parts.append(set(pair).union(*touched))
    return sorted(sorted(part) for part in parts)


def _check_margin(totals) -> None:
    first, second = np.sort(totals)[::-1][:2]
    assert first - second > _MARGIN, "the best permutation is not clear"
