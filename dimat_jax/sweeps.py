"""Builds sweeps: many configs by name, each with only the options that it reads."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from dimat_jax.config import Config, drop_unread, fields_of, fields_read

__all__ = ["grid"]


def grid(
    choices: Mapping[str, Sequence[Any]], configs: Mapping[str, Config]
) -> dict[str, Config]:
    """Combines every config with every combination of some options' values.

    A config takes only the choices that it reads. For example, agents that train alone
    read no topology, so one run of them serves for all topologies. Options that a
    config does not read are set to their defaults.

    Args:
        choices: the values of each option, by its dotted path.
        configs: configs by name; they are not changed.

    Returns:
        configs by names such as "iid-ring-dimat": the values that a config reads, in
        the order of `choices`, and the config's own name.
    """
    runs: dict[str, Config] = {}
    for values in product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        for name, config in configs.items():
            config = config.copy_and_resolve_references()
            config.update_from_flattened_dict(chosen)
            read = fields_read(fields_of(config))
            parts = [str(value) for path, value in chosen.items() if path in read]
            runs.setdefault("-".join([*parts, name]), drop_unread(config))
    return runs
