"""Predicts the speed of many agents on many devices from measured times.

A time is modelled as a constant and a share for each unit of work:

    seconds  =  base + per_unit * units

The units are agents, matched pairs or edges. Both numbers are fitted by least squares
to the relative errors, and neither is negative. The bytes of an exchange are what the
ledger books for it; see `Hardware.exchange_seconds`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import nnls

from dimat_jax._bench._hardware import Hardware
from dimat_jax._bench._worker import Program, config_from, jax_program
from dimat_jax.algorithms._frames import FRAMES
from dimat_jax.algorithms._traffic import MatchingSizes
from dimat_jax.algorithms.base import one_agent
from dimat_jax.data.selection import MATCH_DATA
from dimat_jax.experiment import Experiment
from dimat_jax.ledger import Ledger, Message, Messages
from dimat_jax.mixing import uniform
from dimat_jax.network import Links
from dimat_jax.permutation import group_sizes
from dimat_jax.topology import TOPOLOGIES, Adjacency
from dimat_jax.tree import nbytes

__all__ = ["Fit", "Merge", "Model", "Sizes", "fit", "message_sizes", "predict"]


# Measured times =======================================================================


class Fit(NamedTuple):
    """The seconds of a program: `base + per_unit * units`."""

    base: float
    per_unit: float

    def seconds(self, units: float) -> float:
        return self.base + self.per_unit * units


def fit(units: Sequence[float], seconds: Sequence[float]) -> Fit:
    """Fits the seconds of a program; the relative errors are what is small."""
    wanted = np.maximum(np.asarray(seconds, float), 1e-9)
    rows = np.stack([np.ones(len(wanted)), np.asarray(units, float)], axis=1)
    (base, per_unit), _ = nnls(rows / wanted[:, None], np.ones(len(wanted)))
    return Fit(float(base), float(per_unit))


class Merge(NamedTuple):
    """A measured merge.

    Attributes:
        frame: the frame in which agents merged.
        topology: the name of the graph.
        n_agents: the number of agents.
        seconds: the seconds of every phase.
    """

    frame: str
    topology: str
    n_agents: int
    seconds: Mapping[str, float]


def work(frame: str, phase: str, adjacency: Adjacency) -> int:
    """Counts the units of work of a merge's phase: agents, pairs or edges."""
    if phase in ("correlations", "scores", "assignment"):
        return max(len(_pairs(frame, adjacency)), 1)
    if phase == "mix" and frame == "own":
        return int(adjacency.sum())
    return len(adjacency)


def _pairs(frame: str, adjacency: Adjacency) -> np.ndarray:
    """Returns the pairs that a frame matches, each in one direction."""
    edges = FRAMES[frame].edges(adjacency)
    return np.unique(np.sort(edges, axis=1), axis=0)


def fit_merges(merges: Sequence[Merge]) -> dict[str, dict[str, Fit]]:
    """Fits each phase of the merges in each frame."""
    samples: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for merge in merges:
        adjacency = TOPOLOGIES[merge.topology](merge.n_agents)
        for phase, seconds in merge.seconds.items():
            units = work(merge.frame, phase, adjacency)
            samples.setdefault((merge.frame, phase), []).append((units, seconds))
    fits: dict[str, dict[str, Fit]] = {}
    for (frame, phase), points in samples.items():
        units, seconds = zip(*points, strict=True)
        fits.setdefault(frame, {})[phase] = fit(units, seconds)
    return fits


def merge_seconds(
    fits: Mapping[str, Fit], frame: str, adjacency: Adjacency, share: float = 1.0
) -> float:
    """Predicts the seconds of a merge on one device.

    Args:
        fits: the fitted phases of the frame.
        frame: the frame in which agents merge.
        adjacency: the graph of all agents.
        share: the share of the agents that the device has.
    """

    def seconds(phase: str) -> float:
        # One machine finds all permutations that have to agree.
        alone = FRAMES[frame].joint and phase == "assignment"
        return fits[phase].seconds(
            work(frame, phase, adjacency) * (1.0 if alone else share)
        )

    return sum(map(seconds, fits))


# Bytes ================================================================================


