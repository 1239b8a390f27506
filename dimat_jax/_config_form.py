"""What a config is: a nested dict of fields, each of the type of its default."""

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from dimat_jax._near_names import no_such_field
from dimat_jax.errors import UserError

__all__ = [
    "Config",
    "ConfigError",
    "Fields",
    "NoSuchField",
    "Section",
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


class NoSuchField(KeyError):
    """A config has no such field. The message names the fields that may be meant."""

    def __str__(self) -> str:
        # The text of a KeyError stands between quotation marks.
        return str(self.args[0])


class Section(ConfigDict):
    """A config, or a section of one. It says which field was probably meant.

    Args:
        content: the first fields.
        path: the section's own path, such as "pretrain.optimizer"; "" for the config.
        known: the paths of all fields of the whole config, important ones first.
        options: the other arguments of `ConfigDict`.
    """

    def __init__(
        self,
        content: Any = None,
        *args: Any,
        path: str = "",
        known: Sequence[str] = (),
        **options: Any,
    ):
        super().__init__(content, *args, **options)
        # ConfigDict makes a field of every attribute that is set the usual way.
        object.__setattr__(self, "_path", path)
        object.__setattr__(self, "_known", tuple(known))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        object.__setattr__(self, "_path", state["_path"])
        object.__setattr__(self, "_known", state["_known"])

    def __getitem__(self, key: Any) -> Any:
        try:
            return super().__getitem__(key)
        except KeyError as error:
            # `key` may be a path. Then the section that lacks it has raised the error.
            raise self._explained(key, error) from None

    def __setitem__(self, key: Any, value: Any) -> None:
        try:
            super().__setitem__(key, value)
        except KeyError as error:
            raise self._explained(key, error) from None

    def update_from_flattened_dict(
        self, flattened_dict: Mapping[str, Any], strip_prefix: str = ""
    ) -> None:
        for path in flattened_dict:
            field = path.removeprefix(strip_prefix)
            if self.is_locked and path.startswith(strip_prefix):
                self[field]  # This raises an error if there is no such field.
        super().update_from_flattened_dict(flattened_dict, strip_prefix)

    def _explained(self, key: Any, error: KeyError) -> KeyError:
        # Libraries ask for many attributes that no config has, such as __deepcopy__.
        if not self._known or not isinstance(key, str) or key.startswith("_"):
            return error
        path = f"{self._path}.{key}" if self._path else key
        return NoSuchField(no_such_field(path, self._known))


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
            f"the config has a field too many: {no_such_field(unknown[0], defaults)}"
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
