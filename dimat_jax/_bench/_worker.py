"""The process of one side of a benchmark: it makes a program and calls it on request.

The parent process writes one line of JSON for each request, and this process answers
each with one line: see `_timing`. It ends when its input ends. Nothing here imports
JAX before a program asks for it, because the memory of JAX would count as memory of a
program that uses another library.
"""

import importlib
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from dimat_jax.errors import UserError, out_of_memory

__all__ = ["Program", "Unavailable", "config_from", "jax_program", "made", "timed"]


class Unavailable(Exception):
    """A side cannot be measured on this machine. The message says what is missing."""


class Program(NamedTuple):
    """What a side times.

    Attributes:
        call: the function that is timed. It returns once all of its work is done. What
            it returns, a dict that JSON can hold, is kept in `Timing.facts`.
        device: the name of the device, with the version of the library.
        device_peak_bytes: returns the peak of the memory in use on the accelerator, or
            None on a CPU.
        untimed: returns further facts about the latest call. It is called once the
            clock has stopped.
    """

    call: Callable[[], dict[str, Any]]
    device: str
    device_peak_bytes: Callable[[], int | None]
    untimed: Callable[[], dict[str, Any]] = dict


def jax_program(
    call: Callable[[], dict[str, Any] | None],
    untimed: Callable[[], dict[str, Any]] = dict,
) -> Program:
    """Makes a program that uses JAX's default devices.

    Args:
        call: the function that is timed, as for `Program`; None stands for no facts.
        untimed: as for `Program`.
    """
    import jax

    devices = jax.devices()

    def peak() -> int | None:
        if devices[0].platform == "cpu":
            return None
        return max(d.memory_stats()["peak_bytes_in_use"] for d in devices)

    name = f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}"
    return Program(lambda: call() or {}, name, peak, untimed)


def config_from(fields: dict[str, Any]) -> Any:
    """Rebuilds a config from `config.to_dict()`, and splits the CPU as it says.

    It must be called before JAX computes anything.
    """
    from dimat_jax.config import default_config, fields_of
    from dimat_jax.placement import request_cpu_devices

    config = default_config()
    config.update_from_flattened_dict(fields_of(fields))
    request_cpu_devices(config.placement.cpu_devices)
    return config


def main() -> None:
    """Answers the requests of the parent process until it closes the pipe."""
    # Libraries may print, but the pipe is for replies alone.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    try:
        request = json.loads(sys.stdin.readline())
        program = made(request["program"], request["arguments"])
        answer({})
        for _ in sys.stdin:
            answer(timed(program))
    except KeyboardInterrupt:
        pass  # The parent process was interrupted too, and says so.
    except Exception as error:
        answer(_reason(error))


def _reason(error: Exception) -> dict[str, Any]:
    """Returns the reply for a program that has failed."""
    full = out_of_memory(error)
    if full is not None:
        return {"unavailable": full}
    if isinstance(error, Unavailable):
        return {"unavailable": str(error)}
    if isinstance(error, UserError):
        return {"refused": str(error)}
    return {"failed": "".join(traceback.format_exception(error))}


def made(program: str, arguments: dict[str, Any]) -> Program:
    """Makes a side's program; the arguments are as for `Side`."""
    module, _, function = program.partition(":")
    return getattr(importlib.import_module(module), function)(**arguments)


def timed(program: Program) -> dict[str, Any]:
    """Calls a program, and returns the reply for the parent process."""
    start = time.perf_counter()
    facts = program.call()
    reply = {
        "seconds": time.perf_counter() - start,
        "device": program.device,
        "host_peak_bytes": _host_peak_bytes(),
        "device_peak_bytes": program.device_peak_bytes(),
    }
    # What is not timed comes last, so that the first peaks are those of the call.
    return {**reply, "facts": {**facts, **program.untimed()}}


def _host_peak_bytes() -> int:
    """Returns the peak of this process's resident memory."""
    status = Path("/proc/self/status")
    if status.exists():
        # On Linux, getrusage would include the peak of the parent process.
        lines = status.read_text().splitlines()
        (line,) = (line for line in lines if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
