"""A run for TensorBoard: the numbers of its rows, its options, and its partition.

The events are written by the thread that adds them, so that a full disk is an error
there. TensorboardX's own writer has a thread of its own; if that thread fails, the
program waits for it for ever.
"""

import socket
import struct
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dimat_jax.errors import writing

__all__ = ["About", "Events"]

# Runs with more agents have no curves by agent.
_MOST_AGENTS = 64
# The fields of a row that say which row it is.
_PLACE = ("round", "step", "epoch")
# The phases whose metric the table of hyperparameters shows.
_RESULTS = ("merged", "trained")


class About(NamedTuple):
    """What TensorBoard shows of a run beside its rows.

    Attributes:
        options: the options that the run reads, by path.
        partition: a PNG file that shows the partition; None if there is none.
        metric: the name of the metric in the rows.
    """

    options: Mapping[str, Any]
    partition: bytes | None = None
    metric: str = "accuracy"


class Events:
    """Writes events so that TensorBoard shows each point once.

    TensorBoard can drop events only from some step on, and the rows before and after a
    merge have the same step. So a run that goes on writes the events of all its rows
    into a new file, and then removes the older files.

    Args:
        workdir: The run's folder, which exists.
        rows: The rows that the run has already.
        about: What else is shown of the run.
    """

    def __init__(
        self,
        workdir: Path,
        rows: Sequence[dict[str, Any]],
        about: About | None = None,
    ):
        older = set(workdir.glob("events.out.tfevents.*"))
        # Files are read in the order of their names. Names begin with the second, so
        # the digit decides between two files of one second.
        prefix = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}"
        name = uuid.uuid4().hex[:8]
        if rows:
            # A TensorBoard that has shown older files drops everything from step 0 on.
            history = _File(workdir / f"{prefix}.0-{name}", True, about)
            now, last = time.time(), rows[-1].get("seconds_total", 0.0)
            for row in rows:
                history.add(row, now - last + row.get("seconds_total", 0.0))
        shown = None if rows else about
        self._file = _File(workdir / f"{prefix}.1-{name}", not rows, shown)
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
        about: What the file holds of the run beside its rows; None for nothing.

    Attributes:
        path: The file.
    """

    def __init__(self, path: Path, drops_older: bool, about: About | None):
        # This import is slow, since it imports PyTorch too if that is installed.
        from tensorboardX.proto import event_pb2

        self._proto: Any = event_pb2  # Its messages are made at import time.
        self.path, now = path, time.time()
        first = [self._proto.Event(wall_time=now, file_version="brain.Event:2")]
        if drops_older:
            start = self._proto.SessionLog(status=self._proto.SessionLog.START)
            first.append(self._proto.Event(wall_time=now, step=0, session_log=start))
        summaries = _introduction(about) if about else []
        first += [
            self._proto.Event(wall_time=now, step=0, summary=summary)
            for summary in summaries
        ]
        self._write(first)

    def add(self, row: Mapping[str, Any], seconds: float) -> None:
        """Adds the numbers of a row, at a time in seconds."""
        from tensorboardX.summary import scalar

        self._write(
            self._proto.Event(
                wall_time=seconds, step=row["step"], summary=scalar(tag, value)
            )
            for tag, value in _scalars(row)
        )

    def _write(self, events: Iterable[Any]) -> None:
        from tensorboardX.record_writer import masked_crc32c

        with writing(self.path), self.path.open("ab") as file:
            for event in events:
                content = event.SerializeToString()
                length = struct.pack("<Q", len(content))
                for part in (length, content):
                    file.write(part + struct.pack("<I", masked_crc32c(part)))


def _scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a row that are points of curves, with the names of the curves."""
    for name, value in row.items():
        if type(value) in (int, float) and name not in _PLACE:
            yield f"{row['phase']}/{name}", float(value)
        elif _is_by_agent(name, value) and len(value) <= _MOST_AGENTS:
            for agent, number in enumerate(value):
                if number is not None:  # It was not finite.
                    yield f"{row['phase']}_by_agent/{name}/{agent}", number


def _is_by_agent(name: str, value: Any) -> bool:
    """Whether a field of a row has a metric or a loss of each agent."""
    is_measure = name.partition("_")[0] in ("test", "train", "validation")
    is_shown = is_measure and not name.endswith(("_local", "_by_class"))
    return is_shown and isinstance(value, list)


def _introduction(about: About) -> list[Any]:
    """The options as a table and as hyperparameters, and the picture."""
    from tensorboardX.proto import summary_pb2
    from tensorboardX.summary import hparams, text

    proto: Any = summary_pb2  # Its messages are made at import time.
    lines = ["option | value", "--- | ---"]
    lines += [f"{path} | {value!r}" for path, value in about.options.items()]
    # The library takes numbers of 64 bits, and a seed may have more.
    values = {
        path: str(value) if isinstance(value, int) and abs(value) >= 2**63 else value
        for path, value in about.options.items()
    }
    experiment, session, _ = hparams(
        values, {f"{phase}/test_{about.metric}_mean": None for phase in _RESULTS}
    )
    found = [text("config", "\n".join(lines)), experiment, session]
    if about.partition is not None:
        picture = proto.Summary.Image(encoded_image_string=about.partition)
        value = proto.Summary.Value(tag="partition", image=picture)
        found.append(proto.Summary(value=[value]))
    return found
