"""Reads files that users may have changed, and checks folders before they are used."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dimat_jax._digests import expect_unchanged
from dimat_jax._temporary import is_temporary
from dimat_jax.errors import UserError, first_line, reading

__all__ = [
    "check_output",
    "check_output_file",
    "map_array",
    "parse_json",
    "read_json",
    "strangers",
]

# Shells, schedulers and system daemons may write these into a folder.
_LOGS = (".log", ".out", ".err")

# The bytes of the longest name that usual file systems allow.
_LONGEST_NAME = 255


def read_json(
    path: Path, expected: type | None = dict, kind: type[UserError] = UserError
) -> Any:
    """Reads a JSON file. If its folder has digests, the file must be as it was written.

    Args:
        path: The file.
        expected: The type that its content must have; None: it may have any.
        kind: The class of the error.

    Raises:
        UserError: The file cannot be read, has changed since it was written, is no
            JSON, or holds something else.
    """
    with reading(path, kind):
        if path.exists() and not path.is_file():
            raise ValueError("it is no file")
        text = path.read_bytes()
        expect_unchanged(path, text)
        content = parse_json(text)
    if expected is not None and not isinstance(content, expected):
        found, wanted = type(content).__name__, expected.__name__
        raise kind(f"{path} cannot be used: it holds a {found}, expected a {wanted}")
    return content


def parse_json(text: bytes) -> Any:
    """Returns the content of a JSON file.

    Raises:
        ValueError: It is no JSON. The message says so before it says where.
    """
    try:
        return json.loads(text.decode("utf-8"))
    except RecursionError:
        reason = "it has too many brackets within each other"
    except ValueError as error:
        reason = "a number is too long" if "limit" in str(error) else first_line(error)
    raise ValueError(f"it is damaged, or no JSON: {reason}")


def map_array(path: Path, kind: type[UserError] = UserError) -> np.ndarray:
    """Maps the array of a .npy file, so that only its header is read.

    Args:
        path: The file.
        kind: The class of the error.

    Raises:
        UserError: The file cannot be read, or holds no array.
    """
    with reading(path, kind):
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        with path.open("rb") as file:
            # NumPy takes any other file for one that could run code.
            if not file.read(16).startswith(np.lib.format.MAGIC_PREFIX):
                raise ValueError("it is damaged, or no .npy file")
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, SyntaxError) as error:
            raise ValueError(f"it is damaged, or no .npy file: {error}") from error


def check_output(
    given: str | os.PathLike[str], name: str, kind: type[UserError] = UserError
) -> None:
    """Refuses a folder that cannot be made or written. Nothing is written.

    Args:
        given: The folder, as it was given. It may be missing.
        name: What the folder is given by, for messages: "--workdir".
        kind: The class of the error.

    Raises:
        UserError: The path is empty, is a file or leads through one, or may not be
            written.
    """
    text = os.fspath(given)
    if not text:
        raise kind(f"{name} is empty; it must name a folder")
    if "\0" in text:
        raise kind(f"{name}={text!r} is no path")
    with reading(f"{name}={text}", kind):
        path = Path(text)
        # `Path.exists` would also be False where a part of the path is a file.
        there = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
        if not there.is_dir():
            raise kind(f"{name}={text} cannot be a folder: {there} is none")
        if not os.access(there, os.W_OK | os.X_OK):
            raise kind(f"{name}={text} cannot be written: no permission in {there}")
        if any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts):
            raise kind(f"{name}={text[:100]}... has a name that is too long")


def check_output_file(
    given: str | os.PathLike[str], name: str, kind: type[UserError] = UserError
) -> None:
    """Refuses a file that cannot be written; see `check_output`. Nothing is written."""
    text = os.fspath(given)
    if "\0" in text:
        raise kind(f"{name}={text!r} is no path")
    if not text or text.endswith(os.sep) or os.path.isdir(text):
        raise kind(f"{name}={text} must name a file")
    if len(os.fsencode(os.path.basename(text))) > _LONGEST_NAME:
        raise kind(f"{name}={text[:100]}... has a name that is too long")
    if os.path.exists(text) and not os.access(text, os.W_OK):
        raise kind(f"{name}={text} cannot be written: no permission")
    check_output(os.path.dirname(text) or os.curdir, f"the folder of {name}", kind)


def strangers(folder: Path, is_own: Callable[[Path], bool]) -> list[str]:
    """The names of a folder's entries that do not belong there.

    Logs, which shells and schedulers write, are left out, and so are files that were
    being written when a process was killed.

    Args:
        folder: The folder. A missing one has no entries.
        is_own: Whether an entry belongs there.

    Raises:
        UserError: The folder cannot be read.
    """
    if not folder.is_dir():
        return []
    with reading(folder):
        paths = list(folder.iterdir())
    names = [path.name for path in paths if not (is_own(path) or is_temporary(path))]
    return sorted(name for name in names if not name.endswith(_LOGS))
