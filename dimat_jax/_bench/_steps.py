"""The program that takes a config's local steps, as the benchmarks time it."""

from typing import Any

from dimat_jax._bench._worker import Program, config_from, jax_program
from dimat_jax._trainer import Trainer
from dimat_jax.config import Config, copy_of, drop_unread, fields_of, fields_read
from dimat_jax.experiment import Experiment
from dimat_jax.placement import AGENTS

__all__ = ["changed", "local_steps", "number_of_agents"]


def number_of_agents(config: Config) -> int:
    """Returns the number of agents; a config that does not read it has a single one."""
    return fields_read(fields_of(config)).get(AGENTS.path, 1)


def changed(config: Config, fields: dict[str, Any]) -> Config:
    """Returns a copy of a config with other values of those fields that it reads."""
    copy = copy_of(config)
    copy.update_from_flattened_dict(fields)
    return drop_unread(copy)


def local_steps(config: dict[str, Any], steps: int) -> Program:
    """Makes a program that takes local steps of all agents.

    Args:
        config: the config as a dict; see `config_from`.
        steps: the number of steps in a call.
    """
    experiment = Experiment(config_from(config))
    state = experiment.algorithm.init(experiment.initial_variables())
    trainer = Trainer(
        experiment, experiment.algorithm, experiment.sampler, experiment.key("rounds")
    )
    done = 0

    def call() -> dict[str, Any]:
        nonlocal state, done
        numbers = range(done, done + steps)
        networks = [experiment.network_at_step(number, 1) for number in numbers]
        # `train` returns once the losses are on the host, so no work is left then.
        state, _ = trainer.train(state, done, networks)
        done += steps
        return {"steps_per_epoch": experiment.sampler.steps_per_epoch}

    return jax_program(call)
