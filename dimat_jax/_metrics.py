"""JSON files, and the rows of a run as JSON lines and TensorBoard events.

    metrics.jsonl     the rows, each a line of JSON
    metrics.digests   a digest of each row together with all rows before it

So rows that are changed, doubled, missing or out of order are noticed. The checkpoints
of a run hold the rows too, from which they are restored.
"""

import contextlib
import gzip
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from dimat_jax._digests import DIGESTS, blake2b, sync, with_digest
from dimat_jax._events import About, Events
from dimat_jax._temporary import temporary
from dimat_jax.errors import UserError, reading, writing
from dimat_jax.tasks import CLASSIFICATION, Metric

__all__ = [
    "MetricsError",
    "MetricsWriter",
    "best_rows",
    "evaluations",
    "read_evaluations",
    "read_rows",
    "restore_rows",
    "write_bytes",
    "write_json",
]

_ROWS, _DIGESTS = "metrics.jsonl", "metrics.digests"
# The phases of the rows that are of an epoch between two evaluations.
_OF_EPOCHS = ("pretraining", "training")


class MetricsError(UserError):
    """The rows of a run are not those that it has written."""


def write_json(
    path: Path, content: Any, lasting: bool = True, *, digested: bool = False
) -> None:
    """Writes a JSON file. A crash leaves the old file or the new one, never a part.

    Args:
        path: The file.
        content: Its content. NumPy's numbers and arrays become those of JSON.
        lasting: Whether to wait until the file is on the disk, so that even a power
            failure leaves the old file or the new one.
        digested: Whether the digests of its folder name the file. They are written
            first, so a crash in between leaves a digest of a file that is not there.
    """
    text = (json.dumps(_plain(content), indent=2) + "\n").encode()
    if digested:
        digests = path.with_name(DIGESTS)
        write_bytes(digests, with_digest(path, text), lasting)
    write_bytes(path, text, lasting)


def write_bytes(path: Path, content: bytes, lasting: bool = True) -> None:
    """Writes a whole file, or leaves the old one; see `write_json`."""
    unfinished = temporary(path)
    try:
        with writing(path), unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            if lasting:
                os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise
    if lasting:
        sync(path.parent)


def read_rows(workdir: Path) -> list[dict[str, Any]]:
    """Reads the rows of `workdir`/metrics.jsonl, and compares them with their digests.

    A last line that a crash has cut off is left out. Without a file there are no rows.
    The rows of older versions have no digests.

    Raises:
        MetricsError: Rows are changed, doubled, missing or out of order.
    """
    path = Path(workdir) / _ROWS
    lines, digests = _lines_and_digests(Path(workdir))
    rows, seen, above = [], set(), ""
    for number, line in enumerate(lines):
        above = _digest(above, line)
        row = _row(line)
        if row is None or (number < len(digests) and digests[number] != above.encode()):
            raise _damaged(path, f"row {number + 1} is damaged, or not in its place")
        key = repr([row.get(name) for name in ("round", "phase", "epoch")])
        if key in seen and number >= len(digests):
            raise _damaged(path, f"row {number + 1} is there twice")
        seen.add(key)
        rows.append(row)
    if len(rows) < len(digests):
        missing = f"the file has {len(rows)} rows instead of {len(digests)}"
        raise _damaged(path, missing)
    return rows


