"""Algorithms with a server, which meets the present agents once a round."""

from collections.abc import Callable

import numpy as np

from tests.reference.agents import Alone, Now

Server = Callable[[np.ndarray], np.ndarray]
"""`server(change)` is the server's step, given the average minus its model."""


class FedAvg(Alone):
    """McMahan et al. 2017, Algorithm 1, with the present agents as the clients.

    With a server's optimizer it is Reddi et al. 2021, Algorithm 1. Clients are the
    present agents who have trained from the server's latest model.

    Args:
        examples: n_k, the number of each agent's examples; None if all are equal.
        server: makes the server's optimizer.
        sampled: whether the server draws the agents of each round: those of the last
            round are the clients, wherever they are now.
    """

    def __init__(
        self,
        x,
        optimizer=None,
        examples=None,
        server: Callable[[], Server] = lambda: lambda change: change,
        sampled: bool = False,
    ):
        self.sampled = sampled
        super().__init__(x, optimizer)
        self.examples = np.ones(len(x)) if examples is None else examples
        self.server, self.model = server(), None
        self.fresh = set(self.x)
        # The model from which each agent trains.
        self.got = dict(self.x)

    def clients(self, now: Now) -> list[int]:
        if self.sampled and self.model is not None:
            return sorted(self.fresh)
        return [i for i in now.agents if i in self.fresh]

    def communicate(self, now: Now) -> None:
        clients = self.clients(now)
        if clients:
            n = sum(self.examples[k] for k in clients)
            shares = [self.examples[k] / n for k in clients]
            average = np.array(shares) @ np.array([self.x[k] for k in clients])
            if self.model is None:  # The server's first model is the first average.
                self.model = average
            else:
                self.model = self.model + self.server(average - self.model)
        for i in now.agents:
            self.x[i] = self.got[i] = self.model
        self.fresh = set(now.agents)


class FedProx(FedAvg):
    """Li et al. 2020, Algorithm 2, with gradient steps as the inexact solver."""

    def __init__(self, x, optimizer=None, mu=0.1, **options):
        self.mu = mu
        super().__init__(x, optimizer, **options)

    def gradient(self, now: Now, i: int, x=None) -> np.ndarray:
        return super().gradient(now, i, x) + self.mu * (self.x[i] - self.got[i])


class Scaffold(FedAvg):
    """Karimireddy et al. 2020, Algorithm 1, with option II.

    With plain SGD of one rate, the new c_i of option II is the mean of the gradients of
    the client's steps. c is the mean of the c_i of all agents.
    """

    def __init__(self, x, optimizer=None, eta=1.0, sampled=False):
        super().__init__(
            x,
            optimizer,
            server=lambda: lambda change: eta * change,
            sampled=sampled,
        )
        zero = np.zeros_like(self.x[0])
        self.control: dict[int, np.ndarray] = {i: zero for i in self.x}
        # The c that each agent has got.
        self.common = dict.fromkeys(self.x, zero)
        self.seen: dict[int, list] = {i: [] for i in self.x}

    def communicate(self, now: Now) -> None:
        for i in self.clients(now):
            if self.seen[i]:
                self.control[i] = np.mean(self.seen[i], axis=0)
        mean = np.mean([self.control[i] for i in self.x], axis=0)
        for i in [*now.agents, *self.clients(now)]:
            self.seen[i] = []
        for i in now.agents:
            self.common[i] = mean
        super().communicate(now)

    def step(self, now: Now) -> None:
        for i in now.agents:
            gradient = self.gradient(now, i)
            if now.trains(i):
                self.seen[i].append(gradient)
            corrected = gradient - self.control[i] + self.common[i]
            self.x[i] = self.x[i] + self.update(now, i, corrected)


# The server's optimizers ==============================================================


def momentum(eta: float, beta: float) -> Server:
    """FedAvgM, Hsu et al. 2019."""
    v = 0.0

    def step(change):
        nonlocal v
        v = beta * v + change
        return eta * v

    return step


def adaptive(name: str, eta: float, beta1: float, beta2: float, tau: float) -> Server:
    """Reddi et al. 2021, Algorithm 2, with v_{-1} = tau^2."""
    m, v = 0.0, tau**2

    def step(change):
        nonlocal m, v
        m = beta1 * m + (1 - beta1) * change
        if name == "adagrad":
            v = v + change**2
        elif name == "yogi":
            v = v - (1 - beta2) * change**2 * np.sign(v - change**2)
        else:
            v = beta2 * v + (1 - beta2) * change**2
        return eta * m / (np.sqrt(v) + tau)

    return step
