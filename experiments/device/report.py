"""Turns the JSON files of `measure` into a section for experiments/RESULTS.md.

    python -m experiments.device.report DIR

The Markdown goes to the standard output. Figures that are missing leave empty cells.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dimat_jax._bench._record import table
from experiments.device._cells import read_record
from experiments.device.parts import PARTS

__all__ = ["render"]

Figures = dict[str, Any]
# The number of cells that were not reached and are named.
_SHOWN = 10


def render(out: Path) -> str:
    """Writes the section on the figures in a folder."""
    records = {part.name: read_record(out / f"{part.name}.json") for part in PARTS}
    settings = read_record(out / "measure.json")
    lines = ["## On one device", ""]
    if settings.get("commit"):
        lines += [f"Commit {settings['commit']}.", ""]
    if settings.get("tiny"):
        lines += ["This was a rehearsal with tiny sizes: no figure means anything.", ""]
    for part in PARTS:
        record = records[part.name]
        if not (record["cells"] or "status" in record):
            continue  # The part was not run.
        lines += [f"### {part.summary.rstrip('.')}", ""]
        shown = _TABLES[part.name](record["cells"], records)
        lines += [*shown, ""] if shown else []
        lines += [*_gaps(record), ""]
    return "\n".join(lines).rstrip() + "\n"


def _gaps(record: dict[str, Any]) -> list[str]:
    """Says how long a part took, and what has no complete figures, and why."""
    cells, planned = record["cells"], record.get("planned", [])
    by_status: dict[str, list[str]] = {}
    for name, cell in cells.items():
        reason = ""
        if "error" in cell:
            last = cell["error"].strip().splitlines()[-1:]
            reason = f" ({last[0][:160]})" if last else ""
        by_status.setdefault(cell["status"], []).append(f"{name}{reason}")
    told = [f"{len(by_status.pop('done', []))} of {len(planned)} done"]
    told += [f"{status}: {'; '.join(names)}" for status, names in by_status.items()]
    missing = [name for name in planned if name not in cells]
    if missing:
        shown = "; ".join(missing[:_SHOWN]) + ("; ..." if missing[_SHOWN:] else "")
        told.append(f"{len(missing)} not reached: {shown}")
    if not cells:
        told.append(record["status"].strip().splitlines()[-1])
    seconds = record.get("seconds")
    took = f"{seconds:.0f} s; " if seconds is not None else ""
    return [took + ". ".join(told) + "."]


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """The lines of a table; None is an empty cell. Without rows there is no table."""
    return table(header, rows).split("\n") if rows else []


def _scaled(value: float | None, factor: float) -> float | None:
    """A value in another unit; None stays None."""
    return None if value is None else factor * value


def _words(value: float) -> str:
    """A number within a sentence."""
    return f"{value:.3g}"


def _facts(cells: dict[str, Any], records: dict[str, Any]) -> list[str]:
    machine = cells.get("machine", {}).get("figures", {})
    rows = [
        ("device", machine.get("driver") or machine.get("device_kind")),
        ("CPU cores", machine.get("cores")),
        ("Python", machine.get("python")),
        *(machine.get("versions") or {}).items(),
    ]
    for name, cell in cells.items():
        figures = cell["figures"]
        if "flops_per_second" in figures:
            size = figures["size"]
            rate = _words(1e-12 * figures["flops_per_second"])
            rows.append((f"{name}, {size} x {size}", f"{rate} TFLOP/s"))
        if "bytes_per_second" in figures:
            rows.append((name, f"{_words(1e-12 * figures['bytes_per_second'])} TB/s"))
    return _table(("", ""), rows)


def _runs(cells: dict[str, Any], records: dict[str, Any]) -> list[str]:
    rows = [
        (name, cell["status"], cell["figures"].get("run_seconds"))
        for name, cell in cells.items()
    ]
    return _table(("", "status", "s, compilation included"), rows)


def _tests(cells: dict[str, Any], records: dict[str, Any]) -> list[str]:
    outcomes = [
        outcome
        for cell in cells.values()
        for outcome in cell["figures"].get("outcomes", {}).items()
    ]
    return _table(("test", "outcome"), outcomes)


def _layouts(cells: dict[str, Any], records: dict[str, Any]) -> list[str]:
    """Each cell, with its time over that of as many agents one after the other."""
    measured = [cell["figures"] for cell in cells.values()]
    measured = [figures for figures in measured if "step_seconds" in figures]
    alone = {
        (f["model"], f["width"]): f["step_seconds"]
        for f in measured
        if f["agents"] == 1
    }
    rows = []
    for f in measured:
        single = alone.get((f["model"], f["width"]))
        ratio = single and f["step_seconds"] / (f["agents"] * single)
        rows.append(
            (
                f"{f['model']}, width {f['width']:g}",
                f["agents"],
                "alone" if f["agents"] == 1 else f["layout"],
                1e3 * f["step_seconds"],
                100 * f["spread"],
                f["images_per_second"],
                ratio,
                _scaled(f.get("host_seconds"), 1e3),
                f["first_seconds"],
                _scaled(f.get("peak_bytes"), 2**-20),
            )
        )
    header = ("model", "agents", "layout", "step, ms", "spread, %", "images/s")
    header += ("step / (agents x step alone)", "of it on the host, ms")
    header += ("first step, s", "memory, MiB")
    choices = [
        f"For {cell['figures']['agents']} agents with {cell['figures']['model']} of "
        f"width {cell['figures']['width']:g} a run chooses "
        f"{cell['figures']['chosen']} after "
        f"{_words(cell['figures']['choice_seconds'])} s, since "
        f"{cell['figures']['reason']}."
        for cell in cells.values()
        if "chosen" in cell["figures"]
    ]
    return [
        *_table(header, rows),
        *(line for choice in choices for line in ("", choice)),
    ]


def _merges(cells: dict[str, Any], records: dict[str, Any]) -> list[str]:
    rows = []
    for name, cell in cells.items():
        figures = cell["figures"]
        for which in ("first", "later"):
            if f"{which}_seconds" in figures:
                phases = figures.get(f"{which}_phases", {}).items()
                told = ", ".join(f"{phase} {_words(s)}" for phase, s in phases)
                total = figures[f"{which}_seconds"]
                rows.append((name, which, total, told))
    return _table(("merge", "call", "s", "by phase, s"), rows)


def _precision(cells: dict[str, Any], records: dict[str, Any]) -> list[str]:
    rows = [
        (
            name,
            f["layout"],
            1e3 * f["step_seconds"],
            _scaled(f.get("flops_per_second"), 1e-12),
            _scaled(f.get("utilisation"), 100),
        )
        for name, f in ((name, cell["figures"]) for name, cell in cells.items())
        if "step_seconds" in f
    ]
    header = ("", "layout", "step, ms", "model TFLOP/s", "utilisation, %")
    return _table(header, rows)


def _pytorch(cells: dict[str, Any], records: dict[str, Any]) -> list[str]:
    """PyTorch's step, and the library's step of the same single model over it."""
    ours = {
        f["width"]: f["step_seconds"]
        for f in (cell["figures"] for cell in records["layouts"]["cells"].values())
        if "step_seconds" in f and f["agents"] == 1 and f["model"] == "resnet20"
    }
    rows = []
    for name, cell in cells.items():
        figures = cell["figures"]
        if "step_seconds" in figures:
            step = figures["step_seconds"]
            here = ours.get(figures["width"])
            ratio = here and here / step
            rate = figures["images_per_second"]
            rows.append((name, 1e3 * step, rate, ratio))
    header = ("PyTorch, one agent", "step, ms", "images/s", "JAX float32 / PyTorch")
    return _table(header, rows)


def _protocol(cells: dict[str, Any], records: dict[str, Any]) -> list[str]:
    """Accuracies by round, right after the communication and after training."""
    rows = []
    for name, cell in cells.items():
        for row in cell["figures"].get("rows", ()):
            accuracy, deviation = row["test_accuracy_mean"], row["test_accuracy_std"]
            told = f"{100 * accuracy:.2f} ± {100 * deviation:.2f}"
            when = (row["round"], row["phase"])
            rows.append((name, *when, told, row["seconds_total"]))
    return _table(("run", "round", "phase", "test accuracy, %", "s"), rows)


_TABLES: dict[str, Callable[[dict[str, Any], dict[str, Any]], list[str]]] = {
    "facts": _facts,
    "algorithms": _runs,
    "models": _runs,
    "tests": _tests,
    "layouts": _layouts,
    "merges": _merges,
    "precision": _precision,
    "pytorch": _pytorch,
    "protocol": _protocol,
}


def main() -> None:
    """Prints the section."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the folder that `measure` has filled")
    print(render(parser.parse_args().out), end="")


if __name__ == "__main__":
    main()