def evaluations(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that are evaluations, without those of the epochs between them."""
    return [row for row in rows if row.get("phase") not in _OF_EPOCHS]


def read_evaluations(workdir: Path) -> list[dict[str, Any]]:
    """Reads the `evaluations` among the rows of a run; see `read_rows`."""
    return evaluations(read_rows(workdir))


def restore_rows(workdir: Path, saved: bytes) -> None:
    """Writes the rows of a checkpoint into `workdir`/metrics.jsonl.

    Args:
        workdir: The run's folder.
        saved: What `MetricsWriter.packed` has returned.
    """
    text = gzip.decompress(saved)
    write_bytes(workdir / _DIGESTS, _digests(text.split(b"\n")[:-1]))
    write_bytes(workdir / _ROWS, text)


def best_rows(
    rows: list[dict[str, Any]], split: str, metric: Metric = CLASSIFICATION.shown
) -> dict[str, dict[str, Any]]:
    """Finds the best round by the agents' mean metric on a split.

    The test images must not choose the round whose test accuracy is reported, so a run
    without a validation split has no best round.

    Args:
        rows: the rows of a run.
        split: the name of the split that chooses: "validation".
        metric: the metric.

    Returns:
        "best_merged" and "best_trained": the best row of each phase of a round, the
        earliest of equally good ones. It is empty if no row has the split's metric.
    """
    best, values = {}, {}
    sign = 1 if metric.better == "larger" else -1
    for row in rows:
        name, value = f"best_{row['phase']}", metric.deciding(row, split)
        if row["phase"] == "pretrained" or value is None:
            continue
        if name not in best or sign * value > values[name]:
            best[name], values[name] = row, sign * value
    return best


class MetricsWriter:
    """Appends rows to `workdir`/metrics.jsonl, and their numbers to TensorBoard events.

    Args:
        workdir: The run's folder, which exists.
        keep_rows: The number of rows of an interrupted run to keep. The run writes the
            later ones again.
        saved: The rows to keep, as `packed` has returned them. They are restored if
            they are not in the file. None: the rows in the file are taken.
        about: What TensorBoard shows beside the rows.

    Attributes:
        rows: The number of rows in the file.
    """

    def __init__(
        self,
        workdir: Path,
        keep_rows: int = 0,
        saved: bytes | None = None,
        about: About | None = None,
    ):
        self._path, self._digests = workdir / _ROWS, workdir / _DIGESTS
        if saved is None:
            kept = read_rows(workdir)[:keep_rows] if keep_rows else []
            if len(kept) < keep_rows:
                logging.warning("%s has only %d rows", self._path, len(kept))
            self._packed, text = b"", "".join(map(_line, kept)).encode()
        else:
            self._packed, text = saved, gzip.decompress(saved)
        lines = text.split(b"\n")[:-1]
        self.rows = len(lines)
        digests = _digests(lines)
        if saved is not None:
            _warn_of_changes(self._path, text)
            _warn_of_changes(self._digests, digests)
        # Both files end with the last row that is kept. See `read_rows` for the order.
        self._last = digests[-65:-1].decode()
        write_bytes(self._digests, digests)
        write_bytes(self._path, text)
        self._unpacked = b"" if saved is not None else text
        self._events = Events(workdir, [json.loads(line) for line in lines], about)
        self._is_open = True

    def write(self, row: dict[str, Any]) -> dict[str, Any]:
        """Appends a row: numbers, strings, arrays, and lists and dicts of these.

        Returns:
            The row as it is in the file.
        """
        line = _line(row).encode()
        self._last = _digest(self._last, line[:-1])
        with writing(self._path), self._path.open("ab") as file:
            file.write(line)
        with writing(self._digests), self._digests.open("ab") as file:
            file.write(f"{self._last}\n".encode())
        self.rows += 1
        self._unpacked += line
        written = json.loads(line)
        self._events.add(written)
        return written

    def packed(self) -> bytes:
        """All rows, compressed. Only rows since the last call are compressed now."""
        if self._unpacked:
            # Parts that are compressed one by one are a whole when put together.
            self._packed += gzip.compress(self._unpacked, mtime=0)
            self._unpacked = b""
        return self._packed

    def close(self) -> None:
        """Waits until all rows and events are on disk."""
        if self._is_open:
            self._is_open = False
            for path in (self._path, self._digests, self._events.path):
                sync(path)


def _warn_of_changes(path: Path, saved: bytes) -> None:
    """Warns if a file does not begin with what was in it at the last checkpoint."""
    there = path.read_bytes() if path.is_file() else b""
    if not there.startswith(saved):
        logging.warning(
            "%s did not hold the rows that the run had written when it saved its last "
            "checkpoint; they are restored from there",
            path,
        )


def _damaged(path: Path, what: str) -> MetricsError:
    return MetricsError(
        f"{path}: {what}. The run's checkpoints hold the rows, too: the command that "
        "has started the run restores them"
    )


def _lines(path: Path) -> list[bytes]:
    """The lines of a file, without a last one that a crash has cut off."""
    with reading(path, MetricsError):
        if path.exists() and not path.is_file():
            raise ValueError("it is no file")
        return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def _lines_and_digests(workdir: Path) -> tuple[list[bytes], list[bytes]]:
    """The lines of both files as they were at one moment.

    A run may be writing. It adds a row first and then its digest, so the digests are
    read first. A run that goes on replaces both files, and then they are read again.
    """
    while True:
        digests = _lines(workdir / _DIGESTS)
        lines = _lines(workdir / _ROWS)
        if _lines(workdir / _DIGESTS)[: len(digests)] == digests:
            return lines, digests


def _row(line: bytes) -> dict[str, Any] | None:
    """The row that a line holds; None if it holds no row."""
    try:
        row = json.loads(line)
    except Exception:  # A line can hold anything, for example a thousand brackets.
        return None
    return row if isinstance(row, dict) else None


def _digest(above: str, line: bytes) -> str:
    """The digest of a row, and of the digest of the row above it."""
    return blake2b(above.encode() + line)


def _digests(lines: Iterable[bytes]) -> bytes:
    """The content of the file of digests."""
    found = [""]
    for line in lines:
        found.append(_digest(found[-1], line))
    return "".join(f"{digest}\n" for digest in found[1:]).encode()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(_plain(row), allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """The value with Python's numbers for NumPy's, and None for NaN and infinity."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value
