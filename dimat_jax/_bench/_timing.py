"""Times several programs against each other, each in a process of its own.

The programs take turns, so that a disturbance of the machine concerns all of them. A
process of its own gives each program its own peak memory and an unshared first call,
which includes all compilation: compiled programs are not read from a cache.
"""

import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from dimat_jax.errors import UserError

__all__ = ["Side", "Timing", "ratio_range", "race", "ratio"]

_PACKAGES = Path(__file__).parents[2]
_PROCESS = "from dimat_jax._bench._worker import main; main()"


class Side(NamedTuple):
    """One of the programs that are compared.

    Attributes:
        name: the name of the side in tables and results.
        program: the function that makes the program, "package.module:function". It is
            called in the side's own process, and returns a `_worker.Program`.
        arguments: its keyword arguments, of which JSON can hold every one.
    """

    name: str
    program: str
    arguments: Mapping[str, Any]


class Timing(NamedTuple):
    """The measurements of one side.

    Attributes:
        name: the name of the side.
        device: the device that the side used, with the version of its library.
        first_call_seconds: the seconds of the first call, compilation included.
        seconds: the seconds of each later call, one a round.
        host_peak_bytes: the peak of the process's resident memory, libraries included.
        device_peak_bytes: the peak of the memory in use on an accelerator; None where
            the device is a CPU, whose memory is the host's.
        facts: what each later call returned, in the order of `seconds`.
        unavailable: why the side was not measured; "" if it was. All other fields but
            the name are empty then.
    """

    name: str
    device: str = ""
    first_call_seconds: float = float("nan")
    seconds: tuple[float, ...] = ()
    host_peak_bytes: int = 0
    device_peak_bytes: int | None = None
    facts: tuple[dict[str, Any], ...] = ()
    unavailable: str = ""

    @property
    def median(self) -> float:
        """The median seconds of the later calls."""
        return statistics.median(self.seconds)

    @property
    def compile_seconds(self) -> float:
        """The seconds by which the first call took longer than the later ones."""
        return self.first_call_seconds - self.median

    @property
    def peak_bytes(self) -> int:
        """The peak memory on the accelerator or, on a CPU, of the process."""
        peak = self.device_peak_bytes
        return self.host_peak_bytes if peak is None else peak

    def required(self) -> "Timing":
        """Returns this timing, if it was measured.

        Raises:
            UserError: the side was not measured. The message says why.
        """
        if self.unavailable:
            raise UserError(f"{self.name}: {self.unavailable}")
        return self

    def record(self) -> dict[str, Any]:
        """Returns the measurements for a JSON file."""
        if self.unavailable:
            return {"unavailable": self.unavailable}
        return {
            "device": self.device,
            "first_call_seconds": self.first_call_seconds,
            "median_seconds": self.median,
            "seconds": list(self.seconds),
            "host_peak_bytes": self.host_peak_bytes,
            "device_peak_bytes": self.device_peak_bytes,
        }


def ratio(above: Timing, below: Timing) -> float | None:
    """Returns how many times longer one side took than another.

    It is the median over the rounds of the two sides' ratio in the same round, so that
    a slow minute of the machine cancels out. It is None if a side was not measured.
    """
    if above.unavailable or below.unavailable:
        return None
    return ratio_range(above, below)[1]


def ratio_range(above: Timing, below: Timing) -> tuple[float, float, float]:
    """Returns the smallest, the median and the largest ratio over the rounds."""
    pairs = zip(above.seconds, below.seconds, strict=True)
    ratios = sorted(a / b for a, b in pairs)
    return ratios[0], statistics.median(ratios), ratios[-1]


def race(sides: Sequence[Side], repeats: int) -> dict[str, Timing]:
    """Measures several sides, which take turns.

    All processes are made ready first. Then every side is called once, and then
    `repeats` times in turn, every other round in the opposite order. Only one side
    computes at a time. A side whose device runs out of memory, or which needs a package
    that is not installed, is left out, and its timing says why.

    Args:
        sides: the sides, in the order of the tables.
        repeats: the number of calls of each side after its first call.

    Returns:
        the timing of every side by its name, in the order of the sides.

    Raises:
        UserError: a program refuses its arguments.
        RuntimeError: a program failed for another reason; the message has its
            traceback.
    """
    with ExitStack() as stack:
        workers = [stack.enter_context(_Worker(side)) for side in sides]
        calls = len(sides) * (repeats + 1)
        with tqdm(total=calls, unit="call", leave=False, disable=None) as bar:
            for worker in workers:
                worker.wait()
            for number in range(repeats + 1):
                for worker in workers[:: -1 if number % 2 else 1]:
                    bar.set_description(worker.side.name)
                    worker.call()
                    bar.update(1)
        return {worker.side.name: worker.timing() for worker in workers}


class _Worker:
    """The process of one side."""

    def __init__(self, side: Side):
        self.side = side
        self._replies: list[dict[str, Any]] = []
        self._unavailable = ""

    def __enter__(self) -> "_Worker":
        environment = {
            **os.environ,
            # The package is found in the process as it was found here.
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(_PACKAGES), os.environ.get("PYTHONPATH")])
            ),
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            # The processes share a GPU. By default each would take most of its memory.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROCESS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._send({"program": self.side.program, "arguments": self.side.arguments})
        return self

    def __exit__(self, *exception: object) -> None:
        # The process ends when its input ends.
        with suppress(BrokenPipeError):
            self._pipes[0].close()
        self._process.wait()
        self._pipes[1].close()

    def wait(self) -> None:
        """Waits until the program is ready to be called."""
        self._receive()

    def call(self) -> None:
        """Calls the program once, and waits for it."""
        if not self._unavailable:
            self._send({})
            reply = self._receive()
            if not self._unavailable:
                self._replies.append(reply)

    def timing(self) -> Timing:
        """Returns all measurements so far, of which the first call is one."""
        if self._unavailable:
            return Timing(self.side.name, unavailable=self._unavailable)
        first, *later = self._replies
        return Timing(
            name=self.side.name,
            device=first["device"],
            first_call_seconds=first["seconds"],
            seconds=tuple(reply["seconds"] for reply in later),
            host_peak_bytes=self._replies[-1]["host_peak_bytes"],
            device_peak_bytes=self._replies[-1]["device_peak_bytes"],
            facts=tuple(reply["facts"] for reply in later),
        )

    @functools.cached_property
    def _pipes(self):
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None  # both are pipes
        return stdin, stdout

    def _send(self, message: dict[str, Any]) -> None:
        # A process that has ended leaves no reply, which `_receive` reports.
        with suppress(BrokenPipeError):
            self._pipes[0].write(json.dumps(message) + "\n")
            self._pipes[0].flush()

    def _receive(self) -> dict[str, Any]:
        line = self._pipes[1].readline()
        if not line:
            code = self._process.wait()
            self._unavailable = (
                f"its process ended with exit code {code}; the machine may have too "
                "little memory"
            )
            return {}
        reply = json.loads(line)
        if "refused" in reply:
            raise UserError(reply["refused"])
        if "failed" in reply:
            raise RuntimeError(f"{self.side.name}: {reply['failed']}")
        self._unavailable = reply.get("unavailable", "")
        return reply
