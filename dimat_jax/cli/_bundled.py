"""Finds config files and sweep files by path or, if they are bundled, by name."""

import ast
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from dimat_jax import _user_code
from dimat_jax._near_names import no_such_field
from dimat_jax.config import (
    Config,
    expect_all_fields,
    field_paths,
    fields_of,
    settle_overrides,
)
from dimat_jax.errors import UserError, concerning, nearest, reading

__all__ = [
    "bundled_configs",
    "bundled_sweeps",
    "define_config",
    "given_config",
    "is_config",
    "is_config_given",
    "load_config",
    "load_runs",
    "name_of_given_config",
    "summary",
]

_CONFIGS = Path(__file__).parents[1] / "configs"


def bundled_configs() -> dict[str, Path]:
    """Returns the files of the bundled configs, by name."""
    return {path.stem: path for path in sorted(_CONFIGS.glob("[!_]*.py"))}


def bundled_sweeps() -> dict[str, Path]:
    """Returns the files of the bundled sweeps, by name."""
    return {path.stem: path for path in sorted(_CONFIGS.glob("sweeps/[!_]*.py"))}


def summary(path: Path) -> str:
    """Reads the first line of a file's docstring, without running the file."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def _find(name: str, kind: str, folder: str, bundled: dict[str, Path]) -> Path:
    """Finds a file by its path, or a bundled one by its name.

    A bundled file has the same path in a clone of the repository. That path is taken as
    its name, so that a command that works in a clone works everywhere.

    Args:
        name: the path or the name.
        kind: "config" or "sweep", for the message.
        folder: the folder of the bundled files, seen from "configs".
        bundled: the bundled files.

    Raises:
        UserError: there is no such file.
    """
    with reading(f"{kind} file {name!r}"):
        if Path(name).is_file():
            return Path(name)
    short = _short(name).removeprefix(folder)
    if short not in bundled:
        raise UserError(
            f"there is no {kind} file {name}, and no bundled {kind} of this name; "
            f"{nearest(short, bundled)}"
        )
    return bundled[short]


def _short(name: str) -> str:
    return name.removesuffix(".py").removeprefix("configs/")


class _ConfigParser(flags.ArgumentParser):
    """Reads a config that is given by path or by name, with its argument."""

    argument = ""

    def parse(self, argument: str) -> Any:
        self.argument = argument
        config = load_config(argument).lock()
        # ml_collections looks for the overrides there, too.
        for given in sys.argv:
            _expect_field(given, config)
        return config

    def flag_type(self) -> str:
        return "config object"


def _expect_field(argument: str, config: Config) -> None:
    """Refuses an argument that is an override of a field that does not exist.

    Raises:
        UserError: the message names the fields that may be meant.
    """
    override = re.match(r"--?(?:no)?config\.([\w.-]+)", argument)
    if override and override[1] not in fields_of(config):
        raise UserError(no_such_field(override[1], field_paths()))


def _find_config(name: str) -> Path:
    return _find(name, "config", "", bundled_configs())


def define_config(
    default: str | None, meaning: str, *, is_required: bool = True
) -> None:
    """Defines the flag --config, and --config.FIELD for each of the config's fields.

    Args:
        default: the config if the flag is not given; None if there is none.
        meaning: the documentation of the flag.
        is_required: whether there must be a config.
    """
    config_flags.DEFINE_config_file("config", None, meaning)
    flag = flags.FLAGS["config"]
    flag.parser = _ConfigParser()
    if default is not None:
        flags.FLAGS.set_default("config", default)
    elif is_required:
        flags.mark_flag_as_required("config")


def given_config() -> Config:
    """The config of --config with its overrides, --config.FIELD=VALUE.

    Options that the file has set and that only the overrides leave unread have their
    defaults.
    """
    flag = flags.FLAGS["config"]
    overridden = config_flags.get_override_values(flag)
    original = load_config(name_of_given_config())
    return settle_overrides(expect_all_fields(flag.value), original, overridden)


def name_of_given_config() -> str:
    """The name or path of the config, as --config gives it."""
    parser = flags.FLAGS["config"].parser
    assert isinstance(parser, _ConfigParser)  # `define_config` has set it
    return parser.argument


def is_config_given() -> bool:
    """Whether the user has given --config, or a field of it."""
    flag = flags.FLAGS["config"]
    return bool(flag.present or config_flags.get_override_values(flag))


def is_config(name: str) -> bool:
    """Whether a name is that of a bundled config, or the path of a file of the user.

    An argument may follow. A file that defines `get_runs` is a sweep.

    Raises:
        UserError: the file cannot be read.
    """
    name = name.partition(":")[0]
    if _short(name) in bundled_configs():
        return True
    with reading(name):
        path = Path(name)
        return path.is_file() and "def get_runs" not in path.read_text(encoding="utf-8")


def load_config(name: str) -> Config:
    """Loads a config by its path or its name, with its argument: "quickstart:wa".

    Raises:
        UserError: there is no such file, it does not parse, it raises an error, or what
            its `get_config` returns is no config.
    """
    name, *argument = name.split(":", 1)
    path = _find_config(name)
    config = _user_code.call(path, "get_config() -> config", *argument)
    with concerning(f"{path}: get_config()"):
        return expect_all_fields(config)


def load_runs(name: str) -> dict[str, Config]:
    """Loads the configs of a sweep by its path or its name.

    Raises:
        UserError: there is no such file, it does not parse, it raises an error, or what
            its `get_runs` returns are no configs by name.
    """
    path = _find(name, "sweep", "sweeps/", bundled_sweeps())
    runs = _user_code.call(path, "get_runs() -> {name: config}")
    if not isinstance(runs, Mapping) or not runs:
        found = type(runs).__name__ if not isinstance(runs, Mapping) else "no runs"
        raise UserError(
            f"{path}: get_runs() must return a dict of configs by name, got {found}"
        )
    for run, config in runs.items():
        if not isinstance(run, str):
            raise UserError(f"{path}: the name of a run must be a text, got {run!r}")
        with concerning(f"{path}: run {run!r}"):
            expect_all_fields(config)
    return dict(runs)
