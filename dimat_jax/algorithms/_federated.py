"""Rounds with a server: agents train from its model, and it averages what comes back.

In every communication the present agents that hold the server's latest model, and have
trained from it, send their models. The server takes its step, and all present agents
get its new model. What an agent has trained from an older model is lost.

If the server draws agents (`server.sampled`), those that took part in the last round
always deliver their models, whether they take part in the next one or not. In the first
communication the server gets its model from the agents that it has just drawn.

The server lives in the agents' states: an agent's memory "change" is the difference of
its params from the model that it got last, and the server's moments are kept by all who
got that model. So the state of the server is in the slot of any agent that has the
largest turn, whether it is present or not.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from dimat_jax.algorithms.base import (
    Metrics,
    Task,
    apply_updates,
    gradient,
    optimizer_step,
)
from dimat_jax.algorithms.local import LocalState
from dimat_jax.algorithms.memory import MemoryState
from dimat_jax.algorithms.server import ServerOptimizer
from dimat_jax.data.pipeline import Batch
from dimat_jax.mixing import mix
from dimat_jax.placement import Placement
from dimat_jax.tree import PyTree

__all__ = ["Averages", "Turn", "counted_examples", "no_turns", "trained", "turn_of"]


def counted_examples(
    placement: Placement, examples: Sequence[int] | None
) -> Float[Array, " slots"]:
    """Returns what each agent counts: its examples, or 1 if all count the same."""
    counts = jnp.ones(placement.n_agents)
    if examples is not None:
        counts = jnp.asarray(examples, jnp.float32)
    return jnp.zeros(placement.slots).at[: placement.n_agents].set(counts)


def no_turns(placement: Placement) -> dict[str, Array]:
    """Makes the mark "turn": the number of the server's model that an agent has got."""
    return {"turn": jnp.zeros(placement.slots, int, device=placement.sharding)}


def trained(
    task: Task,
    tx: optax.GradientTransformation,
    state: MemoryState,
    batch: Batch,
    key: Key[Array, ""],
    correct: Callable[[PyTree, dict[str, PyTree]], PyTree],
) -> tuple[MemoryState, PyTree, Metrics]:
    """Takes one agent's local step, and adds it to the memory "change".

    Args:
        task: the task that the agents learn.
        tx: the local optimizer.
        state: the agent's state.
        batch: the agent's batch.
        key: the randomness of the step; the key is consumed.
        correct: `correct(gradient, memory) -> direction` returns what the optimizer
            gets instead of the gradient.

    Returns:
        the new state, the gradient, and the metrics.
    """
    variables, opt_state = state.local
    grads, model_state, metrics = gradient(task, variables, batch, key)
    direction = correct(grads, state.memory)
    updates, opt_state = optimizer_step(
        tx, batch, direction, opt_state, variables["params"]
    )
    variables = apply_updates({**variables, **model_state}, updates)
    change = jax.tree.map(jnp.add, state.memory["change"], updates)
    memory = {**state.memory, "change": change}
    state = MemoryState(LocalState(variables, opt_state), memory, state.marks)
    return state, grads, metrics


class Turn(NamedTuple):
    """Who takes part in a communication with the server.

    Attributes:
        heard: the agents whose models the server averages. If the server draws agents,
            they need not be present.
        any_heard: whether there are any.
        W: the weights of the average, in the rows of the present agents. If no model
            arrives, they choose the slot that holds the server's own.
        holder: for each present agent the slot with the server's moments; for an absent
            one itself.
        next: the mark "turn" after the communication.
        first: whether the server has had no model so far.
    """

    heard: Bool[Array, " slots"]
    any_heard: Bool[Array, ""]
    W: Float[Array, "slots slots"]
    holder: Int[Array, " slots"]
    next: Int[Array, " slots"]
    first: Bool[Array, ""]


