"""Cases of the soak: what each has counted, and what has gone wrong in it."""

import contextlib
import dataclasses
import json
import random
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.soak._children import Ended

__all__ = ["Case", "Failure", "Phase", "do"]


class Failure(Exception):
    """A case cannot go on. The reason has been noted."""


class Case:
    """One case, with random numbers of its own.

    Args:
        phase: The name of the phase.
        number: The number of the case in its phase.
        seed: The seed of the soak.
        folder: A folder for the case's files; it is removed unless something is wrong.

    Attributes:
        name: The case's name.
        rng: The case's random numbers.
        folder: The case's folder.
        counts: How often each thing was done, or was seen.
        failures: What has gone wrong.
        notes: What a person may want to look at.
    """

    def __init__(self, phase: str, number: int, seed: int, folder: Path):
        self.phase, self.number, self.seed = phase, number, seed
        self.name = f"{phase}:{number}"
        self.rng = random.Random(f"{seed} {self.name}")
        self.folder = folder
        self.counts: Counter[str] = Counter()
        self.failures: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def count(self, what: str, times: int = 1) -> None:
        """Counts something that was done or seen."""
        self.counts[what] += times

    def fail(self, kind: str, what: str, ended: Ended | None = None) -> None:
        """Notes that something is wrong.

        Args:
            kind: A word or two by which failures are counted.
            what: What was done, and what is wrong.
            ended: The end of the child that has shown it.
        """
        failure: dict[str, Any] = {"kind": kind, "what": what}
        if ended is not None:
            failure |= {"code": ended.code, "text": ended.text[-3000:]}
        self.failures.append(failure)

    def expect(self, holds: bool, kind: str, what: str, ended: Ended) -> None:
        """Ends the case if something does not hold.

        Raises:
            Failure: It does not hold.
        """
        if not holds:
            self.fail(kind, what, ended)
            raise Failure

    def expect_message(self, what: str, ended: Ended, seconds: float) -> None:
        """Expects that a command has ended as after bad input.

        Args:
            what: The input.
            ended: The command's end.
            seconds: The time in which it must have come.

        Raises:
            Failure: There is a traceback, another code, no message or more than one; or
                it took too long.
        """
        self.expect("Traceback" not in ended.text, "traceback", what, ended)
        self.expect(ended.code == 2, "exit code", what, ended)
        self.expect(len(ended.errors) == 1, "messages", what, ended)
        self.expect(ended.seconds < seconds, "slow", what, ended)

    def record(self) -> dict[str, Any]:
        """Returns what is kept of the case."""
        names = ("phase", "number", "seed", "failures", "notes")
        found = {name: getattr(self, name) for name in names}
        return {**found, "counts": dict(self.counts)}


def do(case: Case, work: Callable[[Case], None], path: Path) -> None:
    """Does a case, and writes its record; its files stay only if something is wrong."""
    began = time.monotonic()
    shutil.rmtree(case.folder, ignore_errors=True)
    case.folder.mkdir(parents=True)
    try:
        work(case)
    except Failure:
        pass
    except Exception:
        case.fail("soak", traceback.format_exc())
    content = {**case.record(), "seconds": round(time.monotonic() - began, 2)}
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)
    if not case.failures:
        with contextlib.suppress(OSError):
            shutil.rmtree(case.folder)


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase of the soak.

    Attributes:
        name: The phase's name.
        work: The function that does one of its cases.
        meaning: What its cases do, in a sentence.
    """

    name: str
    work: Callable[[Case], None]
    meaning: str
