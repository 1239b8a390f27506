"""Agents as plain NumPy loops: what a step sees, and agents that train alone.

These loops are a second implementation of the algorithms. They are written from the
papers, without JAX and without the package. Everything is float64, an agent's params
are one vector, and agents meet only through `Now`: what an agent computes with is its
own, or it comes from `Now.senders`.

An algorithm is a class with a `step`, which every present agent takes at the same time,
and perhaps a `communicate`, which comes once before the steps of each round. Absent
agents are in no loop, so they keep everything they have.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tests.reference.optimizers import Sgd


class Now(NamedTuple):
    """The network and the examples of one local step, or of one communication.

    Attributes:
        W: the mixing matrix. Agent i gives W[i, j] to what it gets from agent j.
        arrives: `arrives[i, j]` says whether agent j's message reaches agent i.
        present: whether each agent is present.
        gradient: `gradient(i, x)` is the gradient at x of agent i's loss on its
            examples of this step.
        has_examples: whether each agent has any examples in this step.
        rate: the learning rate.
    """

    W: np.ndarray
    arrives: np.ndarray
    present: np.ndarray
    gradient: Callable[[int, np.ndarray], np.ndarray] = lambda i, x: np.zeros_like(x)
    has_examples: Any = ()
    rate: float = 0.0

    @property
    def agents(self) -> list[int]:
        """The agents that are present."""
        return [i for i in range(len(self.present)) if self.present[i]]

    def trains(self, i: int) -> bool:
        """Whether an agent is present and has examples."""
        return bool(self.present[i] and self.has_examples[i])

    def senders(self, i: int) -> list[int]:
        """The agents whose messages reach agent i."""
        return [j for j in range(len(self.W)) if self.arrives[i, j] and j != i]

    def average(self, i: int, sent):
        """Agent i's weighted sum of what it has and of what it gets."""
        return self.W[i, i] * sent[i] + sum(
            self.W[i, j] * sent[j] for j in self.senders(i)
        )


class Alone:
    """Agents that train alone. All other algorithms are built on this one.

    Args:
        x: the params of each agent at the start, `[agents, dim]`.
        optimizer: makes an agent's optimizer.

    Attributes:
        optimizer: the class of the optimizers that the algorithm has by default.
        x: {agent: params}
        optimizers: {agent: optimizer}
    """

    optimizer: type[Sgd] = Sgd
    # Whether the first step of a round is computed before agents communicate, by
    # `ahead`, and taken after that, by `communicate`.
    looks_ahead = False

    def __init__(self, x, optimizer=None):
        self.new_optimizer = optimizer or self.optimizer
        self.x: dict[int, Any] = {
            i: np.array(row, np.float64) for i, row in enumerate(x)
        }
        self.optimizers = {i: self.new_optimizer() for i in self.x}
        for i in self.x:
            self.restart(i)

    def restart(self, i: int) -> None:
        """Makes what an agent remembers start anew, at the start and after a merge."""

    def result(self, i: int) -> np.ndarray:
        """The params of an agent that are evaluated and merged."""
        return self.x[i]

    def gradient(self, now: Now, i: int, x=None) -> np.ndarray:
        """An agent's gradient at its own params or at x; 0 without examples."""
        x = self.x[i] if x is None else x
        return now.gradient(i, x) if now.trains(i) else np.zeros_like(x)

    def update(self, now: Now, i: int, direction: np.ndarray) -> np.ndarray:
        """An optimizer's step along a direction; 0 for an agent without examples."""
        if not now.trains(i):
            return np.zeros_like(direction)
        return self.optimizers[i].step(direction, now.rate)

    def step(self, now: Now) -> None:
        for i in now.agents:
            self.x[i] = self.x[i] + self.update(now, i, self.gradient(now, i))

    def ahead(self, now: Now) -> None:
        """Computes a step that `communicate` is to take."""
        raise NotImplementedError

    def communicate(self, now: Now) -> None:
        """What agents do once a round, before its steps."""


def path(agents: Alone, gradient, W, rates, present=None) -> np.ndarray:
    """Runs an algorithm that has only steps, with the same examples at every step.

    Args:
        agents: the algorithm at its start.
        gradient: `gradient(i, x)` is agent i's gradient at x.
        W: the mixing matrix of each step. A message arrives if it has a weight.
        rates: the learning rate of each step, or one for all.
        present: for each step which agents are present; None if all are.

    Returns:
        the agents' params at the start and after each step, `[steps + 1, agents, dim]`.
    """
    n_agents, result = len(agents.x), []
    everyone = np.ones(n_agents, bool)
    for t, rate in enumerate(np.broadcast_to(rates, len(W))):
        result.append([agents.result(i) for i in agents.x])
        takes_part = everyone if present is None else np.asarray(present[t])
        arrives = (W[t] != 0) & ~np.eye(n_agents, dtype=bool)
        agents.step(Now(W[t], arrives, takes_part, gradient, everyone, rate))
    return np.array([*result, [agents.result(i) for i in agents.x]])
