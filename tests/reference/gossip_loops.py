"""Decentralized algorithms as NumPy loops, each written from its paper's equations.

Everything is float64. `gradient(i, x)` is agent i's gradient at x, the same at every
step. `W[t]` is the mixing matrix of step t, and `x[i]` is agent i's vector. Each
function returns the list of x after every step, and x(0) comes first.
"""

import numpy as np
from scipy.optimize import nnls


def gradients(gradient, x):
    return np.stack([gradient(i, x_i) for i, x_i in enumerate(x)])


def cdsgd(gradient, W, x, alpha, present=None):
    """Jiang et al. 2017, equation 3; Lian et al. 2017, Algorithm 1.

    `present[t]` marks the agents that take part in step t.
    """
    path = [x]
    for t, mixing in enumerate(W):
        takes_part = np.ones(len(x)) if present is None else present[t]
        step = alpha * gradients(gradient, path[-1])
        path.append(mixing @ path[-1] - takes_part[:, None] * step)
    return path


def adapt_then_combine(gradient, W, x, alpha):
    """Chen & Sayed 2012."""
    path = [x]
    for mixing in W:
        path.append(mixing @ (path[-1] - alpha * gradients(gradient, path[-1])))
    return path


def cdmsgd(gradient, W, x, alpha, beta):
    """Jiang et al. 2017, Algorithm 2 (Polyak momentum); alpha may change."""
    path, v = [x], np.zeros_like(x)
    for mixing, rate in zip(W, alpha, strict=True):
        v = beta * v - rate * gradients(gradient, path[-1])
        path.append(mixing @ path[-1] + v)
    return path


def cdmsgd_nesterov(gradient, W, x, alpha, beta):
    """CDMSGD as its authors' code steps (Nesterov momentum); alpha may change."""
    path, v = [x], np.zeros_like(x)
    for mixing, rate in zip(W, alpha, strict=True):
        g = gradients(gradient, path[-1])
        v = beta * v - rate * g
        path.append(mixing @ path[-1] + beta * v - rate * g)
    return path


def cdadam(gradient, W, x, alpha, b1=0.9, b2=0.999, eps=1e-8):
    """Nazari et al. 2022, Algorithm 1, with beta_3 = 0."""
    path = [x]
    m, v, v_hat = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    for mixing in W:
        g = gradients(gradient, path[-1])
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        v_hat = np.maximum(v_hat, v)
        path.append(mixing @ path[-1] - alpha * m / (np.sqrt(v_hat) + eps))
    return path


def sgp(gradient, P, x, alpha, beta=0.0):
    """Assran et al. 2019, Algorithm 1; with beta its momentum form. Returns z."""
    w, u = np.ones((len(x), 1)), np.zeros_like(x)
    path = [x]
    for mixing in P:
        u = beta * u + gradients(gradient, path[-1])
        x, w = mixing @ (x - alpha * u), mixing @ w
        path.append(x / w)
    return path


def d2(gradient, W, x, alpha):
    """Tang et al. 2018, Algorithm 1; alpha may change, as a factor of each gradient."""
    path, u = [x], [-alpha[0] * gradients(gradient, x)]
    path.append(W[0] @ (x + u[0]))
    for mixing, rate in zip(W[1:], alpha[1:], strict=True):
        u.append(-rate * gradients(gradient, path[-1]))
        path.append(mixing @ (2 * path[-1] - path[-2] + u[-1] - u[-2]))
    return path


def dsgt(gradient, W, x, alpha, present=None):
    """Pu & Nedic 2021, equation 3, with y(0) = g(0).

    `present[t]` marks the agents that take part in step t. If some of them took part in
    another company the last time, all trackers start again from g.
    """
    path, y, g = [x], np.zeros_like(x), np.zeros_like(x)
    # For each agent, the agents that took part in its last step.
    company = np.ones((len(x), len(x)), bool)
    for t, mixing in enumerate(W):
        active = company[0] if present is None else present[t]
        takes_part = active[:, None]
        if (company != active)[active].any():
            y = np.where(takes_part, g, y)
        company[active] = active
        new = np.where(takes_part, gradients(gradient, path[-1]), g)
        y = mixing @ y + new - g
        g = new
        path.append(mixing @ (path[-1] - alpha * takes_part * y))
    return path