def turn_of(
    turn: Int[Array, " slots"],
    present: Bool[Array, " slots"],
    counts: Float[Array, " slots"],
    sampled: bool = False,
) -> Turn:
    """Finds who takes part in a communication.

    Args:
        turn: the mark "turn".
        present: the agents that are to train from the server's new model.
        counts: what each agent counts.
        sampled: whether the server draws agents for each round.
    """
    slots, latest = jnp.arange(len(turn)), turn.max()
    newest = turn == latest
    heard, holder = present & newest, jnp.argmax(newest)
    if sampled:
        heard = jnp.where(latest == 0, present, newest)
    any_heard = heard.any()
    shares = jnp.where(heard, counts, 0)
    shares = shares / jnp.maximum(shares.sum(), jnp.finfo(shares.dtype).tiny)
    shares = jnp.where(any_heard, shares, (slots == holder).astype(shares.dtype))
    return Turn(
        heard,
        any_heard,
        W=jnp.where(present[:, None], shares[None, :], jnp.eye(len(turn))),
        holder=jnp.where(present, holder, slots),
        next=jnp.where(present, latest + 1, turn),
        first=latest == 0,
    )


class Averages:
    """The server's side of a communication.

    Running statistics are averaged like the params, and optimizer states are kept.

    Args:
        placement: the devices on which the agents live.
        counts: what each agent counts in an average.
        server: what the server makes of the mean change.
        sampled: whether the server draws agents for each round.
    """

    def __init__(
        self,
        placement: Placement,
        counts: Float[Array, " slots"],
        server: ServerOptimizer,
        sampled: bool = False,
    ):
        self._placement, self._counts, self._server = placement, counts, server
        self._sampled = sampled

    def __call__(
        self, state: MemoryState, present: Bool[Array, " slots"]
    ) -> MemoryState:
        """Returns the agents' states after a communication."""
        turn = turn_of(state.marks["turn"], present, self._counts, self._sampled)
        variables, change = state.local.variables, state.memory["change"]
        # If no model arrives, agents keep their statistics: the server has none.
        others = {name: tree for name, tree in variables.items() if name != "params"}
        W = jnp.where(turn.any_heard, turn.W, jnp.eye(len(present)))
        others = mix(W, others, self._placement)
        # An agent that is not heard knows the server's model, and not more.
        sent = jax.tree.map(
            lambda x, d: jnp.where(_rows(turn.heard, x), x, x - d),
            variables["params"],
            change,
        )
        if self._server.plain:
            params, moments = mix(turn.W, sent, self._placement), {}
        else:
            params, moments = self._stepped(turn, sent, change, state.memory)
        change = jax.tree.map(
            lambda d: jnp.where(_rows(present, d), jnp.zeros_like(d), d), change
        )
        return state._replace(
            local=state.local._replace(variables={**others, "params": params}),
            memory={**state.memory, **moments, "change": change},
            marks={**state.marks, "turn": turn.next},
        )

    def _stepped(
        self, turn: Turn, sent: PyTree, change: PyTree, memory: dict[str, PyTree]
    ) -> tuple[PyTree, dict[str, PyTree]]:
        """Returns the server's new model and moments, in the rows of the present."""
        change = jax.tree.map(
            lambda d: jnp.where(_rows(turn.heard, d), d, jnp.zeros_like(d)), change
        )
        mean, change = mix(turn.W, (sent, change), self._placement)
        names = self._server.moments
        old = {name: memory[name] for name in names}
        old = self._placement.pick(old, turn.holder) if names else old
        step, new = self._server.step(change, old)
        # Before the first model of the server there is no change from it.
        steps = turn.any_heard & ~turn.first
        params = jax.tree.map(
            lambda x, d, u: jnp.where(steps, x + (u - d), x), mean, change, step
        )
        return params, jax.tree.map(lambda n, o: jnp.where(steps, n, o), new, old)


def _rows(mask: Bool[Array, " slots"], leaf: Array) -> Array:
    """Shapes a mask of agents so that it selects rows of a stacked leaf."""
    return mask.reshape(-1, *[1] * (leaf.ndim - 1))
