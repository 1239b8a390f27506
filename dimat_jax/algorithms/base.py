"""The types of algorithms and of their inputs, and steps that several of them share.

An algorithm works on stacked agents. It is written with two tools:
`Placement.per_agent` lifts a function of one agent to all agents, and
`mixing.mix(W, tree, placement)` averages over neighbours.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key

from dimat_jax.data.pipeline import Batch, Samples
from dimat_jax.ledger import Messages
from dimat_jax.network import Network
from dimat_jax.optimizers import CLIP_NORM, clipped, with_clocks_of
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
    "no_alignment",
    "apply_updates",
    "one_agent",
    "permute_opt_state",
    "permute_params",
]

Variables = dict[str, PyTree]
"""A dict of collections: "params", which are trained, and others like "batch_stats"."""

State = Any
"""An algorithm's own NamedTuple. Every leaf is stacked: `[agents, ...]`."""

Metrics = dict[str, Any]
"""The metrics of a step or of a communication, by name."""


class Task(NamedTuple):
    """The task that the agents learn. Its functions are for one agent.

    Attributes:
        loss: `loss(variables, batch, key) -> (loss, (model_state, metrics))`, where
            model_state holds the updated collections other than "params".
        spec: the permutation symmetry of the variables.
        activations: `activations(variables, inputs) -> {tap: array}`. It is never
            called if the spec has no groups.
        batch_statistics: `batch_statistics(variables, inputs, mask)` returns the
            batch_stats of that batch alone; None for a model without BatchNorm.
        clip_norm: the largest norm of an agent's gradient; 0 if it has no limit.
    """

    loss: Callable[[Variables, Batch, Key[Array, ""]], tuple[Array, tuple]]
    spec: PermutationSpec
    activations: Callable[[Variables, Array], dict[str, Array]] = lambda v, x: {}
    batch_statistics: Callable[[Variables, Array, Array], PyTree] | None = None
    clip_norm: float = CLIP_NORM.default


class MergeData(NamedTuple):
    """The examples that a communication looks at. A field is None if there are none.

    Attributes:
        match: the examples on which units are matched by their activations.
        recalibrate: the examples on which BatchNorm statistics are measured anew after
            the communication.
    """

    match: Samples | None = None
    recalibrate: Samples | None = None


def no_alignment(
    variables: Variables, frames: Any, data: MergeData, key: Key[Array, ""]
) -> dict[str, np.ndarray]:
    """Finds no permutations: the agents' units are averaged in the order they have."""
    del variables, frames, data, key
    return {}


class Algorithm(NamedTuple):
    """An algorithm: functions on stacked agents.

    Attributes:
        init: `init(variables) -> state` makes the state at the start.
        step: `step(state, batch, network, key) -> (state, metrics)` is one local step,
            with gossip if the algorithm gossips with every step. It is pure and may be
            jitted. Its metrics are stacked.
        communicate: `communicate(state, data, network, key) -> (state, metrics)` is
            called at least once a round. It runs on the host and jits its parts. Its
            metrics are host numbers. "frames" is one of them if the algorithm aligns
            agents; only `common_frame` reads it. `data` is None if agents that merge
            are not to merge this time.
        variables: `variables(state)` returns the variables that are evaluated, matched
            and merged.
        with_variables: `with_variables(state, variables) -> state` is called after a
            merge. It restarts what the merge makes invalid, and keeps the rest.
        with_statistics: `with_statistics(state, batch_stats) -> state` gives the agents
            other running statistics, and keeps everything else. Afterwards `variables`
            returns these statistics.
        aligned: `aligned(state, perms) -> state` permutes every field that is in an
            agent's frame, momenta included. The permutations are stacked too.
        messages: `messages(state) -> Messages` returns what one agent sends to one
            neighbour. Only shapes and dtypes matter, so `state` may consist of
            `jax.ShapeDtypeStruct`s.
        ahead: `ahead(state, batch, network, key) -> (state, metrics)` computes a local
            step that the next `communicate` takes, as `step` does otherwise. None if an
            algorithm takes no step there.
        common_frame: `common_frame(variables, frames, data, key) -> perms` finds the
            permutations that align all agents with one of them, on the host and
            stacked. It is empty if units need no permutation, or the algorithm has
            none. `frames` is the metric "frames" of the last communication, or None if
            there is none. It measures, and changes no agent.
    """

    init: Callable[[Variables], State]
    step: Callable[[State, Batch, Network, Key[Array, ""]], tuple[State, Metrics]]
    communicate: Callable[
        [State, MergeData | None, Network, Key[Array, ""]], tuple[State, Metrics]
    ]
    variables: Callable[[State], Variables]
    with_variables: Callable[[State, Variables], State]
    with_statistics: Callable[[State, PyTree], State]
    aligned: Callable[[State, Perms], State]
    messages: Callable[[State], Messages]
    ahead: (
        Callable[[State, Batch, Network, Key[Array, ""]], tuple[State, Metrics]] | None
    ) = None
    common_frame: Callable[
        [Variables, Any, MergeData, Key[Array, ""]], dict[str, np.ndarray]
    ] = no_alignment


