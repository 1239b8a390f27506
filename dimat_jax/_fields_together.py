"""Checks of a config's fields whose values depend on each other."""

from typing import Any

import jax.numpy as jnp

from dimat_jax._config_form import ConfigError, Fields
from dimat_jax._run_options import LOCAL_EPOCHS, LOCAL_STEPS
from dimat_jax.algorithms import INNER, AlgorithmRecord
from dimat_jax.algorithms._ahead import GRADIENT, check_gradient
from dimat_jax.algorithms._merging import OPT_STATE, check_moments
from dimat_jax.algorithms.record import INIT, INIT_FROM
from dimat_jax.callbacks import check_callbacks
from dimat_jax.compression import COMPRESSOR
from dimat_jax.data.partition import PARTITION, PRETRAIN_PARTITION, ByClass
from dimat_jax.data.selection import BN_BATCH_SIZE, BN_DATA, BN_SAMPLES, BN_WHEN
from dimat_jax.data.sources import SOURCE, SOURCES, Signature
from dimat_jax.errors import concerning, reading
from dimat_jax.models import MODEL, MODELS, classifier
from dimat_jax.network import FAULTS, faults
from dimat_jax.optimizers import OPTIMIZER
from dimat_jax.options import arguments
from dimat_jax.tasks import TASK, TASKS

__all__ = [
    "build_model",
    "check_data",
    "check_together",
    "model_arguments",
]


def model_arguments(fields: Fields) -> dict[str, Any]:
    """Returns the keyword arguments of `MODELS[name]`.

    Empty options are left out, so that the model's own defaults hold.
    """
    found = arguments(MODELS[fields[MODEL.path]], fields)
    if "dtype" in found:
        found["dtype"] = jnp.dtype(found["dtype"])
    return {name: value for name, value in found.items() if value != ""}


def build_model(
    fields: Fields, data: Signature, permutes: bool = True
) -> classifier.Model:
    """Builds the model of a config.

    Args:
        fields: the config's fields; empty ones are resolved.
        data: what the model must know of the data set.
        permutes: whether its permutation symmetry is wanted; see `OwnModel`.
    """
    record, given = MODELS[fields[MODEL.path]], model_arguments(fields)
    model = record(n_classes=data.n_classes, **given)
    return classifier.for_inputs(
        model, data.input_shape, data.input_dtype, permutes=permutes
    )


def check_together(fields: Fields, record: AlgorithmRecord) -> None:
    """Checks options whose values depend on each other.

    Args:
        fields: the config's fields; empty ones are resolved.
        record: the record of the config's algorithm.

    Raises:
        ConfigError: they do not go together; the message names them.
    """
    epochs, steps = fields[LOCAL_EPOCHS.path], fields[LOCAL_STEPS.path]
    if (epochs > 0) == (steps > 0):
        raise ConfigError(
            "a round trains for local_epochs or for local_steps: one of them must be "
            f"0 and the other not, got {epochs} and {steps}"
        )
    if fields[INIT_FROM.path] and (init := fields[INIT.path]) != INIT.default:
        raise ConfigError(f"config.init is {init!r}, but config.init_from is set")
    chosen = fields[OPTIMIZER.path]
    if not record.other_optimizers and chosen != record.optimizer:
        raise ConfigError(
            f"config.{OPTIMIZER.path} is {chosen!r}, but {record.title} is defined "
            f"with {record.optimizer!r} only"
        )
    if record.merges:
        entry = COMPRESSOR.entry(fields[COMPRESSOR.path])
        compressor = entry(**arguments(entry, fields))
        with concerning("config.merge", ConfigError):
            check_moments(fields[OPT_STATE.path], compressor)
            check_gradient(fields[GRADIENT.path], fields[INNER.path])
    with concerning("config.faults", ConfigError):
        faults(**{o.keyword: fields[o.path] for o in FAULTS})
    if (data := SOURCES[fields[SOURCE.path]].signature) is not None:
        check_data(fields, data)
    check_callbacks(fields)


def check_data(fields: Fields, data: Signature) -> None:
    """Refuses a task, a partition or options that do not fit the data and the model.

    Args:
        fields: the config's fields; empty ones are resolved.
        data: what is known of the data set.

    Raises:
        ConfigError: the message names the field, and what there is instead.
    """
    _check_task(fields, data)
    _check_batch_norm(fields, data)


def _check_task(fields: Fields, data: Signature) -> None:
    """Refuses a task, or a partition, that is not for the labels of the data."""
    task = TASKS[fields[TASK.path]]
    if task.labels != data.labels:
        raise ConfigError(
            f"config.{TASK.path} is {task.name!r}, which is for labels that are "
            f"{task.labels}, but those of {data.name} are {data.labels}"
        )
    for option in (PARTITION, PRETRAIN_PARTITION):
        entry = option.entry(fields[option.path])
        if isinstance(entry, ByClass) and data.labels != "classes":
            raise ConfigError(
                f"config.{option.path} is {entry.name!r}, which splits examples by "
                f"their classes, but the labels of {data.name} are {data.labels}"
            )


def _check_batch_norm(fields: Fields, data: Signature) -> None:
    """Refuses options of BatchNorm for a model that has none or cannot be built."""
    name = fields[MODEL.path]
    with concerning("config.model", ConfigError), reading(f"{name!r}", ConfigError):
        normalises = classifier.has_statistics(build_model(fields, data))
    for option in () if normalises else (BN_DATA, BN_SAMPLES, BN_BATCH_SIZE, BN_WHEN):
        # "none" is true of such a model, so that a config may say it.
        if fields[option.path] not in (option.default, "none"):
            raise ConfigError(
                f"config.{option.path} is {fields[option.path]!r}, but nothing reads "
                f"it: {name} has no BatchNorm here"
            )
