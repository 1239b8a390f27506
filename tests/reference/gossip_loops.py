"""Gossip algorithms as plain NumPy loops, each written from its paper's equations.

Everything is float64. `gradient(i, x)` is agent i's gradient at x, the same at every
step; `W[t]` is the mixing matrix of step t, and `x[i]` agent i's vector. Each returns
the list of x after every step, x(0) first.
"""

import numpy as np
from scipy.optimize import nnls


def gradients(gradient, x):
    return np.stack([gradient(i, x_i) for i, x_i in enumerate(x)])


def cdsgd(gradient, W, x, alpha):
    """Jiang et al. 2017, equation 3; Lian et al. 2017, Algorithm 1."""
    path = [x]
    for mixing in W:
        path.append(mixing @ path[-1] - alpha * gradients(gradient, path[-1]))
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
    """Tang et al. 2018, Algorithm 1."""
    path, g = [x], [gradients(gradient, x)]
    path.append(W[0] @ (x - alpha * g[0]))
    for mixing in W[1:]:
        g.append(gradients(gradient, path[-1]))
        path.append(mixing @ (2 * path[-1] - path[-2] - alpha * g[-1] + alpha * g[-2]))
    return path


def dsgt(gradient, W, x, alpha):
    """Pu & Nedic 2021; y(0) = g(0)."""
    path, y, g = [x], None, None
    for mixing in W:
        new = gradients(gradient, path[-1])
        y = new if y is None else mixing @ y + new - g
        g = new
        path.append(mixing @ path[-1] - alpha * y)
    return path


def qgm(gradient, W, x, alpha, beta):
    """Lin et al. 2021, Algorithm 1 (QG-DSGDm), with mu = beta."""
    path, m = [x], np.zeros_like(x)
    for mixing in W:
        half = path[-1] - alpha * (beta * m + gradients(gradient, path[-1]))
        path.append(mixing @ half)
        m = beta * m + (1 - beta) * (path[-2] - path[-1]) / alpha
    return path


def projected(own, others):
    """Esfandiari et al. 2021, equation 5: G' u + g for the best u >= 0."""
    G = np.stack([own, *others])
    u, _ = nnls(G.T, -own)
    return G.T @ u + own


def cga(gradient, W, x, alpha, beta):
    """Esfandiari et al. 2021, Algorithm 1."""
    path, v = [x], np.zeros_like(x)
    for mixing in W:
        x, direction = path[-1], np.zeros_like(v)
        for i in range(len(x)):
            others = [
                gradient(j, x[i]) for j in range(len(x)) if j != i and mixing[i, j] > 0
            ]
            direction[i] = projected(gradient(i, x[i]), others)
        v = beta * v - alpha * direction
        path.append(mixing @ x + v)
    return path


def choco(gradient, W, x, alpha, gamma, compress):
    """Koloskova, Stich & Jaggi 2019, Algorithm 2."""
    path, known = [x], np.zeros_like(x)
    for mixing in W:
        half = path[-1] - alpha * gradients(gradient, path[-1])
        known = known + np.stack([compress(d) for d in half - known])
        path.append(half + gamma * (mixing @ known - known))
    return path
