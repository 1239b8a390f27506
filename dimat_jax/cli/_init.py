"""Writes a config file to start from, with a comment on each of its fields.

    dimat init [FILE] [--like=NAME]

FILE is my_config.py by default, and must not exist. The file sets the fields that are
used most, and those in which it differs from the defaults. It can be run as it is:

    dimat train --config=FILE --workdir=DIR

NAME is the config whose values it has: a bundled one (`dimat show configs`), with an
argument if it takes one (quickstart:wa), or the path of a config file.
"""

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from dimat_jax._folders import check_output_file
from dimat_jax._inputs import from_plugins
from dimat_jax._option_facts import facts
from dimat_jax._storage import explained
from dimat_jax.cli import _bundled, _program
from dimat_jax.cli._field_texts import texts_of, wrapped
from dimat_jax.config import ROOT, Config, check, fields_of, resolved
from dimat_jax.errors import UserError
from dimat_jax.options import Option, read

__all__ = ["COMMAND", "MOST_USED"]

MOST_USED = (
    "seed",
    "agents",
    "algorithm",
    "topology",
    "mixing",
    "rounds",
    "local_epochs",
    "batch_size",
    "data.name",
    "data.dir",
    "data.partition",
    "data.alpha",
    "model.name",
    "model.width",
    "optimizer.name",
    "optimizer.learning_rate",
    "optimizer.schedule",
    "pretrain.epochs",
    "merge.frame",
    "merge.stay",
    "merge.every",
    "merge.match_data",
    "batch_norm.data",
    "eval.every",
    "checkpoint.every",
)
"""The fields that a new file sets if its config reads them."""

_FILE = '''"""A config like `{like}`.

    dimat show {path}{plugins}
    dimat train --config={path} --workdir={workdir}{plugins}

Fields that are not set here have their defaults; `dimat train --help` lists all of
them. A field that nothing reads must keep its default.
"""

from dimat_jax.config import default_config


def get_config():
    """Makes the config."""
    config = default_config()
{fields}

    return config
'''


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("like", "quickstart", "The config whose values the file has.")


def main(arguments: list[str]) -> None:
    """Writes the file, and says how to go on."""
    if len(arguments) > 1:
        raise UserError(f"expected one file, got {', '.join(arguments)}")
    path = arguments[0] if arguments else "my_config.py"
    check_output_file(path, "FILE")
    if not path.endswith(".py"):
        raise UserError(f"FILE={path} must be a Python file, whose name ends with .py")
    if Path(path).is_symlink() or Path(path).exists():
        raise UserError(f"FILE={path} exists already; remove it or choose another name")
    like = flags.FLAGS.like
    config = _bundled.load_config(like)
    check(config)
    text = content(config, path, like)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # Another program may have made the file in the meantime.
    with explained(Path(path).parent, "No file has been replaced"):
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    print(f"wrote {path}; `dimat show {path}` says what it will do")


def content(config: Config, path: str, like: str) -> str:
    """Writes the text of a file that defines a config.

    Args:
        config: the config.
        path: the file's path.
        like: the name of the config, for the file's first line.
    """
    fields, described = fields_of(config), facts(ROOT)
    modules = dict.fromkeys(named.module for named in from_plugins(config))
    found = read(ROOT, resolved(fields))
    rank = {field: place for place, field in enumerate(MOST_USED)}
    options = [
        option
        for option in found.values()
        if option.path in rank or fields[option.path] != option.default
    ]
    options.sort(key=lambda option: rank.get(option.path, len(rank)))
    return _FILE.format(
        like=_in_docstring(like),
        path=_in_docstring(shlex.quote(path)),
        workdir=_in_docstring(shlex.quote(f"runs/{Path(path).stem}")),
        plugins=_in_docstring("".join(f" --plugin={shlex.quote(m)}" for m in modules)),
        fields="\n".join(
            line for option in options for line in _field(option, fields, described)
        ),
    )


def _field(
    option: Option, fields: Mapping[str, Any], described: Mapping[str, list[str]]
) -> Iterator[str]:
    """Yields the lines that set a field, with a comment before them."""
    yield ""
    for text in texts_of(option, described[option.path]):
        if text != "Read: always":
            yield wrapped(text, " " * 4 + "# ")
    value = fields[option.path]
    literal = json.dumps(value) if isinstance(value, str) else repr(value)
    yield f"    config.{option.path} = {literal}"


def _in_docstring(text: str) -> str:
    """Escapes what would end a docstring, or mean something else in it."""
    return text.replace("\\", "\\\\").replace('"', '\\"')


COMMAND = _program.Command("init", __doc__, main, define_flags)
