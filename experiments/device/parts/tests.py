"""Runs the tests that are marked `gpu`."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from experiments.device._cells import Cell, Log
from experiments.device.parts import Settings

__all__ = ["cells"]

# Compiling takes most of the time, and most of that is the CPU's.
_PROCESSES = 4
_ROOT = Path(__file__).parents[3]


def cells(settings: Settings) -> list[Cell]:
    """The one cell of this part."""

    def measure(log: Log) -> None:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rA", "-q"]
        # Warnings of other versions of other packages say nothing about the device.
        # pytest-benchmark would warn that it does not go together with xdist.
        command += ["-W", "default", "-p", "no:benchmark", "-p", "no:cacheprovider"]
        command += ["tests/device"]
        environment = dict(os.environ)
        if settings.tiny:
            # The tests then compare the CPU with itself.
            environment["DIMAT_TEST_ANY_DEVICE"] = "1"
        elif importlib.util.find_spec("xdist"):
            command += ["-n", str(_PROCESSES)]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=_ROOT, env=environment
        )
        outcomes = {
            test.rpartition("::")[2]: outcome.lower()
            for outcome, test in re.findall(
                r"^(PASSED|FAILED|ERROR|SKIPPED) (\S+)", done.stdout, re.MULTILINE
            )
        }
        log.note(outcomes=outcomes, exit_code=done.returncode)
        if done.returncode:
            log.note(output=(done.stdout + done.stderr)[-8000:])
            raise RuntimeError(f"pytest ended with {done.returncode}")

    return [Cell("tests", settings.seconds, measure)]
