"""Exports a model of a run: the average of its agents, or one of them.

    dimat_jax.export_model("runs/digits", "average.safetensors")
    dimat_jax.export_model("runs/digits", "agent2", agent=2, round=10)

A path that ends in .safetensors becomes a file of that format: with the names and the
layout that PyTorch code uses (see `models.to_torch`) for the architectures that
PyTorch's code knows, and otherwise with the paths of the leaves, as
"params.Dense_0.kernel". Any other path becomes a folder with an Orbax checkpoint, in
DIR/model/0/tree. `dimat merge` and the option `init_from` read both, but for files of
architectures that PyTorch's code does not know.
"""

import os
import shutil
import uuid
from pathlib import Path

import jax
import numpy as np

from dimat_jax._folders import check_output, check_output_file
from dimat_jax._loaded_run import (
    experiment_of,
    load_weights,
    restored_of,
)
from dimat_jax._measuring import average_model
from dimat_jax._model_files import of_experiment
from dimat_jax._run_folder import Workdir
from dimat_jax.algorithms._common_frame import frames_of
from dimat_jax.errors import UserError
from dimat_jax.models import _saved
from dimat_jax.models._saved import SavedModel
from dimat_jax.models._torch_files import save_safetensors
from dimat_jax.models.torch_import import ARCHITECTURES, to_torch
from dimat_jax.tree import flatten, take

__all__ = ["export_model"]

_FILE = ".safetensors"


def export_model(
    workdir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    agent: int | None = None,
    round: int | None = None,
    data_dir: str | None = None,
) -> Path:
    """Writes the average of a run's agents, or one of them, for use elsewhere.

    The average is the one that the run measures (`test_accuracy_average_model`): the
    agents are aligned first if the algorithm aligns them, and BatchNorm statistics are
    measured anew as the run does. So it may need the run's data. An agent needs none.

    Args:
        workdir: The run's folder.
        out: The file or the folder to write, which must not exist. See the module.
        agent: The number of the agent; None for the average.
        round: The round after which the agents are taken; 0 for the end of
            pre-training. By default they are those of the newest checkpoint.
        data_dir: Where the run's data are now, if they have moved.

    Returns:
        The path of what was written.

    Raises:
        UserError: The run cannot be read, lacks this round or agent, or needs data that
            are missing; or `out` cannot be written.
    """
    path = _checked(out)
    if agent is None:
        model = _average(workdir, round, data_dir)
    else:
        experiment, agents = load_weights(workdir, data_dir, round)
        n_agents = experiment.placement.n_agents
        if not 0 <= agent < n_agents:
            raise UserError(
                f"there is no agent {agent}; the run has 0 to {n_agents - 1}"
            )
        model = of_experiment(experiment, take(agents, agent))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == _FILE:
        save_safetensors(path, _arrays(model))
    else:
        _write_folder(path, model)
    return path


def _checked(out: str | os.PathLike[str]) -> Path:
    """Refuses a place that cannot be written, before anything is computed."""
    path = Path(out)
    if path.suffix == _FILE:
        check_output_file(out, "out")
    elif path.suffix in (".pt", ".pth", ".msgpack", ".npz", ".bin", ".ckpt"):
        raise UserError(f"out={out} must end in {_FILE}, or be a folder")
    else:
        check_output(out, "out")
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise UserError(f"out={out} exists already; choose a new file or folder")
    return path


def _average(
    workdir: str | os.PathLike[str], round: int | None, data_dir: str | None
) -> SavedModel:
    """The average of a run's agents, as the run measures it."""
    folder = Workdir(workdir)
    experiment = experiment_of(folder, data_dir)
    restored = restored_of(folder, experiment, round)
    frames = frames_of(restored.record.get("frames"), experiment.placement)
    variables = restored.algorithm.variables(restored.state)
    number = restored.record["round"]
    average = average_model(experiment, variables, frames, number)
    return of_experiment(experiment, average)


def _arrays(model: SavedModel) -> dict[str, np.ndarray]:
    """The arrays of a .safetensors file, by name."""
    if model.name in ARCHITECTURES:
        return to_torch(model.name, model.variables)
    leaves = flatten(model.variables).items()
    return {path.replace("/", "."): np.array(leaf, order="C") for path, leaf in leaves}


def _write_folder(path: Path, model: SavedModel) -> None:
    """Writes an Orbax checkpoint. A crash leaves the whole folder or none."""
    partial = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    variables = jax.tree.map(np.asarray, model.variables)
    try:
        _saved.save(partial / "model", model._replace(variables=variables))
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
