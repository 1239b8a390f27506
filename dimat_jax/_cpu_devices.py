"""Splits a CPU into several devices, with enough threads for all of them."""

import os

import jax

from dimat_jax._layouts import PlacementError
from dimat_jax.options import Option

__all__ = ["CPU_DEVICES", "check_threads", "cores", "request_cpu_devices"]

CPU_DEVICES = Option(
    "placement.cpu_devices",
    1,
    "The number of devices that a CPU is split into.",
    at_least=1,
    unit="devices",
    changes_results=False,
)


def request_cpu_devices(n_devices: int) -> None:
    """Splits the CPU into `n_devices` devices. Call it before JAX first computes.

    A collective within one process holds one thread of XLA's pool for each device, and
    programs that wait for the collective hold more threads. The pool has as many
    threads as the CPU has cores, unless the environment variable PJRT_NPROC sets
    another number. With too few threads the devices never meet in a collective, and XLA
    aborts the process. So this function sets PJRT_NPROC if the pool is too small.

    Raises:
        RuntimeError: JAX has started already.
        PlacementError: `n_devices` is below 1.
    """
    if n_devices < 1:
        raise PlacementError(f"expected at least 1 CPU device, got {n_devices}")
    jax.config.update("jax_num_cpu_devices", n_devices)
    if _pool_size() < _threads_for(n_devices):
        os.environ["PJRT_NPROC"] = str(_threads_for(n_devices))


def check_threads(n_devices: int) -> None:
    """Refuses several devices with too few threads; see `request_cpu_devices`.

    Raises:
        PlacementError: collectives of this process's devices would deadlock.
    """
    if n_devices > 1 and _pool_size() < _threads_for(n_devices):
        raise PlacementError(
            f"{n_devices} host devices share a pool of {_pool_size()} threads, in "
            "which collectives deadlock; call request_cpu_devices before JAX starts, "
            f"or set PJRT_NPROC={_threads_for(n_devices)} in the environment"
        )


def _threads_for(n_devices: int) -> int:
    """The number of threads with which collectives do not deadlock.

    It was measured with jax 0.10.2 by dispatching forward passes and all-gathers
    without waiting for them. 2 devices hang with 3 threads, and 5 devices hang with 9.
    2 devices with 4 threads, 5 with 10 and 8 with 16 do not hang.
    """
    return 2 * n_devices


def _pool_size() -> int:
    """The number of threads that XLA:CPU has, or will have, for all devices."""
    if requested := os.environ.get("PJRT_NPROC"):
        return int(requested)
    return cores()


def cores() -> int:
    """The number of cores that XLA counts: those that the process may use."""
    # Not every system can tell them.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
