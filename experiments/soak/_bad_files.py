"""Files that cannot be used: code, graphs, data sets, and the files of runs."""

import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dimat_jax.config import Config, default_config, drop_unread
from dimat_jax.data._cache import write_arrays
from dimat_jax.data.sources import make_split
from experiments.soak._draws import SMALL, write_config

__all__ = ["draw"]

Bad = tuple[str, list[str]]
"""Words for a bad input, and the command line that has it."""

_NESTED = b"[" * 100_000
# What a file may hold instead of what it should.
_CONTENTS: dict[str, bytes] = {
    "nothing": b"",
    "no text": b"\xff\x00\xfe garbage",
    "a list": b"[]",
    "an object": b"{}",
    "null": b"null",
    "an infinite number": b"1e999",
    "many brackets": _NESTED,
    "many objects": b'{"a":' * 50_000,
    "a text": b'"x"',
    "digits": b"9" * 5000,
    "wrong types": b'{"rounds": "x", "data": 3, "files": 1, "round": [1]}\n',
    "a row of wrong types": b'{"round": 1, "phase": "merged", "step": {}}\n',
}
_CODE = (
    "def get_{kind}(:\n",
    "1 / 0\n",
    "import nowhere_at_all\n",
    "import sys\nsys.exit(0)\n",
    "class E(BaseException): pass\nraise E('x')\n",
    "x = " + "(" * 500 + ")" * 500 + "\n",
    "get_{kind} = 3\n",
    "def get_{kind}(a, b, c): pass\n",
    "def get_{kind}(): return None\n",
    "def get_{kind}(): return {{1: 2}}\n",
    "def get_{kind}(): return {{'a': 3}}\n",
    "def get_{kind}(): return get_{kind}()\n",
    "def get_{kind}(): return 1 / 0\n",
    "def get_{kind}():\n    yield 3\n",
    "class get_{kind}:\n    pass\n",
    "{start}    config.roundz = 3\n    return config\n",
    "{start}    config.rounds = 'many'\n    return config\n",
    "{start}    del config.rounds\n    return config\n",
    "{start}    config.unlock().more = 3\n    return config\n",
    "{start}    config.data = 3\n    return config\n",
)
_START = (
    "from dimat_jax.config import default_config\n\n\ndef get_{kind}():\n"
    "    config = default_config()\n"
)


def draw(folder: Path, rng: random.Random) -> Bad:
    """Makes a random bad file in a folder.

    Args:
        folder: The folder.
        rng: Random numbers.

    Returns:
        Words for what is bad, and the command line.
    """
    return rng.choice(_MAKERS)(folder, rng)


def _config() -> Config:
    config = default_config()
    config.update_from_flattened_dict({**SMALL, "algorithm": "wa"})
    return drop_unread(config)


def _train(folder: Path, **changes: object) -> list[str]:
    """A command line that would train if nothing were wrong."""
    path = write_config(_config(), folder / "config.py", **changes)
    return ["train", f"--config={path}", f"--workdir={folder / 'run'}"]


def _code(folder: Path, rng: random.Random) -> Bad:
    """A config or a sweep whose code cannot run, or returns something else."""
    command, kind = rng.choice((("train", "config"), ("sweep", "runs")))
    code = rng.choice(_CODE).format(kind=kind, start=_START.format(kind=kind))
    path = folder / "code.py"
    path.write_text(code)
    if rng.random() < 0.15:
        path.write_bytes(code.encode() + b"x = 'caf\xe9'\n")
    flag = f"--{'sweep' if kind == 'runs' else 'config'}={path}"
    return f"{kind}: {code[:60]!r}", [command, flag, f"--workdir={folder / 'run'}"]


def _content(rng: random.Random, good: bytes) -> tuple[str, bytes]:
    """Damages the content of a file, or replaces it."""
    kind = rng.choice((*_CONTENTS, "a flipped bit", "half of it"))
    if kind in _CONTENTS:
        return kind, _CONTENTS[kind]
    if kind == "half of it":
        return kind, good[: len(good) // 2]
    changed = bytearray(good)
    changed[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
    return kind, bytes(changed)


def _run_folder(folder: Path, rng: random.Random) -> Bad:
    """A damaged file in the folder of a run that has begun."""
    arguments, run = _train(folder), folder / "run"
    run.mkdir()
    config = _config().to_json().encode()
    (run / "config.json").write_bytes(config)
    name = rng.choice(
        ("config.json", "layout.json", "inputs.json", "metrics.jsonl", "summary.json")
    )
    kind, content = _content(rng, config)
    (run / name).write_bytes(content)
    other = rng.choice((["report", str(run)], ["show", str(run)], ["tune", str(run)]))
    if other[0] == "report":
        other.append(f"--out={folder / 'report'}")
    chosen = arguments if rng.random() < 0.6 else other
    return f"{chosen[0]} with {kind} in {name}", chosen


def _graph(folder: Path, rng: random.Random) -> Bad:
    """A graph that is none."""
    ring = [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
    values = (None, "x", float("nan"), 10**400, -1, [1], {}, 0.5)
    path = folder / rng.choice(("graph.json", "graph.npy", "graph.txt"))
    if path.suffix == ".json" and rng.random() < 0.5:
        ring[rng.randrange(3)][rng.randrange(3)] = rng.choice(values)  # type: ignore[call-overload]
        what, content = "a wrong entry", json.dumps(ring).encode()
    else:
        np.save(folder / "good.npy", np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]]))
        good = (folder / "good.npy").read_bytes()
        if path.suffix == ".json":
            good = json.dumps(ring).encode()
        what, content = _content(rng, good)
    path.write_bytes(content)
    fields = {"topology": "file", "graph__file": str(path)}
    return f"{path.name}: {what}", _train(folder, **fields)


