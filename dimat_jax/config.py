"""Configurations: every option with its default, and the check that finds mistakes.

A config file starts from `default_config()`, sets some fields, and returns the result.
The config is locked, so a misspelt field is an error. Options are declared in the files
that read them; `ROOT` holds the options that every run reads, and leads to all others
(see `dimat_jax.options`).
"""

from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import FieldReference

from dimat_jax import _checkpoint, algorithms, evaluate, plugins
from dimat_jax._config_form import (
    Config,
    ConfigError,
    Fields,
    Section,
    check_form,
    check_types,
    copy_of,
    fields_of,
)
from dimat_jax._fields_together import check_together, model_arguments
from dimat_jax._layouts import BATCHING
from dimat_jax._run_options import (
    BATCH_SIZE,
    LOCAL_EPOCHS,
    LOCAL_STEPS,
    PRETRAIN_EPOCHS,
    ROUNDS,
)
from dimat_jax._schedules import WARMUP
from dimat_jax.algorithms import ALGORITHM, INNER, AlgorithmRecord
from dimat_jax.algorithms.record import INIT, INIT_FROM
from dimat_jax.callbacks import CALLBACK
from dimat_jax.compression import COMPRESSOR
from dimat_jax.data._label_noise import LABEL_NOISE
from dimat_jax.data._small_shards import SMALL_SHARDS
from dimat_jax.data.partition import (
    DATA_SEED,
    PARTITION,
    PRETRAIN_PARTITION,
    VALIDATION,
)
from dimat_jax.data.pipeline import FLIP, PAD
from dimat_jax.data.selection import BN_DATA, BN_SAMPLES
from dimat_jax.data.sources import SOURCE, TEST_SIZE, TRAIN_SIZE
from dimat_jax.models import MODEL
from dimat_jax.network import ABSENCES, DROPOUT
from dimat_jax.optimizers import (
    CLIP_NORM,
    LEARNING_RATE,
    OPTIMIZER,
    OPTIMIZERS,
    SCHEDULE,
)
from dimat_jax.options import (
    SEED,
    Option,
    OptionError,
    describe_readers,
    every,
    read,
    readers,
)
from dimat_jax.placement import AGENTS, CPU_DEVICES
from dimat_jax.tasks import TASK

__all__ = [
    "RENAMED",
    "ROOT",
    "Config",
    "ConfigError",
    "check",
    "copy_of",
    "default_config",
    "drop_unread",
    "expect_all_fields",
    "field_paths",
    "fields_of",
    "fields_of_json",
    "fields_read",
    "model_arguments",
    "record_of",
    "resolved",
    "set_if_read",
    "settle_overrides",
]

RENAMED = {"merge.bn_data": BN_DATA.path, "merge.bn_samples": BN_SAMPLES.path}
"""The names that options had in older versions, with those that they have now."""


ROOT = (
    SEED,
    AGENTS,
    INIT,
    INIT_FROM,
    ALGORITHM,
    BATCH_SIZE,
    ROUNDS,
    LOCAL_EPOCHS,
    LOCAL_STEPS,
    DROPOUT,
    ABSENCES,
    SOURCE,
    TRAIN_SIZE,
    TEST_SIZE,
    PARTITION,
    SMALL_SHARDS,
    DATA_SEED,
    VALIDATION,
    LABEL_NOISE,
    FLIP,
    PAD,
    MODEL,
    TASK,
    BN_DATA,
    OPTIMIZER,
    LEARNING_RATE,
    SCHEDULE,
    WARMUP,
    CLIP_NORM,
    PRETRAIN_EPOCHS,
    evaluate.EVERY,
    evaluate.SAMPLES,
    evaluate.BATCH_SIZE,
    _checkpoint.EVERY,
    _checkpoint.EVERY_MINUTES,
    _checkpoint.KEEP,
    _checkpoint.KEEP_EVERY,
    CPU_DEVICES,
    BATCHING,
    CALLBACK,
)
"""The options that every run reads."""


def _options() -> dict[str, Option]:
    """Returns all options by path, those of installed plugins included.

    Raises:
        UserError: an installed plugin cannot be used.
    """
    plugins.load_installed()
    return {option.path: option for option in every(ROOT)}


def default_config() -> Config:
    """Makes a locked config that holds all options with their defaults."""
    known = field_paths()
    config = Section(known=known)
    for option in _options().values():
        *sections, name = option.path.split(".")
        place: Any = config
        for depth, section in enumerate(sections, 1):
            if section not in place:
                path = ".".join(sections[:depth])
                place[section] = Section(path=path, known=known)
            place = place[section]
        # A field has the type of its default, unless it says that it may have any type.
        place[name] = (
            FieldReference(option.default, field_type=object)
            if option.words
            else option.default
        )
    return config.lock()


def field_paths() -> list[str]:
    """The paths of all fields. Those that every run reads come first."""
    always = [option.path for option in ROOT]
    return list(dict.fromkeys([*always, *_options()]))


# Fields ===============================================================================


