"""Digests of the files of a folder, which show damage before a file is used.

Checkpoints have them, and so have the JSON files of a run.

The digests stand in one file of the folder. They are BLAKE2b, 32 bytes long, from the
standard library. Measured on two busy CPU cores: BLAKE2b reads 530 MiB a second. For
arrays of 122 MiB the digests add 0.4 seconds to a checkpoint, while the run goes on,
and 0.3 seconds to reading it.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from absl import logging

from dimat_jax.errors import UserError, writing

__all__ = [
    "DIGESTS",
    "blake2b",
    "damage",
    "expect_unchanged",
    "missing",
    "sync",
    "with_digest",
    "without_digest",
    "write_digests",
]

DIGESTS = "digests.json"
"""The file with the digests of the other files of its folder."""

# Orbax writes these files after the digests have been written. Nothing reads them.
_WRITTEN_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")


def blake2b(content: bytes) -> str:
    """The digest of some bytes, as hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=32).hexdigest()


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk.

    A folder that the system cannot open, or a file system that cannot wait, is left
    alone: there the file system alone decides what a power failure leaves.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        with writing(path):
            os.fsync(descriptor)
    except OSError:
        if path.is_file():
            raise
    finally:
        os.close(descriptor)


def write_digests(folder: Path) -> None:
    """Writes the digests of all files of a folder, and waits until they are on disk."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    own = [name for name in names if name not in (*_WRITTEN_LATER, DIGESTS)]
    for path in (*(folder / name for name in own), *_folders(folder)):
        sync(path)
    files = {name: _facts(folder / name) for name in own}
    path = folder / DIGESTS
    with writing(path):
        path.write_text(_text(files))
    sync(path)
    sync(folder)


def damage(folder: Path, part: int = 0, n_parts: int = 1) -> str | None:
    """Compares files with their digests.

    Files that have no digest are not looked at.

    Args:
        folder: A folder that `write_digests` has completed.
        part: The part of the files to read. Several processes can share the work.
        n_parts: The number of parts.

    Returns:
        What is wrong with the first file that differs; None if all files are as they
        were written.

    Raises:
        FileNotFoundError: The folder has no digests.
    """
    files = _files((folder / DIGESTS).read_bytes())
    if files is None:
        return f"{DIGESTS} is damaged"
    names = sorted(files)[part::n_parts]
    # The digests are computed without the interpreter's lock.
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: _difference(folder / name, files[name]), names)
        wrong = (f"{n} {why}" for n, why in zip(names, found, strict=True) if why)
        return next(wrong, None)


def with_digest(path: Path, content: bytes) -> bytes:
    """Returns the digests of a file's folder, together with that of the file.

    Args:
        path: The file, which is about to be written.
        content: Its content.

    Returns:
        The content of the file `DIGESTS` of the folder.
    """
    digests = path.with_name(DIGESTS)
    files = _files(digests.read_bytes()) if digests.is_file() else None
    return _text({**(files or {}), path.name: _facts_of(content)}).encode()


def without_digest(path: Path) -> bytes | None:
    """Returns the digests of a file's folder without that of the file.

    Returns:
        None if the folder has no digests that can be used.
    """
    digests = path.with_name(DIGESTS)
    files = _files(digests.read_bytes()) if digests.is_file() else None
    if files is None:
        return None
    return _text({name: files[name] for name in files if name != path.name}).encode()


def expect_unchanged(path: Path, content: bytes) -> None:
    """Refuses what was read from a file if it is not what was written.

    A file that has no digest in its folder is not looked at. Folders of older versions
    have no digests. If the digests are damaged, there is a warning.

    Args:
        path: The file.
        content: What was read.

    Raises:
        ValueError: The content has changed.
    """
    digests = path.with_name(DIGESTS)
    if not digests.is_file():
        return
    files = _files(digests.read_bytes())
    if files is None:
        if digests not in _warned:
            _warned.add(digests)
            logging.warning("%s is damaged, so nothing verifies its folder", digests)
        return
    facts = _facts_of(content)
    if files.get(path.name, facts) != facts:
        raise ValueError(
            f"it has changed since it was written. Put back a copy. If it was changed "
            f"on purpose, remove {digests}"
        )


def missing(folder: Path) -> list[str]:
    """The names of the files that a folder's digests name, and that are not there.

    Raises:
        UserError: The digests are no file, so they could not be written again.
    """
    digests = folder / DIGESTS
    if digests.exists() and not digests.is_file():
        raise UserError(f"{digests} is no file. Move it away, or put back a copy")
    files = _files(digests.read_bytes()) if digests.is_file() else None
    return [name for name in files or () if not (folder / name).exists()]


# The damaged files of digests that this process has warned of.
_warned: set[Path] = set()


def _files(text: bytes) -> Mapping[str, Any] | None:
    """The facts about files that a file of digests holds; None if it is damaged."""
    try:
        files = json.loads(text)["files"]
        return files if _text(files).encode() == text else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _difference(path: Path, expected: Mapping[str, Any]) -> str | None:
    """What is wrong with a file; None if it is as expected."""
    try:
        found = _facts(path)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if found["bytes"] != expected["bytes"]:
        return f"has {found['bytes']} bytes instead of {expected['bytes']}"
    return None if found == expected else "has changed since it was written"


def _facts(path: Path) -> dict[str, Any]:
    """The size of a file, and the digest of its content."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32))
        return {"bytes": file.tell(), "blake2b": digest.hexdigest()}


def _facts_of(content: bytes) -> dict[str, Any]:
    """The size and the digest of a file with some content."""
    return {"bytes": len(content), "blake2b": blake2b(content)}


def _text(files: Mapping[str, Any]) -> str:
    """The content of the file of digests, which has a digest too."""
    body = json.dumps(files, sort_keys=True)
    content = {"files": files, "digest": blake2b(body.encode())}
    return json.dumps(content, sort_keys=True, indent=1) + "\n"


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_dir()]
