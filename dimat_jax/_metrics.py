"""JSON files, and the rows of a run as JSON lines and TensorBoard events."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["MetricsWriter", "best_rows", "read_rows", "write_json"]


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file. A crash leaves the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(_plain(content), indent=2) + "\n")
    os.replace(temporary, path)


def read_rows(workdir: Path) -> list[dict[str, Any]]:
    """Reads the rows of `workdir`/metrics.jsonl.

    A last line that a crash has cut off is left out. Without a file there are no rows.
    """
    path = Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def best_rows(rows: list[dict[str, Any]], split: str) -> dict[str, dict[str, Any]]:
    """Finds the best round by the agents' mean accuracy on a split.

    The test images must not choose the round whose test accuracy is reported, so a run
    without a validation split has no best round.

    Args:
        rows: the rows of a run.
        split: the name of the split that chooses: "validation".

    Returns:
        "best_merged" and "best_trained": the best row of each phase of a round, the
        earliest of equally good ones. It is empty if no row has the split's accuracy.
    """
    field, best = f"{split}_accuracy_mean", {}
    for row in rows:
        name, accuracy = f"best_{row['phase']}", row.get(field)
        if row["phase"] == "pretrained" or accuracy is None:
            continue
        if name not in best or accuracy > best[name][field]:
            best[name] = row
    return best


class MetricsWriter:
    """Appends rows to `workdir`/metrics.jsonl, and their numbers to TensorBoard events.

    Args:
        workdir: The run's folder, which exists.
        keep_rows: The number of rows of an interrupted run to keep. The run writes the
            later ones again.

    Attributes:
        rows: The number of rows in the file.
    """

    def __init__(self, workdir: Path, keep_rows: int = 0):
        self._path = workdir / "metrics.jsonl"
        kept = read_rows(workdir)[:keep_rows]
        self.rows = len(kept)
        text = "".join(_line(row) for row in kept)
        temporary = self._path.with_name(".metrics.jsonl.tmp")
        temporary.write_text(text)
        os.replace(temporary, self._path)
        # This import is slow, since it imports PyTorch too if that is installed.
        from tensorboardX import SummaryWriter

        # TensorBoard drops the events from this step on: they are written again.
        next_step = kept[-1]["step"] + 1 if kept else 0
        # Events are flushed every second. Calling `flush` would not be enough, since it
        # does not wait for the events that are still in a queue.
        self._events = SummaryWriter(str(workdir), purge_step=next_step, flush_secs=1)

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row: numbers, strings, arrays, and lists and dicts of these."""
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
