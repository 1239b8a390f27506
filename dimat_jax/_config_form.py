"""What a config is: a nested dict of fields, each of the type of its default."""

import copy
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from dimat_jax.errors import UserError, nearest

__all__ = [
    "Config",
    "ConfigError",
    "Fields",
    "check_form",
    "check_types",
    "copy_of",
    "fields_of",
]

if TYPE_CHECKING:
    # ml_collections declares every field of a ConfigDict as a number or a text, so that
    # type checkers would refuse `config.merge.stay`.
    Config = Any
else:
    Config = ConfigDict
"""The type of a config."""

Fields = Mapping[str, Any]
"""The values of a config's fields, by dotted path."""


class ConfigError(UserError):
    """A config cannot be run. The message names a field, its value, what is allowed."""


def copy_of(config: Config) -> Config:
    """Returns a copy of a config, whose fields take values of the same types.

    `ConfigDict.copy_and_resolve_references` does not do this: in its copy, a field that
    may be a number or a word takes only values of the type that it has at the time.
    """
    return copy.deepcopy(config)


def fields_of(config: Config | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a config's values by dotted path.

    Args:
        config: a config, or the same fields as nested dicts.
        prefix: the beginning of every path.
    """
    flat = {}
    for name, value in config.items():
        path = f"{prefix}{name}"
        is_section = isinstance(value, (Mapping, ConfigDict))
        flat |= fields_of(value, f"{path}.") if is_section else {path: value}
    return flat


def check_form(config: Any, defaults: Fields, words: Collection[str]) -> None:
    """Refuses what is no config with all fields, each of the type of its default.

    A whole number may stand for a number with decimals.

    Args:
        config: Anything.
        defaults: The defaults of all fields, by path.
        words: The paths of the fields that may be a number or a word.

    Raises:
        ConfigError: The message says what is wrong.
    """
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"expected a config, as default_config() makes it, got a value of type "
            f"{type(config).__name__}"
        )
    fields = fields_of(config)
    unknown = [path for path in fields if path not in defaults]
    if unknown:
        raise ConfigError(
            f"the config has the field {unknown[0]!r}, which does not exist; "
            f"{nearest(unknown[0], defaults)}"
        )
    missing = [path for path in defaults if path not in fields]
    if missing:
        raise ConfigError(
            f"the config lacks the field(s) {', '.join(missing)}; make it with "
            "default_config() or from a bundled config"
        )
    check_types(fields, defaults, words)


def check_types(fields: Fields, defaults: Fields, words: Collection[str]) -> None:
    """Refuses values that are not of the types of their defaults; see `check_form`."""
    for path, default in defaults.items():
        value, kind = fields[path], type(default)
        allowed = (int, float) if kind is float else (kind,)
        if path in words:
            continue  # `Option.check` says which words and numbers are allowed.
        # Python counts True as a number.
        is_flag = isinstance(value, bool)
        if not isinstance(value, allowed) or is_flag != (kind is bool):
            raise ConfigError(
                f"config.{path} is {value!r}, of type {type(value).__name__}; it must "
                f"be of type {kind.__name__}"
            )
