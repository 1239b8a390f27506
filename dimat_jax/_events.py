"""The numbers of a run's rows as TensorBoard events.

The events are written by the thread that adds them, so that a full disk is an error
there. TensorboardX's own writer has a thread of its own; if that thread fails, the
program waits for it for ever.
"""

import socket
import struct
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dimat_jax.errors import writing

__all__ = ["Events"]


class Events:
    """Writes events so that TensorBoard shows each point once.

    TensorBoard can drop events only from some step on, and the rows before and after a
    merge have the same step. So a run that goes on writes the events of all its rows
    into a new file, and then removes the older files.

    Args:
        workdir: The run's folder, which exists.
        rows: The rows that the run has already.
    """

    def __init__(self, workdir: Path, rows: Sequence[dict[str, Any]]):
        older = set(workdir.glob("events.out.tfevents.*"))
        # Files are read in the order of their names. Names begin with the second, so
        # the digit decides between two files of one second.
        prefix = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}"
        name = uuid.uuid4().hex[:8]
        if rows:
            # A TensorBoard that has shown older files drops everything from step 0 on.
            history = _File(workdir / f"{prefix}.0-{name}", drops_older=True)
            now, last = time.time(), rows[-1].get("seconds_total", 0.0)
            for row in rows:
                history.add(row, now - last + row.get("seconds_total", 0.0))
        self._file = _File(workdir / f"{prefix}.1-{name}", drops_older=not rows)
        for path in older:
            path.unlink(missing_ok=True)

    @property
    def path(self) -> Path:
        """The file to which events are added."""
        return self._file.path

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds the numbers of a row. Readers of the file see them at once."""
        self._file.add(row, time.time())


class _File:
    """A file of events, in the format of TFRecord. It is open only while it is written.

    Args:
        path: The file, which is made.
        drops_older: Whether TensorBoard forgets the events of older files.

    Attributes:
        path: The file.
    """

    def __init__(self, path: Path, drops_older: bool):
        # This import is slow, since it imports PyTorch too if that is installed.
        from tensorboardX.proto import event_pb2

        self._proto: Any = event_pb2  # Its messages are made at import time.
        self.path, now = path, time.time()
        first = [self._proto.Event(wall_time=now, file_version="brain.Event:2")]
        if drops_older:
            start = self._proto.SessionLog(status=self._proto.SessionLog.START)
            first.append(self._proto.Event(wall_time=now, step=0, session_log=start))
        self._write(first)

    def add(self, row: Mapping[str, Any], seconds: float) -> None:
        """Adds the numbers of a row, at a time in seconds."""
        from tensorboardX.summary import scalar

        self._write(
            self._proto.Event(
                wall_time=seconds,
                step=row["step"],
                summary=scalar(f"{row['phase']}/{name}", value),
            )
            for name, value in row.items()
            if type(value) in (int, float) and name not in ("round", "step")
        )

    def _write(self, events: Iterable[Any]) -> None:
        from tensorboardX.record_writer import masked_crc32c

        with writing(self.path), self.path.open("ab") as file:
            for event in events:
                content = event.SerializeToString()
                length = struct.pack("<Q", len(content))
                for part in (length, content):
                    file.write(part + struct.pack("<I", masked_crc32c(part)))
