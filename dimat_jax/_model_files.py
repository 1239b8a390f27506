"""Reads trained models from runs, from earlier merges, and from PyTorch files."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from dimat_jax._loaded_run import load_weights
from dimat_jax.algorithms.base import Variables
from dimat_jax.config import Config, fields_of, model_arguments
from dimat_jax.data.sources import SOURCES
from dimat_jax.errors import UserError, reading
from dimat_jax.experiment import Experiment
from dimat_jax.models import _saved
from dimat_jax.models._saved import SavedModel
from dimat_jax.models._torch_files import ENDINGS, is_torch_file
from dimat_jax.models.torch_import import (
    from_torch,
    infer_arguments,
    infer_image_shape,
)
from dimat_jax.tree import take

__all__ = [
    "ReadFile",
    "agent_of",
    "located",
    "of_experiment",
    "read",
    "read_agents",
    "refuse_another",
    "torch_reader",
]


ReadFile = Callable[[Path], SavedModel]
"""Reads a model from a file, or from a folder that is neither a run nor a merge."""


def read(
    names: Sequence[str],
    data_dir: str | None,
    read_file: ReadFile,
    *,
    only_files: bool = False,
    one_data_set: bool = False,
) -> tuple[list[SavedModel], str | None]:
    """Reads models.

    Args:
        names: the models' names. Each is the workdir of a run (DIR:2 is its agent 2,
            DIR its agent 0; DIR@10 and DIR@10:2 are these at the end of round 10), the
            folder of a merge or of an export, or a file.
        data_dir: the folder of the runs' data, if it is no longer the one in their
            configs.
        read_file: reads the models that are files; see `torch_reader`.
        only_files: whether all models are files.
        one_data_set: whether runs on different data of the user's own are refused,
            unless `data_dir` is given. Their sources have the same name, but not the
            same data; see `Source.dir_is_data`.

    Returns:
        the models, and the folder of the data, if it is given or a run names it.

    Raises:
        UserError: a model cannot be read; the message names it and says why. Or runs
            are on different data; the message names both folders.
    """

    directories = [data_dir]
    own: dict[str, Config] = {}

    @functools.cache  # Several models may be agents of the same run.
    def load_agents(workdir: Path, round: int | None):
        experiment, agents = load_weights(workdir, data_dir, round)
        config = experiment.config
        directories.append(config.data.dir)
        if SOURCES[config.data.name].dir_is_data:
            own[str(workdir)] = config
        return experiment, agents

    def read_one(name: str) -> SavedModel:
        path, round, agent = located(name)
        if not path.exists():
            raise UserError("there is no such file or folder")
        if only_files:
            return read_file(path)
        if (path / "config.json").exists():
            return agent_of(*load_agents(path, round), agent or 0)
        if agent is not None or round is not None:
            raise UserError(
                f"{path} is no run; only runs have agents and rounds to choose from"
            )
        if (path / "model").is_dir():
            return _saved.load(path / "model")
        if path.is_file() or is_torch_file(path):
            return read_file(path)
        raise UserError(
            "neither the workdir of a run (no config.json) nor of a merge (no model/), "
            f"nor a PyTorch file ({', '.join(ENDINGS)})"
        )

    models = []
    for name in names:
        try:
            with reading(name):
                models.append(read_one(name))
        except UserError as error:
            where = "" if name in str(error) else f"{name}: "
            raise UserError(f"{where}{error}") from error
    if one_data_set and data_dir is None:
        _refuse_other_data(own)
    return models, next(filter(None, directories), None)


def _refuse_other_data(runs: Mapping[str, Config]) -> None:
    """Refuses runs whose folders of data differ; see `read`."""

    def folder(directory: str) -> Path | str:
        return Path(directory).expanduser().resolve() if directory else ""

    first_name = next(iter(runs), "")
    for name, config in runs.items():
        first, data = runs[first_name].data, config.data
        if data.name == first.name and folder(data.dir) != folder(first.dir):
            raise UserError(
                f"{first_name} was trained on the data in {first.dir!r}, and {name} on "
                f"those in {data.dir!r}; choose the data for all models with "
                "--data_dir"
            )


def torch_reader(
    architecture: str | None,
    entry: tuple[str, ...] | None = None,
    prefix: str | None = None,
) -> ReadFile:
    """Reads PyTorch files. They name no data set, so this field of the models is empty.

    Args:
        architecture: the name of the models' architecture.
        entry: where the weights are in a file; see `from_torch`.
        prefix: what the keys of the weights begin with; see `from_torch`.

    Returns:
        a function that raises `UserError` if a file cannot be read, or if there is no
        architecture.
    """

    def read_file(path: Path) -> SavedModel:
        if not is_torch_file(path):
            raise UserError(f"a PyTorch file ends in one of {', '.join(ENDINGS)}")
        if architecture is None:
            raise UserError("--model must say which architecture a PyTorch file holds")
        variables = from_torch(architecture, path, entry=entry, prefix=prefix)
        arguments = {**infer_arguments(architecture, variables), "dtype": "float32"}
        shape = infer_image_shape(architecture, variables)
        return SavedModel(architecture, arguments, shape, None, variables)

    return read_file


def read_agents(name: str) -> list[SavedModel]:
    """Reads all agents of a run: DIR, or DIR@10 at the end of round 10.

    Raises:
        UserError: they cannot be read.
    """
    path, round, _ = located(name)
    with reading(name):
        experiment, agents = load_weights(path, None, round)
    n_agents = experiment.placement.n_agents
    return [agent_of(experiment, agents, number) for number in range(n_agents)]


def located(name: str) -> tuple[Path, int | None, int | None]:
    """The path in a model's name, and the round and the agent that it chooses."""
    path = Path(name)
    if path.exists() or not (
        found := re.fullmatch(r"(.+?)(?:@(\d+))?(?::(\d+))?", name)
    ):
        return path, None, None
    round, agent = (None if n is None else int(n) for n in found.groups()[1:])
    return Path(found[1]), round, agent


