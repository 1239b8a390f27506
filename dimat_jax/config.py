"""Configurations: every field with its default, and the check that finds mistakes.

A config file starts from `default_config()`, changes what it is about, and returns the
result; the config is locked, so a misspelt field is an error.
"""

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, get_args

from ml_collections import ConfigDict

from dimat_jax.algorithms import (
    ALGORITHMS,
    BETWEEN_MERGES,
    MERGING,
    OptStatePolicy,
    needs,
)
from dimat_jax.algorithms._frames import FRAMES
from dimat_jax.algorithms.cdsgd import Order
from dimat_jax.arguments import (
    Config,
    ConfigError,
    compressor,
    compressor_name,
    faults,
    model_arguments,
    needed,
    optimizer_name,
)
from dimat_jax.compression import COMPRESSORS, CompressionError
from dimat_jax.data.partition import PARTITIONS
from dimat_jax.data.sources import SOURCES
from dimat_jax.errors import nearest
from dimat_jax.mixing import MIXINGS
from dimat_jax.models import MODELS, ModelError
from dimat_jax.optimizers import OPTIMIZERS, SCHEDULES, WITH_MOMENTUM
from dimat_jax.placement import Batching
from dimat_jax.topology import TOPOLOGIES

__all__ = [
    "Config",
    "ConfigError",
    "check",
    "default_config",
    "result_fields",
]

# Where things are, how fast they go and what is kept. These fields change no result:
# a run may resume with others, and runs are not compared by them.
CIRCUMSTANCES = (
    "data.dir",
    "data.cache_dir",
    "pretrain.cache_dir",
    "pretrain.checkpoint_every",
    "placement",
    "checkpoint",
)
DTYPES = ("float32", "bfloat16")
INITS = ("different", "same")
MATCH_DATA = ("own", "proxy", "global")
BN_DATA = ("own", "proxy", "global", "none")


def default_config() -> Config:
    """All fields, locked. Sizes that count examples take 0 for "all of them"."""
    config = ConfigDict(
        {
            "seed": 0,  # of everything: data, inits, orders, augmentation
            "agents": 5,
            "init": "different",  # different | same: the agents' initial weights
            "algorithm": "dimat",
            "topology": "ring",
            "mixing": "uniform",  # or file
            "graph": {  # for the topologies and weights that take them
                "degree": 0,  # of random_regular; 0: the least above the ring's
                "edge_probability": 0.5,  # of erdos_renyi
                "file": "",  # a matrix, .json or .npy: its edges, its weights, or both
            },
            "faults": {  # from the first round on
                "dropout": 0.0,  # the probability that an agent is away for a round
                "edge_loss": 0.0,  # ... that a link fails in an exchange
                "absences": "",  # "3:1-4, 0:6-": 3 in rounds 1 to 4, 0 from 6 on
            },
            "gossip": {  # for the algorithms that take them
                "order": "combine_then_adapt",  # or adapt_then_combine; cdsgd
                "momentum": 0.9,  # qgm
                "gamma": 1.0,  # the consensus step of choco; less for top_k, random_k
            },
            "compression": {  # of messages, for the algorithms that compress
                "name": "",  # "": the algorithm's own
                "fraction": 0.1,  # what top_k and random_k keep
            },
            "batch_size": 100,  # of each agent's local steps
            "rounds": 100,  # a round: communicate, evaluate, train
            "local_epochs": 2,  # local training in a round: epochs ...
            "local_steps": 0,  # ... or, if not 0, steps
            "data": {
                "name": "cifar100",
                "dir": "",  # "": where tfds looks by itself
                "cache_dir": "",  # of decoded images; "": the user's cache
                "train_size": 0,
                "test_size": 0,
                "partition": "iid",
                "alpha": 0.5,  # of dirichlet and quantity_skew
                "classes": 2,  # of each agent, for classes_per_agent
            },
            "augmentation": {
                "flip": False,  # left to right, with probability 1/2
                "pad": 0,  # pixels to pad before a random crop to the old size
            },
            "model": {
                "name": "resnet20",
                "width": 1.0,  # channels, in multiples of the architecture's own
                "norm": "",  # batch | layer | group | none; "": its own
                "stem": "",  # cifar | imagenet; "": its own
                "dtype": "float32",  # of the computation; weights are float32
            },
            "optimizer": _optimizer(""),  # in the rounds
            "pretrain": {  # alone, before the rounds
                "epochs": 100,
                "batch_size": 100,
                "optimizer": _optimizer("adam"),
                "partition": "",  # of the data; "": the same as in the rounds
                "checkpoint_every": 10,  # epochs
                "cache_dir": "",  # where runs share pre-trained agents; "": nowhere
            },
            "merge": {  # for the algorithms that merge
                "frame": "own",  # own | reference | joint
                "stay": 0.0,  # a unit moves only for a gain above this
                "opt_state": "reset",  # reset | keep | merge
                "restarts": 1,  # of weight matching, from which the best is taken
                "inner": "local",  # between merges: or gossip with every step, too
                "match_data": "proxy",  # own | proxy | global; of no concern to wm
                "match_samples": 1000,  # of each agent (own), or shared by all
                "bn_data": "proxy",  # own | proxy | global | none
                "bn_samples": 1000,
                "batch_size": 100,
            },
            "eval": {
                "every": 1,  # rounds
                "samples": 0,  # test images, the same ones every time
                "batch_size": 500,
            },
            "checkpoint": {
                "every": 1,  # rounds
                "keep": 2,
            },
            "placement": {
                "cpu_devices": 1,  # to split a CPU into
                "batching": "auto",  # auto | vmap | unroll: agents on one device
            },
        }
    )
    return config.lock()


