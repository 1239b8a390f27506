"""Merging: align the neighbours' networks, average them, train on.

    x_i  <-  sum_j W_ij P_ij x_j

P_ij permutes agent j's hidden units onto agent i's (DIMAT, arXiv 2404.08079, equation
4 and Algorithms 1 to 3). It is found from activations (DIMAT) or from weights (WM);
without permutations the rule is weight averaging (WA).

The weights W_ij of a receiver are normalised to the sum 1. They have another sum if
links fail in a directed network, or if W is column-stochastic.
"""

from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Key

from dimat_jax._stopwatch import Stopwatch
from dimat_jax.algorithms._ahead import GRADIENT, looking_ahead, stepped
from dimat_jax.algorithms._announcing import announcing
from dimat_jax.algorithms._common_frame import CommonFrame, frames_after
from dimat_jax.algorithms._edges import (
    EdgePerms,
    Edges,
    MatchedEdges,
    Matcher,
    match_edges,
)
from dimat_jax.algorithms._frames import (
    AS_THEY_ARE,
    FRAMES,
    Exchanged,
    Frame,
    Views,
)
from dimat_jax.algorithms._matchers import ActivationMatcher, WeightMatcher
from dimat_jax.algorithms._traffic import matching_sizes
from dimat_jax.algorithms.base import (
    Algorithm,
    MergeData,
    Metrics,
    State,
    Task,
    one_agent,
)
from dimat_jax.algorithms.local import LocalState, local_part, with_opt_state
from dimat_jax.compression import Compressor, none
from dimat_jax.errors import UserError
from dimat_jax.matching._assignment import STAY
from dimat_jax.matching._taps import with_last_taps
from dimat_jax.matching._weight import RESTARTS
from dimat_jax.network import Network
from dimat_jax.optimizers import with_bias, with_clocks_of, without_bias
from dimat_jax.options import Option
from dimat_jax.placement import Placement
from dimat_jax.tree import take

__all__ = ["FRAME", "OPT_STATE", "TAPS", "check_moments", "merging"]

FRAME = Option(
    "merge.frame",
    "own",
    "The frame in which agents merge. A frame is an order of the hidden units, to "
    "which networks are aligned before they are averaged.",
    choices=FRAMES,
)
OPT_STATE = Option(
    "merge.opt_state",
    "reset",
    'What happens to the optimizer state at a merge. "reset": it starts anew, while '
    'learning-rate schedules go on. "keep": it does not change. "merge": it is '
    "permuted and averaged like the weights. Moments are averaged without their bias, "
    "so that agents may have taken different numbers of steps.",
    choices=("reset", "keep", "merge"),
)
TAPS = Option(
    "merge.taps",
    "all",
    "The taps at which units are matched, if the same units show at several ones, as "
    "those of a residual stream do: their mean correlation over all taps counts, or "
    "the one at the last tap, which the published code uses.",
    choices=("all", "last"),
)


