"""The flags by which a command runs in several processes."""

import contextlib

from absl import flags

from dimat_jax import _processes
from dimat_jax.errors import UserError

__all__ = ["define_flags", "joined"]

# How long processes wait for each other. A process that is missing usually still waits
# in the queue of the cluster.
_ARRIVAL_SECONDS = 300
# After how long without a sign of life a process counts as dead. This finds machines
# that have failed. On CPUs a process that is killed is noticed at once.
_HEARTBEAT_SECONDS = 60


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
        UserError: flags of several processes are given without --multihost.
    """
    values = flags.FLAGS
    if not values.multihost:
        for name in ("coordinator", "n_processes", "process_id"):
            if values[name].present:
                raise UserError(f"--{name} needs --multihost")
        return contextlib.nullcontext()
    return _processes.joined(
        values.coordinator,
        values.n_processes,
        values.process_id,
        arrival_timeout=values.arrival_timeout,
        heartbeat_timeout=values.heartbeat_timeout,
    )
