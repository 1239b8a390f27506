"""Measures how long merging and training take, in relation to each other.

    dimat bench merge|train|scale --out=FILE.json [--config=NAME --config.FIELD=VALUE]

merge: times a merge round by phase, and compares it with a local epoch.
train: times a step of all agents together, and compares it with as many steps of one
    agent alone, and with a step in bfloat16.
scale: times a step of 1, 2, 5, ... agents, and compares the time for each agent with
    that of a single agent.

Times are medians over --repeats, after a first call that compiles. Compare only times
within one file.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from dimat_jax._metrics import write_json
from dimat_jax._trainer import Trainer
from dimat_jax.cli import _bundled, _program
from dimat_jax.config import (
    Config,
    copy_of,
    drop_unread,
    fields_of,
    fields_read,
    record_of,
)
from dimat_jax.errors import UserError, nearest
from dimat_jax.experiment import Experiment
from dimat_jax.models._settings import DTYPE
from dimat_jax.network import Network
from dimat_jax.placement import AGENTS, request_cpu_devices

__all__ = ["COMMAND"]


def define_flags() -> None:
    """Defines the flags of the command."""
    _bundled.define_config(
        "cifar100_resnet20:small",
        "The config to time. By default, cifar100_resnet20:small.",
    )
    flags.DEFINE_string("out", None, "The JSON file to write.", required=True)
    flags.DEFINE_integer("repeats", 3, "The number of timings of each program.", 1)
    flags.DEFINE_integer("steps", 5, "The number of local steps in one timing.", 1)


def _seconds_per_step(config: Config) -> float:
    """Measures the median time of a local step of all agents."""
    repeats, steps = flags.FLAGS.repeats, flags.FLAGS.steps
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
    for repeat in range(repeats):
        start = time.perf_counter()
        # `train` returns once the losses are on the host, so no work is left then.
        first = 1 + repeat * steps
        state, _ = trainer.train(state, first, networks(first, steps))
        times.append((time.perf_counter() - start) / steps)
    return float(np.median(times))


def merge(config: Config) -> dict[str, Any]:
    """Times a merge round by phase, in seconds and in local epochs.

    Raises:
        UserError: the config's algorithm does not merge.
    """
    if not record_of(fields_of(config)).merges:
        raise UserError(f"config.algorithm is {config.algorithm!r}; it does not merge")
    experiment = Experiment(config)
    state = experiment.algorithm.init(experiment.initial_variables())
    phases, totals = [], []
    for number in range(1, 2 + flags.FLAGS.repeats):
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
    """Times stacked agents against one agent, and bfloat16 against float32."""
    n_agents = _n_agents(config)
    stacked = _seconds_per_step(config)
    alone = _seconds_per_step(_changed(config, {AGENTS.path: 1}))
    half = _seconds_per_step(_changed(config, {DTYPE.path: "bfloat16"}))
    return {
        "agents": n_agents,
        "step_seconds": stacked,
        "images_per_second": n_agents * config.batch_size / stacked,
        "one_agent_step_seconds": alone,
        "stacked_per_agents_alone": stacked / (n_agents * alone),
        "bfloat16_per_float32": half / stacked,
    }


def scale(config: Config) -> dict[str, Any]:
    """Times a step for each agent, for growing numbers of agents."""
    counts = [n for n in (1, 2, 5, 10, 20, 40) if n <= _n_agents(config)]
    steps = {n: _seconds_per_step(_changed(config, {AGENTS.path: n})) for n in counts}
    return {
        "step_seconds": steps,
        "per_agent_relative_to_one": {n: t / n / steps[1] for n, t in steps.items()},
    }


BENCHES = {"merge": merge, "train": train, "scale": scale}


def _n_agents(config: Config) -> int:
    """Returns the number of agents; a config that does not read it has a single one."""
    return fields_read(fields_of(config)).get(AGENTS.path, 1)


def _changed(config: Config, fields: Mapping[str, Any]) -> Config:
    """Returns a copy of a config with other values of those fields that it reads."""
    changed = copy_of(config)
    changed.update_from_flattened_dict(fields)
    return drop_unread(changed)


def main(arguments: list[str]) -> None:
    """Runs the benchmark that the argument names."""
    if len(arguments) != 1 or arguments[0] not in BENCHES:
        given = " ".join(arguments)
        raise UserError(f"the benchmark is {given!r}; {nearest(given, BENCHES)}")
    config = _bundled.given_config()
    request_cpu_devices(config.placement.cpu_devices)
    result = {
        "bench": arguments[0],
        **BENCHES[arguments[0]](config),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "config": config.to_dict(),
    }
    out = Path(flags.FLAGS.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    for name, value in result.items():
        if name != "config":
            print(f"{name}: {value}")
    print(f"wrote {out}")


COMMAND = _program.Command("bench", __doc__, main, define_flags)
