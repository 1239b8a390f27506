"""Shares out the cores and the devices of this machine to jobs that run side by side.

A job's process starts with its cores and environment variables, and sets its options
of JAX before JAX starts. XLA then makes as many threads as the job has cores, and sees
only the job's own devices.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import jax

from dimat_jax.errors import UserError

__all__ = ["Devices", "Share", "applied", "make_shares", "share_out"]

# The part of a GPU's memory that the jobs which share it take together. JAX's default
# for a single process is .75, but the jobs of a sweep are meant to fill the machine.
_GPU_MEMORY = 0.9


class Devices(NamedTuple):
    """The accelerators that a process of this machine would see.

    Attributes:
        platform: JAX's name of their kind: "cpu", "gpu", "tpu".
        n_devices: The number of devices. It is 1 for a CPU that is not split.
    """

    platform: str
    n_devices: int


class Share(NamedTuple):
    """What one job gets.

    Attributes:
        cores: The CPU cores. None where the system cannot bind a process to cores.
        environment: The environment variables that the job's process starts with.
        jax_options: The values of `jax.config` that the process sets.
    """

    cores: frozenset[int] | None
    environment: Mapping[str, str]
    jax_options: Mapping[str, str]


def share_out(n_jobs: int, jobs_per_device: int = 1) -> list[Share]:
    """Finds what each of the jobs that run at a time gets of this machine.

    See `make_shares`. A single job gets all of the machine.

    Raises:
        UserError: As of `make_shares`, or a single job would share a device.
    """
    if n_jobs == 1:
        if jobs_per_device > 1:
            raise UserError(
                f"--jobs_per_device={jobs_per_device} has no effect with one job at a "
                "time; set --jobs to the number of jobs that go on at a time"
            )
        return [Share(None, {}, {})]
    return make_shares(n_jobs, _available_devices(), jobs_per_device)


def _available_devices() -> Devices:
    """Asks JAX for the devices of this machine, in a process that ends afterwards.

    If this process asked itself, it would hold the GPUs' memory from then on.

    Raises:
        UserError: JAX cannot start.
    """
    if jax.config.values["jax_platforms"] == "cpu":
        return Devices("cpu", 1)
    code = "import jax; d = jax.local_devices(); print(d[0].platform, len(d))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        # Counting the devices needs none of their memory.
        env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UserError(f"JAX cannot start on this machine: {done.stderr.strip()}")
    platform, count = done.stdout.split()[-2:]
    return Devices(platform, int(count))


def make_shares(n_jobs: int, devices: Devices, jobs_per_device: int = 1) -> list[Share]:
    """Shares out cores, GPUs and their memory.

    Args:
        n_jobs: The number of jobs that run at a time.
        devices: The devices of this machine.
        jobs_per_device: How many jobs may share one GPU.

    Returns:
        A share for each job. Every core belongs to one job. Every GPU belongs to one
        job too, unless there are more jobs than GPUs.

    Raises:
        UserError: There are more jobs than cores, or than devices can take,
            processes cannot share devices of this kind, or jobs would share GPUs and
            there are none.
    """
    cores = _cores()
    n_cores = len(cores) if cores is not None else os.cpu_count() or 1
    if n_jobs > n_cores:
        raise UserError(
            f"--jobs={n_jobs} needs as many CPU cores, but this process may use "
            f"{n_cores}; --jobs is at most {n_cores} here"
        )
    parts = _device_parts(n_jobs, devices, jobs_per_device)
    shares = []
    for number, part in enumerate(parts):
        environment = {}
        own_cores = None
        if cores is None:
            # Without binding, XLA is told how many threads it may have.
            n_threads = len(_part(range(n_cores), number, n_jobs))
            environment["PJRT_NPROC"] = str(n_threads)
        else:
            own_cores = frozenset(_part(cores, number, n_jobs))
        if part and n_jobs > devices.n_devices:
            fraction = _GPU_MEMORY / -(-n_jobs // devices.n_devices)
            environment[_memory_variable()] = f"{fraction:.3f}"
        # JAX counts the GPUs from 0 among those that are visible to it already.
        visible: dict[str, str] = {}
        for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
            if part:
                visible[name] = ",".join(map(str, part))
        shares.append(Share(own_cores, environment, visible))
    return shares


def _memory_variable() -> str:
    """The variable that limits XLA's part of a GPU's memory.

    XLA refuses the old name together with the new one.
    """
    old = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    return old if old in os.environ else "XLA_CLIENT_MEM_FRACTION"


def _device_parts(
    n_jobs: int, devices: Devices, jobs_per_device: int
) -> list[list[int]]:
    """The numbers of each job's GPUs. On a CPU the lists are empty."""
    if devices.platform == "cpu":
        if jobs_per_device > 1:
            raise UserError(
                f"--jobs_per_device={jobs_per_device} has no effect here: JAX sees no "
                "GPU, and the jobs share out the CPU cores"
            )
        return [[]] * n_jobs
    if devices.platform != "gpu":
        raise UserError(
            f"--jobs={n_jobs}: processes cannot share the {devices.platform} devices "
            "of a machine; use --jobs=1, which spreads every run over all of them"
        )
    most = devices.n_devices * jobs_per_device
    if n_jobs > most:
        raise UserError(
            f"--jobs={n_jobs} is too much: there are {devices.n_devices} GPUs, and "
            f"--jobs_per_device={jobs_per_device}; --jobs is at most {most} here"
        )
    if n_jobs <= devices.n_devices:
        return [_part(range(devices.n_devices), i, n_jobs) for i in range(n_jobs)]
    return [[i % devices.n_devices] for i in range(n_jobs)]


def _cores() -> list[int] | None:
    """The cores that this process may use; None if the system cannot tell."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return None


def _part(items: Sequence[int], number: int, n_parts: int) -> list[int]:
    """The part of a number, of `n_parts` parts that differ in size by at most one."""
    ends = [len(items) * i // n_parts for i in (number, number + 1)]
    return list(items[ends[0] : ends[1]])


@contextmanager
def applied(share: Share) -> Iterator[None]:
    """Lets processes that are started within have a share.

    A new process inherits the cores of the thread that starts it, and the environment.
    """
    before = {name: os.environ.get(name) for name in share.environment}
    cores = _cores()
    os.environ.update(share.environment)
    if share.cores is not None:
        os.sched_setaffinity(0, share.cores)
    try:
        yield
    finally:
        if share.cores is not None and cores is not None:
            os.sched_setaffinity(0, cores)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
