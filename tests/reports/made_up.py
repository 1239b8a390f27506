"""Made-up runs for the tests of reports: their folders, with the files of a run."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

# Files that are written in the same instant have the same time.
SECONDS = itertools.count(1_700_000_000)


def nested(fields: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for path, value in fields.items():
        *sections, name = path.split(".")
        section = config
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return config


def evaluation(
    number: int, phase: str, accuracy: float, sent: dict[str, int] | None, **metrics
) -> dict[str, Any]:
    row = {
        "round": number,
        "phase": phase,
        "test_accuracy": [accuracy - 0.125, accuracy + 0.125],
        "test_accuracy_mean": accuracy,
        "bytes_sent_total": sum((sent or {}).values()),
        "comm_rounds_total": 2.0 * number,
        "seconds_total": 1.0,
        **metrics,
    }
    if sent is not None:
        row["bytes_sent_by_kind"] = sent
        row["bytes_sent_by_link"] = [[0, 7], [7, 0]]
    return row


def write_run(
    folder: Path,
    *,
    accuracy: float = 0.5,
    rounds: int = 2,
    sent: dict[str, int] | None = None,
    present: list[list[bool]] | None = None,
    partition: dict[str, Any] | None = None,
    **fields: Any,
) -> None:
    """Writes a run that sends `sent` bytes in a round, and gains 1/100 by training.

    In the names of config fields, double underscores stand for dots.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fields = {name.replace("__", "."): value for name, value in fields.items()}
    fields = {"rounds": rounds, **fields}
    config = folder / "config.json"
    config.write_text(json.dumps(nested(fields)))
    time = next(SECONDS)
    os.utime(config, (time, time))
    kinds = sent or {}
    rows = [evaluation(0, "pretrained", 0.25, dict.fromkeys(kinds, 0))]
    for number in range(1, rounds + 1):
        total = {kind: number * size for kind, size in kinds.items()}
        extra = {"present": present[number - 1]} if present else {}
        rows += [
            evaluation(number, "merged", accuracy, total, **extra),
            evaluation(number, "trained", accuracy + 0.01, total, **extra),
        ]
    # Agents that never send anything count as if they communicated while they train.
    at_once = "merged" if any(kinds.values()) else "trained"
    for row in rows[1:]:
        row["communicated"] = row["phase"] == at_once
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines)
    if partition is not None:
        (folder / "partition.json").write_text(json.dumps(partition))


def add_to_rows(run: Path, **values: Any) -> None:
    """Gives all rows of a run further values, or the results of functions of a row."""
    rows = [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    for row in rows:
        row |= {
            name: value(row) if callable(value) else value
            for name, value in values.items()
        }
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (run / "metrics.jsonl").write_text(text)


def by_class(*counts: list[int], name: str = "by_class") -> dict[str, Any]:
    return {"partition": name, "classes": None, "counts": list(counts)}
