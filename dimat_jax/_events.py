"""The numbers of a run's rows as TensorBoard events."""

import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
        name = uuid.uuid4().hex[:8]
        if rows:
            # A TensorBoard that has shown older files drops everything from step 0 on.
            history = _writer(workdir, f".0-{name}", purge_step=0)
            now, last = time.time(), rows[-1].get("seconds_total", 0.0)
            for row in rows:
                _add(history, row, now - last + row.get("seconds_total", 0.0))
            history.close()
        self._writer = _writer(workdir, f".1-{name}", purge_step=None if rows else 0)
        for path in older:
            path.unlink(missing_ok=True)

    def add(self, row: dict[str, Any]) -> None:
        """Adds the numbers of a row."""
        _add(self._writer, row, time.time())

    def close(self) -> None:
        """Waits until all events are in the file, and closes it."""
        self._writer.close()


def _writer(workdir: Path, suffix: str, purge_step: int | None) -> Any:
    # This import is slow, since it imports PyTorch too if that is installed.
    from tensorboardX import SummaryWriter

    # Events are flushed every second. Calling `flush` would not be enough, since it
    # does not wait for the events that are still in a queue.
    return SummaryWriter(
        str(workdir), purge_step=purge_step, flush_secs=1, filename_suffix=suffix
    )


def _add(writer: Any, row: dict[str, Any], seconds: float) -> None:
    for name, value in row.items():
        if isinstance(value, (int, float)) and name not in ("round", "step"):
            tag = f"{row['phase']}/{name}"
            writer.add_scalar(tag, value, row["step"], walltime=seconds)
