"""One frame for all agents, in which the average of their models has a meaning.

A merge finds permutations between neighbours. Composed along a tree, they align all
agents that the merge has linked with one of them, the root. So a measurement right
after a merge, or after the local training that follows, costs no matching. Agents that
the last merge has not linked with the others, and all agents before the first merge,
are matched for the measurement.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Int, Key

from dimat_jax._slots import agent_of_slots
from dimat_jax._stopwatch import Stopwatch
from dimat_jax.algorithms._edges import EdgePerms, Matcher, match_edges, spanning_forest
from dimat_jax.algorithms._frames import Frame, StackedPerms, to_roots
from dimat_jax.algorithms.base import MergeData, Variables
from dimat_jax.placement import Placement

__all__ = ["CommonFrame", "Frames", "frames_after", "frames_of"]


class Frames(NamedTuple):
    """The agents' frames after a merge.

    Attributes:
        roots: for each slot the agent with which `perms` align it.
        perms: a permutation of each group for every slot. An empty dict stands for
            identities.
    """

    roots: Int[np.ndarray, " slots"]
    perms: StackedPerms

    def record(self, n_agents: int) -> dict[str, Any]:
        """The frames of the agents as JSON content; see `frames_of`."""
        perms = {group: perm[:n_agents].tolist() for group, perm in self.perms.items()}
        return {"roots": self.roots[:n_agents].tolist(), "perms": perms}


def frames_of(record: Mapping[str, Any] | None, placement: Placement) -> Frames | None:
    """The frames of which `Frames.record` was made, for the slots of a placement."""
    if record is None:
        return None
    agents = agent_of_slots(placement)
    perms = {
        group: np.array(perm, np.int32)[agents]
        for group, perm in record["perms"].items()
    }
    return Frames(np.array(record["roots"])[agents], perms)


def frames_after(frame: Frame, perms: EdgePerms, slots: int) -> Frames:
    """Returns the agents' frames after a merge.

    Args:
        frame: the frame in which the agents have merged.
        perms: the permutations that the merge has used, by edge.
        slots: the number of stacked agents.
    """
    linked = np.zeros((slots, slots), bool)
    for receiver, sender in perms:
        linked[receiver, sender] = True
    roots = np.arange(slots)
    for parent, child in spanning_forest(linked).tolist():
        roots[child] = roots[parent]
    moved = frame.moves or not perms
    return Frames(roots, {} if moved else to_roots(perms, slots))


class CommonFrame:
    """Aligns all agents with agent 0, for a measurement.

    Args:
        matcher: the way in which the algorithm matches agents.
        placement: the devices on which the agents live.
        joint: whether the algorithm's permutations must agree along cycles.
        stay: the score that a unit must gain to move.
    """

    def __init__(
        self, matcher: Matcher, placement: Placement, *, joint: bool, stay: float
    ):
        self._matcher, self._placement = matcher, placement
        self._joint, self._stay = joint, stay

    def __call__(
        self,
        variables: Variables,
        frames: Frames | None,
        data: MergeData,
        key: Key[Array, ""],
    ) -> StackedPerms:
        """Finds the permutations; see `Algorithm.common_frame`.

        Only the roots of the last merge are matched. Where there is a single root,
        nothing is.
        """
        slots, n_agents = self._placement.slots, self._placement.n_agents
        roots, to_root = frames or Frames(np.arange(slots), {})
        others = [int(root) for root in np.unique(roots[:n_agents]) if root != roots[0]]
        if not others:
            return to_root
        edges = np.array([(roots[0], root) for root in others])
        perms = match_edges(
            self._matcher,
            variables,
            edges,
            data,
            placement=self._placement,
            joint=self._joint,
            stay=self._stay,
            key=key,
            stopwatch=Stopwatch(),
        ).perms
        aligned = {}
        for group, some in perms[tuple(edges[0].tolist())].items():
            places = np.arange(some.shape[-1], dtype=np.int32)
            identity = np.broadcast_to(places, some.shape)
            onto_first = {root: perms[int(roots[0]), root][group] for root in others}
            # An agent is aligned with its root, and then moves with it.
            moves = np.stack([onto_first.get(int(root), identity) for root in roots])
            own = to_root.get(group, np.tile(identity, (slots, *[1] * some.ndim)))
            aligned[group] = np.take_along_axis(own, moves, axis=-1).astype(np.int32)
        return aligned