def qgm(gradient, W, x, alpha, beta):
    """Lin et al. 2021, Algorithm 1 (QG-DSGDm), with mu = beta."""
    path, m = [x], np.zeros_like(x)
    for mixing in W:
        half = path[-1] - alpha * (beta * m + gradients(gradient, path[-1]))
        path.append(mixing @ half)
        m = beta * m + (1 - beta) * (path[-2] - path[-1]) / alpha
    return path


def qgm_alone(gradient_at, x, alpha, beta):
    """QG-DSGDm for a single agent. `gradient_at(t, x)`; alpha may change. Returns x."""
    m = np.zeros_like(x, np.float64)
    for t, rate in enumerate(alpha):
        direction = beta * m + gradient_at(t, x)
        x = x - rate * direction
        m = beta * m + (1 - beta) * direction
    return x


def projected(own, others):
    """Esfandiari et al. 2021, equation 5: G' u + g for the best u >= 0."""
    G = np.stack([own, *others])
    u, _ = nnls(G.T, -own)
    return G.T @ u + own


def cga(gradient, W, x, alpha, beta):
    """Esfandiari et al. 2021, Algorithm 1."""
    return compcga(gradient, W, x, alpha, beta, lambda g: g)


def compcga(gradient, W, x, alpha, beta, compress):
    """Esfandiari et al. 2021, section 3.3: compressed cross-gradients, with feedback.

    If a link fails, neither x_i arrives at agent j nor is there an answer, so the
    feedback does not change.
    """
    path, v, errors = [x], np.zeros_like(x), {}
    for mixing in W:
        x, direction = path[-1], np.zeros_like(v)
        for i in range(len(x)):
            others = []
            for j in np.flatnonzero(mixing[i]):
                if j != i:
                    exact = gradient(j, x[i]) + errors.get((i, j), 0)
                    others.append(compress(exact))
                    errors[i, j] = exact - others[-1]
            direction[i] = projected(gradient(i, x[i]), others)
        v = beta * v - alpha * direction
        path.append(mixing @ x + v)
    return path


def choco(gradient, W, x, alpha, gamma, compress):
    """Koloskova, Stich & Jaggi 2019, Algorithm 2."""
    path, x_hat = [x], np.zeros_like(x)
    for mixing in W:
        half = path[-1] - alpha * gradients(gradient, path[-1])
        x_hat = x_hat + np.stack([compress(d) for d in half - x_hat])
        path.append(half + gamma * (mixing @ x_hat - x_hat))
    return path


def choco_by_edge(gradient, W, x, alpha, gamma, compress):
    """CHOCO with links that fail. `x_hat[i, j]` is agent j's copy of x^_i."""
    agents = range(len(x))
    path, x_hat = [x], {(i, j): np.zeros_like(x[i]) for i in agents for j in agents}
    for mixing in W:
        half = path[-1] - alpha * gradients(gradient, path[-1])
        links = [(i, j) for i in agents for j in agents if i != j and mixing[i, j]]
        for i, j in links:
            x_hat[i, j] = x_hat[i, j] + compress(half[i] - x_hat[i, j])
        new = half.copy()
        for i, j in links:
            new[i] += gamma * mixing[i, j] * (x_hat[j, i] - x_hat[i, j])
        path.append(new)
    return path


def relaysgd(gradient, edges, x, alpha):
    """Vogels et al. 2021, Algorithm 1. `edges[t]` are the pairs (i, j) of step t.

    A message from i to j that does not arrive is 0, and contains 0 models.
    """
    path, agents = [x], range(len(x))
    m, c = np.zeros((len(x), len(x), x.shape[1])), np.zeros((len(x), len(x)))
    for links in edges:
        half = path[-1] - alpha * gradients(gradient, path[-1])
        new_m, new_c = np.zeros_like(m), np.zeros_like(c)
        for i, j in links:
            others = [k for k in agents if k != j]
            new_m[i, j] = half[i] + sum(m[k, i] for k in others)
            new_c[i, j] = 1 + sum(c[k, i] for k in others)
        m, c = new_m, new_c
        path.append((half + m.sum(axis=0)) / (1 + c.sum(axis=0))[:, None])
    return path


