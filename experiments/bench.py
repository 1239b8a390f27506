"""How long things take, and relative to what.

    python -m experiments.bench merge --out=FILE.json [--config=... --config.FIELD=...]

merge: a merge round by phase, against a local epoch.
train: a step of all agents together, against as many steps of one agent alone; the
    same in bfloat16.
scale: a step's time for each agent, against that of one agent, for 1, 2, 5, ... agents.

Times are medians over --repeats, after a first, compiling call; they are meant to be
compared within one file only.
"""

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from dimat_jax._metrics import write_json
from dimat_jax._trainer import Trainer
from dimat_jax.config import Config
from dimat_jax.errors import UserError, nearest
from dimat_jax.experiment import Experiment
from dimat_jax.network import Network
from dimat_jax.placement import request_cpu_devices
from experiments import program

_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/cifar100_resnet20.py:small", "What to time."
)
_OUT = flags.DEFINE_string("out", None, "The JSON file to write.", required=True)
_REPEATS = flags.DEFINE_integer("repeats", 3, "How often to time a thing.", 1)
_STEPS = flags.DEFINE_integer("steps", 5, "Local steps in one timing.", 1)


def _seconds_per_step(config: Config) -> float:
    """A local step of all agents, the median."""
    experiment = Experiment(config)
    state = experiment.algorithm.init(experiment.initial_variables())
    trainer = Trainer(
        experiment, experiment.algorithm, experiment.sampler, experiment.key("rounds")
    )

    def networks(first: int, n_steps: int) -> list[Network]:
        steps = range(first, first + n_steps)
        return [experiment.network_at_step(step, 1) for step in steps]

    state, _ = trainer.train(state, 0, networks(0, 1))
    times = []
    for repeat in range(_REPEATS.value):
        first = 1 + repeat * _STEPS.value
        start = time.perf_counter()
        # This returns once the losses are on the host.
        state, _ = trainer.train(state, first, networks(first, _STEPS.value))
        times.append((time.perf_counter() - start) / _STEPS.value)
    return float(np.median(times))


def merge(config: Config) -> dict[str, Any]:
    """A merge round by phase, in seconds and in local epochs."""
    experiment = Experiment(config)
    state = experiment.algorithm.init(experiment.initial_variables())
    phases, totals = [], []
    for number in range(1, 2 + _REPEATS.value):
        data = experiment.merge_data(number)
        network = experiment.network_at_round(number)
        start = time.perf_counter()
        state, metrics = experiment.algorithm.communicate(
            state, data, network, jax.random.key(0)
        )
        jax.block_until_ready(state)
        totals.append(time.perf_counter() - start)
        phases.append(metrics["merge_seconds"])
    epoch = _seconds_per_step(config) * experiment.sampler.steps_per_epoch
    seconds = float(np.median(totals[1:]))
    return {
        "first_call_seconds": totals[0],
        "seconds": seconds,
        "seconds_by_phase": {
            phase: float(np.median([p[phase] for p in phases[1:]]))
            for phase in phases[0]
        },
        "local_epoch_seconds": epoch,
        "merge_per_local_epoch": seconds / epoch,
    }


def train(config: Config) -> dict[str, Any]:
    """Stacked agents against one agent, and bfloat16 against float32."""
    stacked = _seconds_per_step(config)
    alone = _seconds_per_step(_changed(config, agents=1))
    half = _seconds_per_step(_changed(config, dtype="bfloat16"))
    return {
        "agents": config.agents,
        "step_seconds": stacked,
        "images_per_second": config.agents * config.batch_size / stacked,
        "one_agent_step_seconds": alone,
        "stacked_per_agents_alone": stacked / (config.agents * alone),
        "bfloat16_per_float32": half / stacked,
    }


def scale(config: Config) -> dict[str, Any]:
    """Time for each agent as their number grows."""
    counts = [n for n in (1, 2, 5, 10, 20, 40) if n <= config.agents]
    steps = {n: _seconds_per_step(_changed(config, agents=n)) for n in counts}
    return {
        "step_seconds": steps,
        "per_agent_relative_to_one": {n: t / n / steps[1] for n, t in steps.items()},
    }


BENCHES = {"merge": merge, "train": train, "scale": scale}


def _changed(config: Config, agents: int | None = None, dtype: str | None = None):
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        changed.agents = agents or config.agents
        changed.model.dtype = dtype or config.model.dtype
    return changed


def main(arguments: list[str]) -> None:
    """Times one thing."""
    if len(arguments) != 1 or arguments[0] not in BENCHES:
        raise UserError(f"what to time? {nearest(' '.join(arguments), BENCHES)}")
    config = _CONFIG.value
    request_cpu_devices(config.placement.cpu_devices)
    result = {
        "bench": arguments[0],
        **BENCHES[arguments[0]](config),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "config": config.to_dict(),
    }
    out = Path(_OUT.value)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    for name, value in result.items():
        if name != "config":
            print(f"{name}: {value}")
    print(f"wrote {out}")


if __name__ == "__main__":
    program.run(main)