def _arrays(folder: Path, rng: random.Random) -> Bad:
    """A data set of arrays, one of which is damaged or of another shape."""
    place = folder / "data" / "cifar100" / "arrays"

    def split(n: int):
        images = np.zeros((n, 32, 32, 3), np.uint8)
        images += np.arange(n, dtype=np.uint8)[:, None, None, None]
        return make_split(images, np.arange(n, dtype=np.int32) % 100)

    write_arrays(place, (split(200), split(100), 100, None))
    path = rng.choice(sorted(place.rglob("*.npy")))
    others = (
        np.full(200, 1000, np.int32),
        np.full(200, -1, np.int32),
        np.zeros((200, 8, 8, 3), np.uint8),
        np.full(3, np.nan, np.float32),
        np.array(10**12),
        np.array(["a"] * 200),
        np.zeros((0, 32, 32, 3), np.uint8),
    )
    if rng.random() < 0.5:
        array = rng.choice(others)
        np.save(path, array)
        what = f"{array.dtype}{array.shape}"
    else:
        what, content = _content(rng, path.read_bytes())
        path.write_bytes(content)
    fields = {"data__name": "cifar100", "data__dir": str(folder / "data")}
    return f"{path.name}: {what}", _train(folder, **fields)


def _png(width: int, height: int) -> bytes:
    """A PNG that claims to be of some size, and holds a few zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b"")


def _archive(folder: Path, rng: random.Random) -> Bad:
    """A zip of images in which something is damaged."""
    members = {
        "wnids.txt": b"n01\nn02\n",
        "words.txt": b"n01\tcat\nn02\tdog\n",
        "val/val_annotations.txt": b"a.JPEG\tn01\t0\t0\t1\t1\n",
        "val/images/a.JPEG": _png(64, 64),
        "train/n01/images/n01_0.JPEG": _png(64, 64),
        "train/n02/images/n02_0.JPEG": _png(64, 64),
    }
    name = rng.choice(list(members))
    if name.endswith("JPEG"):
        size = rng.choice(((64, 64), (40_000, 40_000), (40_000, 1), (1, 1)))
        what, members[name] = f"an image of {size}", _png(*size)
    else:
        what, members[name] = _content(rng, members[name])
    path = folder / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(f"tiny-imagenet-200/{member}", content)
    if rng.random() < 0.3:
        what, content = _content(rng, path.read_bytes())
        path.write_bytes(content)
    fields = {"data__name": "tiny_imagenet", "data__dir": str(path)}
    fields["data__cache_dir"] = str(folder / "cache")
    return f"{name} in a zip: {what}", _train(folder, **fields)


def _place(folder: Path, rng: random.Random) -> Bad:
    """A folder that cannot be used, or a command line that cannot be read."""
    (folder / "file").touch()
    (folder / "photos").mkdir()
    (folder / "photos" / "me.jpg").touch()
    arguments = _train(folder)
    places = ("", "file", "file/x", "/dev/null/x", "photos", "w" * 300, "a/" * 3000)
    lines: tuple[list[str], ...] = (
        *([*arguments, f"--workdir={place}"] for place in places),
        [*arguments, "--no_such_flag=3"],
        [*arguments, "more", "words"],
        [*arguments, f"--config.{rng.choice(('roundz', 'data', '', 'rounds.x'))}=3"],
        arguments[:1],
        ["no_such_command"],
        ["report"],
        ["report", "nowhere"],
        ["report", "photos"],
        ["show", "nowhere"],
        ["merge", "file", "file", "--out=merged"],
        ["merge", "nowhere", "photos", "--out=merged"],
        ["tune", "nowhere"],
        ["bench", "nothing"],
    )
    chosen = rng.choice(lines)
    return " ".join(chosen[-2:])[-80:], chosen


_MAKERS: tuple[Callable[[Path, random.Random], Bad], ...] = (
    _code,
    _run_folder,
    _graph,
    _arrays,
    _archive,
    _place,
)
