"""Algorithms that gossip with every step, each from its paper's equations."""

import numpy as np

from tests.reference.agents import Alone, Now
from tests.reference.optimizers import Dadam, HeavyBall


class Cdsgd(Alone):
    """Jiang et al. 2017, equation 3; Lian et al. 2017, Algorithm 1."""

    def step(self, now: Now) -> None:
        steps = {i: self.update(now, i, self.gradient(now, i)) for i in now.agents}
        mixed = {i: now.average(i, self.x) for i in now.agents}
        self.x.update({i: mixed[i] + steps[i] for i in now.agents})


class AdaptThenCombine(Alone):
    """Chen & Sayed 2012."""

    def step(self, now: Now) -> None:
        super().step(now)
        self.x.update({i: now.average(i, self.x) for i in now.agents})


class Cdmsgd(Cdsgd):
    """Jiang et al. 2017, Algorithm 2."""

    optimizer = HeavyBall


class Cdadam(Cdsgd):
    """Nazari et al. 2022, Algorithm 1."""

    optimizer = Dadam


class Sgp(Alone):
    """Assran et al. 2019, Algorithm 1; Algorithm 2 with momentum."""

    def __init__(self, x, optimizer=None):
        self.w = {}
        super().__init__(x, optimizer)

    def restart(self, i: int) -> None:
        self.w[i] = 1.0

    def result(self, i: int) -> np.ndarray:
        return self.x[i] / self.w[i]

    def step(self, now: Now) -> None:
        for i in now.agents:
            gradient = self.gradient(now, i, self.result(i))
            self.x[i] = self.x[i] + self.update(now, i, gradient)
        self.x.update({i: now.average(i, self.x) for i in now.agents})
        self.w.update({i: now.average(i, self.w) for i in now.agents})


class D2(Alone):
    """Tang et al. 2018, Algorithm 1, with -u as its alpha times the gradient."""

    def __init__(self, x, optimizer=None):
        self.before = {}
        super().__init__(x, optimizer)

    def restart(self, i: int) -> None:
        self.before[i] = None

    def step(self, now: Now) -> None:
        half = {}
        for i in now.agents:
            x, u = self.x[i], self.update(now, i, self.gradient(now, i))
            half[i] = x + u
            if self.before[i] is not None:
                old_x, old_u = self.before[i]
                half[i] = 2 * x - old_x + u - old_u
            self.before[i] = x, u
        self.x.update({i: now.average(i, half) for i in now.agents})


class Dsgt(Alone):
    """Pu & Nedic 2021, equation 3, with y(-1) = g(-1) = 0.

    If one of the present agents took its last step in other company, all present agents
    restart their trackers from their gradients: otherwise the mean of the trackers
    would not be the mean of the gradients.
    """

    def __init__(self, x, optimizer=None):
        self.y, self.g = {}, {}
        # For each agent the agents that were present when it was last present.
        self.company = dict.fromkeys(range(len(x)), set(range(len(x))))
        super().__init__(x, optimizer)

    def restart(self, i: int) -> None:
        self.y[i] = self.g[i] = np.zeros_like(self.x[i])

    def communicate(self, now: Now) -> None:
        together = set(now.agents)
        if any(self.company[i] != together for i in together):
            self.y.update({i: self.g[i] for i in together})
        self.company.update(dict.fromkeys(together, together))

    def step(self, now: Now) -> None:
        received = {i: now.average(i, self.y) for i in now.agents}
        for i in now.agents:
            gradient = self.gradient(now, i)
            self.y[i] = received[i] + gradient - self.g[i]
            self.g[i] = gradient
            # An agent without examples follows its tracker too.
            self.x[i] = self.x[i] + self.optimizers[i].step(self.y[i], now.rate)
        self.x.update({i: now.average(i, self.x) for i in now.agents})


class Qgm(Alone):
    """Lin et al. 2021, Algorithm 1 (QG-DSGDm), with mu = beta."""

    def __init__(self, x, optimizer=None, beta=0.9):
        self.beta, self.m = beta, {}
        super().__init__(x, optimizer)

    def restart(self, i: int) -> None:
        self.m[i] = np.zeros_like(self.x[i])

    def step(self, now: Now) -> None:
        old, beta = dict(self.x), self.beta
        for i in now.agents:
            direction = beta * self.m[i] + self.gradient(now, i)
            self.x[i] = self.x[i] + self.update(now, i, direction)
        self.x.update({i: now.average(i, self.x) for i in now.agents})
        for i in now.agents:
            moved = (old[i] - self.x[i]) / now.rate
            self.m[i] = beta * self.m[i] + (1 - beta) * moved
