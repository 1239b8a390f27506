"""Random runs that are disturbed, and must come to the results of the undisturbed run.

A case draws a config, runs it once in peace, and once more with a disturbance: it is
killed, its files are damaged, its disk is full, or others want its folder.
"""

import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.soak._cases import Case
from experiments.soak._children import Child, Ended, Limits, call, run
from experiments.soak._draws import draw, write_config
from experiments.soak._same import compare

__all__ = ["Subject", "killed_at_random", "prepare"]

# A run that is asked to end works for no more seconds than these, beside its own ones.
MOST_SECONDS = 30.0
# Configs that a theory or a bound refuses are drawn again, so many times.
_MOST_REFUSED = 20
# So many cases have configs that share most of their compiled programs.
_FAMILY = 4
# A run that is killed by the system gives no message; the others say what they do.
_SIGNALS = (
    *(signal.SIGKILL,) * 3,
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
)


class Subject:
    """A config, and the folder of its undisturbed run.

    Args:
        case: The case.
        config: The file of the config.
        whole: The folder of the run that nothing disturbs.
    """

    def __init__(self, case: Case, config: Path, whole: Path):
        self.case, self.config, self.whole = case, config, whole
        # The seconds that the whole run takes, and those that it works.
        self.seconds, self.worked = 1.0, 1.0

    def start(self, workdir: Path, limits: Limits = Limits()) -> Child:  # noqa: B008
        """Starts the run in a folder, or goes on with it there."""
        flags = (f"--config={self.config}", f"--workdir={workdir}")
        return run(("train", *flags), self.case.folder, limits)

    def finish(self, workdir: Path, what: str) -> None:
        """Lets the run finish in a folder, and compares it with the undisturbed one.

        Args:
            workdir: The folder.
            what: What has happened to the run.
        """
        ended = self.start(workdir).wait()
        self.case.expect(ended.code == 0, "does not go on", what, ended)
        self.expect_same(workdir, what)

    def expect_same(self, workdir: Path, what: str) -> None:
        """Compares a finished run with the undisturbed one."""
        found = compare(workdir, self.whole)
        self.case.expect(found.code == 0, "difference", what, found)
        self.case.count("runs compared")


def prepare(case: Case, **changes: Any) -> Subject:
    """Draws configs until one can be run, and runs it.

    Args:
        case: The case.
        changes: Other values of some fields, by their paths with double underscores.
    """
    for attempt in range(_MOST_REFUSED):
        seed, path = f"{case.seed} {case.name} {attempt}", case.folder / "config.py"
        family = f"{case.seed} {case.phase} {case.number // _FAMILY} {attempt}"

        def choose(seed: str = seed, path: Path = path, family: str = family) -> None:
            config = draw(seed, case.folder, family)
            write_config(config, path, **changes)

        found = call(choose, case.folder)
        case.expect(found.code == 0, "soak", "drawing a config", found)
        subject = Subject(case, path, case.folder / f"whole-{attempt}")
        began = time.monotonic()
        ended = subject.start(subject.whole).wait()
        if ended.code == 0:
            case.count("configs")
            subject.seconds = time.monotonic() - began
            subject.worked = ended.seconds
            return subject
        what = f"an undisturbed run of {path.read_text()}"
        if ended.code == 1 and len(ended.errors) == 1 and "not finite" in ended.text:
            case.expect("Traceback" not in ended.text, "traceback", what, ended)
            case.count("configs that diverged")
        else:
            case.expect_message(what, ended, MOST_SECONDS)
            case.count("configs refused")
            case.notes.append(ended.errors[0])
    raise AssertionError("no config could be run")


def events(workdir: Path) -> int:
    """Counts what a run has begun to write: checkpoints, and rows."""
    rows = workdir / "metrics.jsonl"
    n_rows = rows.read_bytes().count(b"\n") if rows.is_file() else 0
    return n_rows + len(list((workdir / "checkpoints").glob("*")))


def killed_at_random(subject: Subject, workdir: Path) -> bool:
    """Starts a run, and ends it by a signal at a random moment.

    Returns:
        Whether it was still going on.
    """
    case, child = subject.case, subject.start(workdir)
    rng = case.rng
    if rng.random() < 0.4:
        child.poll(rng.random() * subject.seconds)
    else:
        least = events(workdir) + rng.randrange(1, 6)
        while child.poll(0.002) is None and events(workdir) < least:
            pass
        child.poll(rng.random() * 0.05)
    number = rng.choice(_SIGNALS)
    before = len(child.text)
    child.send(number)
    if number != signal.SIGKILL and rng.random() < 0.2:
        # A cluster sends SIGKILL some time after SIGTERM.
        child.poll(rng.random() * 0.5)
        child.send(signal.SIGKILL)
    return _expect_end(case, number, child.wait(), before, subject.worked)


def _expect_end(
    case: Case, number: signal.Signals, ended: Ended, before: int, most: float
) -> bool:
    """Expects that a run has ended by a signal as it should; see `killed_at_random`."""
    what = f"a run that gets {number.name}"
    if ended.code == 0:
        case.count("signals that came too late")
        return False
    case.expect("Traceback" not in ended.text, "traceback", what, ended)
    if ended.code == -signal.SIGKILL and "had not ended" not in ended.text:
        case.count("kills")
        case.count("kills by SIGKILL")
        return True
    case.expect(ended.code == 128 + number, "exit code", what, ended)
    case.expect(len(ended.text) > before, "messages", what, ended)
    case.expect(ended.seconds < MOST_SECONDS + most, "slow", what, ended)
    case.count("kills")
    case.count(f"kills by {number.name}")
    return True


def kills(case: Case) -> None:
    """A run that is killed again and again goes on."""
    subject = prepare(case)
    workdir = case.folder / "killed"
    times = case.rng.choice((1, 1, 2, 3))
    for _ in range(times):
        if not killed_at_random(subject, workdir):
            break
    subject.finish(workdir, f"a run that was killed {times} time(s)")


Disturbances = Mapping[str, tuple[int, Callable[[Case], None]]]


def disturbed(case: Case, disturbances: Disturbances) -> None:
    """Does a case with one of the disturbances, drawn by their weights."""
    names = list(disturbances)
    weights = [disturbances[name][0] for name in names]
    (name,) = case.rng.choices(names, weights)
    disturbances[name][1](case)
