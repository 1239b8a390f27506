"""Runs a part's cells, each with a time limit of its own, and keeps every figure.

A part of the measurements is a list of cells. One process, the worker, runs the cells
one after the other and writes the part's JSON file before and after each cell and after
each figure. Another process, the watcher, starts the worker, kills it if a cell exceeds
its limit, and starts it again for the cells that are left. Only a process that can be
killed stops a compilation or a device that hangs, and it loses nothing but that cell.

The JSON file has these fields:

    part      the name of the part
    process   the number of the last worker's process
    planned   the names of all cells, in the order in which they run
    cells     by name: "status", "seconds" and "figures" of each cell that was started
    status    "done", or why cells are missing
    seconds   the time that the part took

A cell's status is "running", "done", "failed" (with the "error"), "left out" (with the
"error" that says why), "over time" or "died".
"""

import dataclasses
import gc
import json
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from dimat_jax._metrics import write_json

__all__ = ["Cell", "LeftOut", "Log", "kill_workers", "read_record", "watch", "work"]

# How often the watcher looks at the worker, in seconds.
_PERIOD = 0.2
# The last characters of an error or of a log that a JSON file keeps.
_KEPT = 1500


class LeftOut(Exception):
    """Raised by a cell that decides not to measure. The message says why."""


@dataclasses.dataclass
class Log:
    """What a cell writes its figures to.

    Attributes:
        note: writes figures of this cell to the part's file at once.
        figures: the figures of the part's earlier cells, by cell.
    """

    note: Callable[..., None]
    figures: dict[str, dict[str, Any]]


class Cell(NamedTuple):
    """One thing to measure.

    Attributes:
        name: the name of the cell, unique in its part.
        seconds: the time limit of the cell.
        measure: measures, and notes each figure as soon as it is known.
    """

    name: str
    seconds: float
    measure: Callable[[Log], None]


def read_record(path: Path) -> dict[str, Any]:
    """Reads a part's JSON file; without a file, nothing has been measured."""
    return json.loads(path.read_text()) if path.exists() else {"cells": {}}


# The worker ===========================================================================


def work(path: Path, part: str, cells: Sequence[Cell]) -> None:
    """Runs those cells of a part that its file does not hold yet."""
    record = read_record(path)
    planned = [cell.name for cell in cells]
    record |= {"part": part, "planned": planned, "process": os.getpid()}
    for cell in cells:
        if cell.name not in record["cells"]:
            _run(cell, path, record)
    write_json(path, record)


def _run(cell: Cell, path: Path, record: dict[str, Any]) -> None:
    """Runs a cell. An error ends the cell and not the part."""
    started = time.time()
    figures: dict[str, Any] = {}
    entry = {"status": "running", "until": started + cell.seconds, "figures": figures}
    record["cells"][cell.name] = entry
    earlier = {name: done["figures"] for name, done in record["cells"].items()}

    def note(**new: Any) -> None:
        figures.update(new)
        entry["seconds"] = time.time() - started
        write_json(path, record)

    note()
    try:
        cell.measure(Log(note, earlier))
        entry["status"] = "done"
    except LeftOut as reason:
        entry |= {"status": "left out", "error": str(reason)}
    except Exception as error:  # such as a device without enough memory
        trace = "".join(traceback.format_exception(error))
        entry |= {"status": "failed", "error": trace[-_KEPT:]}
    del entry["until"]
    note()
    # What the cell held on the device is free before the next cell starts.
    gc.collect()


# The watcher ==========================================================================

# The workers that run now.
_alive: list[subprocess.Popen[bytes]] = []


def watch(
    command: Sequence[str],
    path: Path,
    seconds: float,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Runs a worker, again and again if need be, for a limited time.

    Args:
        command: starts a process that calls `work(path, ...)`.
        path: the part's JSON file.
        seconds: the time limit of the part.
        environment: the environment of the worker; by default that of this process.

    Returns:
        The part's status, which its file holds as well. What the worker prints is in a
        file beside it with the suffix .log.
    """
    started = time.time()
    log = path.with_suffix(".log")
    status, record = "", read_record(path)
    while not status:
        before = len(record["cells"])
        with log.open("ab") as output:
            ended = _watch_one(command, path, started + seconds, environment, output)
        record = read_record(path)
        if ended == "out of time":
            status = "out of time"
        elif ended == 0:
            status = "done"
        elif len(record["cells"]) == before:
            # The worker could not even start a cell; it would not the next time.
            status = f"the worker ended with {ended}: {log.read_text()[-_KEPT:]}"
    record |= {"status": status, "seconds": time.time() - started}
    write_json(path, record)
    return status


def _watch_one(
    command: Sequence[str],
    path: Path,
    until: float,
    environment: Mapping[str, str] | None,
    output: IO[bytes],
) -> int | str:
    """Runs a worker once.

    Returns:
        Its exit code, "over time" if a cell was too slow, or "out of time" if the part
        was.
    """
    # The worker leads a process group of its own, so that what it has started is killed
    # with it.
    worker = subprocess.Popen(
        command,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
        process_group=0,
    )
    _alive.append(worker)
    why: str | None = None
    try:
        while worker.poll() is None and why is None:
            time.sleep(_PERIOD)
            now, name = time.time(), _running(path)
            if now > until:
                why = "out of time"
            elif name and now > read_record(path)["cells"][name]["until"]:
                why = "over time"
    finally:
        _kill(worker)
        _alive.remove(worker)
    code = worker.returncode
    if (name := _running(path)) is not None:
        record = read_record(path)
        entry = record["cells"][name]
        del entry["until"]
        entry["status"] = why or "died"
        if why is None:
            entry["error"] = f"the process ended with {code}"
        write_json(path, record)
    return why or code


def kill_workers() -> None:
    """Kills all workers of this process, which would go on without their watchers."""
    for worker in list(_alive):
        _kill(worker)


def _kill(worker: subprocess.Popen[bytes]) -> None:
    """Kills a worker, if it runs, with the processes that it has started."""
    if worker.poll() is None:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


def _running(path: Path) -> str | None:
    """The name of the cell that a part's file shows as running."""
    cells = read_record(path)["cells"]
    return next((n for n, c in cells.items() if c["status"] == "running"), None)