def _optimizer(name: str) -> dict[str, Any]:
    return {
        "name": name,  # "": the algorithm's own
        "learning_rate": 1e-3,
        "momentum": 0.9,  # of momentum, nesterov and heavy_ball
        "weight_decay": 0.0,
        "schedule": "constant",
        "decay": 0.981,  # a factor for each epoch, of exponential
    }


def check(config: Config) -> None:
    """Finds what would go wrong later.

    Raises:
        ConfigError: names the field, its value and what is allowed.
    """
    _one_of(config, "init", INITS)
    _one_of(config, "algorithm", ALGORITHMS)
    _one_of(config, "topology", TOPOLOGIES)
    _one_of(config, "mixing", [*MIXINGS, "file"])
    _one_of(config, "data.name", SOURCES)
    _one_of(config, "data.partition", PARTITIONS)
    _one_of(config, "pretrain.partition", ["", *PARTITIONS])
    _check_model(config)
    _one_of(config, "merge.inner", BETWEEN_MERGES)
    _check_algorithm(config)
    _check_graph(config)
    _check_faults(config)
    _one_of(config, "optimizer.name", ["", *OPTIMIZERS])
    _one_of(config, "pretrain.optimizer.name", OPTIMIZERS)
    for optimizer in ("optimizer", "pretrain.optimizer"):
        _one_of(config, f"{optimizer}.schedule", SCHEDULES)
        _at_least(config, f"{optimizer}.learning_rate", 0)
        _at_least(config, f"{optimizer}.weight_decay", 0)
        _at_least(config, f"{optimizer}.decay", 0)
        _check_optimizer(config, optimizer)
    _one_of(config, "merge.frame", FRAMES)
    _one_of(config, "merge.opt_state", get_args(OptStatePolicy))
    _one_of(config, "merge.match_data", MATCH_DATA)
    _one_of(config, "merge.bn_data", BN_DATA)
    _one_of(config, "placement.batching", get_args(Batching))
    for field in (
        "agents",
        "batch_size",
        "pretrain.batch_size",
        "pretrain.checkpoint_every",
        "merge.restarts",
        "merge.batch_size",
        "eval.every",
        "eval.batch_size",
        "checkpoint.every",
        "checkpoint.keep",
        "placement.cpu_devices",
    ):
        _at_least(config, field, 1)
    for field in (
        "seed",
        "rounds",
        "local_epochs",
        "local_steps",
        "data.train_size",
        "data.test_size",
        "augmentation.pad",
        "pretrain.epochs",
        "merge.stay",
        "merge.match_samples",
        "merge.bn_samples",
        "eval.samples",
    ):
        _at_least(config, field, 0)
    if (config.local_epochs > 0) == (config.local_steps > 0):
        raise ConfigError(
            "a round trains for local_epochs or for local_steps: one of them must be "
            f"0 and the other not, got {config.local_epochs} and {config.local_steps}"
        )


