"""Local optimizers, by name, and what happens to their gradients and their states.

All of them are made of optax's parts, except for DAdam's step, which is written here.
Learning rates are scheduled over the steps since the beginning of the phase. The clock
of a schedule does not go back if a merge resets an agent's optimizer, and it goes on
while an agent is idle because it has no data: see `with_clocks_of`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from dimat_jax._schedules import SCHEDULE, SCHEDULES, Schedule
from dimat_jax.options import Option, Record, Registry, registry
from dimat_jax.tree import PyTree

__all__ = [
    "CLIP_NORM",
    "LEARNING_RATE",
    "OPTIMIZER",
    "OPTIMIZERS",
    "OptimizerRecord",
    "SCHEDULE",
    "SCHEDULES",
    "clipped",
    "scale_by_dadam",
    "with_bias",
    "with_clocks_of",
    "without_bias",
]

# The decay rates of the first and of the second moment of adam and adamw.
B1, B2 = 0.9, 0.999
MOMENTUM = Option(
    "optimizer.momentum",
    0.9,
    "The share of the last step that a step repeats.",
    at_least=0,
    below=1,
)
FORM = Option(
    "optimizer.form",
    "polyak",
    "Whether a heavy ball steps by its new velocity v (polyak), or by beta v - alpha g "
    "(nesterov, as in the published code of CDMSGD).",
    choices=("polyak", "nesterov"),
)
WEIGHT_DECAY = Option(
    "optimizer.weight_decay",
    0.0,
    "The factor of the weights that is added to the gradient, as an L2 penalty adds "
    "it; adamw applies it to the weights themselves (decoupled).",
    at_least=0,
)
CLIP_NORM = Option(
    "optimizer.clip_norm",
    0.0,
    "The largest norm of an agent's gradient over all params. A longer gradient is "
    "scaled to it, before an algorithm uses or sends it and before weight decay.",
    at_least=0,
    empty="gradients are not clipped",
)


class DadamState(NamedTuple):
    """The moments that DAdam keeps. Each is a tree that is shaped like the params.

    Attributes:
        mean: the running mean m of the gradients.
        square: the running mean v of the squared gradients.
        largest: v_hat, which follows the largest v so far.
    """

    mean: PyTree
    square: PyTree
    largest: PyTree


def scale_by_dadam(
    b1: float = 0.9, b2: float = 0.999, b3: float = 0.0, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Makes the step of DAdam, which has no bias correction.

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


def sgd(
    schedule: Schedule, *, weight_decay: float = WEIGHT_DECAY.default
) -> optax.GradientTransformation:
    """Plain stochastic gradient descent (SGD)."""
    return _decayed(optax.sgd(schedule), weight_decay)


def momentum(
    schedule: Schedule,
    *,
    momentum: float = MOMENTUM.default,
    weight_decay: float = WEIGHT_DECAY.default,
) -> optax.GradientTransformation:
    """SGD with momentum: v <- beta v + g, and a step of -alpha v."""
    return _decayed(optax.sgd(schedule, momentum=momentum), weight_decay)


def nesterov(
    schedule: Schedule,
    *,
    momentum: float = MOMENTUM.default,
    weight_decay: float = WEIGHT_DECAY.default,
) -> optax.GradientTransformation:
    """SGD with Nesterov's momentum."""
    tx = optax.sgd(schedule, momentum=momentum, nesterov=True)
    return _decayed(tx, weight_decay)


def heavy_ball(
    schedule: Schedule,
    *,
    momentum: float = MOMENTUM.default,
    form: str = FORM.default,
    weight_decay: float = WEIGHT_DECAY.default,
) -> optax.GradientTransformation:
    """SGD with Polyak's heavy ball: v <- beta v - alpha g, and a step of v.

    With `form="nesterov"` the step is beta v - alpha g, with the new v. The velocity v
    includes the learning rates of earlier steps, while those of "momentum" and
    "nesterov" are all multiplied with the present one. CDMSGD uses the heavy ball
    (Jiang et al. 2017).

    Raises:
        OptionError: the form is unknown.
    """
    FORM.check(form)
    tx = optax.chain(
        optax.scale_by_learning_rate(schedule),
        optax.trace(decay=momentum, nesterov=form == "nesterov"),
    )
    return _decayed(tx, weight_decay)


def adam(
    schedule: Schedule, *, weight_decay: float = WEIGHT_DECAY.default
) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015)."""
    return _decayed(optax.adam(schedule, b1=B1, b2=B2), weight_decay)


def dadam(
    schedule: Schedule, *, weight_decay: float = WEIGHT_DECAY.default
) -> optax.GradientTransformation:
    """DAdam's local step (Nazari et al. 2022); see `scale_by_dadam`."""
    tx = optax.chain(scale_by_dadam(), optax.scale_by_learning_rate(schedule))
    return _decayed(tx, weight_decay)


