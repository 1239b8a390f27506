"""Measures this project on the device at hand, in 12 minutes at most.

    python -m experiments.device.measure --out=DIR [--data=DATA] [--minutes=12]

DIR receives one JSON file a part, and the log of each part. `report` turns them into
tables. Each part has a time limit, and so has each cell of a part; `parts/__init__.py`
has the budget of the parts. The same command goes on where it was cut off. `--parts`
chooses parts. `--tiny` rehearses everything on a CPU, with sizes that mean nothing.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dimat_jax._metrics import write_json
from experiments.device import _cells
from experiments.device.parts import PARTS, Part, Settings, cells_of

__all__ = ["groups", "main"]

_ROOT = Path(__file__).parents[2]
# What every worker gets: several processes share the device's memory, and no program is
# compiled twice.
_ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "PYTHONUNBUFFERED": "1",
}


def groups(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Splits parts into groups. The parts of a group run beside each other."""
    group: list[Part] = []
    for part in parts:
        if group and not part.beside:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def main() -> None:
    """Runs the parts, or one part's worker."""
    options = _parse()
    if options.worker:
        work = Settings(
            options.work, options.out, options.data, options.seconds, options.tiny
        )
        path = options.out / f"{options.worker}.json"
        _cells.work(path, options.worker, cells_of(options.worker, work))
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    _measure(options)


def _end(number: int, frame: object) -> None:
    """Ends at once. Workers that were left behind would go on to use the device."""
    _cells.kill_workers()
    os._exit(128 + number)


def _measure(options: argparse.Namespace) -> None:
    """Runs groups of parts one after the other, and prints what became of each."""
    chosen = [part for part in PARTS if part.name in options.parts]
    planned = list(groups(chosen))
    budget = sum(max(part.seconds for part in group) for group in planned)
    total = budget if options.minutes is None else 60 * options.minutes
    write_json(
        options.out / "measure.json",
        {"commit": options.commit, "tiny": options.tiny, "total_seconds": total},
    )
    ends = time.time() + total
    for group in planned:
        with ThreadPoolExecutor(len(group)) as pool:
            left = ends - time.time()
            last = group is planned[-1]
            limits = [
                left if last else min(left, part.seconds * total / budget)
                for part in group
            ]
            results = pool.map(_run, group, limits, [options] * len(group))
            for part, line in zip(group, results, strict=True):
                print(f"{part.name:12s} {line}", flush=True)


def _run(part: Part, seconds: float, options: argparse.Namespace) -> str:
    """Runs a part, and says in a line what became of it."""
    path = options.out / f"{part.name}.json"
    command = [sys.executable, "-m", "experiments.device.measure"]
    command += [f"--worker={part.name}", f"--seconds={seconds}"]
    command += [f"--out={options.out}", f"--work={options.work}"]
    command += [f"--data={options.data}"] if options.data else []
    command += ["--tiny"] if options.tiny else []
    started = time.time()
    status = _cells.watch(command, path, seconds, environment=_environment(options))
    record = _cells.read_record(path)
    counts: dict[str, int] = {}
    for cell in record["cells"].values():
        counts[cell["status"]] = counts.get(cell["status"], 0) + 1
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    missing = len(record.get("planned", ())) - len(record["cells"])
    told += f", {missing} not reached" if missing else ""
    return f"{time.time() - started:5.0f} s  {status.splitlines()[0]}: {told}"


def _environment(options: argparse.Namespace) -> dict[str, str]:
    """The environment of a worker. What the user has set stays as it is."""
    caches = {
        "JAX_COMPILATION_CACHE_DIR": str(options.work / "xla"),
        "XDG_CACHE_HOME": str(options.work / "cache"),
    }
    return {**_ENVIRONMENT, **caches, **os.environ}


def _commit() -> str | None:
    """The commit that is measured; None outside of a git checkout."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=_ROOT)
    except OSError:
        return None
    return done.stdout.strip() or None


def _parse() -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for figures")
    parser.add_argument(
        "--work", type=Path, default=Path("build/device/work"), help="scratch folder"
    )
    parser.add_argument("--data", type=Path, help="data folder with CIFAR-100")
    parser.add_argument("--minutes", type=float, help="time limit of all parts")
    parser.add_argument("--parts", default=",".join(names), help=", ".join(names))
    parser.add_argument("--commit", default=_commit(), help="what is measured")
    parser.add_argument("--tiny", action="store_true", help="rehearse on a CPU")
    parser.add_argument("--worker", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.parts = options.parts.split(",")
    if unknown := set(options.parts) - set(names):
        parser.error(f"--parts: {sorted(unknown)} are none of {names}")
    if options.minutes is not None and options.minutes <= 0:
        parser.error(f"--minutes: expected more than 0, got {options.minutes}")
    for name in ("out", "work", "data"):
        # Workers may run in another folder.
        if getattr(options, name):
            setattr(options, name, getattr(options, name).resolve())
    return options


if __name__ == "__main__":
    main()
