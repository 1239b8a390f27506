"""The flags by which a command runs in several processes."""

import contextlib
import socket

from absl import flags

from dimat_jax import _processes
from dimat_jax.errors import UserError

__all__ = ["check_arguments", "define_flags", "joined"]

# How long processes wait for each other. A process that is missing usually still waits
# in the queue of the cluster.
_ARRIVAL_SECONDS = 300
# After how long without a sign of life a process counts as dead. This finds machines
# that have failed. On CPUs a process that is killed is noticed at once.
_HEARTBEAT_SECONDS = 60
# The flags that mean nothing without --multihost.
_FLAGS = (
    "coordinator",
    "n_processes",
    "process_id",
    "arrival_timeout",
    "heartbeat_timeout",
)


def define_flags() -> None:
    """Defines the flags."""
    flags.DEFINE_bool(
        "multihost",
        False,
        "Whether this is one of several processes that run the config together, each "
        "with its own devices. All of them see the same --workdir.",
    )
    flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT of process 0, with --multihost. Slurm, TPU pods and Open MPI need "
        "neither this flag nor the next two.",
    )
    flags.DEFINE_integer("n_processes", None, "The number of processes.", 1)
    flags.DEFINE_integer("process_id", None, "The number of this process, from 0.", 0)
    flags.DEFINE_integer(
        "arrival_timeout",
        _ARRIVAL_SECONDS,
        "The seconds within which all processes must have started.",
        1,
    )
    flags.DEFINE_integer(
        "heartbeat_timeout",
        _HEARTBEAT_SECONDS,
        "The seconds without a sign of life after which a process counts as dead.",
        1,
    )


def joined() -> contextlib.AbstractContextManager[None]:
    """Joins the other processes for the time of a block, if there are any.

    Raises:
        UserError: flags of several processes are given without --multihost, or they
            contradict each other.
    """
    values = flags.FLAGS
    if not values.multihost:
        for name in _FLAGS:
            if values[name].present:
                raise UserError(f"--{name} needs --multihost")
        return contextlib.nullcontext()
    check_arguments(values.coordinator, values.n_processes, values.process_id)
    return _processes.joined(
        values.coordinator,
        values.n_processes,
        values.process_id,
        arrival_timeout=values.arrival_timeout,
        heartbeat_timeout=values.heartbeat_timeout,
    )


def check_arguments(
    coordinator: str | None, n_processes: int | None, process_id: int | None
) -> None:
    """Refuses what no process can be started with.

    Raises:
        UserError: some values are missing, the address or the number of the process is
            out of range, or the port is taken.
    """
    given = [coordinator is not None, n_processes is not None, process_id is not None]
    if any(given) and not all(given):
        raise UserError(
            "--coordinator, --n_processes and --process_id are given together, or not "
            "at all where JAX can detect them"
        )
    if coordinator is None or n_processes is None or process_id is None:
        return
    if not 0 <= process_id < n_processes:
        raise UserError(
            f"--process_id must be from 0 to {n_processes - 1} with "
            f"--n_processes={n_processes}, got {process_id}"
        )
    host, colon, port = coordinator.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(
            f"--coordinator must be the HOST:PORT of process 0, got {coordinator!r}"
        )
    if process_id == 0 and _is_taken(int(port)):
        raise UserError(
            f"port {port} of this machine is taken; choose another one, and start a "
            "single process with --process_id=0"
        )


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False
