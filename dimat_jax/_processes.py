"""Several processes that run one program together, on JAX's own runtime.

All processes execute the same calls in the same order; the arrays of the agents are
sharded over the devices of all of them. Process 0, the main process, writes and prints.
With a single process, every function here returns at once.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from dimat_jax.errors import (
    Interrupted,
    NonFiniteError,
    UserError,
    first_line,
    out_of_memory,
)

__all__ = [
    "ProcessError",
    "check_equal",
    "everywhere",
    "from_main",
    "is_lost",
    "is_main",
    "joined",
    "leave",
    "together",
]

# The seconds between two looks at whether all processes are alive.
_POLL_SECONDS = 1.0
# The seconds between two connections to process 0, and to its answer.
_PROBE_SECONDS = 5.0
# The seconds that a process has to end by itself, with a message of its own, once
# another process has ended.
_GRACE_SECONDS = 3.0
# Process 0 runs the service at which the others arrive. It waits longer than they do,
# because JAX aborts a process whose service goes away while it is arriving.
_LONGER_SECONDS = 3.0

_NOT_MET = (
    "the processes could not meet; each needs an id of its own, from 0 to "
    "n_processes - 1, and the same coordinator"
)
_LOST = (
    "another process of the run has ended; the same command on every process goes on "
    "from the last checkpoint"
)


class ProcessError(UserError):
    """The processes of a run disagree, or one of them is missing."""


def is_lost(error: BaseException | None) -> bool:
    """Whether an error may come from another process of the run that has ended.

    JAX raises JaxRuntimeError for computations, and ValueError for some that it runs at
    once.
    """
    if error is None or jax.process_count() == 1 or isinstance(error, UserError):
        return False
    if isinstance(error, jax.errors.JaxRuntimeError):
        return out_of_memory(error) is None
    return isinstance(error, ValueError) and "Gloo" in str(error)


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def everywhere(content: Any) -> list[Any]:
    """Gathers what every process passes, in the order of the processes.

    Args:
        content: JSON content. All processes must make the call.
    """
    if jax.process_count() == 1:
        return [content]
    encoded = np.frombuffer(json.dumps(content).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(encoded)], np.int32))
    # A few lengths, rather than every length, are compiled.
    length = 1 << int(sizes.max() - 1).bit_length()
    padded = np.zeros(length, np.uint8)
    padded[: len(encoded)] = encoded
    gathered = multihost_utils.process_allgather(padded)
    return [
        json.loads(row[:size].tobytes())
        for row, size in zip(gathered, sizes.ravel().tolist(), strict=True)
    ]


def from_main(content: Any) -> Any:
    """Returns what process 0 passes. The content of other processes is ignored.

    Args:
        content: JSON content on process 0, which comes back as JSON decodes it; with a
            single process it comes back as it is.
    """
    return everywhere(content if is_main() else None)[0]


def check_equal(facts: Mapping[str, Any]) -> None:
    """Refuses processes that disagree.

    Args:
        facts: JSON content by name, which must be equal on all processes.

    Raises:
        ProcessError: A fact differs; every process raises the same message.
    """
    all_facts = everywhere(dict(facts))
    names = sorted(set().union(*all_facts))
    differing = []
    for name in names:
        values = [facts.get(name) for facts in all_facts]
        if any(value != values[0] for value in values):
            by_value = Counter(map(repr, values)).most_common(3)
            shown = ", ".join(
                f"{value} on process {[repr(v) for v in values].index(value)}"
                for value, _ in by_value
            )
            differing.append(f"{name} ({shown})")
    if differing:
        raise ProcessError(
            f"the processes disagree in {', '.join(differing)}; start the same command "
            "with the same version on every process"
        )


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Runs a block that every process has to survive.

    The block must not communicate, since an error may end it anywhere.

    Raises:
        UserError: The block has raised one, on this process or on another. So all
            processes end with the same message.
    """
    error = None
    try:
        yield
    except UserError as raised:
        error = raised
    messages = everywhere(None if error is None else str(error))
    if error is not None:
        raise error
    for process, message in enumerate(messages):
        if message is not None:
            raise ProcessError(f"process {process}: {message}")


