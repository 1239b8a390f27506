"""Times a local step of all agents together, of one agent, and in bfloat16."""

from typing import Any

from dimat_jax._bench._record import Bench, Settings, table
from dimat_jax._bench._steps import changed, number_of_agents
from dimat_jax._bench._timing import Side, race, ratio
from dimat_jax.config import Config
from dimat_jax.models._settings import DTYPE
from dimat_jax.placement import AGENTS

__all__ = ["BENCH"]


def run(config: Config, settings: Settings) -> dict[str, Any]:
    """Times stacked agents against one agent, and bfloat16 against float32."""

    def side(name: str, **fields: Any) -> Side:
        given = changed(config, {p.replace("__", "."): v for p, v in fields.items()})
        arguments = {"config": given.to_dict(), "steps": settings.steps}
        return Side(name, "dimat_jax._bench._steps:local_steps", arguments)

    n_agents = number_of_agents(config)
    timings = race(
        [
            side("stacked"),
            side("one agent", **{AGENTS.path: 1}),
            side("bfloat16", **{DTYPE.path: "bfloat16"}),
        ],
        settings.repeats,
    )
    stacked, alone = timings["stacked"], timings["one agent"]
    per_alone = ratio(stacked, alone)
    step = stacked.median / settings.steps
    return {
        "sides": {name: timing.record() for name, timing in timings.items()},
        "agents": n_agents,
        "step_seconds": step,
        "images_per_second": n_agents * config.batch_size / step,
        "one_agent_step_seconds": alone.median / settings.steps,
        "stacked_per_agents_alone": per_alone and per_alone / n_agents,
        "bfloat16_per_float32": ratio(timings["bfloat16"], stacked),
    }


def show(result: dict[str, Any]) -> str:
    """Writes all ratios."""
    return table(
        ["", ""], [[n, v] for n, v in result.items() if not isinstance(v, dict)]
    )


BENCH = Bench("train", run, show)
