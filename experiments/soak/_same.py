"""Whether two runs have come to the same files, bit by bit."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dimat_jax._checkpoint import Checkpoints
from dimat_jax._metrics import read_rows
from dimat_jax.tree import flatten
from experiments.soak._children import Ended, call

__all__ = ["compare", "differences", "final_state"]

# What differs between two runs of the same config: when things happened, and where.
_OWN = ("layout", "device", "versions")


def compare(workdir: Path, whole: Path) -> Ended:
    """Compares two finished runs in a child; its exit code is 0 if they are equal."""

    def look() -> None:
        found = differences(workdir, whole)
        print("\n".join(found))
        raise SystemExit(1 if found else 0)

    return call(look, whole.parent)


def differences(workdir: Path, whole: Path) -> list[str]:
    """Names what differs between two finished runs. It may start JAX."""
    found = []
    for what, read in (
        ("rows", read_rows),
        ("summary", lambda path: json.loads((path / "summary.json").read_text())),
    ):
        ours, theirs = _timeless(read(workdir)), _timeless(read(whole))
        if ours != theirs:
            found.append(f"{what}: {_first_difference(ours, theirs)}")
    ours, theirs = final_state(workdir), final_state(whole)
    if ours.keys() != theirs.keys():
        found.append(f"leaves: {sorted(ours.keys() ^ theirs.keys())}")
    found += [
        f"array {path}"
        for path in ours.keys() & theirs.keys()
        if ours[path].dtype != theirs[path].dtype
        or ours[path].shape != theirs[path].shape
        or ours[path].tobytes() != theirs[path].tobytes()
    ]
    return found


def final_state(workdir: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a run's newest checkpoint, by their paths.

    Devices that hold too few agents are filled up with copies, which differ.
    """
    summary = json.loads((workdir / "summary.json").read_text())
    n_agents, directory = len(summary["test_accuracy"]), workdir / "checkpoints"
    checkpoints = Checkpoints(directory, create=False)
    handler: Any = ocp.StandardCheckpointHandler()
    try:
        tree = handler.metadata(directory / str(checkpoints.newest()) / "tree").tree
        like = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)
        restored = checkpoints.restore(lambda record: like)
    finally:
        handler.close()
        checkpoints.close()
    assert restored is not None
    arrays = {path: np.asarray(leaf) for path, leaf in flatten(restored[0]).items()}
    return {path: x[:n_agents] if x.ndim else x for path, x in arrays.items()}


def _timeless(value: Any) -> Any:
    """The value without what may differ between two runs of a config."""
    if isinstance(value, dict):
        return {
            name: _timeless(item)
            for name, item in value.items()
            if "seconds" not in name and name not in _OWN
        }
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def _first_difference(ours: Any, theirs: Any, path: str = "") -> str:
    """Where two values differ first, and how."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                return _first_difference(
                    ours.get(name), theirs.get(name), f"{path}/{name}"
                )
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            if pair[0] != pair[1]:
                return _first_difference(*pair, f"{path}/{number}")
    return f"{path} is {ours!r} instead of {theirs!r}"
