"""Damaged files of runs: they are named, and never used in silence."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from dimat_jax.workdir import load_agents
from experiments.soak._cases import Case
from experiments.soak._children import Child, Ended
from experiments.soak._runs import MOST_SECONDS, Subject, killed_at_random, prepare
from experiments.soak._same import compare

__all__ = ["damage", "damage_of_shared_agents"]


def _flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _truncate(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def _extend(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 100)))


def _zero(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    content[start : start + 4096] = bytes(len(content[start : start + 4096]))
    path.write_bytes(content)


def _scramble(path: Path, rng: random.Random) -> None:
    """Lines that are doubled, missing or in another order."""
    lines = path.read_bytes().splitlines(keepends=True)
    at = rng.randrange(len(lines))
    changes = (
        lines[: at + 1] + lines[at:],
        lines[:at] + lines[at + 1 :],
        lines[at:] + lines[:at],
    )
    # Another order of a single line is no damage.
    changed = rng.choice([change for change in changes if change != lines])
    path.write_bytes(b"".join(changed))


def _become_a_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()
    (path / "photo.png").write_bytes(rng.randbytes(10))


KINDS: dict[str, Callable[[Path, random.Random], object]] = {
    "a flipped bit": _flip,
    "a truncated file": _truncate,
    "an extended file": _extend,
    "an emptied file": lambda path, rng: path.write_bytes(b""),
    "a block of zeros": _zero,
    "lines in disorder": _scramble,
    "a missing file": lambda path, rng: path.unlink(),
    "a folder instead of a file": _become_a_folder,
}
# A flipped bit is the damage that is most often used in silence.
_WEIGHTS = (4, 2, 1, 1, 1, 1, 2, 1)
# What no later command reads: TensorBoard's own files, the files that Orbax writes
# after the digests, and the lock, which the next process writes anew.
_UNREAD = ("events.out.", "_CHECKPOINT_METADATA", "commit_success.txt", ".running")


def damage(case: Case) -> None:
    """Files of an interrupted or finished run are damaged, one after the other."""
    subject, rng = prepare(case), case.rng
    workdir = case.folder / "run"
    if rng.random() < 0.25:
        subject.finish(workdir, "a second run")
    else:
        for _ in range(20):
            if not killed_at_random(subject, workdir):
                shutil.rmtree(workdir)
            elif _numbers(workdir):
                break
    for number in range(3):
        copy = case.folder / f"damaged-{number}"
        shutil.copytree(workdir, copy)
        _damage_one(subject, copy)
        shutil.rmtree(copy)
    subject.finish(workdir, "a run whose copies were damaged")


def _numbers(workdir: Path) -> list[int]:
    """The numbers of a run's checkpoints, the newest one first."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def _damage_one(subject: Subject, copy: Path) -> None:
    """Damages one thing in a copy of a run's folder, and lets the run go on there."""
    case, numbers = subject.case, _numbers(copy)
    # A finished run does not read its checkpoints, but others may load its agents.
    is_finished = (copy / "summary.json").exists()
    if numbers and case.rng.random() < 0.15:
        what = _foreign_folder(copy, numbers[0], case.rng)
        names = [f"heckpoint {numbers[0] + 1} in", "nothing needs it"]
    else:
        path, what = _damage_a_file(copy, numbers, case.rng)
        names = _names_of(path.relative_to(copy), numbers)
    before = _files(copy)
    if is_finished and "checkpoints/" in what:
        _judge_loaded(subject, copy, what, names)
    else:
        ended = subject.start(copy).wait()
        _judge(subject, copy, what, names, ended, before)


def _damage_a_file(
    copy: Path, numbers: list[int], rng: random.Random
) -> tuple[Path, str]:
    """Damages a random file; the newest checkpoint's are chosen most often."""
    places = [copy / "checkpoints" / str(number) for number in numbers]
    places += [copy] * 2 if places else [copy]
    place = places[0] if rng.random() < 0.4 else rng.choice(places)
    found = place.glob("*") if place == copy else place.rglob("*")
    paths = sorted(path for path in found if path.is_file())
    path = rng.choice([path for path in paths if path.name != ".running"])
    (kind,) = rng.choices(list(KINDS), _WEIGHTS)
    if not path.stat().st_size:
        kind = "a missing file"
    KINDS[kind](path, rng)
    return path, f"{kind}: {path.relative_to(copy)}"


