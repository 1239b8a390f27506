"""Runs the tests that are marked `gpu`."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from experiments.device._cells import Cell, Log
from experiments.device.parts import Settings

__all__ = ["cells", "read_outcome"]

# Compiling takes most of the time, and most of that is the CPU's.
_PROCESSES = 4
_ROOT = Path(__file__).parents[3]


# A line of pytest about a test; with xdist, the outcome comes first.
_OUTCOME = r"PASSED|FAILED|ERROR|SKIPPED"
_LINES = (
    re.compile(rf"^\S+::(?P<test>\S+) (?P<outcome>{_OUTCOME})"),
    re.compile(rf"^\[gw\d+\] \[ *\d+%\] (?P<outcome>{_OUTCOME}) \S+::(?P<test>\S+)"),
)


def cells(settings: Settings) -> list[Cell]:
    """The one cell of this part."""

    def measure(log: Log) -> None:
        printed, outcomes = [], {}
        for line in _run(settings.tiny):
            printed.append(line)
            if outcome := read_outcome(line):
                outcomes.update([outcome])
                log.note(outcomes=outcomes)
        if not outcomes or {"failed", "error"} & set(outcomes.values()):
            log.note(output="".join(printed)[-8000:])
            raise RuntimeError("not every test has passed")

    return [Cell("tests", settings.seconds, measure)]


def read_outcome(line: str) -> tuple[str, str] | None:
    """Reads the name and the outcome of a test from a line that pytest prints."""
    found = next(filter(None, (pattern.match(line) for pattern in _LINES)), None)
    return found and (found["test"], found["outcome"].lower())


def _run(tiny: bool) -> Iterator[str]:
    """Runs the tests, and returns the lines that pytest prints as they come."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v"]
    # Warnings of other versions of other packages say nothing about the device.
    # pytest-benchmark would warn that it does not go together with xdist.
    command += ["-W", "default", "-p", "no:benchmark", "-p", "no:cacheprovider"]
    command += ["tests/device"]
    environment = dict(os.environ)
    if tiny:
        # The tests then compare the CPU with itself.
        environment["DIMAT_TEST_ANY_DEVICE"] = "1"
    elif importlib.util.find_spec("xdist"):
        command += ["-n", str(_PROCESSES)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=_ROOT,
        env=environment,
    ) as process:
        yield from process.stdout or ()
