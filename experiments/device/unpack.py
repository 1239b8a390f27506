"""Turns packed parts into a data folder that `data.dir` can name.

    python -m experiments.device.unpack PACKED TARGET

PACKED holds the folders data-0, data-1, ... that `pack` has written, all of them. The
images are checked to be the original ones, bit by bit.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path

import numpy as np

from dimat_jax.data._cache import write_arrays
from dimat_jax.data._cifar import ARRAYS
from dimat_jax.data._dataset import Split, make_split
from experiments.device import _images

__all__ = ["unpack"]


def unpack(packed: Path, target: Path) -> Path:
    """Writes a packed data set to `target`, unless it is there.

    Raises:
        FileNotFoundError: a part is missing.
        ValueError: the images are not those that were packed.
    """
    facts = json.loads((packed / "data-0" / "data.json").read_text())
    folder = target / facts["name"] / ARRAYS
    if not folder.exists():
        train, test = (_split(packed, facts["splits"][s]) for s in ("train", "test"))
        names = facts["class_names"]
        write_arrays(folder, (train, test, facts["n_classes"], names and tuple(names)))
    return folder


def _split(packed: Path, facts: dict) -> Split:
    files = {file.name: file for file in packed.glob("data-*/*.webp")}
    missing = [name for name in facts["blocks"] if name not in files]
    if missing:
        raise FileNotFoundError(f"no part in {packed} holds {missing[0]}")
    blocks = [files[name].read_bytes() for name in facts["blocks"]]
    images = _images.decode(blocks, facts["height"])
    if hashlib.sha256(images.data).hexdigest() != facts["sha256"]:
        raise ValueError(f"the images in {packed} are not those that were packed")
    return make_split(images, np.array(facts["labels"]))


def main() -> None:
    """Unpacks, and prints how long it took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packed", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    folder = unpack(options.packed, options.target)
    print(f"{folder}: {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
