"""Merging: align the neighbours' networks, average, recalibrate, train on.

    x_i  <-  sum_j W_ij P_ij x_j

P_ij permutes agent j's hidden units onto agent i's (DIMAT, arXiv 2404.08079, equation
4 and Algorithms 1 to 3): by their activations (DIMAT) or by their weights (WM). Without
the permutations it is weight averaging (WA).

Weights are normalised by what arrives: where links fail in a directed network, or W is
column-stochastic, an agent takes the average of what it has.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dimat_jax._stopwatch import Stopwatch
from dimat_jax.algorithms._announcing import announcing
from dimat_jax.algorithms._edges import (
    ActivationMatcher,
    EdgePerms,
    WeightMatcher,
    match_edges,
)
from dimat_jax.algorithms._frames import MEETINGS, same_frame
from dimat_jax.algorithms._traffic import matching_bytes
from dimat_jax.algorithms.base import (
    Algorithm,
    MergeData,
    Metrics,
    State,
    Task,
    Variables,
    one_agent,
)
from dimat_jax.algorithms.local import LocalState, local_part, with_opt_state
from dimat_jax.compression import Compressor, none
from dimat_jax.data.pipeline import Samples
from dimat_jax.errors import UserError
from dimat_jax.matching._assignment import check_stay
from dimat_jax.merge import add_batch
from dimat_jax.network import Network
from dimat_jax.optimizers import with_clocks_of
from dimat_jax.placement import Placement
from dimat_jax.tree import PyTree, nbytes, take

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
    compressor: Compressor = none(),  # noqa: B008
) -> Algorithm:
    """Adds a merge, once a round, to an algorithm that has no rounds of its own.

    Args:
        inner: how agents train between merges: `local`, or gossip with every step,
            which mixes weights as they are, and so is at its best in one frame for all.
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
        compressor: of what is sent; see `announcing`.

    Raises:
        ValueError: an unknown frame or policy, `stay` < 0, or `restarts` < 1.
        UserError: optimizers are to be merged, and messages to be compressed.
    """
    if frame not in MEETINGS:
        raise ValueError(f"frame is one of {sorted(MEETINGS)}, got {frame!r}")
    if opt_state not in get_args(OptStatePolicy):
        raise ValueError(
            f"opt_state is one of {get_args(OptStatePolicy)}, got {opt_state!r}"
        )
    check_stay(stay)

    def exchanged(state: State) -> LocalState:
        """The part of a state that is sent, aligned and averaged."""
        optimizer = local_part(state).opt_state if opt_state == "merge" else ()
        return LocalState(inner.variables(state), optimizer)

    @partial(jax.jit, out_shardings=placement.sharding)
    def absorb(state: State, merged: LocalState) -> State:
        """The state that goes on training from what was merged."""
        if opt_state == "reset":
            return with_clocks_of(inner.init(merged.variables), state)
        if opt_state == "merge":
            state = with_opt_state(state, merged.opt_state)
        return inner.with_variables(state, merged.variables)

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

    def merge_round(state, announced, data: MergeData, network: Network, key):
        stopwatch = Stopwatch()
        key, match_key = jax.random.split(key)
        network = _averaged(network)
        active = np.asarray(network.active_edges)
        matched: Metrics = {"moved_units": 0.0}

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
            units = [len(perm) for perm in next(iter(perms.values())).values()]
            if matcher.both_ways(data):
                edges = edges[edges[:, 0] < edges[:, 1]]
            matched["matching_bytes"] = matching_bytes(
                frame,
                active,
                pairs=edges,
                perms=4 * sum(units),
                scores=4 * sum(n**2 for n in units) if match == "activations" else 0,
                weights=nbytes(one_agent(inner.variables(state)["params"])),
            )
            return perms

        state, metrics = inner.communicate(state, data, network, key)
        with stopwatch("mix") as block:
            state, announced, merged = meet(state, announced, network, match_along)
            state = block(absorb(state, merged))
        if recalibrate is not None and data.recalibrate is not None:
            with stopwatch("recalibration") as block:
                variables = recalibrate(inner.variables(state), data.recalibrate)
                state = block(inner.with_variables(state, variables))
        metrics = {**metrics, **matched, "merge_seconds": stopwatch.seconds}
        return state, announced, metrics

    def communicate(state, data, network, key):
        state, _, metrics = merge_round(state, None, data, network, key)
        return state, metrics

    def messages(state):
        variables, optimizer = jax.eval_shape(lambda s: take(exchanged(s), 0), state)
        whole = {**variables, "optimizer": optimizer}
        return inner.messages(state)._replace(round=whole)

    merged = inner._replace(communicate=communicate, messages=messages)
    if compressor.lossless:
        return merged
    if opt_state == "merge":
        raise UserError(
            "moments do not survive compression (a second moment that is lost turns "
            "up as a large step): compressed merging needs opt_state 'keep' or 'reset'"
        )
    return announcing(merged, placement, merge_round=merge_round, compressor=compressor)


def _averaged(network: Network) -> Network:
    """A network whose weights sum to 1 for every receiver."""
    received = np.asarray(network.W, np.float64).sum(axis=1)
    if np.allclose(received, 1, atol=1e-6):
        return network
    return network._replace(W=network.W / received[:, None].astype(np.float32))


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