def agent_of(experiment: Experiment, agents: Any, number: int) -> SavedModel:
    n_agents = experiment.placement.n_agents
    if number >= n_agents:
        raise UserError(f"there is no agent {number}; the run has 0 to {n_agents - 1}")
    return of_experiment(experiment, take(agents, number))


def of_experiment(experiment: Experiment, variables: Variables) -> SavedModel:
    """Describes the model that the agents of an experiment train.

    Args:
        experiment: the experiment, with its data or without them.
        variables: one agent's variables.
    """
    arguments = model_arguments(fields_of(experiment.config))
    if "dtype" in arguments:
        arguments["dtype"] = jnp.dtype(arguments["dtype"]).name
    return SavedModel(
        name=experiment.config.model.name,
        arguments={"n_classes": experiment.n_classes, **arguments},
        input_shape=experiment.signature.input_shape,
        data=experiment.config.data.name,
        variables=variables,
        input_dtype=experiment.signature.input_dtype,
    )


def refuse_another(
    first_name: str, first: SavedModel, name: str, model: SavedModel
) -> None:
    """Refuses models of different architectures.

    Raises:
        UserError: the message names the two, and the setting in which they differ.
    """
    expected, found = _architecture(first), _architecture(model)
    for field in [*expected, *found]:
        if expected.get(field) != found.get(field):
            raise UserError(
                f"{first_name} and {name} are of different architectures: {field} is "
                f"{expected.get(field)} and {found.get(field)}"
            )


def _architecture(model: SavedModel) -> dict[str, Any]:
    """Returns the settings on which a model's variables and outputs depend."""
    module = model.module
    fields = {
        field.name: getattr(module, field.name)
        for field in dataclasses.fields(module)
        if field.name not in ("parent", "name", "dtype", "bn_momentum")
    }
    return {"model": model.name, **fields}