def merging(
    inner: Algorithm,
    task: Task,
    placement: Placement,
    *,
    match: Literal["activations", "weights"] | None,
    frame: str = FRAME.default,
    stay: float = STAY.default,
    opt_state: str = OPT_STATE.default,
    gradient: str = GRADIENT.default,
    taps: str = TAPS.default,
    restarts: int = RESTARTS.default,
    compressor: Compressor = none(),  # noqa: B008
) -> Algorithm:
    """Adds a merge, once a round, to an algorithm.

    Args:
        inner: the algorithm between merges: `local`, or one that gossips with every
            step. Gossip mixes weights without permuting them, so it works best if all
            agents are in one frame. What `inner` does once a round comes first.
        task: the task that the agents learn.
        placement: the devices on which the agents live.
        match: the property by which units are matched; None if networks are averaged
            without matching.
        frame: the frame in which agents merge: one of `FRAMES`.
        stay: the score that a unit must gain to move; see `STAY`.
        opt_state: the policy for the optimizer state at a merge; see `OPT_STATE`.
        gradient: where the gradient of the step after a merge is computed; see
            `GRADIENT`. For "before_merge", `inner` must be `local`.
        taps: the taps at which units are matched by their activations; see `TAPS`.
        restarts: the number of times that weights are matched; see `RESTARTS`.
        compressor: the compressor of the messages; see `announcing`.

    Raises:
        OptionError: a name is unknown, `stay` < 0, or `restarts` < 1.
        UserError: optimizer states are merged although messages are compressed.
    """
    FRAME.check(frame)
    STAY.check(stay)
    OPT_STATE.check(opt_state)
    GRADIENT.check(gradient)
    TAPS.check(taps)
    RESTARTS.check(restarts)
    check_moments(opt_state, compressor)
    chosen, matcher = AS_THEY_ARE, None
    # A model without hidden units (a linear one, a convex problem) needs no alignment.
    if match is not None and task.spec.groups:
        chosen = FRAMES[frame]
        spec = with_last_taps(task.spec) if taps == "last" else task.spec
        matcher = (
            ActivationMatcher(spec, task.activations, placement)
            if match == "activations"
            else WeightMatcher(task.spec, placement, restarts)
        )
    if gradient == "before_merge":
        inner = looking_ahead(inner, task, placement)
    merge_round = _MergeRound(
        inner, task, placement, chosen, matcher, stay=stay, opt_state=opt_state
    )
    merged = inner._replace(
        communicate=merge_round.communicate, messages=merge_round.messages
    )
    if matcher is not None:
        merged = merged._replace(
            common_frame=CommonFrame(matcher, placement, joint=chosen.joint, stay=stay)
        )
    if compressor.lossless:
        return merged
    return announcing(merged, placement, merge_round=merge_round, compressor=compressor)


def check_moments(opt_state: str, compressor: Compressor) -> None:
    """Refuses to merge moments that compressed messages have lost.

    Raises:
        UserError: optimizer states are to be merged, and messages to be compressed.
    """
    if opt_state == "merge" and not compressor.lossless:
        raise UserError(
            "opt_state is 'merge', but the optimizer's moments do not survive "
            "compression (a second moment that is lost turns up as a large step); it "
            "must be 'keep' or 'reset'"
        )


