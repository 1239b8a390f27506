"""Local optimizers and learning-rate schedules, by name; all of them are optax's.

Learning rates are scheduled over steps since the beginning of the phase. A merge that
resets an agent's optimizer does not turn the clock back, and an agent that idles, for
want of data, does not stop it: see `with_clocks_of`.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from dimat_jax.tree import PyTree

__all__ = ["OPTIMIZERS", "SCHEDULES", "with_clocks_of"]

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
    "adam": lambda schedule, *, momentum, weight_decay: _decayed(
        optax.adam(schedule), weight_decay
    ),
    "adamw": lambda schedule, *, momentum, weight_decay: optax.adamw(
        schedule, weight_decay=weight_decay
    ),
}
"""`OPTIMIZERS[name](schedule, momentum=..., weight_decay=...)`.

Weight decay is decoupled in adamw, and an L2 term of the gradient in all others.
`momentum` is the coefficient of momentum and nesterov.
"""


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
