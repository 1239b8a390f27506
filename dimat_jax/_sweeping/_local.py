"""Runs a sweep on this machine, in this process or in several at a time."""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple

from rich.console import Console

from dimat_jax import _signals, train
from dimat_jax._signals import deferrable
from dimat_jax._sweeping._job import (
    LOG,
    failure_reason,
    inherited_jax_options,
    run_job,
)
from dimat_jax._sweeping._plan import Job, in_order, unfinished
from dimat_jax._sweeping._progress import View
from dimat_jax._sweeping._shares import Share, applied
from dimat_jax.errors import Interrupted, NonFiniteError, UserError

__all__ = [
    "run_here",
    "run_side_by_side",
]

# The seconds between two looks at the files of the runs.
_INTERVAL = 1.0
# The seconds in which a process that is asked to end may finish writing. A process that
# takes longer is killed; its run goes on from its last checkpoint all the same.
_GRACE = 30.0


def run_here(jobs: Sequence[Job]) -> dict[str, str]:
    """Runs one run after the other in this process.

    Returns:
        The reasons of the runs that have failed, by name.
    """
    failures = {}
    for number, job in enumerate(jobs, 1):
        print(f"[{number}/{len(jobs)}] {job.name}", flush=True)
        try:
            train.run(job.config, job.workdir)
        except Exception as error:
            if not isinstance(error, (NonFiniteError, UserError)):
                traceback.print_exc()
            failures[job.name] = failure_reason(error)
            print(f"{job.name}: failed: {failures[job.name]}", flush=True)
    return failures


class _Running(NamedTuple):
    """A run in its process.

    Attributes:
        job: The run.
        share: What it has of the machine.
        process: Its process.
        answer: Where the process sends the reason of a failure, or None, at its end.
    """

    job: Job
    share: Share
    process: SpawnProcess
    answer: Connection


def run_side_by_side(
    jobs: Sequence[Job], shares: Sequence[Share], console: Console | None = None
) -> dict[str, str]:
    """Runs as many runs at a time as there are shares, each in its own process.

    A run that fails, or whose process is killed, stops no other run. If this process
    receives a signal, it ends the others first, which save what they have done. If it
    is killed, the others notice it and end.

    Args:
        jobs: The runs. Those that have finished are left alone.
        shares: What each of the processes gets of this machine.
        console: Where the runs are shown while they go on.

    Returns:
        The reasons of the runs that have failed, by name.

    Raises:
        Interrupted: A signal has ended the runs.
    """
    jobs = in_order(unfinished(jobs))
    waiting, free = deque(jobs), list(shares)
    running: list[_Running] = []
    failures: dict[str, str] = {}
    with deferrable() as signals, View(jobs, console) as view:
        signals.defer()
        try:
            while (waiting or running) and not signals.number:
                while waiting and free:
                    running.append(_start(waiting.popleft(), free.pop(0)))
                    view.start(running[-1].job.name)
                ended = wait([run.process.sentinel for run in running], _INTERVAL)
                view.refresh()
                for run in [r for r in running if r.process.sentinel in ended]:
                    running.remove(run)
                    free.append(run.share)
                    reason = _reason(run)
                    view.end(run.job.name, reason)
                    if reason is not None:
                        log = run.job.workdir / LOG
                        failures[run.job.name] = f"{reason}; log: {log}"
        finally:
            _end(running)
    return failures


def _start(job: Job, share: Share) -> _Running:
    """Starts the process of a run."""
    context = multiprocessing.get_context("spawn")
    answer, from_child = context.Pipe(duplex=False)
    options = {**inherited_jax_options(), **share.jax_options}
    process = context.Process(
        target=_child, args=(job, options, from_child), name=job.name
    )
    # A process inherits what its parent blocks. Ctrl-C reaches every process of a
    # terminal, and here the parent decides what happens.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with applied(share):
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    # Only the child may hold this end: reading then ends when the child does.
    from_child.close()
    return _Running(job, share, process, answer)


def _child(job: Job, jax_options: Mapping[str, Any], answer: Connection) -> None:
    """The program of a run's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What ends a terminal or a job signals the parent too, which then signals its
    # children once more. The parent ends those that take too long.
    _signals.start(second_ends=False)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        answer.send(run_job(job, jax_options))
    except Interrupted as error:
        print(error)
        sys.exit(error.exit_code)


def _end_with_parent() -> None:
    """Ends this process when its parent has died."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this process is a child
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os._exit(1)


def _reason(run: _Running) -> str | None:
    """Finds out why a run has failed whose process has ended; None if it has not."""
    run.process.join()
    try:
        return run.answer.recv()
    except (EOFError, OSError):
        pass  # the process could not send anything
    finally:
        run.answer.close()
    code = run.process.exitcode or 0
    number = -code if code < 0 else code - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"its process ended with exit code {code}{_last_line(run.job)}"
    hint = "; the system does so when memory runs out" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{hint}{_last_line(run.job)}"


def _last_line(job: Job) -> str:
    """The end of a run's log, for a message."""
    try:
        lines = (job.workdir / LOG).read_text(errors="replace").split("\n")
    except OSError:
        return ""
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"; the last line of its log: {last[:200]}" if last else ""


def _end(running: Sequence[_Running]) -> None:
    """Ends processes: first by asking them to, and after a while by force."""
    for run in running:
        run.process.terminate()
    deadline = time.monotonic() + _GRACE
    for run in running:
        run.process.join(max(0.0, deadline - time.monotonic()))
        if run.process.is_alive():
            run.process.kill()
            run.process.join()
