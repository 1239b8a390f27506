"""Models on disk: the architecture, the kind of inputs, and the variables.

A saved model is a folder with one Orbax checkpoint. The checkpoint's JSON record holds
all but the variables, so nothing else is needed to load the model and to run it.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dimat_jax._checkpoint import Checkpoints
from dimat_jax.errors import UserError, nearest
from dimat_jax.models import MODELS, classifier
from dimat_jax.tree import PyTree, flatten

__all__ = ["SavedModel", "SavedModelError", "build", "check", "load", "save"]


class SavedModelError(UserError):
    """Variables do not belong to the model that they are saved as."""


class SavedModel(NamedTuple):
    """A model of a bundled architecture, with everything needed to run it.

    Attributes:
        name: a key of `MODELS`.
        arguments: the arguments of `MODELS[name]` as JSON has them, e.g.
            {"n_classes": 10, ...}.
        input_shape: the shape of one example.
        data: the name of the data set whose mean and standard deviation normalise the
            inputs, or None if it is not known.
        variables: the variables, {"params": ..., ...}.
        input_dtype: the dtype of an example: "float32", or "int32" for tokens.
    """

    name: str
    arguments: dict[str, Any]
    input_shape: tuple[int, ...]
    data: str | None
    variables: PyTree
    input_dtype: str = "float32"

    @property
    def module(self) -> classifier.Model:
        """The model that the variables belong to."""
        model = build(self.name, self.arguments)
        return classifier.for_inputs(model, self.input_shape, self.input_dtype)


def build(name: str, arguments: dict[str, Any]) -> classifier.Model:
    """Builds `MODELS[name](**arguments)` from arguments as JSON has them.

    Raises:
        SavedModelError: there is no such model, or it has no such arguments.
    """
    if name not in MODELS:
        raise SavedModelError(f"unknown model {name!r}; {nearest(name, MODELS)}")
    converted = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in arguments.items()
    }
    if "dtype" in converted:
        converted["dtype"] = jnp.dtype(converted["dtype"])
    try:
        return MODELS[name](**converted)
    except TypeError as error:
        raise SavedModelError(f"{name} does not take {arguments}: {error}") from error


def check(model: SavedModel, where: str) -> None:
    """Checks that a model has the leaves of its architecture, and that they are finite.

    Args:
        model: the model to check.
        where: the name of the model in error messages.

    Raises:
        SavedModelError: a leaf is missing, unexpected, of another shape or not finite.
            The message names the leaf.
    """
    arguments = ", ".join(f"{key}={value}" for key, value in model.arguments.items())
    what = f"{model.name} ({arguments})"
    leaves = flatten(model.variables)
    expected = flatten(_abstract(model))
    for path in [*expected, *leaves]:
        if path not in leaves:
            raise SavedModelError(f"{where} lacks {path!r}, which {what} has")
        if path not in expected:
            raise SavedModelError(
                f"{where} has {path!r}, which {what} does not have; "
                f"{nearest(path, expected)}"
            )
        if leaves[path].shape != expected[path].shape:
            raise SavedModelError(
                f"{where}: {path!r} is of shape {leaves[path].shape}, but {what} on "
                f"inputs of shape {model.input_shape} has {expected[path].shape}"
            )
        if bad := int((~np.isfinite(leaves[path])).sum()):
            raise SavedModelError(
                f"{where}: {path!r} holds {bad} value(s) that are NaN or infinite"
            )


def save(directory: str | os.PathLike[str], model: SavedModel) -> None:
    """Saves a model into a folder that holds no other. The folder is made if needed."""
    checkpoints = Checkpoints(Path(directory), keep=1)
    record = model._asdict()
    variables = jax.tree.map(np.asarray, record.pop("variables"))
    checkpoints.save(0, variables, {"model": record})
    checkpoints.close()


def load(directory: str | os.PathLike[str]) -> SavedModel:
    """Loads a model that `save` has saved. Its variables are NumPy arrays.

    Raises:
        SavedModelError: the folder holds no model, or its variables do not belong to
            the model that its record describes.
    """
    models = []

    def like(record):
        if "model" not in record:
            raise SavedModelError(f"{directory} holds checkpoints, but not of a model")
        fields = {**record["model"], "variables": None}
        fields["input_shape"] = tuple(fields["input_shape"])
        models.append(SavedModel(**fields))
        return _abstract(models[0])

    checkpoints = Checkpoints(Path(directory), create=False)
    try:
        restored = checkpoints.restore(like)
    except UserError:
        raise
    except ValueError as error:  # Orbax raises it for other leaves than expected
        raise SavedModelError(f"{directory}: {error}") from error
    finally:
        checkpoints.close()
    if restored is None:
        raise SavedModelError(f"{directory} holds no model")
    return models[0]._replace(variables=restored[0])


def _abstract(model: SavedModel) -> PyTree:
    """The shapes and dtypes of the architecture's variables."""
    inputs = jax.ShapeDtypeStruct((1, *model.input_shape), model.input_dtype)
    module = model.module
    return jax.eval_shape(
        lambda key, x: classifier.init(module, key, x), jax.random.key(0), inputs
    )