def result_fields(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config's fields by dotted path, without `CIRCUMSTANCES`.

    Args:
        fields: a config as a nested dict.
        prefix: of the paths.
    """
    flat = {}
    for name, value in fields.items():
        path = f"{prefix}{name}"
        if path in CIRCUMSTANCES:
            continue
        flat |= (
            result_fields(value, f"{path}.")
            if isinstance(value, dict)
            else {path: value}
        )
    return flat


def _get(config: Config, field: str) -> Any:
    value: Any = config
    for part in field.split("."):
        value = value[part]
    return value


def _one_of(config: Config, field: str, allowed: Iterable[str]) -> None:
    value = _get(config, field)
    if value not in allowed:
        raise ConfigError(f"config.{field} is {value!r}; {nearest(value, allowed)}")


def _check_algorithm(config: Config) -> None:
    """What an algorithm would ignore, or would not be itself with, is refused."""
    name, wants = config.algorithm, needed(config)
    if config.merge.inner != "local":
        if name not in MERGING:
            raise ConfigError(
                f"config.merge.inner is {config.merge.inner!r}, but {name} does not "
                f"merge; {', '.join(sorted(MERGING))} do"
            )
        name = f"{name} with {config.merge.inner} between merges"
    if not wants.other_optimizers and optimizer_name(config) != wants.optimizer:
        raise ConfigError(
            f"config.optimizer.name is {config.optimizer.name!r}, but {name} is what "
            f"it is with {wants.optimizer!r} only"
        )
    _one_of(config, "gossip.order", get_args(Order))
    _refuse_unread(config, "gossip", wants.options, name)
    _one_of(config, "compression.name", ["", *COMPRESSORS])
    chosen = config.compression.name
    if chosen not in ("", "none") and wants.compressor is None:
        compressing = sorted(n for n in ALGORITHMS if needs(n).compressor)
        raise ConfigError(
            f"config.compression.name is {chosen!r}, but {name} sends everything as it "
            f"is; {', '.join(compressing)} compress"
        )
    chosen = compressor_name(config)
    make = COMPRESSORS[chosen]
    _refuse_unread(config, "compression", {"name", *_takes(make)}, chosen)
    try:
        lossless = compressor(config).lossless
    except CompressionError as error:
        raise ConfigError(f"config.compression: {error}") from None
    if config.algorithm in MERGING and config.merge.opt_state == "merge":
        if not lossless:
            raise ConfigError(
                f"config.merge.opt_state is 'merge', but with compression {chosen!r} "
                "moments do not survive; it must be 'keep' or 'reset'"
            )


def _check_optimizer(config: Config, section: str) -> None:
    name = _get(config, section).name or optimizer_name(config)
    schedule = _get(config, section).schedule
    read = {"name", "learning_rate", "weight_decay", "schedule"}
    read |= {"momentum"} if name in WITH_MOMENTUM else set()
    read |= {"decay"} if schedule == "exponential" else set()
    _refuse_unread(config, section, read, f"{name} with a {schedule} schedule")
    momentum = _get(config, section).momentum
    if not 0 <= momentum < 1:
        raise ConfigError(
            f"config.{section}.momentum is {momentum}; it must be from 0 to below 1"
        )


def _check_faults(config: Config) -> None:
    found, name = faults(config), config.algorithm
    if name == "centralized" and found.any:
        raise ConfigError("config.faults are of networks, but centralized has none")
    if found.edge_loss and not needed(config).graph:
        raise ConfigError(
            f"config.faults.edge_loss is {found.edge_loss}, but {name} sends nothing "
            "along the edges of a graph"
        )


def _check_graph(config: Config) -> None:
    takes = _takes(TOPOLOGIES[config.topology])
    if "file" in (config.topology, config.mixing) and not config.graph.file:
        raise ConfigError(
            "config.graph.file is empty; topology='file' and mixing='file' need it"
        )
    whose = f"topology={config.topology!r}"
    if config.mixing == "file":
        takes |= {"file"}
        whose += " with mixing='file'"
    _refuse_unread(config, "graph", takes, whose)
    partitions = [config.data.partition, config.pretrain.partition or "iid"]
    used = set().union(*(_takes(PARTITIONS[name]) for name in partitions))
    others = set(config.data) - {"alpha", "classes"}
    _refuse_unread(config, "data", {*used, *others}, f"partition={partitions[0]!r}")


def _takes(function: Callable) -> set[str]:
    return set(inspect.signature(function).parameters)


def _refuse_unread(
    config: Config, section: str, read: Iterable[str], whose: str
) -> None:
    """Refuses fields that were changed, and that nobody would look at."""
    defaults = _get(default_config(), section)
    for field, value in _get(config, section).items():
        if field not in read and value != defaults[field]:
            raise ConfigError(
                f"config.{section}.{field} is {value!r}, but {whose} does not read it"
            )


def _check_model(config: Config) -> None:
    _one_of(config, "model.name", MODELS)
    _one_of(config, "model.dtype", DTYPES)
    name, arguments = config.model.name, model_arguments(config)
    taken = inspect.signature(MODELS[name]).parameters
    for field in arguments:
        if field not in taken:
            allowed = ", ".join(sorted(set(config.model) & set(taken)))
            raise ConfigError(
                f"config.model.{field} is {arguments[field]!r}, but {name!r} has none; "
                f"it can be given: {allowed}"
            )
    try:
        MODELS[name](n_classes=1, **arguments)
    except ModelError as error:
        raise ConfigError(f"config.model: {error}") from None


def _at_least(config: Config, field: str, least: float) -> None:
    value = _get(config, field)
    if not least <= value < math.inf:  # which NaN is not, either
        raise ConfigError(f"config.{field} is {value}; it must be at least {least}")
