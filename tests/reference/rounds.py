"""Algorithms in which agents meet once a round: federated averaging, and merging."""

import functools
from collections.abc import Callable

import numpy as np

from tests.reference.agents import Alone, Now
from tests.reference.matching import Model
from tests.reference.messages import none
from tests.reference.optimizers import Adam


class Centralized(Alone):
    """One agent has all data."""

    optimizer = Adam


class Local(Alone):
    optimizer = Adam


class FedAvg(Alone):
    """McMahan et al. 2017, Algorithm 1, with the present agents as the clients.

    Args:
        examples: n_k, the number of each agent's examples; None if all are equal.
    """

    def __init__(self, x, optimizer=None, examples=None):
        super().__init__(x, optimizer)
        self.examples = np.ones(len(x)) if examples is None else examples
        # The number of the last average that each agent has got. An agent that was
        # away while others got a later one gets the next average, but its params are
        # not in it.
        self.number = dict.fromkeys(self.x, 0)

    def communicate(self, now: Now) -> None:
        latest = max((self.number[i] for i in now.agents), default=0)
        clients = [i for i in now.agents if self.number[i] == latest]
        n = sum(self.examples[k] for k in clients)
        average = sum(self.examples[k] / n * self.x[k] for k in clients)
        self.x.update(dict.fromkeys(now.agents, average))
        self.number.update(dict.fromkeys(now.agents, latest + 1))


class Merging(Alone):
    """DIMAT (arXiv 2404.08079), equation 4: x_i <- sum_j W_ij P_ij x_j, once a round.

    The weights of a receiver are scaled to the sum 1. With `compress` agents average
    the others' estimates x^_j <- x^_j + Q(x_j - x^_j) and their own exact params.

    Args:
        inner: what agents run between merges.
        opt_state: whether an optimizer's state is "reset" at a merge, is left as it is
            ("keep"), or is permuted and averaged like the params ("merge").
        model: tells how units are compared and permuted; None if there are no units.
        frame: "own": agent i permutes each neighbour onto itself. "joint": the same,
            but permutations agree on all cycles. "reference": along a tree, all agents
            move into the frame of the lowest one, and stay there.
        compress: the compressor of one array.
        before_merge: whether the step after a merge is computed before it, as in
            Algorithm 1 as printed: x_i <- sum_j W_ij P_ij x_j + u_i(x_i).
    """

    def __init__(
        self,
        x,
        optimizer=None,
        *,
        inner: Callable[..., Alone] = Local,
        opt_state: str = "reset",
        model: Model | None = None,
        frame: str = "own",
        compress=none,
        before_merge: bool = False,
    ):
        self.inner = inner(x, optimizer)
        self.opt_state, self.model, self.frame = opt_state, model, frame
        self.compress = compress
        super().__init__(x)
        # What the others know of each agent: at the start everything.
        self.known = dict(self.x)
        self.looks_ahead, self.waiting = before_merge, {}

    def result(self, i: int) -> np.ndarray:
        return self.inner.result(i)

    def step(self, now: Now) -> None:
        self.inner.step(now)

    def ahead(self, now: Now) -> None:
        for i in now.agents:
            gradient = self.inner.gradient(now, i)
            self.waiting[i] = self.inner.update(now, i, gradient)

    def communicate(self, now: Now) -> None:
        self.inner.communicate(now)
        self._announce(now)
        perms = self._match(now)
        mixed = {i: self._merged(now, i, perms) for i in now.agents}
        averages = {i: self._merged_state(now, i, perms) for i in now.agents}
        for i in now.agents:
            self.inner.x[i] = mixed[i] + self.waiting.pop(i, 0)
            self.inner.restart(i)
            if self.opt_state == "reset":
                self.inner.optimizers[i] = self.inner.new_optimizer()
            elif self.opt_state == "merge":
                self.inner.optimizers[i].receive(averages[i])

    def _announce(self, now: Now) -> None:
        """Each agent sends what the others do not know of it yet, array by array."""
        for i in now.agents:
            missing = self.result(i) - self.known[i]
            parts = self.model.split(missing) if self.model else [missing]
            sent = [self.compress(part).ravel() for part in parts]
            self.known[i] = self.known[i] + np.concatenate(sent)
            if self.compress is none:
                self.known[i] = self.result(i)

    def _match(self, now: Now):
        """{(receiver, sender): permutation} for every message that arrives."""
        pairs = [(i, j) for i in now.agents for j in now.senders(i)]
        if self.model is None or not pairs:
            return {}
        model, known = self.model, self.known
        if self.frame == "own":
            return {(i, j): model.best(model.scores(known, i, j)) for i, j in pairs}
        if self.frame == "joint":
            to_root = model.together(known, pairs)
            return {(i, j): to_root[j][np.argsort(to_root[i])] for i, j in pairs}
        self._move(model.along_a_tree(known, pairs))
        return {}

    def _move(self, to_root) -> None:
        """Permutes everything that an agent has, into the frame of its root."""
        assert self.model is not None
        for i, perm in to_root.items():
            move = functools.partial(self.model.permute, perm)
            self.known[i], self.inner.x[i] = move(self.known[i]), move(self.inner.x[i])
            self.inner.optimizers[i].align(move)
            if i in self.waiting:
                self.waiting[i] = move(self.waiting[i])

    def _merged(self, now: Now, i: int, perms) -> np.ndarray:
        weights = now.W[i] / now.W[i].sum()
        return weights[i] * self.result(i) + sum(
            weights[j] * self._aligned(perms, i, j, self.known[j])
            for j in now.senders(i)
        )

    def _merged_state(self, now: Now, i: int, perms) -> dict:
        """The average of the optimizers' states, aligned like the params."""
        weights, average = now.W[i] / now.W[i].sum(), {}
        for j in [i, *now.senders(i)]:
            for name, part in self.inner.optimizers[j].sent().items():
                moved = self._aligned(perms, i, j, part)
                average[name] = average.get(name, 0.0) + weights[j] * moved
        return average

    def _aligned(self, perms, i: int, j: int, part):
        if (i, j) not in perms or np.ndim(part) == 0:
            return part
        assert self.model is not None
        return self.model.permute(perms[i, j], part)
