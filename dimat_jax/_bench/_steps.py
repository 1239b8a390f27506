"""The program that takes a config's local steps, as the benchmarks time it."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dimat_jax._bench._worker import Program, config_from, jax_program
from dimat_jax._trainer import Trainer
from dimat_jax.algorithms.base import gradient, one_agent
from dimat_jax.config import Config, copy_of, drop_unread, fields_of, fields_read
from dimat_jax.data.pipeline import Batch
from dimat_jax.experiment import Experiment
from dimat_jax.placement import AGENTS

__all__ = ["changed", "gradient_flops", "local_steps", "number_of_agents"]


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

    Returns:
        the program. Its facts are the number of steps in an epoch, and the
        floating-point operations by which one agent computes its gradient in a step.
    """
    experiment = Experiment(config_from(config))
    state = experiment.algorithm.init(experiment.initial_variables())
    trainer = Trainer(
        experiment, experiment.algorithm, experiment.sampler, experiment.key("rounds")
    )
    epoch, flops = experiment.sampler.steps_per_epoch, gradient_flops(experiment)
    done = 0

    def call() -> dict[str, Any]:
        nonlocal state, done
        numbers = range(done, done + steps)
        networks = [experiment.network_at_step(number, 1) for number in numbers]
        # `train` returns once the losses are on the host, so no work is left then.
        state, _ = trainer.train(state, done, networks)
        done += steps
        return {"steps_per_epoch": epoch, "flops_per_step": flops}

    return jax_program(call)


def gradient_flops(experiment: Experiment) -> float:
    """Returns the floating-point operations of one agent's gradient.

    XLA counts them in the program before optimization, because it cannot look into the
    library calls that optimization puts there. It does so for CPUs alone, where the
    program is the same.
    """
    shape = experiment.dataset.train.images.shape[1:]
    size = experiment.config.batch_size

    def empty_batch() -> Batch:
        images = jnp.zeros((size, *shape))
        return Batch(images, jnp.zeros(size, jnp.int32), jnp.ones(size, bool))

    # Without a sharding, nothing binds the program to the run's own devices.
    variables = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        one_agent(experiment.abstract_variables()),
    )
    batch, key = jax.eval_shape(lambda: (empty_batch(), jax.random.key(0)))
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        lowered = jax.jit(partial(gradient, experiment.task)).lower(
            variables, batch, key
        )
    analysis: Any = lowered.cost_analysis()
    return float(analysis["flops"])