class Sizes(NamedTuple):
    """The bytes that agents send.

    Attributes:
        step: the bytes of every kind that an agent sends a neighbour with every step.
        round: the same for every round.
        matching: the sizes of what matching sends.
    """

    step: dict[str, int]
    round: dict[str, int]
    matching: MatchingSizes

    @property
    def messages(self) -> Messages:
        """Messages of these sizes, which a ledger books."""

        def of_sizes(sizes: dict[str, int]) -> Message:
            return {k: jax.ShapeDtypeStruct((n,), jnp.uint8) for k, n in sizes.items()}

        return Messages(step=of_sizes(self.step), round=of_sizes(self.round))


def message_sizes(config: dict[str, Any]) -> Program:
    """Makes a program whose facts are the `Sizes` of a config's algorithm."""
    experiment = Experiment(config_from(config))

    def call() -> dict[str, Any]:
        algorithm, spec = experiment.algorithm, experiment.task.spec
        variables = experiment.abstract_variables()
        messages = algorithm.messages(jax.eval_shape(algorithm.init, variables))
        one = one_agent(variables)
        units = group_sizes(spec, one).values() if spec.groups else []
        by_data = MATCH_DATA in experiment.record.reads
        return {
            "step": {kind: nbytes(tree) for kind, tree in messages.step.items()},
            "round": {kind: nbytes(tree) for kind, tree in messages.round.items()},
            "matching": MatchingSizes(
                perms=4 * sum(units),
                scores=4 * sum(n**2 for n in units) if by_data else 0,
                weights=nbytes(one["params"]),
            )._asdict(),
            "steps_per_round": experiment.local_steps,
        }

    return jax_program(call)


def booked(
    sizes: Sizes, adjacency: Adjacency, frame: str | None = None
) -> tuple[Ledger, Ledger]:
    """Books one step and one round in two ledgers.

    Args:
        sizes: the bytes that agents send.
        adjacency: the graph of all agents.
        frame: the frame in which agents merge; None if they do not.
    """
    network = Links(adjacency, uniform).at_round(1, len(adjacency))
    step, round = Ledger(len(adjacency)), Ledger(len(adjacency))
    step.record_steps(sizes.messages, [network])
    matching = None
    if frame is not None:
        pairs = _pairs(frame, adjacency)
        matching = FRAMES[frame].traffic(adjacency, pairs, sizes.matching)
    round.record_round(sizes.messages, network, adjacency, matching)
    return step, round


# Predictions ==========================================================================


class Model(NamedTuple):
    """What was measured.

    Attributes:
        step: the seconds of a local step, by the number of agents.
        gossip: the further seconds of a step in which agents average, by the number of
            messages that arrive.
        merges: the seconds of each phase of a merge, by frame.
        steps_per_round: the number of local steps between two merges.
        gossip_sizes: the bytes of gossip.
        merge_sizes: the bytes of a merge.
    """

    step: Fit
    gossip: Fit
    merges: dict[str, dict[str, Fit]]
    steps_per_round: int
    gossip_sizes: Sizes
    merge_sizes: Sizes


def predict(
    model: Model, hardware: Hardware, topology: str, n_agents: int, frame: str | None
) -> dict[str, Any]:
    """Predicts a round on other hardware.

    Args:
        model: what was measured.
        hardware: the machines.
        topology: the name of the graph.
        n_agents: the number of agents.
        frame: the frame in which agents merge once a round; None for gossip with every
            step.

    Returns:
        the rounds in an hour, the seconds of computing and of exchanging in a round,
        and the bytes of a round over all links.
    """
    adjacency = TOPOLOGIES[topology](n_agents)
    steps, local = model.steps_per_round, min(hardware.agents_per_device, n_agents)
    share = local / n_agents
    computing = steps * model.step.seconds(local)
    if frame is None:
        step, _ = booked(model.gossip_sizes, adjacency)
        computing += steps * model.gossip.seconds(adjacency.sum() * share)
        exchanging = steps * hardware.exchange_seconds(step.by_link)
        sent = steps * step.bytes_sent
    else:
        _, round = booked(model.merge_sizes, adjacency, frame)
        computing += merge_seconds(model.merges[frame], frame, adjacency, share)
        exchanging = hardware.exchange_seconds(round.by_link)
        sent = round.bytes_sent
    computing /= hardware.speed
    return {
        "agents": n_agents,
        "topology": topology,
        "exchange": "gossip" if frame is None else f"merge, {frame} frame",
        "compute_seconds": computing,
        "exchange_seconds": exchanging,
        "rounds_per_hour": 3600 / (computing + exchanging),
        "bytes_per_round": sent,
    }
