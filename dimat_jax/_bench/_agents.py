"""The agents that a benchmark merges: trained ones from files, or untrained ones."""

from pathlib import Path

import numpy as np
from flax.traverse_util import unflatten_dict

from dimat_jax import workdir
from dimat_jax.algorithms.base import Variables
from dimat_jax.errors import UserError
from dimat_jax.experiment import Experiment
from dimat_jax.models.torch_import import from_torch
from dimat_jax.tree import flatten, stack

__all__ = ["agents_of"]

# The endings of PyTorch files.
_TORCH = (".pth", ".pt", ".safetensors")


def agents_of(experiment: Experiment, path: str) -> Variables:
    """Returns the stacked variables of an experiment's agents, on the devices.

    Args:
        experiment: the experiment whose model and number of agents they must fit.
        path: the workdir of a run; a folder with one PyTorch file for each agent; an
            `.npz` file of arrays `[agents, ...]` by the path of their leaf, as
            "params/head/bias"; or "" for untrained agents.

    Raises:
        UserError: the agents cannot be read, or they do not fit.
    """
    if not path:
        return experiment.initial_variables()
    found = flatten(_read(Path(path), experiment.config.model.name))
    # Abstract variables have a row for each slot, and files have one for each agent.
    n_agents = experiment.placement.n_agents
    expected = {
        leaf: (n_agents, *x.shape[1:])
        for leaf, x in flatten(experiment.abstract_variables()).items()
    }
    for leaf in sorted(expected.keys() | found.keys()):
        if leaf not in found or leaf not in expected:
            lacking = "the agents lack" if leaf in expected else "the model lacks"
            raise UserError(f"--agents={path}: {lacking} {leaf}")
        if found[leaf].shape != expected[leaf]:
            raise UserError(
                f"--agents={path}: {leaf} is of shape {found[leaf].shape}; the "
                f"config's agents need {expected[leaf]}"
            )
    return experiment.placement.put(unflatten_dict(found, sep="/"))


def _read(path: Path, model: str) -> Variables:
    if path.suffix == ".npz" and path.is_file():
        with np.load(path) as arrays:
            return unflatten_dict(dict(arrays), sep="/")
    if (path / "config.json").is_file():
        return workdir.load_agents(path)[1]
    files = [file for file in _files_in(path) if file.suffix in _TORCH]
    if not files:
        raise UserError(
            f"--agents={path} is neither an .npz file, nor the workdir of a run, nor a "
            f"folder with PyTorch files ({', '.join(_TORCH)})"
        )
    return stack([from_torch(model, file) for file in files])


def _files_in(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else []
