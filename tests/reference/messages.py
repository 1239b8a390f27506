"""Algorithms with messages of their own on every link, and compressors, from papers."""

import numpy as np
from scipy.optimize import nnls

from tests.reference.agents import Alone, Now
from tests.reference.optimizers import HeavyBall

# Compressors. Each takes one array; random ones take their draws too. ================


def none(x):
    return x


def float16(x):
    """Half precision; what is too large is sent as the largest number."""
    return np.clip(x, -65504, 65504).astype(np.float16).astype(np.float64)


def bfloat16(x):
    """The upper two bytes of a float32, rounded to nearest, ties to even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)


def sign(x):
    """Signs, and the mean absolute value."""
    return np.where(x >= 0, 1.0, -1.0) * np.abs(x).mean()


def top_k(x, fraction=0.1):
    """The entries of largest absolute value, at least one."""
    count = max(round(fraction * x.size), 1)
    kept = np.argsort(-np.abs(x.ravel()), kind="stable")[:count]
    sent = np.zeros(x.size)
    sent[kept] = x.ravel()[kept]
    return sent.reshape(x.shape)


def random_k(x, order, fraction=0.1):
    """The entries at the first places of a random order, at least one."""
    count = max(round(fraction * x.size), 1)
    sent = np.zeros(x.size)
    sent[order[:count]] = x.ravel()[order[:count]]
    return sent.reshape(x.shape)


def int8(x, uniform):
    """Alistarh et al. 2017: 127 levels on each side of 0, rounded without bias.

    `uniform` are the draws: a number is rounded up if its draw is above the distance
    to the next level.
    """
    scale = np.abs(x).max() / 127
    if scale == 0:
        return np.zeros_like(x)
    down = np.floor(x / scale)
    levels = down + (uniform >= 1 - (x / scale - down))
    return np.clip(levels, -127, 127) * scale


# CGA =================================================================================


def projected(own, others):
    """Esfandiari et al. 2021, equation 5: G' u + g for the best u >= 0.

    The quadratic program is a non-negative least-squares problem: SciPy's solver is an
    active-set method of its own.
    """
    G = np.stack([own, *others])
    u, _ = nnls(G.T, -own)
    return G.T @ u + own


class Cga(Alone):
    """Esfandiari et al. 2021, Algorithm 1; section 3.3 with a compressor.

    Agent i sends its params to its neighbours, and neighbour j answers with the
    gradient of its own loss there. If a link fails, or j has no examples, there is no
    answer, and what j's messages to i have lost so far does not change.
    """

    optimizer = HeavyBall

    def __init__(self, x, optimizer=None, compress=none):
        self.compress, self.lost = compress, {}
        super().__init__(x, optimizer)

    def restart(self, i: int) -> None:
        self.lost.update({(i, j): np.zeros_like(self.x[i]) for j in self.x})

    def step(self, now: Now) -> None:
        steps = {}
        for i in now.agents:
            answers = []
            for j in now.senders(i):
                if now.trains(j):
                    exact = now.gradient(j, self.x[i]) + self.lost[i, j]
                    answers.append(self.compress(exact))
                    self.lost[i, j] = exact - answers[-1]
            own = self.gradient(now, i)
            steps[i] = self.update(now, i, projected(own, answers))
        mixed = {i: now.average(i, self.x) for i in now.agents}
        self.x.update({i: mixed[i] + steps[i] for i in now.agents})


class Compcga(Cga):
    def __init__(self, x, optimizer=None, compress=sign):
        super().__init__(x, optimizer, compress)


# CHOCO ===============================================================================


class Choco(Alone):
    """Koloskova, Stich & Jaggi 2019, Algorithm 2.

    `known[i, j]` is agent j's estimate x^_i of agent i's params. In the paper all
    messages arrive, and all agents have the same estimate. If a link fails, both its
    ends go on with their old estimates.
    """

    def __init__(self, x, optimizer=None, compress=none, gamma=1.0):
        self.compress, self.gamma, self.known = compress, gamma, {}
        super().__init__(x, optimizer)

    def restart(self, i: int) -> None:
        self.known.update({(i, j): np.zeros_like(self.x[i]) for j in self.x})

    def step(self, now: Now) -> None:
        super().step(now)
        links = [(i, j) for i in now.agents for j in now.senders(i)]
        for i, j in links:
            missing = self.x[i] - self.known[i, j]
            self.known[i, j] = self.known[i, j] + self.compress(missing)
        for i, j in links:
            apart = self.known[j, i] - self.known[i, j]
            self.x[i] = self.x[i] + self.gamma * now.W[i, j] * apart
