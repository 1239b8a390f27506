"""Local optimizers and learning-rate schedules, by name.

All of them are made of optax's parts, except DAdam's step (`scale_by_dadam`), which
optax does not have.

Learning rates are scheduled over steps since the beginning of the phase. A merge that
resets an agent's optimizer does not turn the clock back, and an agent that idles, for
want of data, does not stop it: see `with_clocks_of`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dimat_jax.tree import PyTree

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "WITH_MOMENTUM",
    "scale_by_dadam",
    "with_clocks_of",
]

Schedule = Callable[[Any], Any] | float

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": lambda schedule, *, momentum, weight_decay: _decayed(
        optax.sgd(schedule), weight_decay
    ),
    "momentum": lambda schedule, *, momentum, weight_decay: _decayed(
        optax.sgd(schedule, momentum=momentum), weight_decay
    ),
    "nesterov": lambda schedule, *, momentum, weight_decay: _decayed(
        optax.sgd(schedule, momentum=momentum, nesterov=True), weight_decay
    ),
    # v <- beta v - alpha g: unlike "momentum", what was once learnt at a high rate goes
    # on at that rate. CDMSGD's (Jiang et al. 2017).
    "heavy_ball": lambda schedule, *, momentum, weight_decay: _decayed(
        optax.chain(
            optax.scale_by_learning_rate(schedule), optax.trace(decay=momentum)
        ),
        weight_decay,
    ),
    "adam": lambda schedule, *, momentum, weight_decay: _decayed(
        optax.adam(schedule), weight_decay
    ),
    "dadam": lambda schedule, *, momentum, weight_decay: _decayed(
        optax.chain(scale_by_dadam(), optax.scale_by_learning_rate(schedule)),
        weight_decay,
    ),
    "adamw": lambda schedule, *, momentum, weight_decay: optax.adamw(
        schedule, weight_decay=weight_decay
    ),
}
"""`OPTIMIZERS[name](schedule, momentum=..., weight_decay=...)`.

Weight decay is decoupled in adamw, and an L2 term of the gradient in all others.
`momentum` is the coefficient of those `WITH_MOMENTUM`.
"""


WITH_MOMENTUM = frozenset({"momentum", "nesterov", "heavy_ball"})
"""Those whose `momentum` can be chosen."""


class DadamState(NamedTuple):
    """Moments, each like the params.

    Attributes:
        mean: m, of the gradient.
        square: v, of its square.
        largest: v hat, which v decides while it grows.
    """

    mean: PyTree
    square: PyTree
    largest: PyTree


def scale_by_dadam(
    b1: float = 0.9, b2: float = 0.999, b3: float = 0.0, eps: float = 1e-8
) -> optax.GradientTransformation:
    """The step of DAdam, without bias correction.

        m <- b1 m + (1 - b1) g,    v <- b2 v + (1 - b2) g^2
        v_hat <- b3 v_hat + (1 - b3) max(v_hat, v),    step m / (sqrt(v_hat) + eps)

    (Nazari et al. 2022, arXiv 1901.09109, Algorithm 1; with b3 = 0 the second moment is
    AMSGrad's.)
    """

    def init(params) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return DadamState(zeros, zeros, zeros)

    def update(updates, state, params=None) -> Any:
        del params
        mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mean, updates)
        square = jax.tree.map(
            lambda v, g: b2 * v + (1 - b2) * g**2, state.square, updates
        )
        largest = jax.tree.map(
            lambda top, v: b3 * top + (1 - b3) * jnp.maximum(top, v),
            state.largest,
            square,
        )
        steps = jax.tree.map(lambda m, top: m / (jnp.sqrt(top) + eps), mean, largest)
        return steps, DadamState(mean, square, largest)

    return optax.GradientTransformation(init, update)


def _decayed(tx: optax.GradientTransformation, weight_decay: float):
    if weight_decay == 0:
        return tx
    return optax.chain(optax.add_decayed_weights(weight_decay), tx)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": lambda rate, *, decay, steps_per_epoch, total_steps: rate,
    "exponential": lambda rate, *, decay, steps_per_epoch, total_steps: (
        optax.exponential_decay(rate, steps_per_epoch, decay, staircase=True)
    ),
    "cosine": lambda rate, *, decay, steps_per_epoch, total_steps: (
        optax.cosine_decay_schedule(rate, max(total_steps, 1))
    ),
}
"""`SCHEDULES[name](rate, decay=..., steps_per_epoch=..., total_steps=...)`.

exponential: times `decay` after every epoch; cosine: to zero over `total_steps`.
"""


def with_clocks_of(state: PyTree, other: PyTree) -> PyTree:
    """A state with the learning-rate clocks of another.

    Args:
        state: an optimizer's state, or any tree that holds some.
        other: of the same structure.
    """

    def is_clock(node) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda node, clock: clock if is_clock(node) else node,
        state,
        other,
        is_leaf=is_clock,
    )
