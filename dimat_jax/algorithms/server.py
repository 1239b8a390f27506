"""What a server makes of the agents' models: its optimizer.

Agents train from the server's model x to models of their own, and D is their mean
change from x. The change takes the place of a gradient with the opposite sign:

    average:   x <- x + eta D
    momentum:  m <- beta m + D,                    x <- x + eta m
    adaptive:  m <- beta m + (1 - beta) D,         x <- x + eta m / (sqrt(v) + tau)
        adagrad:  v <- v + D^2
        adam:     v <- beta_2 v + (1 - beta_2) D^2
        yogi:     v <- v - (1 - beta_2) D^2 sign(v - D^2)

(FedAvg, McMahan et al. 2017, with eta = 1; FedAvgM, Hsu et al. 2019, arXiv 1909.06335;
FedAdagrad, FedAdam and FedYogi, Reddi et al. 2021, arXiv 2003.00295, Algorithm 2.) At
the start m is 0 and v is tau^2.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dimat_jax.options import Option, Record, Registry, registry
from dimat_jax.tree import PyTree

__all__ = ["SERVER_OPTIMIZER", "SERVER_OPTIMIZERS", "SERVER_RATE", "ServerOptimizer"]

SERVER_RATE = Option(
    "server.learning_rate",
    0.0,
    "The factor eta of a server's step.",
    at_least=0,
    empty="1 for average and momentum, and for scaffold; 0.01 for the others",
)
MOMENTUM = Option(
    "server.momentum",
    0.9,
    "The share of its last step, or of its moment, that a server repeats (beta).",
    at_least=0,
    below=1,
)
SECOND_MOMENTUM = Option(
    "server.second_momentum",
    0.99,
    "The share of the mean square that a server keeps (beta_2).",
    at_least=0,
    below=1,
)
ADAPTIVITY = Option(
    "server.adaptivity",
    1e-3,
    "The number tau that a server adds to the root of the mean square. A smaller one "
    "makes the steps of all params more alike.",
    above=0,
)


class ServerOptimizer(NamedTuple):
    """How a server moves its model.

    Attributes:
        moments: the names of its memories. Each is shaped like the params, and is 0 at
            the start.
        step: `step(change, moments) -> (step, moments)` returns what is added to the
            model, and the new memories. `change` is the agents' mean change.
        plain: whether the step is the change itself.
    """

    moments: tuple[str, ...]
    step: Callable[[PyTree, dict[str, PyTree]], tuple[PyTree, dict[str, PyTree]]]
    plain: bool = False


def _leafwise(
    moments: Sequence[str], rule: Callable[..., tuple[Array, ...]], plain: bool = False
) -> ServerOptimizer:
    """Makes an optimizer of a rule for one leaf.

    `rule(change, *moments) -> (step, *moments)`.
    """

    def step(change, memory):
        leaves, treedef = jax.tree.flatten(change)
        old = [treedef.flatten_up_to(memory[name]) for name in moments]
        results = [rule(*one) for one in zip(leaves, *old, strict=True)]
        steps, *new = map(list, zip(*results, strict=True))
        trees = map(treedef.unflatten, new)
        return treedef.unflatten(steps), dict(zip(moments, trees, strict=True))

    return ServerOptimizer(tuple(moments), step, plain)


def average(*, learning_rate: float = SERVER_RATE.default) -> ServerOptimizer:
    """The mean of the agents' models, or a part of the way there (FedAvg)."""
    SERVER_RATE.check(learning_rate)
    rate = learning_rate or 1.0
    return _leafwise((), lambda change: (rate * change,), plain=rate == 1)


def momentum(
    *,
    learning_rate: float = SERVER_RATE.default,
    momentum: float = MOMENTUM.default,
) -> ServerOptimizer:
    """The server repeats a share of its last step (FedAvgM, Hsu et al. 2019)."""
    SERVER_RATE.check(learning_rate)
    MOMENTUM.check(momentum)
    rate = learning_rate or 1.0

    def rule(change, mean):
        mean = momentum * mean + change
        return rate * mean, mean

    return _leafwise(["server_mean"], rule)


def adagrad(
    *,
    learning_rate: float = SERVER_RATE.default,
    momentum: float = MOMENTUM.default,
    adaptivity: float = ADAPTIVITY.default,
) -> ServerOptimizer:
    """Steps shrink with the sum of squared changes (FedAdagrad, Reddi et al. 2021)."""

    def squares(v, square):
        return v + square

    return _adaptive(squares, learning_rate, momentum, adaptivity)


def adam(
    *,
    learning_rate: float = SERVER_RATE.default,
    momentum: float = MOMENTUM.default,
    second_momentum: float = SECOND_MOMENTUM.default,
    adaptivity: float = ADAPTIVITY.default,
) -> ServerOptimizer:
    """Steps are scaled by the root of a mean square (FedAdam, Reddi et al. 2021)."""
    SECOND_MOMENTUM.check(second_momentum)

    def squares(v, square):
        return second_momentum * v + (1 - second_momentum) * square

    return _adaptive(squares, learning_rate, momentum, adaptivity)


def yogi(
    *,
    learning_rate: float = SERVER_RATE.default,
    momentum: float = MOMENTUM.default,
    second_momentum: float = SECOND_MOMENTUM.default,
    adaptivity: float = ADAPTIVITY.default,
) -> ServerOptimizer:
    """It is adam with a mean square that changes more slowly (FedYogi)."""
    SECOND_MOMENTUM.check(second_momentum)

    def squares(v, square):
        return v - (1 - second_momentum) * square * jnp.sign(v - square)

    return _adaptive(squares, learning_rate, momentum, adaptivity)


def _adaptive(
    squares: Callable[[Array, Array], Array],
    learning_rate: float,
    momentum: float,
    adaptivity: float,
) -> ServerOptimizer:
    """Makes an adaptive optimizer from the rule `squares(v, D^2) -> v`."""
    SERVER_RATE.check(learning_rate)
    MOMENTUM.check(momentum)
    ADAPTIVITY.check(adaptivity)
    rate = learning_rate or 0.01

    def rule(change, mean, excess) -> Any:
        mean = momentum * mean + (1 - momentum) * change
        # A memory is 0 at the start, and v is tau^2: the memory is their difference.
        v = squares(excess + adaptivity**2, change**2)
        return rate * mean / (jnp.sqrt(v) + adaptivity), mean, v - adaptivity**2

    return _leafwise(["server_mean", "server_square"], rule)


_ADAPTIVE = (SERVER_RATE, MOMENTUM, SECOND_MOMENTUM, ADAPTIVITY)
SERVER_OPTIMIZERS: Registry[Record[ServerOptimizer]] = registry(
    Record("average", average, (SERVER_RATE,)),
    Record("momentum", momentum, (SERVER_RATE, MOMENTUM)),
    Record("adagrad", adagrad, (SERVER_RATE, MOMENTUM, ADAPTIVITY)),
    Record("adam", adam, _ADAPTIVE),
    Record("yogi", yogi, _ADAPTIVE),
)
"""`SERVER_OPTIMIZERS[name](**options)` builds a `ServerOptimizer`."""

SERVER_OPTIMIZER = Option(
    "server.optimizer",
    "average",
    "What the server makes of the agents' mean change once a round.",
    choices=SERVER_OPTIMIZERS,
)
