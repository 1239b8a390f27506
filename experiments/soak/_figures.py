"""The figures of a soak, from the records of its cases."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["collect", "figures", "table", "write"]

_SUMS = ("configs", "kills", "damages", "bad inputs", "full disks", "starts at once")
"""What the soak is measured by; the other counts follow them."""


def collect(out: Path, seed: int) -> list[dict[str, Any]]:
    """Reads the records of all cases of a seed."""
    paths = sorted((out / "cases").glob("*.json"))
    found = [json.loads(path.read_text()) for path in paths]
    return [record for record in found if record["seed"] == seed]


def figures(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Adds up the counts and the failures of all cases."""
    counts: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    seconds, n_cases = 0.0, 0
    for record in records:
        counts.update(record["counts"])
        failures.update(failure["kind"] for failure in record["failures"])
        seconds += record["seconds"]
        n_cases += 1
    first = {name: counts.pop(name, 0) for name in _SUMS}
    return {
        "cases": n_cases,
        "counts": {**first, **dict(sorted(counts.items()))},
        "failures": {
            "difference": 0,
            "silent use": 0,
            "traceback": 0,
            **dict(sorted(failures.items())),
        },
        "seconds": round(seconds),
    }


def table(found: Mapping[str, Any]) -> str:
    """The figures as a table in Markdown."""
    lines = ["| | number |", "|:--|--:|"]
    lines += [f"| {name} | {n} |" for name, n in found["counts"].items()]
    lines += [f"| failures: {name} | {n} |" for name, n in found["failures"].items()]
    return "\n".join(lines) + "\n"


def write(out: Path, seed: int, command: str) -> dict[str, Any]:
    """Writes figures.json and table.md, and returns the figures."""
    records = collect(out, seed)
    found = {
        "command": command,
        "seed": seed,
        **figures(records),
        "by_phase": {
            phase: figures(r for r in records if r["phase"] == phase)
            for phase in sorted({r["phase"] for r in records})
        },
        "wrong": [r for r in records if r["failures"]],
    }
    (out / "figures.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "table.md").write_text(table(found))
    return found
