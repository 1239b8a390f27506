"""Does many cases, some at a time, each in a process of its own."""

import os
import time
from collections.abc import Iterable
from pathlib import Path

from experiments.soak import _damage, _figures, _limits, _mistakes, _runs
from experiments.soak._cases import Case, Phase, do
from experiments.soak._children import warm_up

__all__ = ["PHASES", "plan", "work_off"]

# What disturbs a run, and how often compared with the others.
_DISTURBANCES = {
    "kills": (52, _runs.kills),
    "damage": (24, _damage.damage),
    "shared": (6, _damage.damage_of_shared_agents),
    "full": (8, _limits.full),
    "together": (8, _limits.together),
    "sweep": (2, _limits.sweep),
}


def _disturbed(case: Case) -> None:
    _runs.disturbed(case, _DISTURBANCES)


PHASES = {
    phase.name: phase
    for phase in (
        Phase("mistakes", _mistakes.mistake, "A bad input is refused."),
        Phase("runs", _disturbed, "A random run is disturbed."),
    )
}
# The seconds between two times that the figures are written.
_FIGURES_SECONDS = 60.0


def plan(n_mistakes: int, n_runs: int, only: str = "") -> list[tuple[str, int]]:
    """Lists the cases: phases and numbers.

    Args:
        n_mistakes: The number of bad inputs.
        n_runs: The number of random configs.
        only: A single case, PHASE:NUMBER; "" for all of them.
    """
    if only:
        phase, _, number = only.partition(":")
        return [(phase, int(number))]
    numbers = {"mistakes": n_mistakes, "runs": n_runs}
    return [(name, number) for name, n in numbers.items() for number in range(n)]


def work_off(
    cases: Iterable[tuple[str, int]],
    out: Path,
    seed: int,
    jobs: int,
    deadline: float,
    command: str,
) -> int:
    """Does cases until all are done or the time is over.

    Args:
        cases: The cases. Those that have a record with this seed are left out, unless
            there is a single one.
        out: The folder of the soak.
        seed: The seed of all draws.
        jobs: How many cases go on at a time.
        deadline: When to begin no more cases, by `time.monotonic`.
        command: The command line, for the figures.

    Returns:
        How many cases are left.
    """
    cases = list(cases)
    if len(cases) > 1:
        there = {(r["phase"], r["number"]) for r in _figures.collect(out, seed)}
        cases = [case for case in cases if case not in there]
    warm_up()
    running, written = set(), time.monotonic()
    while cases or running:
        while cases and len(running) < jobs and time.monotonic() < deadline:
            running.add(_begin(*cases.pop(0), out, seed))
        if not running:
            break
        pid, _ = os.wait()
        running.discard(pid)
        if time.monotonic() - written > _FIGURES_SECONDS:
            _figures.write(out, seed, command)
            written = time.monotonic()
    return len(cases)


def _begin(phase: str, number: int, out: Path, seed: int) -> int:
    """Starts a case in a process of its own, and returns the process's number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        name = f"{phase}-{number}"
        case = Case(phase, number, seed, out / "work" / name)
        do(case, PHASES[phase].work, out / "cases" / f"{name}.json")
        code = 0
    finally:
        os._exit(code)