class _MergeRound:
    """The merge that `merging` adds to an algorithm, once a round.

    Args:
        inner: the algorithm between merges.
        task: the task that the agents learn.
        placement: the devices on which the agents live.
        frame: the frame in which agents merge.
        matcher: the way of matching; None only for a frame without edges.
        stay: the score that a unit must gain to move.
        opt_state: the policy for the optimizer state.
    """

    def __init__(
        self,
        inner: Algorithm,
        task: Task,
        placement: Placement,
        frame: Frame,
        matcher: Matcher | None,
        *,
        stay: float,
        opt_state: str,
    ):
        self._inner, self._task, self._placement = inner, task, placement
        self._frame, self._matcher, self._stay = frame, matcher, stay
        self._opt_state = opt_state
        self._merge = frame.build(
            inner, Exchanged(self._exchanged, self._with_part), placement
        )
        self._absorb = jax.jit(self._absorbed, out_shardings=placement.sharding)

    def __call__(
        self, views: Views, data: MergeData, network: Network, key: Key[Array, ""]
    ) -> tuple[Views, Metrics]:
        """Runs one round: what `inner` does once a round, and then the merge.

        Args:
            views: the agents' exact states, and the states that the neighbours know.
            data: the examples that merging looks at.
            network: the network of this round.
            key: the randomness of the round; the key is consumed.

        Returns:
            the new views, and host numbers: "moved_units", "match_similarity",
            "matching_bytes" and "merge_seconds"; also "match_samples_used", if units
            were compared on examples, and the `Frames`, if units were permuted.
        """
        stopwatch = Stopwatch()
        key, match_key = jax.random.split(key)
        network = _normalised(network)
        active_edges = np.asarray(network.active_edges)
        state, metrics = self._inner.communicate(views.own, data, network, key)
        views = views._replace(own=state)
        match = partial(
            match_edges,
            self._matcher,
            data=data,
            placement=self._placement,
            joint=self._frame.joint,
            stay=self._stay,
            key=match_key,
            stopwatch=stopwatch,
        )
        with stopwatch("mix") as block:
            edges = self._frame.edges(active_edges)
            matched = match(self._inner.variables(views.known), edges)
            views, merged = self._merge(views, matched.perms, network.W)
            state = block(self._absorb(views.own, merged))
        metrics = {
            **metrics,
            **self._report(state, matched, edges, active_edges, data),
            "merge_seconds": stopwatch.seconds,
        }
        return views._replace(own=state), metrics

    def _report(
        self,
        state: State,
        matched: MatchedEdges,
        edges: Edges,
        active_edges: np.ndarray,
        data: MergeData,
    ) -> Metrics:
        """Returns the metrics of the matching, as host numbers."""
        perms, similarity, n_batches = matched
        if self._matcher is None:
            return {"moved_units": 0.0}
        frames = frames_after(self._frame, perms, self._placement.slots)
        if not perms:
            return {"moved_units": 0.0, "frames": frames}
        sizes = matching_sizes(
            self._task.spec,
            one_agent(self._inner.variables(state)),
            by_activations=self._matcher.by_activations,
        )
        if self._matcher.both_ways(data):
            edges = edges[edges[:, 0] < edges[:, 1]]
        report: Metrics = {
            "frames": frames,
            "moved_units": _share_of_moved_units(perms),
            "match_similarity": similarity,
            "matching_bytes": self._frame.traffic(active_edges, edges, sizes),
        }
        if data.match is not None and n_batches:
            report["match_samples_used"] = data.match.n_examples(n_batches)
        return report

    def _exchanged(self, state: State) -> LocalState:
        """Returns the part of a state that is sent, aligned and averaged."""
        merged = self._opt_state == "merge"
        optimizer = without_bias(local_part(state).opt_state) if merged else ()
        return LocalState(self._inner.variables(state), optimizer)

    def _absorbed(self, state: State, merged: LocalState) -> State:
        """Returns the state with which training goes on after the merge."""
        if self._opt_state == "reset":
            new = with_clocks_of(self._inner.init(merged.variables), state)
        else:
            new = self._with_part(state, merged)
        # The stored step and the merged weights are in the same frame, that of `state`,
        # so the step can be added to them.
        return stepped(self._inner, new, state) if self._inner.ahead else new

    def _with_part(self, state: State, part: LocalState) -> State:
        """Returns the state with another part that is sent, aligned and averaged."""
        if self._opt_state == "merge":
            state = with_opt_state(state, with_bias(part.opt_state))
        return self._inner.with_variables(state, part.variables)

    def communicate(
        self,
        state: State,
        data: MergeData | None,
        network: Network,
        key: Key[Array, ""],
    ) -> tuple[State, Metrics]:
        """Runs the round of an algorithm whose messages are not compressed."""
        if data is None:  # no merge is due
            return self._inner.communicate(state, data, network, key)
        views, metrics = self(Views(state, None), data, network, key)
        return views.own, metrics

    def messages(self, state: State) -> Any:
        """Returns the inner algorithm's messages, and the one of the merge."""

        def sent(state):
            # The bias of moments follows from the count of steps, which is sent too.
            merged = self._opt_state == "merge"
            optimizer = local_part(state).opt_state if merged else ()
            return take((self._inner.variables(state), optimizer), 0)

        variables, optimizer = jax.eval_shape(sent, state)
        whole = {**variables, "optimizer": optimizer}
        return self._inner.messages(state)._replace(round=whole)


def _normalised(network: Network) -> Network:
    """Scales the weights of every receiver so that they sum to 1."""
    received = np.asarray(network.W, np.float64).sum(axis=1)
    if np.allclose(received, 1, atol=1e-6):
        return network
    return network._replace(W=network.W / received[:, None].astype(np.float32))


def _share_of_moved_units(perms: EdgePerms) -> float:
    """Computes the share of units, over edges and groups, that change their place."""
    has_moved = [
        np.ravel(perm != np.arange(perm.shape[-1]))
        for edge_perms in perms.values()
        for perm in edge_perms.values()
    ]
    return float(np.concatenate(has_moved).mean())
