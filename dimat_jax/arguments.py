"""What a config tells the parts of a run: from its fields to their arguments."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from dimat_jax.algorithms import GossipOptions, MergeOptions, Needs, needs
from dimat_jax.compression import COMPRESSORS, Compressor
from dimat_jax.errors import UserError
from dimat_jax.network import Absence, Faults, NetworkError

__all__ = [
    "Config",
    "ConfigError",
    "absences",
    "compressor",
    "compressor_name",
    "faults",
    "gossip_options",
    "merge_options",
    "model_arguments",
    "needed",
    "optimizer_name",
    "options_for",
]

Config = Any
"""An `ml_collections.ConfigDict`, whose fields type checkers cannot know."""


class ConfigError(UserError):
    """A config that cannot be run: which field, what it holds, what is allowed."""


def needed(config: Config) -> Needs:
    """What the algorithm asks for, with what it does between merges."""
    return needs(config.algorithm, config.merge.inner)


def options_for(config: Config, section: str, function: Callable) -> dict[str, Any]:
    """The fields of a section that a function takes."""
    taken = inspect.signature(function).parameters
    return {k: v for k, v in config[section].to_dict().items() if k in taken}


def optimizer_name(config: Config) -> str:
    """The local optimizer in the rounds: the algorithm's own where none is named."""
    return config.optimizer.name or needed(config).optimizer


def compressor_name(config: Config) -> str:
    """What compresses messages: the algorithm's own where none is named."""
    return config.compression.name or needed(config).compressor or "none"


def compressor(config: Config) -> Compressor:
    """Of the algorithm's messages."""
    make = COMPRESSORS[compressor_name(config)]
    return make(**options_for(config, "compression", make))


def merge_options(config: Config) -> MergeOptions:
    """How to merge."""
    return MergeOptions(*(config.merge[field] for field in MergeOptions._fields))


def gossip_options(config: Config) -> GossipOptions:
    """Choices of single algorithms."""
    return GossipOptions(**config.gossip.to_dict())


def faults(config: Config) -> Faults:
    """How the network misbehaves.

    Raises:
        ConfigError: it cannot do so.
    """
    fields = config.faults
    try:
        return Faults(
            fields.dropout, fields.edge_loss, absences(fields.absences), config.seed
        )
    except NetworkError as error:
        raise ConfigError(f"config.faults: {error}") from None


def absences(text: str) -> tuple[Absence, ...]:
    """Reads "agent:first-last, ...": the rounds, from 1, in which agents are away.

    Raises:
        ConfigError: text of another form.
    """
    found = []
    for part in filter(None, map(str.strip, text.split(","))):
        match = re.fullmatch(r"(\d+):(\d+)-(\d*)", part)
        if not match:
            raise ConfigError(
                f"config.faults.absences is {text!r}; expected agent:first-last or "
                'agent:first-, e.g. "3:1-4, 0:6-"'
            )
        agent, first, last = match.groups()
        found.append(Absence(int(agent), int(first), int(last) + 1 if last else None))
    return tuple(found)


def model_arguments(config: Config) -> dict[str, Any]:
    """What `MODELS[config.model.name]` is told: its own defaults for what is empty."""
    fields = config.model.to_dict()
    del fields["name"]
    fields["dtype"] = jnp.dtype(fields["dtype"])
    return {name: value for name, value in fields.items() if value != ""}
