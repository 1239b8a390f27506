"""Runs the code of config files and sweep files."""

import importlib.util
import traceback
from pathlib import Path
from typing import Any

from dimat_jax.errors import UserError, in_one_line

__all__ = ["call"]


def call(path: Path, signature: str, *arguments: str) -> Any:
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
    name = signature.partition("(")[0]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if callable(function := getattr(module, name, None)):
            return function(*arguments)
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise UserError(f"{_place(path, error)}: {_reason(error)}") from error
    raise UserError(f"{path} defines no {signature}")


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
