"""Full disks, limits on file sizes, and several processes that want one folder."""

import contextlib
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from experiments.soak._cases import Case
from experiments.soak._children import Ended, Limits, run
from experiments.soak._runs import MOST_SECONDS, killed_at_random, prepare
from experiments.soak._same import compare

__all__ = ["full", "sweep", "together"]


def full(case: Case) -> None:
    """A run finds no more space, is told so in one message, and goes on later."""
    subject, rng = prepare(case), case.rng
    workdir = case.folder / "full"
    if rng.random() < 0.5 and _may_mount():
        for _ in range(2):
            kibibytes = int(2 ** rng.uniform(3, 8))
            with _small_disk(case.folder / "disk", kibibytes) as disk:
                ended = subject.start(disk / "run").wait()
                _judge(case, f"a disk of {kibibytes} KiB", ended)
                # The disk grows, as if a person had removed other files.
                _mount(f"remount,size={2**26}", disk)
                subject.finish(disk / "run", f"a disk of {kibibytes} KiB")
        return
    for _ in range(3):
        size = int(10 ** rng.uniform(3, 5))
        ended = subject.start(workdir, Limits(file_size=size)).wait()
        _judge(case, f"files of at most {size} bytes", ended)
    subject.finish(workdir, "a run whose files could not grow")


def _judge(case: Case, what: str, ended: Ended) -> None:
    """Expects success, or one message that says which file and what to do."""
    if ended.code == 0:
        case.count("limits that did not matter")
        return
    case.expect_message(what, ended, MOST_SECONDS)
    (message,) = ended.errors
    advises = "free some space" in message or "raise the limit of file" in message
    case.expect(advises and "/" in message, "advice", what, ended)
    case.count("full disks")


def _mount(options: str, folder: Path) -> bool:
    command = ("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder))
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True).returncode == 0
    return False


@functools.cache
def _may_mount() -> bool:
    """Whether this process may make file systems in memory, as root may."""
    with tempfile.TemporaryDirectory() as name:
        if not (shutil.which("mount") and _mount("size=64k", Path(name))):
            return False
        subprocess.run(("umount", name), check=True)
    return True


@contextlib.contextmanager
def _small_disk(folder: Path, kibibytes: int) -> Iterator[Path]:
    """Makes a small file system in memory for the time of a block."""
    folder.mkdir()
    assert _mount(f"size={kibibytes}k", folder)
    try:
        yield folder
    finally:
        subprocess.run(("umount", "-l", str(folder)), check=True)
        folder.rmdir()


def together(case: Case) -> None:
    """Several processes start the same run in one folder at almost the same time."""
    subject, rng = prepare(case), case.rng
    workdir = case.folder / "together"
    if rng.random() < 0.5:
        killed_at_random(subject, workdir)
    children = []
    for _ in range(rng.choice((2, 2, 3))):
        children.append(subject.start(workdir))
        children[-1].poll(rng.choice((0.0, rng.random())))
    ends = [child.wait() for child in children]
    for ended in ends:
        if ended.code != 0:
            case.expect_message("a folder in use", ended, MOST_SECONDS)
            named = "in use by another process" in ended.errors[0]
            case.expect(named, "messages", "a folder in use", ended)
            case.count("second processes refused")
    case.expect(any(e.code == 0 for e in ends), "nobody runs", "two at once", ends[0])
    case.count("starts at once")
    subject.expect_same(workdir, "several processes that started at once")


def sweep(case: Case) -> None:
    """A sweep is killed, and goes on; one of its runs is that of the case."""
    subject = prepare(case)
    path, workdir = case.folder / "sweep.py", case.folder / "sweep"
    path.write_text(
        subject.config.read_text()
        + "\n\ndef get_runs():\n"
        + "    other = get_config()\n    other.seed += 1\n"
        + "    return {'a': get_config(), 'b': other}\n"
    )
    command = ("sweep", f"--sweep={path}", f"--workdir={workdir}")
    for _ in range(case.rng.choice((1, 2))):
        child = run(command, case.folder)
        child.poll(case.rng.random() * 2.5 * subject.seconds)
        number = case.rng.choice((9, 15))
        child.send(number)
        ended = child.wait()
        case.expect("Traceback" not in ended.text, "traceback", "a sweep", ended)
        if ended.code != 0:
            expected = ended.code in (-9, 128 + number)
            case.expect(expected, "exit code", "a sweep that is killed", ended)
            case.count("kills")
            case.count("kills of sweeps")
    ended = run(command, case.folder).wait()
    # Untrained models may have losses that a sweep calls diverged.
    went_on = ended.code == 0 or " is diverged: " in ended.text
    case.expect(went_on, "does not go on", "a sweep that was killed", ended)
    found = compare(workdir / "a", subject.whole)
    case.expect(found.code == 0, "difference", "a sweep that was killed", found)
    case.count("runs compared")
