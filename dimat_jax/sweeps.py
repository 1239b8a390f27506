"""Builds sweeps: many configs by name, each with only the options that it reads."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

from dimat_jax.config import ROOT, Config, copy_of, drop_unread, fields_of, resolved
from dimat_jax.errors import UserError
from dimat_jax.options import read

__all__ = ["grid", "over_seeds"]


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
        the order of `choices`, and the config's own name. An empty value appears as
        the value that it stands for, or as "default".

    Raises:
        UserError: two different configs get the same name.
    """
    runs: dict[str, Config] = {}
    for values in product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        for own_name, config in configs.items():
            config = copy_of(config)
            config.update_from_flattened_dict(chosen)
            name = "-".join([*_values_read(config, choices), own_name])
            run = drop_unread(config)
            _refuse_another(runs.setdefault(name, run), run, name)
    return runs


def over_seeds(configs: Mapping[str, Config], n_seeds: int) -> dict[str, Config]:
    """Repeats every config with the seeds 0, 1, ..., `n_seeds` - 1.

    Args:
        configs: configs by name, all with the same seed; they are not changed.
        n_seeds: how many seeds there are, at least 1.

    Returns:
        configs by names such as "0-iid-ring-dimat", which begin with the seed.

    Raises:
        UserError: the configs have different seeds already, or `n_seeds` is below 1.
    """
    own = sorted({config.seed for config in configs.values()})
    if len(own) > 1:
        raise UserError(
            f"the runs of the sweep have different seeds already: {own}; they cannot "
            f"be repeated with {n_seeds} seeds"
        )
    if n_seeds < 1:
        raise UserError(f"the number of seeds is {n_seeds}, but must be at least 1")
    return grid({"seed": range(n_seeds)}, configs)


def _values_read(config: Config, paths: Iterable[str]) -> list[str]:
    """Returns the values of those options that a config reads, as text."""
    whole = resolved(fields_of(config))
    found = read(ROOT, whole)
    return [str(whole[path]) or "default" for path in paths if path in found]


def _refuse_another(known: Config, run: Config, name: str) -> None:
    """Refuses a config that differs from a known one of the same name.

    An empty value does not differ from the value that it stands for.
    """
    fields, others = (resolved(fields_of(config)) for config in (known, run))
    differing = [path for path, value in fields.items() if others[path] != value]
    if differing:
        raise UserError(
            f"two runs of the sweep get the name {name!r}, but they differ in "
            f"{', '.join(differing)}; give the configs other names"
        )
