"""Runs the code of users: configs, sweeps, models, data sets, and plugins."""

import contextlib
import importlib
import importlib.util
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from dimat_jax.errors import UserError, in_one_line

__all__ = ["call", "import_module", "load", "run"]


def call(path: Path, signature: str, *arguments: Any) -> Any:
    """Loads a Python file of a user, and calls one of its functions.

    The file can raise any error, exit, import what is not there, or not parse at all.
    All of this becomes an error that names the file and, if it is known, the line.

    Args:
        path: The file.
        signature: The function's name and its form, for messages: "get_runs() -> ...".
        arguments: The function's arguments.

    Raises:
        UserError: The file cannot be loaded, lacks the function, or raises an error.
            `UserError`s of this library that it raises stay as they are.
    """
    function = load(path, signature)
    with _blaming(path):
        return function(*arguments)


def load(path: Path, signature: str) -> Callable[..., Any]:
    """Loads a Python file of a user, and returns one of its functions.

    Raises:
        UserError: As of `call`.
    """
    name, module = signature.partition("(")[0], run(path)
    if not callable(function := getattr(module, name, None)):
        raise UserError(f"{path} defines no {signature}")
    return function


def run(path: Path) -> ModuleType:
    """Runs a Python file of a user as a module.

    Raises:
        UserError: As of `call`.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    with _blaming(path):
        spec.loader.exec_module(module)
    return module


def import_module(name: str) -> ModuleType:
    """Imports a module of a user, which can raise any error, as a file can.

    Raises:
        UserError: The module cannot be imported.
    """
    with _blaming(None):
        return importlib.import_module(name)


@contextlib.contextmanager
def _blaming(path: Path | None) -> Iterator[None]:
    """Makes a UserError of all errors, which says where in the file they arise."""
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
