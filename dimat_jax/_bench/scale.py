"""Times a step of 1, 2, 5, ... agents, and compares the time for each agent."""

from typing import Any

from dimat_jax._bench._record import Bench, Settings, table
from dimat_jax._bench._steps import changed, number_of_agents
from dimat_jax._bench._timing import Side, race
from dimat_jax.config import Config
from dimat_jax.placement import AGENTS

__all__ = ["BENCH"]


def run(config: Config, settings: Settings) -> dict[str, Any]:
    """Times a step for each agent, for growing numbers of agents."""
    counts = [n for n in (1, 2, 5, 10, 20, 40) if n <= number_of_agents(config)]
    sides = [
        Side(
            str(n),
            "dimat_jax._bench._steps:local_steps",
            {
                "config": changed(config, {AGENTS.path: n}).to_dict(),
                "steps": settings.steps,
            },
        )
        for n in counts
    ]
    timings = race(sides, settings.repeats)
    steps = {n: timing.median / settings.steps for n, timing in timings.items()}
    return {
        "sides": {name: timing.record() for name, timing in timings.items()},
        "step_seconds": steps,
        "per_agent_relative_to_one": {
            n: seconds / int(n) / steps["1"] for n, seconds in steps.items()
        },
    }


def show(result: dict[str, Any]) -> str:
    """Writes the seconds of a step and of its share for each agent."""
    relative = result["per_agent_relative_to_one"]
    rows = [[n, s, relative[n]] for n, s in result["step_seconds"].items()]
    return table(["agents", "seconds a step", "an agent's share / one alone"], rows)


BENCH = Bench("scale", run, show)