def fields_of_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a run's config.json, also of an older version.

    Fields that the file lacks have their defaults. Those that exist no longer are left
    out.

    Raises:
        ConfigError: A field has a value of another type than its default.
    """
    defaults = {path: option.default for path, option in _options().items()}
    known = {p: v for p, v in fields_of(content).items() if p in defaults}
    check_types(defaults | known, defaults, _may_be_words())
    return defaults | known


def record_of(fields: Fields) -> AlgorithmRecord:
    """Returns the record of a config's algorithm.

    For an algorithm that merges, it includes what agents do between merges.

    Raises:
        ConfigError: the config names an algorithm that does not exist.
    """
    for option in (ALGORITHM, INNER):
        _check_value(option, fields)
    return algorithms.algorithm_record(fields[ALGORITHM.path], fields[INNER.path])


def resolved(fields: Fields) -> dict[str, Any]:
    """Returns the fields with the values that some empty ones stand for.

    These are the fields whose empty value stands for another field's value, for the
    algorithm's own choice, or for the learning rate that suits an optimizer.
    """
    record = record_of(fields)
    stands_for = {
        OPTIMIZER.path: record.optimizer,
        COMPRESSOR.path: record.compressor or "none",
        PRETRAIN_PARTITION.path: fields[PARTITION.path],
    }
    whole = {
        path: stands_for.get(path, value) if value == "" else value
        for path, value in fields.items()
    }
    for section in ("", "pretrain."):
        rate = section + LEARNING_RATE.path
        # An optimizer that does not exist is refused elsewhere, with a message.
        if optimizer := OPTIMIZERS.get(whole[section + OPTIMIZER.path]):
            whole[rate] = whole[rate] or optimizer.learning_rate
    return whole


def fields_read(fields: Fields) -> dict[str, Any]:
    """Returns the values of the options that a config reads, by path.

    Empty values are resolved. Options that change no result are left out.
    """
    whole = resolved(fields)
    return {
        path: whole[path]
        for path, option in read(ROOT, whole).items()
        if option.changes_results
    }


def drop_unread(config: Config) -> Config:
    """Sets every option that a config does not read to its default.

    Config files and sweeps use it to set one list of fields for several algorithms.

    Returns:
        `config` itself.
    """
    kept = read(ROOT, resolved(fields_of(config)))
    defaults = {
        path: option.default for path, option in _options().items() if path not in kept
    }
    config.update_from_flattened_dict(defaults)
    return config


def set_if_read(config: Config, path: str, value: Any) -> None:
    """Sets an option where the config reads it, and leaves the config alone elsewhere.

    Programs use it for what they add to any config, like the folder of the data.
    """
    if path in read(ROOT, resolved(fields_of(config))):
        config.update_from_flattened_dict({path: value})


def settle_overrides(
    config: Config, original: Config, overridden: Collection[str]
) -> Config:
    """Drops what a config file has set and only overrides leave unread.

    A file may set `merge.stay`; if the algorithm is then overridden by one that does
    not merge, `merge.stay` goes back to its default. An overridden option that is not
    read stays, so that `check` refuses it.

    Args:
        config: the file's config, with the overrides.
        original: the file's config without them.
        overridden: the paths of the overridden options.

    Returns:
        `config` itself.
    """
    before = read(ROOT, resolved(fields_of(original)))
    now = read(ROOT, resolved(fields_of(config)))
    defaults = {
        path: option.default
        for path, option in before.items()
        if path not in now and path not in overridden
    }
    config.update_from_flattened_dict(defaults)
    return config


# Checks ===============================================================================


def check(config: Config) -> None:
    """Refuses values that are not allowed, and changed fields that no code would read.

    Raises:
        ConfigError: a field is wrong; the message names it, its value and what is
            allowed.
    """
    fields = fields_of(expect_all_fields(config))
    whole = resolved(fields)
    found = read(ROOT, whole)
    for option in found.values():
        _check_value(option, fields)
    _refuse_unread(fields, found)
    check_together(whole, record_of(whole))


def expect_all_fields(config: Any) -> Config:
    """Refuses what is no config with all fields, each of its type.

    Returns:
        `config` itself.

    Raises:
        ConfigError: A field is missing, unknown or of another type than its default.
    """
    options = _options()
    defaults = {path: options[path].default for path in field_paths()}
    check_form(config, defaults, _may_be_words())
    return config


def _may_be_words() -> list[str]:
    """The fields that may be a number or a word."""
    return [path for path, option in _options().items() if option.words]


def _check_value(option: Option, fields: Fields) -> None:
    try:
        option.check(fields[option.path], f"config.{option.path}")
    except OptionError as error:
        raise ConfigError(str(error)) from None


def _refuse_unread(fields: Fields, found: Mapping[str, Option]) -> None:
    """Refuses fields that were changed although no code would read them."""
    problems = [
        f"config.{path} is {fields[path]!r}, but {_why_unread(path, fields, found)}"
        for path, option in _options().items()
        if path not in found and fields[path] != option.default
    ]
    if problems:
        raise ConfigError("; ".join(problems))


def _why_unread(path: str, fields: Fields, found: Mapping[str, Option]) -> str:
    """Says which choices of a config do not read an option, and which would."""
    if path in {option.path for option in record_of(fields).ignores}:
        return f"{ALGORITHM.path}={fields[ALGORITHM.path]!r} does not read it"
    every_route = readers(ROOT)[path]
    routes = [route for route in every_route if route[0].path in found]
    if not routes:
        opener = every_route[0][0].path
        return f"nothing reads {opener}, which leads to it: " + _why_unread(
            opener, fields, found
        )
    now = [f"{option.path}={fields[option.path]!r}" for option, _ in routes]
    verb = "does" if len(now) == 1 else "do"
    return (
        f"{' and '.join(now)} {verb} not read it; it is read where "
        f"{describe_readers(routes)}"
    )
