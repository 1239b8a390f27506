"""Measures how time and memory grow with the number of agents, and predicts further.

For 1, 2, 5, 10, 20 and 40 agents it times a local step, and merges in every frame. The
growth is fitted as a power of the number of agents or of edges. A cost model that is
fitted to at most 10 agents is checked with the others, and predicts up to 4096 agents
on other hardware.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dimat_jax._bench import _paper
from dimat_jax._bench._paper import Merge, Model, Sizes
from dimat_jax._bench._record import Bench, Settings, table
from dimat_jax._bench._steps import changed, number_of_agents
from dimat_jax._bench._timing import Side, Timing, race
from dimat_jax._bench.merge import merge_side, phase_seconds
from dimat_jax.algorithms._traffic import MatchingSizes
from dimat_jax.config import Config, fields_of, record_of
from dimat_jax.errors import UserError
from dimat_jax.placement import AGENTS
from dimat_jax.topology import TOPOLOGIES, TOPOLOGY

__all__ = ["BENCH"]

COUNTS = (1, 2, 5, 10, 20, 40)
FITTED_UP_TO = 10
"""The cost model is fitted to at most this number of agents."""

MANY = (64, 256, 1024, 4096)
"""The numbers of agents that are predicted."""

MERGES = (
    ("own", "ring"),
    ("own", "fully_connected"),
    ("reference", "fully_connected"),
    ("joint", "fully_connected"),
)
"""The merges that are measured: the frame and the topology."""

PREDICTED = {
    "ring": (None, "own", "reference", "joint"),
    # Frames that agents share need answers, and this graph is directed.
    "exponential": (None, "own"),
    "fully_connected": (None, "own", "reference", "joint"),
}
"""The exchanges that are predicted on each topology: gossip, or a merge in a frame."""

_LIMIT_SECONDS = 540


def run(config: Config, settings: Settings) -> dict[str, Any]:
    """Measures 1, 2, 5, ... agents, up to the config's number.

    Without `settings.full` it stops before the numbers that would take it beyond ten
    minutes. An algorithm that does not align agents has its steps timed alone.

    Raises:
        UserError: not even the steps of one agent can be timed, or the bytes that
            agents send cannot be counted.
    """
    started, spent = time.perf_counter(), 0.0
    timings: dict[int, dict[str, Timing]] = {}
    for n_agents in COUNTS:
        so_far = time.perf_counter() - started
        # Twice the agents take at most three times as long.
        too_long = so_far + 3 * spent > _LIMIT_SECONDS and not settings.full
        if n_agents > number_of_agents(config) or too_long:
            break
        timings[n_agents] = race(_sides(config, n_agents, settings), settings.repeats)
        spent = time.perf_counter() - started - so_far
    steps = _column(timings, "steps", settings.steps)
    if 1 not in steps:
        raise UserError(f"one agent: {timings[1]['steps'].unavailable}")
    result: dict[str, Any] = {
        "sides": {
            str(n): {name: timing.record() for name, timing in of_count.items()}
            for n, of_count in timings.items()
        },
        "step_seconds": steps,
        "per_agent_relative_to_one": {n: s / n / steps[1] for n, s in steps.items()},
        "exponents": _exponents(timings),
        "hardware": settings.hardware._asdict(),
    }
    if _aligns(config) and _suffice(timings):
        result |= _on_paper(config, settings, timings, steps)
    return result


def _suffice(timings: Mapping[int, Mapping[str, Timing]]) -> bool:
    """Whether a cost model can be fitted: every side is measured for some number."""
    complete = any(
        not any(timing.unavailable for timing in sides.values())
        for n_agents, sides in timings.items()
        if 1 < n_agents <= FITTED_UP_TO
    )
    return complete and len(timings) > 2


def _sides(config: Config, n_agents: int, settings: Settings) -> list[Side]:
    """Returns the programs that are timed for a number of agents."""
    local_steps, steps = "dimat_jax._bench._steps:local_steps", settings.steps
    config = changed(config, {AGENTS.path: n_agents})
    sides = [Side("steps", local_steps, {"config": config.to_dict(), "steps": steps})]
    if n_agents > 1 and _aligns(config):
        arguments = {"config": _gossiping(config).to_dict(), "steps": steps}
        sides.append(Side("gossip", local_steps, arguments))
        for frame, topology in MERGES:
            fields = {"merge.frame": frame, TOPOLOGY.path: topology}
            merging = changed(config, fields)
            sides.append(merge_side(f"{frame}, {topology}", merging, agents=""))
    return sides


def _aligns(config: Config) -> bool:
    return record_of(fields_of(config)).aligns


def _gossiping(config: Config) -> Config:
    """Returns the config of agents that average with all others at every step."""
    fields = {"algorithm": "cdsgd", TOPOLOGY.path: "fully_connected"}
    return changed(config, fields)


def _column(
    timings: Mapping[int, Mapping[str, Timing]], name: str, calls: int = 1
) -> dict[int, float]:
    """Returns the seconds of a side by the number of agents."""
    return {
        n: sides[name].median / calls
        for n, sides in timings.items()
        if name in sides and not sides[name].unavailable
    }


# Exponents ============================================================================


def _exponents(
    timings: Mapping[int, Mapping[str, Timing]],
) -> list[dict[str, Any]]:
    """Fits how time and memory grow, for the sides with three numbers from 5 on."""
    found = []
    at_start = timings[1]["steps"].peak_bytes
    for name in timings[max(timings)]:
        frame, _, topology = name.partition(", ")
        seconds = {n: s for n, s in _column(timings, name).items() if n >= 5}
        if len(seconds) < 3:
            continue
        # If every agent has its own frame, the work grows with the number of edges.
        units = [
            int(TOPOLOGIES[topology](n).sum()) if frame == "own" else n for n in seconds
        ]
        memory = [timings[n][name].peak_bytes - at_start for n in seconds]
        found.append(
            {
                "side": name,
                "in": "edges" if frame == "own" else "agents",
                "seconds": _slope(units, list(seconds.values())),
                "first_call": _slope(
                    units, [timings[n][name].first_call_seconds for n in seconds]
                ),
                "memory": _slope(units, memory) if min(memory) > 0 else None,
            }
        )
    return found


def _slope(units: Sequence[float], values: Sequence[float]) -> float:
    """Returns the exponent p of values that grow like units^p."""
    return float(np.polyfit(np.log(units), np.log(values), 1)[0])


# On paper =============================================================================


def _on_paper(
    config: Config,
    settings: Settings,
    timings: Mapping[int, Mapping[str, Timing]],
    steps: Mapping[int, float],
) -> dict[str, Any]:
    """Fits the cost model, checks it, and predicts many agents."""
    gossip = _column(timings, "gossip", settings.steps)
    further = {n: max(gossip[n] - steps[n], 1e-9) for n in gossip if n in steps}
    merges = [
        Merge(frame, topology, n, phase_seconds(sides[f"{frame}, {topology}"]))
        for n, sides in timings.items()
        for frame, topology in MERGES
        if n > 1 and not sides[f"{frame}, {topology}"].unavailable
    ]
    small = {n: s for n, s in steps.items() if n <= FITTED_UP_TO}
    mixed = {n: s for n, s in further.items() if n <= FITTED_UP_TO}
    fewer = [merge for merge in merges if merge.n_agents <= FITTED_UP_TO]
    merge_sizes, rounds = _sizes(config)
    model = Model(
        _paper.fit(list(small), list(small.values())),
        _paper.fit([n * (n - 1) for n in mixed], list(mixed.values())),
        _paper.fit_merges(fewer),
        rounds,
        _sizes(_gossiping(config))[0],
        merge_sizes,
    )
    return {
        "model": {
            "step": model.step._asdict(),
            "gossip": model.gossip._asdict(),
            "merges": {
                frame: {phase: fit._asdict() for phase, fit in phases.items()}
                for frame, phases in model.merges.items()
            },
            "steps_per_round": rounds,
        },
        "checks": _checks(model, steps, merges),
        "predictions": [
            _paper.predict(model, settings.hardware, topology, n, frame)
            for n in MANY
            for topology, frames in PREDICTED.items()
            for frame in frames
        ],
    }


def _sizes(config: Config) -> tuple[Sizes, int]:
    """Returns the bytes that a config's agents send, and the steps of a round."""
    side = Side(
        "sizes", "dimat_jax._bench._paper:message_sizes", {"config": config.to_dict()}
    )
    facts = race([side], 1)["sizes"].required().facts[0]
    matching = MatchingSizes(**facts["matching"])
    return Sizes(facts["step"], facts["round"], matching), facts["steps_per_round"]