def adamw(
    schedule: Schedule, *, weight_decay: float = WEIGHT_DECAY.default
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""
    return optax.adamw(schedule, b1=B1, b2=B2, weight_decay=weight_decay)


def _decayed(
    tx: optax.GradientTransformation, weight_decay: float
) -> optax.GradientTransformation:
    """Adds the gradient of an L2 penalty to the gradient that `tx` gets."""
    if weight_decay == 0:
        return tx
    return optax.chain(optax.add_decayed_weights(weight_decay), tx)


def clipped(gradient: PyTree, clip_norm: float) -> PyTree:
    """Scales one agent's gradient to a norm of at most `clip_norm`; 0 leaves it."""
    if clip_norm == 0:
        return gradient
    clip = optax.clip_by_global_norm(clip_norm)
    return clip.update(gradient, clip.init(gradient))[0]


def with_clocks_of(state: PyTree, other: PyTree) -> PyTree:
    """Returns a state with the learning-rate clocks of another state.

    Args:
        state: an optimizer's state, or any tree that holds optimizer states.
        other: the state with the clocks, of the same structure.
    """

    def is_clock(node) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda node, clock: clock if is_clock(node) else node,
        state,
        other,
        is_leaf=is_clock,
    )


class UnbiasedMoments(NamedTuple):
    """Adam's state without the bias that its moments have after few steps.

    The moments start at 0. After t steps along a constant gradient g they are
    (1 - b1^t) g and (1 - b2^t) g^2, so Adam divides them by these factors. Agents may
    have taken different numbers of steps. The average of their moments then needs a
    correction that no single number of steps gives. The average of their unbiased
    moments needs none.

    Attributes:
        adam: the state. Its moments are divided by their factors; they are 0 if no step
            has been taken.
        known: `[agents]` 1 if the agent has moments, and 0 if it has taken no step.
    """

    adam: optax.ScaleByAdamState
    known: Float[Array, " agents"]


def without_bias(state: PyTree) -> PyTree:
    """Returns stacked optimizer states in the form in which they can be averaged.

    Every `ScaleByAdamState` becomes `UnbiasedMoments`. The decay rates must be those of
    this module's optimizers. Other states have no counts on which their meaning depends
    and stay as they are.

    Args:
        state: the optimizer states of several agents, stacked.
    """

    def remove(node):
        if not _is_adam(node):
            return node
        known = node.count > 0
        return UnbiasedMoments(
            _times(node, *(jnp.where(known, 1 / f, 0) for f in _factors(node.count))),
            known.astype(jnp.float32),
        )

    return jax.tree.map(remove, state, is_leaf=_is_adam)


def with_bias(state: PyTree) -> PyTree:
    """Undoes `without_bias`, after averaging too.

    Every agent keeps its own number of steps. An average counts only agents that have
    taken a step: it is divided by the average of `known`.
    """

    def is_unbiased(node) -> bool:
        return isinstance(node, UnbiasedMoments)

    def add(node):
        if not is_unbiased(node):
            return node
        share = jnp.where(node.known > 0, node.known, 1)
        factors = _factors(node.adam.count)
        return _times(node.adam, *(factor / share for factor in factors))

    return jax.tree.map(add, state, is_leaf=is_unbiased)


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def _factors(count: Array) -> tuple[Array, Array]:
    """Returns 1 - b1^t and 1 - b2^t; both are 0 if no step has been taken."""
    steps = count.astype(jnp.float32)
    # The power b^t is close to 1 after few steps, and 1 - b^t would lose digits.
    first, second = (-jnp.expm1(steps * np.log(b).astype(np.float32)) for b in (B1, B2))
    return first, second


def _times(
    state: optax.ScaleByAdamState, first: Array, second: Array
) -> optax.ScaleByAdamState:
    """Multiplies each agent's moments by the agent's factors."""

    def multiply(factor, moments):
        def one(leaf):
            by_agent = factor.reshape(-1, *[1] * (leaf.ndim - 1))
            return (by_agent * leaf).astype(leaf.dtype)

        return jax.tree.map(one, moments)

    return state._replace(mu=multiply(first, state.mu), nu=multiply(second, state.nu))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class OptimizerRecord(Record[optax.GradientTransformation]):
    """An optimizer. `record(schedule, **options)` builds it.

    Attributes:
        learning_rate: the learning rate of configs that give none. It is a place to
            start from: a momentum of 0.9 makes steps ten times as long, and Adam's are
            scaled.
    """

    learning_rate: float


OPTIMIZERS: Registry[OptimizerRecord] = registry(
    OptimizerRecord("sgd", sgd, (WEIGHT_DECAY,), learning_rate=0.1),
    OptimizerRecord("momentum", momentum, (MOMENTUM, WEIGHT_DECAY), learning_rate=0.01),
    OptimizerRecord("nesterov", nesterov, (MOMENTUM, WEIGHT_DECAY), learning_rate=0.01),
    OptimizerRecord(
        "heavy_ball", heavy_ball, (MOMENTUM, FORM, WEIGHT_DECAY), learning_rate=0.01
    ),
    OptimizerRecord("adam", adam, (WEIGHT_DECAY,), learning_rate=1e-3),
    OptimizerRecord("dadam", dadam, (WEIGHT_DECAY,), learning_rate=1e-3),
    OptimizerRecord("adamw", adamw, (WEIGHT_DECAY,), learning_rate=1e-3),
    kind=OptimizerRecord,
)
"""`OPTIMIZERS[name](schedule, **options)` builds an optax optimizer."""

OPTIMIZER = Option(
    "optimizer.name",
    "",
    "The local optimizer.",
    choices=OPTIMIZERS,
    empty="the algorithm's own",
)
LEARNING_RATE = Option(
    "optimizer.learning_rate",
    0.0,
    "The learning rate at the beginning of the schedule.",
    at_least=0,
    empty=", ".join(f"{r.learning_rate:g} for {r.name}" for r in OPTIMIZERS.values()),
)
