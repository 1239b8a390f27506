"""Loads a run, with its data or without them: its experiment, and its agents."""

import os

from absl import logging

from dimat_jax._restored import Restored, restore_from
from dimat_jax._run_folder import Workdir
from dimat_jax._without_data import ExperimentWithoutData, Form
from dimat_jax.algorithms.base import Variables
from dimat_jax.config import Config, ConfigError, set_if_read
from dimat_jax.data._dataset import DataError
from dimat_jax.experiment import Experiment

__all__ = ["agents_of", "experiment_of", "load_agents", "load_weights", "restored_of"]


def load_agents(
    workdir: str | os.PathLike[str],
    data_dir: str | None = None,
    round: int | None = None,
) -> tuple[Experiment, Variables]:
    """Loads the agents of a run, finished or not. The run's folder stays as it is.

    Without the run's data the agents are loaded all the same. The parts of the
    experiment that need the data are then missing, and say so.

    Args:
        workdir: The run's folder.
        data_dir: Where the run's data are now, if they have moved.
        round: The round after which the agents are taken; 0 for the end of
            pre-training. By default they are those of the newest checkpoint.

    Returns:
        The run's experiment, and the agents' variables: NumPy arrays `[agents, ...]`.

    Raises:
        UserError: The folder holds no run that can be read, or no such checkpoint.
    """
    folder = Workdir(workdir)
    experiment = experiment_of(folder, data_dir)
    return experiment, agents_of(experiment, restored_of(folder, experiment, round))


def load_weights(
    workdir: str | os.PathLike[str],
    data_dir: str | None = None,
    round: int | None = None,
) -> tuple[Experiment, Variables]:
    """Loads agents as `load_agents`, but does not read their data.

    Those of a run of an older version are read, because its folder lacks model.json.
    """
    folder = Workdir(workdir)
    config = _config_of(folder, data_dir)
    experiment = _without_data(folder, config, "they were not asked for")
    if experiment is None:
        experiment = Experiment(config)
    return experiment, agents_of(experiment, restored_of(folder, experiment, round))


def experiment_of(folder: Workdir, data_dir: str | None) -> Experiment:
    """Builds the experiment of a run, without its data if these are missing."""
    config = _config_of(folder, data_dir)
    try:
        return Experiment(config)
    except DataError as error:
        experiment = _without_data(folder, config, str(error))
        if experiment is None:
            raise
        logging.warning("%s is loaded without its data: %s", folder.path, error)
        return experiment


def _config_of(folder: Workdir, data_dir: str | None) -> Config:
    config = folder.with_own_files(folder.read_config())
    if data_dir:
        set_if_read(config, "data.dir", data_dir)
    return config


def _without_data(
    folder: Workdir, config: Config, reason: str
) -> ExperimentWithoutData | None:
    """The experiment of a run without its data; None if the run does not allow it."""
    form = Form.read(folder.path)
    return None if form is None else ExperimentWithoutData(config, form, reason)


def restored_of(
    folder: Workdir, experiment: Experiment, round: int | None = None
) -> Restored:
    """Reads a checkpoint of a run; see `load_agents`."""
    restored = restore_from(experiment, folder.path / "checkpoints", round)
    if restored is None:
        raise ConfigError(f"{folder.path} holds a run that has no checkpoint yet")
    return restored


def agents_of(experiment: Experiment, restored: Restored) -> Variables:
    """The agents' variables in a checkpoint: NumPy arrays `[agents, ...]`."""
    return experiment.placement.gather(restored.algorithm.variables(restored.state))