def _foreign_folder(copy: Path, newest: int, rng: random.Random) -> str:
    """Puts something that is no checkpoint in the place of the next one."""
    path = copy / "checkpoints" / str(newest + 1)
    kind = rng.choice(("an empty folder", "a foreign folder", "a file", "half of one"))
    if kind == "a file":
        path.write_bytes(rng.randbytes(10))
    elif kind == "half of one":
        shutil.copytree(path.with_name(str(newest)), path)
        paths = sorted(each for each in path.rglob("*") if each.is_file())
        for each in rng.sample(paths, len(paths) // 2):
            each.unlink()
    else:
        path.mkdir()
        if kind == "a foreign folder":
            (path / "photo.png").write_bytes(rng.randbytes(10))
    return f"{kind} instead of a checkpoint"


def _names_of(path: Path, numbers: list[int]) -> list[str]:
    """Texts, one of which a message about a damaged file contains."""
    parts = path.parts
    if parts[0] == "checkpoints":
        number = int(parts[1])
        is_last = path.name in _UNREAD or number != numbers[0]
        return [f"heckpoint {number} in", *["nothing needs it"] * is_last]
    if path.name == "digests.json":
        # Without it nothing is verified, as in the folder of an older version.
        return ["digests.json", "nothing needs it"]
    is_unread = path.name.startswith(_UNREAD)
    if path.name.startswith("metrics."):
        # Rows after the last checkpoint are written again.
        return [path.name, "its rows were", "nothing needs it"]
    return [path.name, *["nothing needs it"] * is_unread]


def _files(folder: Path) -> dict[str, int]:
    """The sizes of all files, but for those of the lock."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".running")
    }


def _judge(
    subject: Subject,
    copy: Path,
    what: str,
    names: list[str],
    ended: Ended,
    before: dict[str, int],
) -> None:
    """Expects that damage was named, and changed no result."""
    case = subject.case
    is_named = any(name in ended.text for name in names)
    if ended.code == 2:
        case.expect_message(what, ended, MOST_SECONDS)
        case.expect(is_named, "not named", what, ended)
        case.expect(_files(copy) == before, "deleted", what, ended)
        case.count("damage refused with its name")
    else:
        case.expect("Traceback" not in ended.text, "traceback", what, ended)
        case.expect(ended.code == 0, "exit code", what, ended)
        found = compare(copy, subject.whole)
        kind = "difference" if is_named else "silent use"
        text = f"{what}; it said: {ended.text[-1000:]}"
        case.expect(found.code == 0, kind, text, found)
        _count_silence(case, what, names, is_named, ended)
    case.count("damages")


def _count_silence(
    case: Case, what: str, names: list[str], is_named: bool, ended: Ended
) -> None:
    """Counts damage after which the results are right, by whether it was named."""
    if is_named:
        case.count("damage named and mended")
    else:
        case.expect("nothing needs it" in names, "not named", what, ended)
        case.count("damage to what nothing reads")


def _judge_loaded(subject: Subject, copy: Path, what: str, names: list[str]) -> None:
    """Expects that agents of a damaged checkpoint are not loaded in silence."""
    case = subject.case

    def load() -> None:
        load_agents(copy)

    ended = Child(load, case.folder).wait()
    is_named = any(name in ended.text for name in names)
    refused = "CheckpointError: none of the checkpoints" in ended.text
    case.expect(ended.code == 0 or refused, "exit code", what, ended)
    _count_silence(case, what, names, is_named or refused, ended)
    case.count("damages")


def damage_of_shared_agents(case: Case) -> None:
    """Pre-trained agents that runs share are damaged, and trained again."""
    shared = case.folder / "shared"
    subject = prepare(case, pretrain__cache_dir=str(shared), pretrain__epochs=1)
    entries = [path for path in shared.iterdir() if path.is_dir()]
    case.count("damages")
    for number in range(2):
        files = sorted(path for path in entries[0].rglob("*") if path.is_file())
        path = case.rng.choice(files)
        (kind,) = case.rng.choices(list(KINDS), _WEIGHTS)
        if not path.stat().st_size:
            kind = "a missing file"
        KINDS[kind](path, case.rng)
        what = f"{kind}: shared/{path.relative_to(shared)}"
        workdir = case.folder / f"next-{number}"
        ended = subject.start(workdir).wait()
        case.expect(ended.code == 0, "does not go on", what, ended)
        subject.expect_same(workdir, what)
        names = ["cannot be used", *["nothing needs it"] * (path.name in _UNREAD)]
        _count_silence(case, what, names, names[0] in ended.text, ended)
        case.count("damages")
