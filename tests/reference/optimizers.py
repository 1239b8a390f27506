"""The local optimizers in NumPy, each written from its paper. An agent has its own one.

`step(gradient, rate)` returns what is added to the params. Learning rates are given to
each step, so a schedule goes on while an agent does nothing.
"""

import numpy as np


class Sgd:
    """Plain stochastic gradient descent: the step is -alpha g.

    Attributes:
        memory: the names of the arrays that are in the frame of the params.
    """

    memory: tuple[str, ...] = ()

    def step(self, gradient, rate):
        return -rate * gradient

    def sent(self):
        """What a merge averages: {name: array or number}."""
        return {name: getattr(self, name) for name in self.memory}

    def receive(self, average):
        """Goes on from the average of what agents have sent."""
        for name in self.memory:
            setattr(self, name, average[name])

    def align(self, permute):
        """Permutes what is in the frame of the params."""
        for name in self.memory:
            setattr(self, name, permute(getattr(self, name)))


class _Moving(Sgd):
    """Optimizers whose memory starts at 0; it gets its shape from the first gradient.

    A scalar 0 is an array of zeros of any shape.
    """

    def __init__(self):
        for name in self.memory:
            setattr(self, name, np.zeros(()))

    def align(self, permute):
        for name in self.memory:
            if np.ndim(getattr(self, name)):
                setattr(self, name, permute(getattr(self, name)))


class Momentum(_Moving):
    """Momentum: v <- beta v + g, and a step of -alpha v."""

    memory = ("v",)
    beta = 0.9

    def step(self, gradient, rate):
        self.v = self.beta * self.v + gradient
        return -rate * self.v


class HeavyBall(_Moving):
    """Polyak's heavy ball: v <- beta v - alpha g, and a step of v.

    In Nesterov's form the step is beta v - alpha g, with the new v.
    """

    memory = ("v",)

    def __init__(self, beta=0.9, nesterov=False):
        super().__init__()
        self.beta, self.nesterov = beta, nesterov

    def step(self, gradient, rate):
        self.v = self.beta * self.v - rate * gradient
        return self.beta * self.v - rate * gradient if self.nesterov else self.v


class Dadam(_Moving):
    """Nazari et al. 2022, Algorithm 1, with beta_3 = 0."""

    memory = ("m", "v", "v_hat")
    b1, b2, eps = 0.9, 0.999, 1e-8

    def step(self, gradient, rate):
        self.m = self.b1 * self.m + (1 - self.b1) * gradient
        self.v = self.b2 * self.v + (1 - self.b2) * gradient**2
        self.v_hat = np.maximum(self.v_hat, self.v)
        return -rate * self.m / (np.sqrt(self.v_hat) + self.eps)


class Adam(_Moving):
    """Kingma & Ba 2015, Algorithm 1.

    A merge averages the moments as the steps use them, that is, divided by 1 - beta^t.
    Agents that have taken no step have no moments, and do not count.
    """

    memory = ("m", "v")
    b1, b2, eps = 0.9, 0.999, 1e-8

    def __init__(self):
        super().__init__()
        self.t = 0

    def step(self, gradient, rate):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * gradient
        self.v = self.b2 * self.v + (1 - self.b2) * gradient**2
        m, v = self.m / (1 - self.b1**self.t), self.v / (1 - self.b2**self.t)
        return -rate * m / (np.sqrt(v) + self.eps)

    def sent(self):
        if self.t == 0:
            return {"m": self.m, "v": self.v, "counts": 0.0}
        return {
            "m": self.m / (1 - self.b1**self.t),
            "v": self.v / (1 - self.b2**self.t),
            "counts": 1.0,
        }

    def receive(self, average):
        counts = average["counts"] or 1.0
        self.m = average["m"] / counts * (1 - self.b1**self.t)
        self.v = average["v"] / counts * (1 - self.b2**self.t)
