"""Chooses the devices of a run, and splits a CPU into several of them."""

import os
from collections.abc import Sequence
from typing import Any

import jax

from dimat_jax._layouts import PlacementError
from dimat_jax.options import Option

__all__ = [
    "CPU_DEVICES",
    "check_threads",
    "cores",
    "devices_of_all_processes",
    "request_cpu_devices",
    "shared_out",
]

CPU_DEVICES = Option(
    "placement.cpu_devices",
    1,
    "The number of devices that a CPU is split into.",
    at_least=1,
    at_most=1024,
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
    # JAX refuses the option once it has started, even with the value that it has.
    if getattr(jax.config, "jax_num_cpu_devices", None) != n_devices:
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


def devices_of_all_processes(n_cpu_devices: int) -> list[Any]:
    """Returns the devices of a run: all, or some host devices of each process.

    Args:
        n_cpu_devices: the number of devices of a process, if its devices are CPUs.
    """
    if jax.devices()[0].platform != "cpu":
        return jax.devices()
    return [
        device
        for process in range(jax.process_count())
        for device in jax.local_devices(process_index=process)[:n_cpu_devices]
    ]


def shared_out(
    devices: Sequence[Any], n_agents: int, batch_size: int
) -> tuple[list[Any], int]:
    """Chooses equally many devices of each process.

    Args:
        devices: the devices to choose from.
        n_agents: the number of agents.
        batch_size: the number of examples in a batch, as of `place`.

    Returns:
        the devices, process by process, and the number of devices for each agent. It is
        1 if several agents share a device.

    Raises:
        PlacementError: there are fewer agents than processes.
    """
    processes: dict[int, list[Any]] = {}
    for device in devices:
        processes.setdefault(device.process_index, []).append(device)
    if n_agents < len(processes):
        raise PlacementError(
            f"{n_agents} agents are too few for {len(processes)} processes, each of "
            "which holds at least one"
        )
    # All devices of an agent belong to one process.
    of_each = -(-n_agents // len(processes))
    available = min(map(len, processes.values()))
    most = 1 if n_agents % len(processes) else max(available // of_each, 1)
    n_parts = max(parts for parts in range(1, most + 1) if batch_size % parts == 0)
    wanted = min(of_each * n_parts, available)
    return [device for own in processes.values() for device in own[:wanted]], n_parts
