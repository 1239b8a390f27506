"""What a config chooses by name, built: the network, optimizers, other entries."""

from collections.abc import Mapping
from typing import Any

import optax

from dimat_jax._schedules import WARMUP, WARMUP_UNIT, warmed_up
from dimat_jax.compression import COMPRESSOR
from dimat_jax.config import Config, fields_of, record_of, resolved
from dimat_jax.mixing import MIXING, WHOLE, uniform
from dimat_jax.network import FAULTS, Links, faults
from dimat_jax.optimizers import LEARNING_RATE, OPTIMIZER, SCHEDULE
from dimat_jax.options import Option, arguments
from dimat_jax.placement import AGENTS
from dimat_jax.topology import TOPOLOGIES, TOPOLOGY

__all__ = [
    "Fields",
    "build_chosen",
    "build_optimizer",
    "check_network",
    "number_of_agents",
]

Fields = Mapping[str, Any]
"""The values of a config's fields, by dotted path; empty ones are resolved."""


def check_network(config: Config) -> Links:
    """Builds the network of a config, and checks that its algorithm can use it.

    Raises:
        UserError: the network cannot be built, or the algorithm cannot use it.
    """
    fields = resolved(fields_of(config))
    record, links = record_of(fields), _links(fields)
    given = arguments(record, fields)
    if record.compressor is not None:
        given["compressor"] = build_chosen(COMPRESSOR, fields)
    record.check_network(links, **given)
    return links


def number_of_agents(fields: Fields) -> int:
    """The number of agents: one where the algorithm has a single one."""
    return 1 if record_of(fields).single else fields[AGENTS.path]


def _links(fields: Fields) -> Links:
    n_agents, record = number_of_agents(fields), record_of(fields)
    failing = faults(**{option.keyword: fields[option.path] for option in FAULTS})
    if not record.uses_graph:
        # The algorithm sends nothing along edges, so the topology is not read.
        return Links(TOPOLOGIES["disconnected"](n_agents), uniform, failing)
    adjacency = build_chosen(TOPOLOGY, fields, n_agents)
    rule = MIXING.entry(fields[MIXING.path])
    if fields[MIXING.path] in WHOLE:
        # Unlike a rule, such a matrix cannot be applied anew to the agents that are
        # present.
        return Links(adjacency, build_chosen(MIXING, fields, adjacency), failing)
    return Links(adjacency, rule, failing)


def build_chosen(choice: Option, fields: Fields, *args: Any, **kwargs: Any) -> Any:
    """Builds the entry of a registry that an option chooses, with its own options."""
    record = choice.entry(fields[choice.path])
    return record(*args, **kwargs, **arguments(record, fields))


def build_optimizer(
    fields: Fields,
    *,
    total_steps: int,
    steps_per_epoch: int,
    steps_per_round: int = 0,
) -> optax.GradientTransformation:
    """Builds the local optimizer of a phase, with its learning-rate schedule.

    Args:
        fields: the fields of the section "optimizer", without the section of the phase.
        total_steps: the number of steps of the phase.
        steps_per_epoch: the number of steps in an epoch.
        steps_per_round: the number of steps in a round; 0 if there are no rounds.
    """
    parts = {"steps_per_epoch": steps_per_epoch, "steps_per_round": steps_per_round}
    rate = fields[LEARNING_RATE.path]
    schedule = build_chosen(SCHEDULE, fields, rate, total_steps=total_steps, **parts)
    rising = {option.keyword: fields[option.path] for option in (WARMUP, WARMUP_UNIT)}
    return build_chosen(OPTIMIZER, fields, warmed_up(schedule, **parts, **rising))