# Once a round =========================================================================


def by_rounds(communicate, gradient, x, alpha, steps, n_rounds):
    """Each round is one call of `communicate(round, x)`, then local SGD steps."""
    path = [x]
    for number in range(n_rounds):
        x = communicate(number, path[-1])
        for _ in range(steps):
            x = x - alpha * gradients(gradient, x)
            path.append(x)
    return path


def with_server(step, train, x, steps, present, count=None):
    """Rounds with a server, whose model is z.

    Args:
        step: `step(z, changes, shares)` returns the server's next model; row k of
            `changes` is how agent k's model differs from z.
        train: `train(x, z)` is a local step of all agents.
        steps: the number of local steps in a round.
        present: `present[r]` marks the agents that take part in round r.
        count: the number of each agent's examples; None if all count the same.
    """
    path, z, first = [x], x[0], True
    count = np.ones(len(x)) if count is None else np.asarray(count, float)
    fresh = np.ones(len(x), bool)  # has trained from z
    for here in present:
        heard = here & fresh
        if heard.any():
            shares = heard * count / (heard * count).sum()
            z, first = shares @ x if first else step(z, x - z, shares), False
        x, fresh = np.where(here[:, None], z, x), here
        for _ in range(steps):
            x = np.where(here[:, None], train(x, z), x)
            path.append(x)
    return path


def fedavg(gradient, examples, x, alpha, steps, present):
    """McMahan et al. 2017, Algorithm 1, among the agents that are present."""
    return fedopt(gradient, examples, x, alpha, steps, present, lambda change: change)


def fedprox(gradient, x, alpha, mu, steps, present):
    """Li et al. 2020, Algorithm 2, with gradient steps as the inexact solver."""
    return with_server(
        lambda z, changes, shares: z + shares @ changes,
        lambda x, z: x - alpha * (gradients(gradient, x) + mu * (x - z)),
        x,
        steps,
        present,
    )


def fedopt(gradient, examples, x, alpha, steps, present, server):
    """Reddi et al. 2021, Algorithm 1; `server(change)` is the server's step."""
    return with_server(
        lambda z, changes, shares: z + server(shares @ changes),
        lambda x, z: x - alpha * gradients(gradient, x),
        x,
        steps,
        present,
        examples,
    )


def server_momentum(eta, beta):
    """FedAvgM, Hsu et al. 2019."""
    v = 0.0

    def step(change):
        nonlocal v
        v = beta * v + change
        return eta * v

    return step


def adaptive_server(name, eta, beta1, beta2, tau):
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


def scaffold(gradient, x, alpha, eta, steps, present):
    """Karimireddy et al. 2020, Algorithm 1, with option II."""
    c, control = np.zeros(x.shape[1]), np.zeros_like(x)

    def step(z, changes, shares):
        nonlocal c, control
        heard = (shares > 0)[:, None]
        new = control - c + -changes / (steps * alpha)
        new = np.where(heard, new, control)
        c, control = c + (new - control).sum(axis=0) / len(x), new
        return z + eta * shares @ changes

    def train(x, z):
        return x - alpha * (gradients(gradient, x) - control + c)

    return with_server(step, train, x, steps, present)


def weight_averaging(gradient, W, x, alpha, steps):
    """DIMAT (arXiv 2404.08079), Algorithm 1, without permutations."""
    return by_rounds(lambda number, x: W[number] @ x, gradient, x, alpha, steps, len(W))


def announced_averaging(gradient, W, x, alpha, steps, compress):
    """Weight averaging with copies x^ of the other agents: x^ <- x^ + Q(x - x^)."""
    x_hat = x.copy()

    def communicate(number, x):
        nonlocal x_hat
        x_hat = x_hat + np.stack([compress(d) for d in x - x_hat])
        own = np.diag(np.diag(W[number]))
        return own @ x + (W[number] - own) @ x_hat

    return by_rounds(communicate, gradient, x, alpha, steps, len(W))
