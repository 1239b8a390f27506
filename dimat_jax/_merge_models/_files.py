"""Reads trained models: runs, earlier merges, PyTorch files, a user's own weights."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dimat_jax import _model_files
from dimat_jax._merge_models._options import Options, is_own
from dimat_jax._merge_models._trees import Place, read_tree
from dimat_jax._model_files import refuse_another, torch_reader
from dimat_jax.data._dataset import Dataset
from dimat_jax.errors import UserError
from dimat_jax.models import _saved
from dimat_jax.models._saved import SavedModel
from dimat_jax.models._torch_files import is_torch_file
from dimat_jax.tree import flatten

__all__ = [
    "check",
    "check_classes",
    "check_own",
    "data_set",
    "place",
    "read",
    "torch_file",
]


def place(options: Options) -> Place:
    """Where in files of weights the models are."""
    entry = tuple(options.entry.split("/")) if options.entry else None
    return Place(entry, options.prefix)


def read(options: Options) -> tuple[list[SavedModel], str | None]:
    """Reads the models of a merge.

    PyTorch files name no data set, so this field of the models is empty. Models of the
    user's own have no arguments and no shape of inputs either; their name is --model.

    Returns:
        the models, and the folder of the data, if it is given or a run names it.

    Raises:
        UserError: a model cannot be read, or runs are on different data of the user's
            own and --data_dir names none; the message names the models and says why.
    """
    where, model = place(options), options.model

    def read_own(path: Path) -> SavedModel:
        assert model is not None
        return SavedModel(model, {}, (), None, read_tree(path, where))

    own = model is not None and is_own(model)
    read_file = read_own if own else torch_reader(model, where.entry, where.prefix)
    return _model_files.read(
        options.models,
        options.data_dir,
        read_file,
        only_files=own,
        one_data_set=True,
    )


def torch_file(options: Options) -> Path | None:
    """The first of the models that is a PyTorch file, if there is any."""
    paths = [Path(name) for name in options.models]
    found = (
        path
        for path in paths
        if path.exists() and is_torch_file(path) and not (path / "model").is_dir()
    )
    return next(found, None)


def data_set(
    names: Sequence[str], models: Sequence[SavedModel], given: str | None
) -> str | None:
    """Finds the name of the data set that all models are for; None if none is named.

    Raises:
        UserError: the models are for different data sets.
    """
    data = given or next((model.data for model in models if model.data), None)
    for name, model in zip(names, models, strict=True):
        if model.data not in (None, data):
            raise UserError(
                f"{name} was trained on {model.data!r}, whose mean and deviation "
                f"normalise its inputs, but the data set is {data!r}"
            )
    return data


def check(
    names: Sequence[str],
    models: Sequence[SavedModel],
    shape: tuple[int, ...],
    dataset: Dataset | None,
) -> None:
    """Checks that models have the same architecture, fit the data, and are finite.

    Args:
        names: the names of the models.
        models: the models, of bundled architectures.
        shape: the shape of an image.
        dataset: the data, if there are any.

    Raises:
        UserError: a model does not fit; the message names it, and the setting or leaf.
    """
    for name, model in zip(names, models, strict=True):
        refuse_another(names[0], models[0], name, model)
        if dataset is not None:
            check_classes(name, model.arguments["n_classes"], dataset)
        _saved.check(model._replace(input_shape=shape), name)


def check_classes(name: str, n_classes: int, dataset: Dataset) -> None:
    """Refuses a model that is for another number of classes than the data have."""
    if n_classes != dataset.n_classes:
        raise UserError(
            f"{name} is for {n_classes} classes, but {dataset.name} has "
            f"{dataset.n_classes}"
        )


def check_own(names: Sequence[str], models: Sequence[SavedModel]) -> None:
    """Checks that a user's own models have the same leaves, and that they are finite.

    Raises:
        UserError: a model does not fit; the message names it, and the leaf.
    """
    expected = flatten(models[0].variables)
    for name, model in zip(names, models, strict=True):
        leaves = flatten(model.variables)
        for path in [*expected, *leaves]:
            if path not in leaves or path not in expected:
                has, lacks = (names[0], name) if path in expected else (name, names[0])
                raise UserError(f"{has} has {path!r}, which {lacks} lacks")
            shapes = np.shape(expected[path]), np.shape(leaves[path])
            if shapes[0] != shapes[1]:
                raise UserError(
                    f"{path!r} is of shape {shapes[0]} in {names[0]}, but of shape "
                    f"{shapes[1]} in {name}"
                )
            if bad := int((~np.isfinite(leaves[path])).sum()):
                raise UserError(
                    f"{name}: {path!r} holds {bad} value(s) that are NaN or infinite"
                )
