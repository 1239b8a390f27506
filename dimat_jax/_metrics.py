"""What a run writes down: JSON lines, and TensorBoard events."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["MetricsWriter", "read_rows", "write_json"]


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(_plain(content), indent=2) + "\n")
    os.replace(temporary, path)


def read_rows(workdir: Path) -> list[dict[str, Any]]:
    """The rows of DIR/metrics.jsonl; a last line cut off by a crash is left out."""
    path = Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


class MetricsWriter:
    """Appends rows to DIR/metrics.jsonl, and their numbers to TensorBoard events.

    Args:
        workdir: DIR, which exists.
        keep_rows: how many rows of an interrupted run to keep; what it wrote after its
            last checkpoint will be written again.
    """

    def __init__(self, workdir: Path, keep_rows: int = 0):
        self._path = workdir / "metrics.jsonl"
        kept = read_rows(workdir)[:keep_rows]
        self.rows = len(kept)
        text = "".join(_line(row) for row in kept)
        temporary = self._path.with_name(".metrics.jsonl.tmp")
        temporary.write_text(text)
        os.replace(temporary, self._path)
        # Slow to import: it imports PyTorch too, if that is installed.
        from tensorboardX import SummaryWriter

        # Tells TensorBoard to forget the events that will be written again.
        next_step = kept[-1]["step"] + 1 if kept else 0
        # Flushed by time, since `flush` does not wait for what is still in its queue.
        self._events = SummaryWriter(str(workdir), purge_step=next_step, flush_secs=1)

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row of numbers, strings, and lists and dicts of them."""
        with self._path.open("a") as file:
            file.write(_line(row))
        self.rows += 1
        prefix = row["phase"]
        for name, value in row.items():
            is_number = isinstance(value, (int, float, np.number))
            if is_number and name not in ("round", "step"):
                self._events.add_scalar(f"{prefix}/{name}", value, row["step"])

    def close(self) -> None:
        """Closes the event file."""
        self._events.close()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(_plain(row), allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """As JSON has it: NumPy's numbers as Python's, and null for what is not finite."""
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
