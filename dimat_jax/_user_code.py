"""Runs the code of users: of config files, of sweep files, and of plugins."""

import importlib
import importlib.util
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from dimat_jax.errors import UserError, in_one_line

__all__ = ["call", "import_module", "load"]


def load(path: Path) -> ModuleType:
    """Loads a Python file of a user as a module.

    The file can raise any error, exit, import what is not there, or not parse at all.
    All of this becomes an error that names the file and, if it is known, the line.

    Raises:
        UserError: The file cannot be loaded. `UserError`s of this library that it
            raises stay as they are.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    with _explained(path):
        spec.loader.exec_module(module)
    return module


def call(path: Path, signature: str, *arguments: str) -> Any:
    """Loads a Python file of a user, and calls one of its functions.

    Args:
        path: The file.
        signature: The function's name and its form, for messages: "get_runs() -> ...".
        arguments: The function's arguments.

    Raises:
        UserError: The file cannot be loaded, lacks the function, or raises an error;
            see `load`.
    """
    module = load(path)
    function = getattr(module, signature.partition("(")[0], None)
    if not callable(function):
        raise UserError(f"{path} defines no {signature}")
    with _explained(path):
        return function(*arguments)


def import_module(name: str) -> ModuleType:
    """Imports a module of a user by its name. It can raise any error, as a file can.

    Raises:
        UserError: The module cannot be imported.
    """
    with _explained(None):
        return importlib.import_module(name)


@contextmanager
def _explained(path: Path | None) -> Iterator[None]:
    """Makes errors of a user's code errors with one message; see `load`.

    Args:
        path: The file of the code; None if the message needs no place in a file.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        place = "" if path is None else f"{_place(path, error)}: "
        raise UserError(f"{place}{_reason(error)}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"the file ends the program (SystemExit: {error})"
    text = in_one_line(error)
    name = type(error).__name__
    return text if text.startswith(name) else f"{name}: {text}"


def _place(path: Path, error: BaseException) -> str:
    """The file, and its last line that was running or that does not parse."""
    places = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        places.append((error.filename or "", error.lineno))
    lines = [line for name, line in places if Path(name).absolute() == path.absolute()]
    return f"{path}, line {lines[-1]}" if lines and lines[-1] else str(path)
