"""What an algorithm is, and what it is given.

An algorithm lives at the level of stacked agents. It is written with two things: what
an agent does alone, lifted by `Placement.per_agent`, and `mixing.mix(W, tree)`, by
which agents talk.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from dimat_jax.data.pipeline import Batch, Samples
from dimat_jax.ledger import Messages
from dimat_jax.network import Network
from dimat_jax.optimizers import with_clocks_of
from dimat_jax.permutation import Perms, PermutationSpec, permute_leaf
from dimat_jax.tree import PyTree, map_with_path, take

__all__ = [
    "Algorithm",
    "Gradient",
    "MergeData",
    "Metrics",
    "State",
    "Task",
    "Variables",
    "optimizer_step",
    "gradient",
    "keep_idle",
    "apply_updates",
    "one_agent",
    "permute_opt_state",
    "permute_params",
]

Variables = dict[str, PyTree]
"""{"params": what is trained, other collections: e.g. "batch_stats"}."""

State = Any
"""An algorithm's own NamedTuple. Every leaf is stacked: `[agents, ...]`."""

Metrics = dict[str, Any]


class Task(NamedTuple):
    """What is to be learned, for one agent.

    Attributes:
        loss: `loss(variables, batch, key) -> (loss, (model_state, metrics))`, where
            model_state holds the collections other than "params", updated.
        spec: the permutation symmetry of the variables.
        activations: `activations(variables, inputs) -> {tap: array}`; never called
            where the spec has no groups.
        batch_statistics: `(variables, inputs, mask) -> batch_stats` of that batch
            alone; None for a model without BatchNorm.
    """

    loss: Callable[[Variables, Batch, Key[Array, ""]], tuple[Array, tuple]]
    spec: PermutationSpec
    activations: Callable[[Variables, Array], dict[str, Array]] = lambda v, x: {}
    batch_statistics: Callable[[Variables, Array, Array], PyTree] | None = None


class MergeData(NamedTuple):
    """The examples that merging looks at; None where nothing is to be looked at.

    Attributes:
        match: for activations.
        recalibrate: for BatchNorm statistics.
    """

    match: Samples | None = None
    recalibrate: Samples | None = None


class Algorithm(NamedTuple):
    """The shape of every algorithm. All of it is on stacked agents.

    Attributes:
        init: `init(variables) -> state`.
        step: `step(state, batch, network, key) -> (state, metrics)`: one local step,
            with gossip if it gossips per step. Pure, to be jitted. Metrics are stacked.
        communicate: `communicate(state, data, network, key) -> (state, metrics)`, once
            a round. Runs on the host (it jits its parts); metrics are host numbers.
        variables: `variables(state)`: what is evaluated, matched and merged.
        with_variables: `with_variables(state, variables) -> state`: after a merge;
            restarts what the merge invalidates and keeps the rest.
        aligned: `aligned(state, perms) -> state`, perms stacked too: permutes every
            field that lives in an agent's frame, momenta included.
        messages: `messages(state) -> Messages`: what one agent sends one neighbour.
            Shapes alone matter: `state` may be of `jax.ShapeDtypeStruct`s.
    """

    init: Callable[[Variables], State]
    step: Callable[[State, Batch, Network, Key[Array, ""]], tuple[State, Metrics]]
    communicate: Callable[
        [State, MergeData, Network, Key[Array, ""]], tuple[State, Metrics]
    ]
    variables: Callable[[State], Variables]
    with_variables: Callable[[State, Variables], State]
    aligned: Callable[[State, Perms], State]
    messages: Callable[[State], Messages]


class Gradient(NamedTuple):
    """One agent's gradient, and what else its batch brought.

    Attributes:
        grads: as `variables["params"]`.
        model_state: the other collections, updated.
        metrics: scalars, with the number of "examples" they are means of.
    """

    grads: PyTree
    model_state: PyTree
    metrics: Metrics


def gradient(
    task: Task, variables: Variables, batch: Batch, key: Key[Array, ""]
) -> Gradient:
    """One agent's gradient with respect to its params. The key is consumed.

    An agent whose batch holds no example has a gradient of 0, and nothing is updated.
    """

    def loss(params):
        return task.loss({**variables, "params": params}, batch, key)

    (_, (model_state, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(
        variables["params"]
    )
    idle = jax.tree.map(jnp.zeros_like, grads), {k: variables[k] for k in model_state}
    grads, model_state = keep_idle(batch, (grads, model_state), idle)
    return Gradient(grads, model_state, {**metrics, "examples": batch.mask.sum()})


def keep_idle(batch: Batch, new: PyTree, old: PyTree) -> PyTree:
    """One agent's new state, or its old one if its batch holds no example at all.

    Learning-rate clocks go on all the same: schedules count everybody's steps.
    """
    busy, idle = batch.mask.any(), with_clocks_of(old, new)
    return jax.tree.map(lambda n, o: jnp.where(busy, n, o), new, idle)


def optimizer_step(
    tx: optax.GradientTransformation,
    batch: Batch,
    direction: PyTree,
    opt_state: optax.OptState,
    params: PyTree,
) -> tuple[PyTree, optax.OptState]:
    """One agent's optimizer step: what is to be added to its params, and its state.

    Args:
        tx: the optimizer.
        batch: without an example there is no step.
        direction: the gradient, or what an algorithm has in place of it.
        opt_state: the optimizer's state.
        params: where the agent stands.
    """
    updates, new = tx.update(direction, opt_state, params)
    still = jax.tree.map(jnp.zeros_like, updates)
    return keep_idle(batch, (updates, new), (still, opt_state))


def apply_updates(variables: Variables, updates: PyTree) -> Variables:
    """Variables whose params took a step; one agent's, or stacked."""
    return {**variables, "params": optax.apply_updates(variables["params"], updates)}


def one_agent(stacked: PyTree) -> PyTree:
    """One agent's part of a stacked tree, as `jax.ShapeDtypeStruct`s: a message."""
    return jax.eval_shape(lambda tree: take(tree, 0), stacked)


def permute_params(spec: PermutationSpec, perms: Perms, params: PyTree) -> PyTree:
    """Permutes one agent's tree that is shaped like its params, e.g. a momentum."""
    return map_with_path(
        lambda path, leaf: permute_leaf(spec.axes[f"params/{path}"], perms, leaf),
        params,
    )


def permute_opt_state(
    tx: optax.GradientTransformation,
    spec: PermutationSpec,
    perms: Perms,
    opt_state: optax.OptState,
    params: PyTree,
) -> optax.OptState:
    """Permutes whatever in one agent's optimizer state is shaped like its params.

    Momenta live in the frame of the params that they move; counters live in none.
    """
    return optax.tree.map_params(
        tx,
        lambda leaf, path: permute_leaf(spec.axes[f"params/{path}"], perms, leaf),
        opt_state,
        map_with_path(lambda path, _: path, params),
    )