class Gradient(NamedTuple):
    """One agent's gradient, with the other results of the same pass.

    Attributes:
        grads: the gradient, shaped like `variables["params"]`.
        model_state: the updated collections other than "params".
        metrics: scalars, which are means over the batch. The entry "examples" is the
            number of examples in it.
    """

    grads: PyTree
    model_state: PyTree
    metrics: Metrics


def gradient(
    task: Task, variables: Variables, batch: Batch, key: Key[Array, ""]
) -> Gradient:
    """Computes one agent's gradient with respect to its params. The key is consumed.

    The gradient is clipped to the task's `clip_norm`. Every algorithm computes its
    gradients here, so memories such as trackers are made of clipped gradients too. If
    the batch holds no example, the gradient is 0 and no collection is updated.
    """

    def loss(params):
        return task.loss({**variables, "params": params}, batch, key)

    (_, (model_state, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(
        variables["params"]
    )
    grads = clipped(grads, task.clip_norm)
    idle = jax.tree.map(jnp.zeros_like, grads), {k: variables[k] for k in model_state}
    grads, model_state = keep_idle(batch, (grads, model_state), idle)
    return Gradient(grads, model_state, {**metrics, "examples": batch.mask.sum()})


def keep_idle(batch: Batch, new: PyTree, old: PyTree) -> PyTree:
    """Returns one agent's new state, or its old one if its batch holds no example.

    Learning-rate clocks go on in both cases: schedules count the steps of the whole
    run, not those of one agent.
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
    """Computes one agent's optimizer step.

    Args:
        tx: the optimizer.
        batch: the agent's batch. If it holds no example, the updates are 0 and the
            state does not change, learning-rate clocks aside.
        direction: the gradient, or the direction that an algorithm uses instead.
        opt_state: the optimizer's state.
        params: the agent's params.

    Returns:
        the updates, which are to be added to the params, and the new optimizer state.
    """
    updates, new = tx.update(direction, opt_state, params)
    no_updates = jax.tree.map(jnp.zeros_like, updates)
    return keep_idle(batch, (updates, new), (no_updates, opt_state))


def apply_updates(variables: Variables, updates: PyTree) -> Variables:
    """Adds updates to the params of some variables, one agent's or stacked ones."""
    return {**variables, "params": optax.apply_updates(variables["params"], updates)}


def one_agent(stacked: PyTree) -> PyTree:
    """Returns one agent's part of a stacked tree, as `jax.ShapeDtypeStruct`s."""
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
    """Permutes what is shaped like the params in one agent's optimizer state.

    Momenta are in the frame of the params that they move; counters are in no frame.
    """
    return optax.tree.map_params(
        tx,
        lambda leaf, path: permute_leaf(spec.axes[f"params/{path}"], perms, leaf),
        opt_state,
        map_with_path(lambda path, _: path, params),
    )
