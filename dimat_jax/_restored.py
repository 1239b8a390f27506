"""Reads from the newest checkpoint of a run what the run has saved there."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from dimat_jax._checkpoint import CheckpointError, Checkpoints
from dimat_jax._metrics import MetricsError, read_rows, restore_rows
from dimat_jax._slots import refill, with_sharding
from dimat_jax.algorithms import Algorithm
from dimat_jax.algorithms.base import State
from dimat_jax.errors import reading
from dimat_jax.experiment import Experiment
from dimat_jax.tree import PyTree

__all__ = ["SAVED_ROWS", "mend_rows", "restore"]

SAVED_ROWS = "rows.jsonl.gz"
"""The file of a checkpoint that holds the rows of the run."""


def mend_rows(workdir: Path) -> bool:
    """Restores the rows of a run that has finished, if they are damaged.

    Returns:
        Whether they were damaged.

    Raises:
        UserError: They are damaged, and no checkpoint holds them.
    """
    try:
        read_rows(workdir)
        return False
    except MetricsError:
        saved = Checkpoints(workdir / "checkpoints", create=False).read_attached(
            SAVED_ROWS
        )
        if saved is None:
            raise
    restore_rows(workdir, saved)
    return True


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
