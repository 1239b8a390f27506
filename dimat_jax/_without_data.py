"""The parts of a run that do without its data set: its model, algorithm and network.

    model.json    the number of classes, and the shape and the dtype of an input

A run writes this file when it begins, so that its agents can be read on a machine that
does not have the data.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dimat_jax._folders import read_json
from dimat_jax._metrics import write_json
from dimat_jax.config import Config, ConfigError
from dimat_jax.data._dataset import DataError, Signature
from dimat_jax.errors import reading
from dimat_jax.experiment import Experiment

__all__ = ["FORM", "ExperimentWithoutData", "Form"]

FORM = "model.json"
"""The file that tells what is known of a run's data."""

# The parts of an experiment from which all follows that needs the data.
_NEED_DATA = (
    "dataset",
    "division",
    "shards",
    "sampler",
    "pretrain_sampler",
    "local_steps",
    "pretrain_steps",
)


class Form(NamedTuple):
    """What a run knows of its data without them.

    Attributes:
        n_classes: the number of classes.
        input_shape: the shape of one input.
        sizes: the number of each agent's training images.
        input_dtype: the dtype of the inputs: "float32", or "int32" for tokens.
        labels: the kind of the labels; see `Signature`.
    """

    n_classes: int
    input_shape: tuple[int, ...]
    sizes: list[int]
    input_dtype: str = "float32"
    labels: str = "classes"

    @staticmethod
    def of(experiment: Experiment) -> "Form":
        """Returns the form of an experiment that has its data."""
        sizes = [len(shard) for shard in experiment.shards]
        data = experiment.signature
        return Form(
            data.n_classes, data.input_shape, sizes, data.input_dtype, data.labels
        )

    def write(self, workdir: Path) -> None:
        """Writes the form into a run's folder."""
        write_json(workdir / FORM, self._asdict(), digested=True)

    @staticmethod
    def read(workdir: Path) -> "Form | None":
        """Reads the form of a run; None for a run of an older version.

        Raises:
            ConfigError: model.json cannot be used.
        """
        path = workdir / FORM
        if not path.exists():
            return None
        content = read_json(path, dict, ConfigError)
        with reading(path, ConfigError):
            shape, sizes = content["input_shape"], content["sizes"]
            return Form(
                int(content["n_classes"]),
                tuple(map(int, shape)),
                [*map(int, sizes)],
                # Runs of older versions have images alone.
                np.dtype(content.get("input_dtype", "float32")).name,
                str(content.get("labels", "classes")),
            )


class ExperimentWithoutData(Experiment):
    """The parts of a run that need no data.

    Its dataset, its shards, its samplers, its numbers of steps, and all that follows
    from them are missing.

    Args:
        config: the run's config.
        form: what is known of the data.
        reason: why the data are missing, for messages.

    Raises:
        UserError: the config cannot be run; or, later, something needs the data.
    """

    def __init__(self, config: Config, form: Form, reason: str):
        self._reason = reason
        known = form.input_shape, form.input_dtype, form.n_classes, form.labels
        self.signature = Signature(config.data.name, *known)
        self._begin(config, self.signature)
        self._build_task()
        self._place(None)
        # The states of optimizers do not depend on the numbers of steps.
        steps = {"steps_per_epoch": 1, "total_steps": 1}
        self._build_algorithms(form.sizes, steps, {**steps, "steps_per_round": 1})

    def __getattr__(self, name: str) -> Any:
        """Says why a part is missing. Python asks this for missing attributes alone."""
        if name in _NEED_DATA:
            raise DataError(
                f"this run was loaded without its data, and its {name} needs them: "
                f"{self._reason}"
            )
        raise AttributeError(name)

    def _example_inputs(self, n: int) -> np.ndarray:
        # Fresh variables do not depend on the values of the inputs.
        return np.zeros((n, *self.signature.input_shape), self.signature.input_dtype)
