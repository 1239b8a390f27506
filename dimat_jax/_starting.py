"""Where agents start: trained weights that a config names, instead of random ones."""

import dataclasses
import functools
import glob
import re

import jax
import numpy as np

from dimat_jax import _model_files
from dimat_jax._chosen import number_of_agents
from dimat_jax._digests import blake2b
from dimat_jax._model_files import located, of_experiment
from dimat_jax._slots import put_each
from dimat_jax.algorithms.base import Variables
from dimat_jax.algorithms.record import INIT_FROM
from dimat_jax.config import Config, ConfigError, fields_of, resolved
from dimat_jax.errors import UserError, concerning
from dimat_jax.experiment import Experiment
from dimat_jax.models import _saved
from dimat_jax.models._saved import SavedModel
from dimat_jax.tree import flatten

__all__ = ["Start", "is_there", "read_start"]


@dataclasses.dataclass(frozen=True)
class Start:
    """The trained weights from which the agents of a run start.

    Attributes:
        names: the names of the models in messages.
        models: a model for each agent.
    """

    names: list[str]
    models: list[SavedModel]

    def check(self, experiment: Experiment) -> None:
        """Refuses weights that are not those of the experiment's model.

        Raises:
            ConfigError: a model is of another architecture, has other leaves or shapes,
                or is not finite. The message names it, and the setting or the leaf.
        """
        wanted = of_experiment(experiment, {})
        with concerning(f"config.{INIT_FROM.path}", ConfigError):
            for name, model in zip(self.names, self.models, strict=True):
                _model_files.refuse_another("the config's model", wanted, name, model)
                _saved.check(wanted._replace(variables=model.variables), name)

    @functools.cached_property
    def digest(self) -> str:
        """A text that differs for other weights, or for another order of the agents."""
        lines = [
            f"{agent} {path} {leaf.shape} {blake2b(leaf.tobytes())}"
            for agent, model in enumerate(self.models)
            for path, leaf in _leaves(model)
        ]
        return blake2b("\n".join(lines).encode())

    def variables(self, experiment: Experiment) -> Variables:
        """The variables on the devices, stacked."""
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
            experiment.abstract_variables(),
        )

        def of_agent(agent: int) -> Variables:
            given = self.models[agent].variables
            return jax.tree.map(lambda x, s: np.asarray(x, s.dtype), given, like)

        return put_each(experiment.placement, of_agent)


def _leaves(model: SavedModel) -> list[tuple[str, np.ndarray]]:
    leaves = flatten(model.variables).items()
    return sorted((path, np.asarray(leaf, np.float32)) for path, leaf in leaves)


def read_start(config: Config) -> Start | None:
    """Reads the trained weights that a config names, one model for each agent.

    Returns:
        None if the config names none.

    Raises:
        ConfigError: a model cannot be read, or there are more or fewer than agents.
    """
    text, n_agents = config.init_from, number_of_agents(resolved(fields_of(config)))
    if not text:
        return None
    with concerning(f"config.{INIT_FROM.path}", ConfigError):
        names = _names(text)
        models = _agents(names[0]) if len(names) == 1 else None
        if models is not None:
            names = [f"{names[0]}:{agent}" for agent in range(len(models))]
        else:
            read_file = _model_files.torch_reader(config.model.name)
            models, _ = _model_files.read(names, None, read_file)
            if len(names) == 1:
                names, models = names * n_agents, models * n_agents
        if len(names) != n_agents:
            raise UserError(
                f"{text} has {len(names)} models, but there are {n_agents} agents"
            )
    return Start(names, models)


def _agents(name: str) -> list[SavedModel] | None:
    """All agents of a run; None if the name is not that of a whole run."""
    path, _, agent = located(name)
    if agent is not None or not (path / "config.json").is_file():
        return None
    return _model_files.read_agents(name)


def is_there(config: Config) -> bool:
    """Whether the files and folders that a config starts from are still there."""
    try:
        return all(located(name)[0].exists() for name in _names(config.init_from))
    except UserError:
        return False


def _names(text: str) -> list[str]:
    """The names in a list with commas, in which patterns stand for what they match.

    Raises:
        UserError: a pattern matches nothing, or a name is empty.
    """
    names: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        if not name:
            raise UserError(f"{text!r} has an empty name")
        found = sorted(glob.glob(name), key=_by_number) if glob.has_magic(name) else []
        if glob.has_magic(name) and not found:
            raise UserError(f"no file or folder matches {name}")
        names += found or [name]
    return names


def _by_number(path: str) -> list[tuple[int, str]]:
    """Puts agent10 after agent9: numbers in names are compared as numbers."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part)
        for part in re.split(r"(\d+)", path)
    ]
