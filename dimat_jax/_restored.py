"""Reads from the newest checkpoint of a run what the run has saved there."""

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dimat_jax._checkpoint import CheckpointError, Checkpoints
from dimat_jax._lock import held
from dimat_jax._metrics import MetricsError, read_rows, restore_rows
from dimat_jax._slots import refill, with_sharding
from dimat_jax.algorithms import Algorithm
from dimat_jax.algorithms.base import State
from dimat_jax.errors import reading
from dimat_jax.experiment import Experiment
from dimat_jax.tree import PyTree

__all__ = ["SAVED_ROWS", "mend_rows", "restore", "restore_from"]

SAVED_ROWS = "rows.jsonl.gz"
"""The file of a checkpoint that holds the rows of the run."""


def mend_rows(
    workdir: Path, summary: Mapping[str, Any], log: Callable[[str], None]
) -> bool:
    """Restores the rows of a run that has finished, if they are damaged.

    Only rows that end as the run did are restored: if its last checkpoint is damaged
    too, an older one lacks the last rows.

    Args:
        workdir: The run's folder. It is locked only if there is something to restore.
        summary: The content of summary.json.
        log: A function that receives a line of text if the lock of a process that has
            died is taken over.

    Returns:
        Whether they were damaged.

    Raises:
        UserError: They are damaged, and no checkpoint holds all of them; or another
            process works in the folder.
    """
    try:
        read_rows(workdir)
        return False
    except MetricsError:
        pass
    with held(workdir, log):
        try:
            # Another process may have restored them before the lock was taken.
            read_rows(workdir)
        except MetricsError:
            checkpoints = Checkpoints(workdir / "checkpoints", create=False)
            saved = checkpoints.read_attached(SAVED_ROWS)
            if saved is None or not _is_last(saved, summary):
                raise
            restore_rows(workdir, saved)
    return True


def _is_last(saved: bytes, summary: Mapping[str, Any]) -> bool:
    """Whether the saved rows end with the row from which a summary was made."""
    lines = gzip.decompress(saved).splitlines()
    last = json.loads(lines[-1]) if lines else {}
    return all(last.get(name) == summary.get(name) for name in ("round", "phase"))


def restore_from(
    experiment: Experiment, directory: Path
) -> tuple[Algorithm, State, Any | None] | None:
    """Reads the newest checkpoint of a directory, as `restore`.

    A run may be saving checkpoints there, and removing older ones. If the one that is
    being read may have been removed, the newest one is looked for again.
    """
    while True:
        before = _checkpoint_names(directory)
        checkpoints = Checkpoints(directory, create=False)
        try:
            return restore(experiment, checkpoints)
        except Exception:
            # A run removes a checkpoint only after it has saved a newer one.
            if _checkpoint_names(directory) <= before:
                raise
        finally:
            checkpoints.close()


def _checkpoint_names(directory: Path) -> set[str]:
    """The names of a directory's checkpoints that are complete."""
    return {path.name for path in directory.glob("*") if path.name.isdecimal()}


def restore(
    experiment: Experiment, checkpoints: Checkpoints
) -> tuple[Algorithm, State, Any | None] | None:
    """The newest checkpoint: the algorithm it belongs to, its state, and its totals.

    The run may have been saved on another number of devices, so that its arrays had
    another number of slots. Older versions saved the agents alone.
    """
    placement = experiment.placement

    def algorithm_of(record: dict[str, Any]) -> Algorithm:
        pretraining = record["epoch"] < experiment.config.pretrain.epochs
        return experiment.pretrain_algorithm if pretraining else experiment.algorithm

    def abstract_state(record: dict[str, Any]) -> PyTree:
        variables = experiment.abstract_variables()
        tree = jax.eval_shape(algorithm_of(record).init, variables)
        if record.get("within"):
            totals = jax.ShapeDtypeStruct((placement.slots, 3), np.float32)
            tree = {"state": tree, "totals": totals}
        return with_sharding(placement, tree)

    with reading(f"the newest checkpoint in {checkpoints}", CheckpointError):
        restored = checkpoints.restore(abstract_state, rows=placement.n_agents)
    if restored is None:
        return None
    tree, record = restored
    tree, totals = refill(placement, tree), None
    if record.get("within"):
        tree, totals = tree["state"], tree["totals"]
    return algorithm_of(record), tree, totals
