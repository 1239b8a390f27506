"""One run of a sweep, in a process of its own. The run's folder then also holds:

run.log         what the process printed; a run that goes on appends to it
progress.json   how many local steps are done, and how fast; it changes every second
"""

import io
import os
import sys
import threading
import traceback
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
from absl import logging
from tqdm import tqdm

from dimat_jax import train
from dimat_jax._inputs import load_plugins
from dimat_jax._lock import held
from dimat_jax._metrics import write_json
from dimat_jax._storage import explained
from dimat_jax._sweeping._plan import Job
from dimat_jax.errors import NonFiniteError, UserError, out_of_memory
from dimat_jax.placement import request_cpu_devices

__all__ = ["LOG", "PROGRESS", "failure_reason", "inherited_jax_options", "run_job"]

LOG = "run.log"
PROGRESS = "progress.json"


def inherited_jax_options() -> dict[str, Any]:
    """The options of `jax.config` that the processes of a sweep share."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
    )
    return {name: jax.config.values[name] for name in names}


def run_job(job: Job, jax_options: Mapping[str, Any]) -> str | None:
    """Runs a run, or what is left of it, and never raises an `Exception`.

    What the process prints goes to the run's log from now on.

    Args:
        job: The run.
        jax_options: Values of `jax.config` to set. JAX must not have started.

    Returns:
        Why the run has failed; None if it has finished.

    Raises:
        Interrupted: A signal has ended the run.
    """
    notes: list[str] = []
    again = "The same sweep tries the run again"
    try:
        with explained(job.workdir, again), held(job.workdir, notes.append):
            _print_to(job.workdir / LOG)
            print(*notes, sep="\n", end="\n" if notes else "")
            return _run(job, jax_options)
    except UserError as error:
        return failure_reason(error)


def _run(job: Job, jax_options: Mapping[str, Any]) -> str | None:
    """Runs a run in a folder that no other process uses; see `run_job`."""
    # Orbax logs every step of every save at the level below.
    logging.set_verbosity(logging.WARNING)
    try:
        for name, value in jax_options.items():
            jax.config.update(name, value)
        load_plugins(job.from_plugins, f"run {job.name!r}")
        request_cpu_devices(job.config.placement.cpu_devices)
        make_bar = partial(_ProgressFile, job.workdir / PROGRESS)
        train.run(job.config, job.workdir, print, make_bar)
    except Exception as error:
        traceback.print_exc()
        return failure_reason(error)
    return None


def failure_reason(error: Exception) -> str:
    """Says in one line why a run has failed."""
    full = out_of_memory(error)
    if full is not None:
        return full
    first_line = str(error).strip().partition("\n")[0]
    if isinstance(error, NonFiniteError):
        return f"diverged: {first_line}"
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    return f"{type(error).__name__}: {first_line}"


def _print_to(path: Path) -> None:
    """Sends the output of this process to the end of a file, that of XLA included."""
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # Everybody who reads the log sees each line at once.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)


class _ProgressFile(tqdm):
    """A progress bar that writes a JSON file instead of drawing.

    Args:
        path: The file.
        options: The options of `tqdm`.
    """

    def __init__(self, path: Path, **options: Any):
        self._path = path
        # A lock of threads is enough, since every process has a file of its own. A lock
        # of processes would outlive a process that is killed.
        self.set_lock(threading.RLock())
        changed = {"disable": False, "file": io.StringIO(), "mininterval": 1.0}
        super().__init__(**{**options, **changed})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        del msg, pos
        done = self.format_dict
        rate = done["rate"]
        if rate is None and done["elapsed"] > 0:
            rate = (done["n"] - done["initial"]) / done["elapsed"]
        write_json(
            self._path,
            {"step": done["n"], "steps": done["total"], "steps_per_second": rate},
            lasting=False,
        )