@contextlib.contextmanager
def joined(
    coordinator: str | None,
    n_processes: int | None,
    process_id: int | None,
    *,
    arrival_timeout: int,
    heartbeat_timeout: int,
) -> Iterator[None]:
    """Joins this process with the others of a run, for the time of a block.

    JAX must not have started. What is None is detected by JAX, under Slurm for example.
    If another process ends within the block, this process ends with a message and exit
    code 1.

    Args:
        coordinator: "host:port", where process 0 listens.
        n_processes: The number of processes.
        process_id: The number of this process, from 0 on.
        arrival_timeout: The seconds within which all processes must arrive. If one
            does not, this process ends with a message and exit code 2.
        heartbeat_timeout: The seconds without a sign of life after which a process
            counts as dead.

    Raises:
        ProcessError: The arguments cannot be used, nothing can be detected, or the
            processes have unequal numbers of devices.
    """
    # An error of another process is then raised as an exception, and does not abort
    # this process.
    jax.config.update("jax_enable_recoverability", True)
    # The service would catch SIGTERM, and the process would not end.
    jax.config.update("jax_enable_preemption_service", False)
    expected = f"the {n_processes}" if n_processes else "all"
    missing = threading.Timer(
        arrival_timeout + (0 if process_id else _LONGER_SECONDS),
        _end,
        (2, _MISSING.format(expected, coordinator or "process 0", arrival_timeout)),
    )
    missing.daemon = True
    missing.start()
    _on_abort(2, _NOT_MET)
    try:
        jax.distributed.initialize(
            coordinator,
            n_processes,
            process_id,
            # JAX aborts at its own timeout, so that the timer has to be faster.
            initialization_timeout=arrival_timeout + 60,
            heartbeat_timeout_seconds=heartbeat_timeout,
        )
        _check_devices()
        everywhere(None)
    except (ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise ProcessError(first_line(error) + _DETECTION) from error
    finally:
        missing.cancel()
    _on_abort(1, _LOST)
    watch = _Watch(heartbeat_timeout, coordinator)
    try:
        yield
        watch.finish()
    except Interrupted as error:
        # All processes end at the same step, whichever has received the signal.
        if error.agreed:
            watch.finish()
        raise
    except Exception as error:
        if is_lost(error):
            watch.explain(error)
        if not isinstance(error, UserError | NonFiniteError):
            # What JAX does at the end of a program would wait for the other processes.
            watch.over = True
            traceback.print_exc()
            leave(1)
        raise
    finally:
        watch.over = True


_MISSING = (
    "{} processes did not arrive at {} within {} seconds; start every process with the "
    "same number of processes and the same coordinator, and with an id of its own, and "
    "see whether one of them has ended with an error"
)
_DETECTION = (
    "; JAX detects the processes under Slurm, under Open MPI and on TPU pods; it needs "
    "--coordinator=HOST:PORT --n_processes=N --process_id=I elsewhere"
)


def _check_devices() -> None:
    counts = Counter(device.process_index for device in jax.devices())
    if len(counts) != jax.process_count() or len(set(counts.values())) != 1:
        shown = ", ".join(f"{n} on process {i}" for i, n in sorted(counts.items()))
        raise ProcessError(
            f"every process must have the same number of devices; there are {shown}"
        )


class _Watch:
    """Watches whether the other processes are alive, in a thread.

    A process that waits for a dead one may wait for ever, depending on the devices.

    Args:
        heartbeat_timeout: The seconds after which a silent process counts as dead.
        coordinator: "host:port", where process 0 listens; None if JAX has found it.

    Attributes:
        over: Whether it no longer matters that other processes end.
    """

    def __init__(self, heartbeat_timeout: int, coordinator: str | None):
        self.over = False
        self._patience = heartbeat_timeout + 2 * _GRACE_SECONDS
        self._devices = jax.devices()
        self._lost = threading.Event()
        if jax.process_count() == 1:
            return
        threading.Thread(target=self._poll, daemon=True).start()
        if coordinator is not None and not is_main():
            address = coordinator.rsplit(":", 1)
            threading.Thread(target=self._probe, args=address, daemon=True).start()

    def _probe(self, host: str, port: str) -> None:
        """Sees at once that process 0 is dead. `_poll` would wait for its answer."""
        while not self.over:
            try:
                socket.create_connection(
                    (host.strip("[]"), port), _PROBE_SECONDS
                ).close()
            except ConnectionRefusedError:
                self._end()
            except OSError:
                pass  # Process 0 may be alive; the heartbeats decide.
            time.sleep(_PROBE_SECONDS)

    def _poll(self) -> None:
        while not self.over:
            try:
                with multihost_utils.live_devices(self._devices) as alive:
                    n_alive = len(alive)
            except Exception:
                n_alive = 0
            if n_alive < len(self._devices):
                self._end()
            time.sleep(_POLL_SECONDS)

    def _end(self) -> None:
        """Ends this process, unless it ends by itself."""
        if not self.over:
            self._lost.set()
            time.sleep(_GRACE_SECONDS)
        if not self.over:
            _end(1, _LOST)

    def finish(self) -> None:
        """Waits for the other processes, since they may now end at any time."""
        everywhere(None)
        self.over = True
        # No process leaves before every process has stopped to watch.
        with contextlib.suppress(jax.errors.JaxRuntimeError, ValueError):
            everywhere(None)

    def explain(self, error: Exception) -> None:
        """Ends this process if an error comes from another process that has ended."""
        if "Gloo" in str(error) or self._lost.wait(self._patience):
            self.over = True
            _end(1, _LOST)


def leave(code: int, agreed: bool = False) -> NoReturn:
    """Ends this process, whether it has joined others or not.

    Args:
        code: The exit code.
        agreed: Whether all processes end now, with the same code.
    """
    if not jax.distributed.is_initialized():
        sys.exit(code)
    # JAX aborts the other processes as soon as process 0 has ended.
    if code and (is_main() or not agreed):
        # The others may have to read what this process has sent them last.
        time.sleep(_POLL_SECONDS)
    # Other threads, and what JAX does at the end, may wait for other processes.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_ending = threading.Lock()


def _end(code: int, message: str) -> NoReturn:
    """Ends this process from any thread, with the first message that any thread has."""
    if not _ending.acquire(blocking=False):
        time.sleep(_GRACE_SECONDS)  # The other thread ends the process meanwhile.
    else:
        print(f"error: {message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


_abort_handlers: list[Any] = []


def _on_abort(code: int, message: str) -> None:
    """Ends this process with a message where JAX's runtime would abort it.

    The runtime aborts a process as soon as process 0 is gone, and has no callback that
    works: jax 0.10.2 raises std::bad_cast when it calls a `missed_heartbeat_callback`.
    It aborts from a thread of its own while Python goes on, so that a handler may run
    Python. Handlers of the module `signal` would wait for the main thread.
    """
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: _end(code, message))
    _abort_handlers.append(handler)  # C holds no reference.
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)
