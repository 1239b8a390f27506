"""The data of a merge: a data set, a user's own images, or none."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dimat_jax import _user_code
from dimat_jax._merge_models import _files
from dimat_jax._merge_models._methods import METHODS
from dimat_jax._merge_models._options import OPTIONS, Options, is_own
from dimat_jax.data import sources
from dimat_jax.data._images import Form, read_images
from dimat_jax.data.sources import Dataset
from dimat_jax.errors import UserError
from dimat_jax.models._saved import SavedModel

__all__ = ["example", "image_shape", "input_dtype", "load", "name_to_save"]

# The options that say how data are used.
_OF_DATA = ("data_dir", "samples", "points", "train_size", "test_size")


def load(
    options: Options, models: Sequence[SavedModel], directory: str | None
) -> Dataset | None:
    """Loads the data of a merge; None if there are none and the method needs none.

    Args:
        options: the options of the merge.
        models: the models, which may name their data set.
        directory: the folder of the data.

    Raises:
        UserError: the data cannot be read, are too few, or are needed but not named.
    """
    name = _files.data_set(options.models, models, options.data)
    if name is None:
        _check_without(options)
        return None
    if is_own(name):
        dataset = _own(options, name, models, directory)
    else:
        dataset = sources.load(
            name,
            directory=directory,
            train_size=options.train_size,
            test_size=options.test_size,
            seed=options.seed,
        )
    available = len(dataset.train.labels)
    # All of a user's own images may be fewer than the default.
    is_given = options.samples != OPTIONS["samples"].default or not is_own(name)
    if options.samples > available and is_given:
        raise UserError(
            f"--samples is {options.samples}, but there are only {available} images"
        )
    return dataset


def _check_without(options: Options) -> None:
    """Refuses a merge without data if something in its options needs them."""
    if METHODS[options.method].needs_data:
        methods = [name for name, method in METHODS.items() if not method.needs_data]
        raise UserError(
            "no model names its data set; --data must name it, unless --method is "
            f"{' or '.join(methods)}, which need no data"
        )
    for name in _OF_DATA:
        if (value := getattr(options, name)) != OPTIONS[name].default:
            raise UserError(f"--{name} is {value}, but there are no data; name --data")


def _own(
    options: Options,
    name: str,
    models: Sequence[SavedModel],
    directory: str | None,
) -> Dataset:
    path, colon, function = name.rpartition(":")
    if colon and path.endswith(".py"):
        signature = f"{function}(directory, cache_dir) -> Dataset"
        dataset = _user_code.call(Path(path), signature, directory, None)
        if not isinstance(dataset, Dataset):
            raise UserError(
                f"{name} returns a {type(dataset).__name__}, expected a "
                "dimat_jax.data.sources.Dataset"
            )
        return sources.select(
            dataset, options.train_size, options.test_size, options.seed
        )
    known = next((model.input_shape for model in models if model.input_shape), ())
    form = Form(
        _shape(options.size, known[-1] if known else 3, (0, 0)),
        options.mean,
        options.std,
        options.train_size or options.samples,
        options.test_size,
        options.seed,
    )
    return read_images(Path(name), form)


def _shape(
    size: tuple[int, ...] | None, channels: int, default: tuple[int, int]
) -> tuple[int, int, int]:
    """The shape that --size means."""
    if size is None:
        return *default, channels
    if len(size) == 1:
        return size[0], size[0], channels
    height, width, channels = size
    return height, width, channels


def image_shape(
    options: Options, models: Sequence[SavedModel], dataset: Dataset | None
) -> tuple[int, ...]:
    """The shape of an image, as the data, a model or --size tells it.

    Raises:
        UserError: nothing tells it.
    """
    if dataset is not None:
        return dataset.train.images.shape[1:]
    known = next((model.input_shape for model in models if model.input_shape), None)
    if options.size is None and known is None:
        raise UserError(
            "without data, --size must tell the size of the images that "
            f"{options.model} takes"
        )
    if options.size is None:
        assert known is not None
        return known
    return _shape(options.size, known[-1] if known else 3, (0, 0))


def input_dtype(models: Sequence[SavedModel], dataset: Dataset | None) -> str:
    """The dtype of an input: "float32", or "int32" for tokens."""
    return models[0].input_dtype if dataset is None else dataset.signature.input_dtype


def example(
    options: Options,
    models: Sequence[SavedModel],
    dataset: Dataset | None,
    shape: tuple[int, ...],
) -> np.ndarray:
    """Eight inputs of a shape on which symmetries are read off and checked."""
    if input_dtype(models, dataset) == "float32":
        drawn = np.random.default_rng(options.seed).normal(size=(8, *shape))
        return drawn.astype(np.float32)
    # How many tokens there are is not known, so none is drawn at random.
    if dataset is None:
        return np.zeros((8, *shape), np.int32)
    return np.resize(dataset.train.images[:8], (8, *shape))


def name_to_save(models: Sequence[SavedModel], dataset: Dataset | None) -> str | None:
    """The name of the data set that a merged model is for; None if it has no name."""
    names = [dataset.name] if dataset is not None else [m.data for m in models]
    return next((name for name in names if name in sources.SOURCES), None)
