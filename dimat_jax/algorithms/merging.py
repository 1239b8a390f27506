"""Merging: align the neighbours' networks, average, recalibrate, train on.

    x_i  <-  sum_j W_ij P_ij x_j

P_ij permutes agent j's hidden units onto agent i's (DIMAT, arXiv 2404.08079, equation
4 and Algorithms 1 to 3): by their activations (DIMAT) or by their weights (WM). Without
the permutations it is weight averaging (WA).
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dimat_jax.algorithms.base import Algorithm, MergeData, State, Task, Variables
from dimat_jax.algorithms.edges import (
    ActivationMatcher,
    EdgePerms,
    WeightMatcher,
    match_edges,
)
from dimat_jax.algorithms.frames import MEETINGS, same_frame
from dimat_jax.data.pipeline import Samples
from dimat_jax.matching.assignment import check_stay
from dimat_jax.merge import add_batch
from dimat_jax.network import Network
from dimat_jax.optimizers import with_clocks_of
from dimat_jax.placement import Placement
from dimat_jax.stopwatch import Stopwatch
from dimat_jax.tree import PyTree, take

__all__ = ["OptStatePolicy", "Recalibrator", "merging"]

OptStatePolicy = Literal["reset", "keep", "merge"]


def merging(
    inner: Algorithm,
    task: Task,
    placement: Placement,
    *,
    match: Literal["activations", "weights"] | None,
    frame: str = "own",
    stay: float = 0.0,
    opt_state: OptStatePolicy = "reset",
    restarts: int = 1,
) -> Algorithm:
    """Adds a merge, once a round, to an algorithm that has no rounds of its own.

    Args:
        inner: how agents train between merges, e.g. `local`.
        task: what they learn.
        placement: where they live.
        match: by what networks are aligned before they are averaged; None: they are
            averaged as they are.
        frame: "own": every agent aligns each neighbour to itself, and stays in its own
            frame. "reference": along a spanning tree every agent moves into the frame
            of a root, one for each connected component, and stays there. "joint": as
            "own", with permutations that agree round every cycle.
        stay: a unit moves only if its mean score, a correlation or what weights have
            that is like one, gains more than this.
        opt_state: what becomes of the optimizer at a merge: "reset" it (learning-rate
            schedules go on), "keep" it, or "merge" it like the weights.
        restarts: how often weights are matched from another start; the best counts.

    Raises:
        ValueError: an unknown frame or policy, `stay` < 0, or `restarts` < 1.
    """
    if frame not in MEETINGS:
        raise ValueError(f"frame is one of {sorted(MEETINGS)}, got {frame!r}")
    if opt_state not in get_args(OptStatePolicy):
        raise ValueError(
            f"opt_state is one of {get_args(OptStatePolicy)}, got {opt_state!r}"
        )
    check_stay(stay)

    def exchanged(state: State) -> PyTree:
        """The part of a state that is sent, aligned and averaged."""
        return state if opt_state == "merge" else inner.variables(state)

    @partial(jax.jit, out_shardings=placement.sharding)
    def absorb(state: State, merged: PyTree) -> State:
        """The state that goes on training from what was merged."""
        if opt_state == "merge":
            return merged
        if opt_state == "keep":
            return inner.with_variables(state, merged)
        return with_clocks_of(inner.init(merged), state)

    meet, matcher = same_frame(inner, exchanged), None
    # Without hidden units there is nothing to align (a linear model, a convex problem).
    if match is not None and task.spec.groups:
        meet = MEETINGS[frame](inner, exchanged)
        matcher = (
            ActivationMatcher(task.spec, task.activations, placement)
            if match == "activations"
            else WeightMatcher(task.spec, placement, restarts)
        )
    recalibrate = None
    if task.batch_statistics is not None:
        recalibrate = Recalibrator(task.batch_statistics, placement)

    def communicate(state, data: MergeData, network: Network, key):
        stopwatch = Stopwatch()
        key, match_key = jax.random.split(key)
        matched = {"moved_units": 0.0}

        def match_along(state, edges, joint):
            assert matcher is not None  # only frames that align ask
            perms, similarity = match_edges(
                matcher,
                inner.variables(state),
                edges,
                data,
                placement=placement,
                joint=joint,
                stay=stay,
                key=match_key,
                stopwatch=stopwatch,
            )
            matched["moved_units"] = _moved_units(perms)
            matched["match_similarity"] = similarity
            return perms

        state, metrics = inner.communicate(state, data, network, key)
        with stopwatch("mix") as block:
            state, merged = meet(state, network, match_along)
            state = block(absorb(state, merged))
        if recalibrate is not None and data.recalibrate is not None:
            with stopwatch("recalibration") as block:
                variables = recalibrate(inner.variables(state), data.recalibrate)
                state = block(inner.with_variables(state, variables))
        return state, {
            **metrics,
            **matched,
            "merge_seconds": stopwatch.seconds,
        }

    def messages(state):
        one_agent = jax.eval_shape(lambda s: take(exchanged(s), 0), state)
        return inner.messages(state)._replace(round=one_agent)

    return inner._replace(communicate=communicate, messages=messages)


class Recalibrator:
    """Measures BatchNorm statistics anew: batch means and variances, averaged.

    Averaged weights do not have the averages of the statistics (Jordan et al. 2022);
    without this step merged networks with BatchNorm are worth little.
    """

    def __init__(
        self,
        batch_statistics: Callable[[Variables, Array, Array], PyTree],
        placement: Placement,
    ):
        def add(total, count, variables, inputs, mask):
            statistics = batch_statistics(variables, inputs, mask)
            n = mask.sum().astype(jnp.float32)
            return add_batch(total, count, statistics, n)

        self._add = {
            shared: jax.jit(
                placement.per_agent(
                    add, in_axes=(0, 0, 0, *[None if shared else 0] * 2)
                ),
                donate_argnums=(0, 1),
            )
            for shared in (True, False)
        }
        self._mean = jax.jit(
            placement.per_agent(lambda t, n: jax.tree.map(lambda x: x / n, t)),
            out_shardings=placement.sharding,
        )
        self._placement = placement

    def __call__(self, variables: Variables, samples: Samples) -> Variables:
        """Stacked variables with the statistics of `samples`, own or shared."""
        zeros = self._placement.zeros
        total = jax.tree.map(lambda x: zeros(*x.shape[1:]), variables["batch_stats"])
        count = zeros()
        for inputs, _, mask in samples:
            total, count = self._add[samples.shared](
                total, count, variables, inputs, mask
            )
        return {**variables, "batch_stats": self._mean(total, count)}


def _moved_units(perms: EdgePerms) -> float:
    """The share of units, over edges and groups, that matching moved."""
    moved = [
        np.asarray(perm) != np.arange(len(perm))
        for edge_perms in perms.values()
        for perm in edge_perms.values()
    ]
    return float(np.concatenate(moved).mean())
