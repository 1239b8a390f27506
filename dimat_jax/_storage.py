"""Says what a user can do about files that the system refuses to write or to read.

Libraries that write files report the system's reasons in errors of their own. So the
reason is looked for in the whole chain of errors, by its number or by its text.
"""

import contextlib
import errno
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl.logging import get_absl_logger

from dimat_jax.errors import UserError

__all__ = ["StorageError", "explained", "problem"]


class StorageError(UserError):
    """The system refuses to write or read a file. The message says what to do."""


# What a user can do about the system's reasons.
_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or ask for more",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or use another disk",
    errno.EACCES: "change the permissions, or choose another folder",
    errno.EPERM: "change the permissions, or choose another folder",
    errno.EROFS: "choose a folder that can be written",
    errno.EIO: "check the disk",
    errno.ENXIO: "check the disk",
    errno.ENODEV: "check the disk",
    errno.ESTALE: "check the network file system",
    errno.ETIMEDOUT: "check the network file system",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "choose another folder",
    errno.EISDIR: "choose another name",
    errno.ELOOP: "choose another folder",
    errno.ENOENT: "it was removed while it was in use; put it back",
    errno.EEXIST: "another program has made it; move it away",
    errno.ENOTEMPTY: "another program has filled it; move it away",
}
# These reasons are a user's business only in a folder that a program uses. Elsewhere
# they show a mistake in the program.
_ONLY_BELOW = (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY)
# Libraries that are not written in Python give the reasons as these texts.
_TEXTS = {os.strerror(number): number for number in _ADVICE}
# A path in the text of an error.
_PATH = re.compile(r"""["'](/[^"']+)["']""")


def problem(error: BaseException, folder: Path | None = None) -> str | None:
    """Says which file the system refuses, why, and what to do.

    Args:
        error: Any error.
        folder: A folder whose files should be there.

    Returns:
        One line; None if neither the error nor its causes come from the file system.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        path, number = _refusal(link)
        if number in _ONLY_BELOW and not _is_below(path, folder):
            number = 0
        if number:
            where = f"{path}: " if path else ""
            return f"{where}{os.strerror(number)}; {_ADVICE[number]}"
        link = link.__cause__ or link.__context__
    return None


@contextlib.contextmanager
def explained(folder: Path, advice: str) -> Iterator[None]:
    """Raises what the file system refuses within a block as a `StorageError`.

    Args:
        folder: The folder where the block writes. The message names it if the error
            names no file.
        advice: What holds after such an error, and what to do next; one sentence.

    Raises:
        StorageError: A file cannot be written or read.
    """
    try:
        with _quiet_orbax():
            yield
    except UserError:
        raise
    except Exception as error:
        text = problem(error, folder)
        if text is None:
            raise
        where = "" if "/" in text.partition(": ")[0] else f"{folder}: "
        raise StorageError(f"{where}{text}. {advice}") from error


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Keeps Orbax's threads from printing the tracebacks of errors within a block.

    The first of these errors is also raised where the checkpoint was asked for.
    """

    def is_news(record: logging.LogRecord) -> bool:
        return not (record.exc_info and f"{os.sep}orbax{os.sep}" in record.pathname)

    def report(unraisable: Any) -> None:
        # Files are still written when Orbax has given up waiting for them.
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    logger, hook = get_absl_logger(), sys.unraisablehook
    logger.addFilter(is_news)
    sys.unraisablehook = report
    try:
        yield
    finally:
        sys.unraisablehook = hook
        logger.removeFilter(is_news)


def _refusal(error: BaseException) -> tuple[str, int]:
    """The file ("": unknown) and the number (0: none) that an error itself holds."""
    if isinstance(error, OSError) and error.errno in _ADVICE:
        names = [error.filename2, error.filename]
        paths = [os.fsdecode(n) for n in names if isinstance(n, (str, bytes))]
        return (paths[0] if paths else ""), error.errno
    text = str(error)
    for reason, number in _TEXTS.items():
        if reason in text:
            path = _PATH.search(text)
            return (path[1] if path else ""), number
    return "", 0


def _is_below(path: str, folder: Path | None) -> bool:
    if not path or folder is None:
        return False
    return Path(path).absolute().is_relative_to(folder.absolute())