def _checks(
    model: Model, steps: Mapping[int, float], merges: Sequence[Merge]
) -> list[dict[str, Any]]:
    """Compares the model with measured numbers of agents that it was not fitted to."""
    pairs = [
        (n, "steps", seconds, model.step.seconds(n)) for n, seconds in steps.items()
    ]
    for frame, topology, n, phases in merges:
        to_do = _paper.work(frame, TOPOLOGIES[topology](n))
        predicted = _paper.merge_seconds(model.merges[frame], frame, to_do)
        pairs.append((n, f"{frame}, {topology}", sum(phases.values()), predicted))
    return [
        {
            "agents": n,
            "side": side,
            "measured_seconds": measured,
            "predicted_seconds": predicted,
            "error": predicted / measured - 1,
        }
        for n, side, measured, predicted in sorted(pairs, key=lambda pair: pair[0])
        if n > FITTED_UP_TO
    ]


# Tables ===============================================================================


def show(result: dict[str, Any]) -> str:
    """Writes what was measured, how it grows, and what the cost model predicts."""
    relative = result["per_agent_relative_to_one"]
    texts = [
        _measured(result),
        table(
            ["agents", "seconds a step", "an agent's share / one alone"],
            [[str(n), s, relative[n]] for n, s in result["step_seconds"].items()],
        ),
    ]
    for name, header in _TABLES.items():
        if result.get(name):
            rows = [[_shown(row[key]) for key in header] for row in result[name]]
            texts.append(table(list(header.values()), rows))
    return "\n\n".join(texts)


_TABLES = {
    "exponents": {
        "side": "grows with a power",
        "in": "of the",
        "seconds": "time",
        "first_call": "first call",
        "memory": "memory",
    },
    "checks": {
        "side": "checked",
        "agents": "agents",
        "measured_seconds": "measured",
        "predicted_seconds": "predicted",
        "error": "error",
    },
    "predictions": {
        "topology": "topology",
        "agents": "agents",
        "exchange": "exchange",
        "compute_seconds": "computing, s a round",
        "exchange_seconds": "exchanging, s a round",
        "rounds_per_hour": "rounds an hour",
        "bytes_per_round": "bytes a round",
    },
}


def _measured(result: dict[str, Any]) -> str:
    rows = [
        [
            side,
            n,
            timing["median_seconds"],
            timing["first_call_seconds"],
            (timing["device_peak_bytes"] or timing["host_peak_bytes"]) / 2**20,
        ]
        for n, sides in result["sides"].items()
        for side, timing in sides.items()
        if "unavailable" not in timing
    ]
    header = ["side", "agents", "seconds a call", "first call", "peak MiB"]
    return table(header, rows)


def _shown(value: Any) -> Any:
    return float(value) if isinstance(value, int) and value >= 10_000 else value


BENCH = Bench("scale", run, show)
