"""Packs what a machine without network needs, in folders of limited size.

    python -m experiments.device.pack --data_dir=DATA [--out=build/device]

OUT/wheels receives those Python packages that such a machine usually lacks. The folders
OUT/data-0, OUT/data-1, ... receive CIFAR-100, without loss, in parts that can be copied
one by one. `python -m experiments.device.unpack` makes a data folder of the parts.
"""

import argparse
import hashlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dimat_jax.data import sources
from experiments.device import _images

__all__ = ["WHEELS", "pack_data", "pack_wheels"]

WHEELS = ("beartype", "ml_collections", "tensorboardX")
"""What this project needs beside the packages that come with JAX and Flax.

An image for JAX has NumPy, SciPy, pandas, matplotlib, scikit-learn, Pillow, networkx,
tqdm, tabulate, PyYAML and protobuf, but not these. tfds is not needed, since the
unpacked data are arrays.
"""

PART_MIB = 50
"""The size of a part in MiB, so that a part, the code and the wheels fit in 60 MiB."""

_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def pack_wheels(out: Path, python: str) -> None:
    """Downloads the wheels, in the versions of this environment.

    Args:
        out: the folder for the wheels.
        python: the version of Python on the other machine, as "3.12".
    """
    names = [f"{name}=={importlib.metadata.version(name)}" for name in WHEELS]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation=cp"]
    command += [f"--python-version={python}", f"--dest={out}"]
    command += [f"--platform={platform}" for platform in _PLATFORMS]
    subprocess.run([*command, *names], check=True)


def pack_data(dataset: sources.Dataset, out: Path, part_bytes: int) -> list[Path]:
    """Writes a data set to folders of limited size.

    Returns:
        The folders data-0, data-1, ... below `out`. The first one holds the labels and
        `data.json`, which says what the whole consists of.
    """
    blocks: list[tuple[str, bytes]] = []
    facts: dict = {"name": dataset.name, "n_classes": dataset.n_classes}
    facts |= {"class_names": dataset.class_names, "splits": {}}
    for split in ("train", "test"):
        images, labels = getattr(dataset, split)
        coded = _images.encode(np.asarray(images))
        named = [(f"{split}-{i:04d}.webp", block) for i, block in enumerate(coded)]
        blocks += named
        facts["splits"][split] = {
            "blocks": [name for name, _ in named],
            "height": images.shape[1],
            "labels": np.asarray(labels).tolist(),
            "sha256": hashlib.sha256(np.ascontiguousarray(images).data).hexdigest(),
        }
    first = json.dumps(facts).encode()
    parts: list[list[tuple[str, bytes]]] = [[("data.json", first)]]
    for name, block in blocks:
        size = sum(len(content) for _, content in parts[-1])
        if size + len(block) > part_bytes:
            parts.append([])
        parts[-1].append((name, block))
    return [_write(out / f"data-{i}", part) for i, part in enumerate(parts)]


def _write(folder: Path, files: Sequence[tuple[str, bytes]]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files:
        (folder / name).write_bytes(content)
    return folder


def main() -> None:
    """Packs everything, and prints the sizes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", help="tfds's data folder; by default, its own")
    parser.add_argument("--out", type=Path, default=Path("build/device"))
    parser.add_argument("--part_mib", type=int, default=PART_MIB)
    parser.add_argument("--python", default="3.12", help="Python of the other machine")
    options = parser.parse_args()
    for old in [options.out / "wheels", *options.out.glob("data-*")]:
        shutil.rmtree(old, ignore_errors=True)
    dataset = sources.load("cifar100", directory=options.data_dir)
    pack_data(dataset, options.out, options.part_mib * 2**20)
    pack_wheels(options.out / "wheels", options.python)
    for folder in sorted(options.out.iterdir()):
        size = sum(file.stat().st_size for file in folder.rglob("*"))
        print(f"{size / 2**20:6.1f} MiB  {folder}")


if __name__ == "__main__":
    main()
