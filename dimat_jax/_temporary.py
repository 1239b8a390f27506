"""The names of files that are being written, before they are renamed.

A process that is killed leaves them behind. So every folder may hold some.
"""

import re
import uuid
from pathlib import Path

__all__ = ["is_temporary", "temporary"]


def temporary(path: Path) -> Path:
    """A new name beside a file, under which its content is written first.

    Several processes may write the same file, so each call gives another name.
    """
    return path.with_name(f".{path.name}-{uuid.uuid4().hex}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether a path has a name that `temporary` gives."""
    return re.fullmatch(r"\..+-[0-9a-f]{32}\.tmp", path.name) is not None
