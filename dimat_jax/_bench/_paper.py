"""Predicts the speed of many agents on many devices from measured times.

A time is modelled as a constant and a share for each unit of work:

    seconds  =  base + per_unit * units

The units are agents, matched pairs or edges. Both numbers are fitted by least squares
to the relative errors, and neither is negative. The bytes of an exchange are what the
ledger books for it; see `Hardware.exchange_seconds`.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import nnls

from dimat_jax._bench._hardware import Hardware
from dimat_jax._bench._worker import Program, config_from, jax_program
from dimat_jax.algorithms._frames import FRAMES
from dimat_jax.algorithms._traffic import MatchingSizes, matching_sizes
from dimat_jax.algorithms.base import one_agent
from dimat_jax.experiment import Experiment
from dimat_jax.ledger import Ledger, Message, Messages
from dimat_jax.mixing import uniform
from dimat_jax.network import Links, Network
from dimat_jax.topology import TOPOLOGIES, Adjacency
from dimat_jax.tree import nbytes

__all__ = [
    "Fit",
    "Merge",
    "Model",
    "Sizes",
    "fit",
    "fit_merges",
    "merge_seconds",
    "message_sizes",
    "predict",
    "work",
]


# Measured times =======================================================================


class Fit(NamedTuple):
    """The seconds of a program: `base + per_unit * units`."""

    base: float
    per_unit: float

    def seconds(self, units: float) -> float:
        return self.base + self.per_unit * units


def fit(units: Sequence[float], seconds: Sequence[float]) -> Fit:
    """Fits the seconds of a program.

    It minimises the sum of the squares of the relative errors, because short times
    count as much as long ones.
    """
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


class Work(NamedTuple):
    """How much a merge has to do.

    Attributes:
        agents: the number of agents.
        edges: the number of messages.
        pairs: the pairs that are matched, each in one direction.
    """

    agents: int
    edges: int
    pairs: np.ndarray

    def units(self, frame: str, phase: str) -> int:
        """Counts the units of work of a phase: agents, pairs or edges."""
        if phase in ("correlations", "scores", "assignment"):
            return len(self.pairs)
        return self.edges if phase == "mix" and frame == "own" else self.agents


def work(frame: str, adjacency: Adjacency) -> Work:
    """Counts the work of a merge in a frame."""
    edges = FRAMES[frame].edges(adjacency)
    numbers = edges.min(axis=1) * len(adjacency) + edges.max(axis=1)
    pairs = np.stack(np.divmod(np.unique(numbers), len(adjacency)), axis=1)
    return Work(len(adjacency), int(adjacency.sum()), pairs)


def fit_merges(merges: Sequence[Merge]) -> dict[str, dict[str, Fit]]:
    """Fits each phase of the merges in each frame."""
    samples: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for merge in merges:
        done = work(merge.frame, TOPOLOGIES[merge.topology](merge.n_agents))
        for phase, seconds in merge.seconds.items():
            sample = done.units(merge.frame, phase), seconds
            samples.setdefault((merge.frame, phase), []).append(sample)
    fits: dict[str, dict[str, Fit]] = {}
    for (frame, phase), points in samples.items():
        units, seconds = zip(*points, strict=True)
        fits.setdefault(frame, {})[phase] = fit(units, seconds)
    return fits


def merge_seconds(
    fits: Mapping[str, Fit], frame: str, to_do: Work, share: float = 1.0
) -> float:
    """Predicts the seconds of a merge on one device.

    Args:
        fits: the fitted phases of the frame.
        frame: the frame in which agents merge.
        to_do: the work of all agents.
        share: the share of the agents that the device has.
    """

    def seconds(phase: str) -> float:
        # One machine finds all permutations that have to agree.
        alone = FRAMES[frame].joint and phase == "assignment"
        units = to_do.units(frame, phase)
        return fits[phase].seconds(units if alone else share * units)

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
        matching = matching_sizes(
            spec,
            one_agent(variables),
            by_activations=experiment.record.matches_activations,
        )
        return {
            "step": {kind: nbytes(tree) for kind, tree in messages.step.items()},
            "round": {kind: nbytes(tree) for kind, tree in messages.round.items()},
            "matching": matching._asdict(),
            "steps_per_round": experiment.local_steps,
        }

    return jax_program(call)


# Several predictions in a row are for the same network.
@functools.lru_cache(1)
def _network(topology: str, n_agents: int) -> tuple[Adjacency, Network]:
    adjacency = TOPOLOGIES[topology](n_agents)
    return adjacency, Links(adjacency, uniform).at_round(1, n_agents)


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
    adjacency, network = _network(topology, n_agents)
    steps, local = model.steps_per_round, min(hardware.agents_per_device, n_agents)
    share, ledger = local / n_agents, Ledger(n_agents)
    computing, exchanges = steps * model.step.seconds(local), 1
    if frame is None:
        exchanges = steps
        ledger.record_steps(model.gossip_sizes.messages, [network])
        computing += steps * model.gossip.seconds(share * int(adjacency.sum()))
    else:
        to_do, sizes = work(frame, adjacency), model.merge_sizes
        matching = FRAMES[frame].traffic(adjacency, to_do.pairs, sizes.matching)
        ledger.record_round(sizes.messages, network, adjacency, matching)
        computing += merge_seconds(model.merges[frame], frame, to_do, share)
    computing /= hardware.speed
    exchanging = exchanges * hardware.exchange_seconds(ledger.by_link)
    return {
        "agents": n_agents,
        "topology": topology,
        "exchange": "gossip" if frame is None else f"merge, {frame} frame",
        "compute_seconds": computing,
        "exchange_seconds": exchanging,
        "rounds_per_hour": 3600 / (computing + exchanging),
        "bytes_per_round": exchanges * ledger.bytes_sent,
    }
