"""Reads from the newest checkpoint of a run what the run has saved there."""

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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

__all__ = ["SAVED_ROWS", "Restored", "mend_rows", "restore", "restore_from"]

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


class Restored(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        algorithm: The algorithm that the state belongs to.
        state: The agents' state, on the devices.
        totals: What the steps of an unfinished round or epoch have added up; None if
            the checkpoint was saved between two.
        record: How far the run had come; see `_run_progress.Progress`.
    """

    algorithm: Algorithm
    state: State
    totals: Any | None
    record: dict[str, Any]


def restore_from(
    experiment: Experiment, directory: Path, round: int | None = None
) -> Restored | None:
    """Reads the newest checkpoint of a directory, as `restore`.

    A run may be saving checkpoints there, and removing older ones. If the one that is
    being read may have been removed, the newest one is looked for again.

    Args:
        experiment: The run's experiment.
        directory: The directory of its checkpoints.
        round: The round at whose end the checkpoint was saved; 0 for the end of
            pre-training. None: any checkpoint will do.

    Raises:
        CheckpointError: There is no checkpoint of this round, or none can be used.
    """
    while True:
        before = _checkpoint_names(directory)
        if round is None:
            checkpoints = Checkpoints(directory, create=False)
        else:
            epochs = experiment.config.pretrain.epochs
            checkpoints = _OfRound(directory, round, epochs)
        try:
            return restore(experiment, checkpoints)
        except Exception:
            # A run removes a checkpoint only after it has saved a newer one.
            if _checkpoint_names(directory) <= before:
                raise
        finally:
            checkpoints.close()


class _OfRound(Checkpoints):
    """The checkpoints of a directory that were saved at the end of a round.

    Args:
        directory: The directory, which stays as it is.
        round: The round; 0 for the end of pre-training.
        epochs: The number of epochs of pre-training.
    """

    def __init__(self, directory: Path, round: int, epochs: int):
        super().__init__(directory, create=False)
        self._round, self._epochs = round, epochs

    def _numbers(self) -> list[int]:
        rounds = {number: self._ended(number) for number in super()._numbers()}
        found = [number for number, ended in rounds.items() if ended == self._round]
        if not found:
            there = sorted({ended for ended in rounds.values() if ended is not None})
            listed = ", ".join(map(str, there)) or "none"
            raise CheckpointError(
                f"{self} holds no checkpoint of the end of round {self._round}; there "
                f"are these rounds: {listed}. Runs keep the newest checkpoints, and "
                "those that checkpoint.keep_every names"
            )
        return found

    def _ended(self, number: int) -> int | None:
        """The round at whose end a checkpoint was saved; None within one."""
        path = self._directory / str(number) / "record" / "metadata"
        try:
            record = json.loads(path.read_bytes())
            at_an_end = not record.get("within") and record["epoch"] >= self._epochs
            return record["round"] if at_an_end else None
        except (OSError, ValueError, LookupError):
            return None  # It is damaged, or was removed just now.


def _checkpoint_names(directory: Path) -> set[str]:
    """The names of a directory's checkpoints that are complete."""
    return {path.name for path in directory.glob("*") if path.name.isdecimal()}


def restore(experiment: Experiment, checkpoints: Checkpoints) -> Restored | None:
    """The content of the newest checkpoint; None if there is none.

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
    return Restored(algorithm_of(record), tree, totals, record)
