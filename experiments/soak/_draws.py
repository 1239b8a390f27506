"""Random configs that can be run in a second, drawn from the registries.

An option that nobody mentions here is drawn by its bounds or its choices. So
algorithms, graphs and options that are added later are drawn without a change of this
file.
"""

import json
import random
from pathlib import Path
from typing import Any

from dimat_jax._layouts import LAYOUTS
from dimat_jax.config import (
    ROOT,
    Config,
    check,
    default_config,
    drop_unread,
    fields_of,
)
from dimat_jax.data.sources import DIRECTORY, SOURCES
from dimat_jax.errors import UserError
from dimat_jax.experiment import check_network
from dimat_jax.options import Option, every

__all__ = ["OPTIONS", "SMALL", "draw", "write_config"]

OPTIONS: dict[str, Option] = {option.path: option for option in every(ROOT)}
"""All options by path."""

# Options whose values decide how long a run takes, or that depend on each other.
_VALUES: dict[str, tuple[Any, ...]] = {
    "seed": (0, 1, 2**32, 2**70 + 3),
    "agents": (2, 3, 4),
    "rounds": (1, 2, 2, 3),
    "batch_size": (10, 16),
    "local_epochs": (0, 1, 1, 2),
    "local_steps": (0, 0, 1, 3),
    "data.name": tuple(n for n, s in SOURCES.items() if DIRECTORY not in s.reads),
    "data.dir": ("",),
    "data.cache_dir": ("",),
    "data.train_size": (60, 90),
    "data.test_size": (20,),
    "data.validation": (0.0, 0.2),
    "data.held_out": (10,),
    "data.min_samples": (1, 1, 5),
    "data.seed": (0, 0, 7),
    "data.label_noise": (0.0, 0.0, 0.2),
    "data.alpha": (0.5, 5.0),
    "data.classes": (2, 5),
    # The other models compile for many seconds.
    "model.name": ("mlp",) * 19 + ("resnet20",),
    "model.width": (0.0625, 0.125),
    "augmentation.pad": (0, 1),
    "merge.match_samples": (0, 12, "enough"),
    "merge.batch_size": (10, 20),
    "merge.every": (1, 2),
    "merge.restarts": (1, 2),
    "batch_norm.samples": (0, 12),
    "batch_norm.batch_size": (10,),
    "optimizer.learning_rate": (0.0, 0.01),
    "optimizer.warmup": (0, 2),
    "server.learning_rate": (0.0, 0.1),
    "server.sampled": (0, 1, 2),
    "pretrain.epochs": (0, 1, 1, 2),
    "pretrain.batch_size": (10, 16),
    "pretrain.checkpoint_every": (1, 2),
    "pretrain.cache_dir": ("",),
    "pretrain.optimizer.learning_rate": (0.0, 0.01),
    "pretrain.optimizer.warmup": (0, 2),
    "eval.every": (1, 2),
    "eval.samples": (0, 10),
    "eval.batch_size": (10, 20),
    "checkpoint.every": (1, 2),
    "checkpoint.every_minutes": (0.0, 0.002, 15.0),
    "checkpoint.keep": (1, 2, 3),
    "checkpoint.keep_every": (0, 0, 1),
    "faults.absences": ("", "0:1-1", "1:1-2"),
    "faults.edge_loss": (0.0, 0.0, 0.3),
    "faults.dropout": (0.0, 0.0, 0.3),
    "graph.file": ("graph.json",),
    "graph.degree": (0, 2),
    "graph.peers": (1, 2),
    "graph.period": (2, 3),
    "gossip.gamma": (0.0, 0.1),
    "placement.cpu_devices": (1,) * 7 + (2,),
    "placement.batching": ("vmap",) * 4 + tuple(LAYOUTS),
}
# Options that change no compiled program, or only small ones.
_FREE = (
    *("init", "topology", "mixing", "rounds", "local_epochs", "local_steps"),
    *("faults.absences", "faults.dropout", "eval.every", "pretrain.epochs"),
    *("data.partition", "data.alpha", "data.classes", "pretrain.partition"),
    *("checkpoint.every", "checkpoint.every_minutes", "checkpoint.keep"),
    *("checkpoint.keep_every", "pretrain.checkpoint_every"),
)
# How often these are drawn anew before the others are.
_TRIES = 20
_MOST_DRAWS = 10_000

SMALL: dict[str, Any] = {
    "agents": 3,
    "rounds": 2,
    "local_epochs": 1,
    "batch_size": 16,
    "data.name": "digits",
    "data.train_size": 60,
    "data.test_size": 20,
    "data.held_out": 10,
    "model.name": "mlp",
    "model.width": 0.125,
    "pretrain.epochs": 1,
    "pretrain.batch_size": 16,
    "merge.match_samples": 12,
}
"""Fields with which a run takes a second."""


def draw(seed: str, folder: Path, family: str = "") -> Config:
    """Draws a config that its checks accept.

    Args:
        seed: The same text gives the same config.
        folder: A folder where a graph's file is put, if the config names one.
        family: Configs of one family differ only in options that change no compiled
            program, so that they compile once. By default a config has its own.
    """
    for number in range(_MOST_DRAWS):
        shared = random.Random(f"{family or seed} {number // _TRIES}")
        rng = random.Random(f"{seed} {number}")
        values = {path: _value(option, shared) for path, option in OPTIONS.items()}
        values |= {path: _value(OPTIONS[path], rng) for path in _FREE}
        config = default_config()
        config.update_from_flattened_dict(values)
        drop_unread(config)
        if config.graph.file:
            config.graph.file = str(_write_graph(config.agents, folder, rng))
        try:
            check(config)
            check_network(config)
        except UserError:
            continue
        return config
    raise AssertionError("no config was accepted")


def write_config(config: Config, path: Path, **changes: Any) -> Path:
    """Writes the file of a config, for `--config`.

    Args:
        config: The config.
        path: The file.
        changes: Other values of some fields, by their paths with double underscores.
    """
    defaults = fields_of(default_config())
    fields = {
        name: value
        for name, value in fields_of(config).items()
        if value != defaults[name]
    }
    fields |= {name.replace("__", "."): value for name, value in changes.items()}
    path.write_text(
        "from dimat_jax.config import default_config\n\n\n"
        "def get_config():\n"
        "    config = default_config()\n"
        f"    config.update_from_flattened_dict({fields!r})\n"
        "    return config\n"
    )
    return path


def _value(option: Option, rng: random.Random) -> Any:
    """Draws a value of an option."""
    if option.path in _VALUES:
        return rng.choice(_VALUES[option.path])
    if option.choices is not None:
        names = list(option.choices)
        # The empty name stands for another option's choice.
        return rng.choice([*names, option.default])
    if isinstance(option.default, bool):
        return rng.random() < 0.5
    if isinstance(option.default, str):
        return option.default
    return _number(option, rng)


def _number(option: Option, rng: random.Random) -> Any:
    """Draws a number near the default and within the bounds."""
    default, kind = option.default, type(option.default)
    drawn = kind((default or 1) * rng.choice((0.25, 0.5, 1, 2)))
    for value in (drawn, default):
        try:
            option.check(value)
        except UserError:
            continue
        return value if rng.random() < 0.5 else default
    return default


def _write_graph(n_agents: int, folder: Path, rng: random.Random) -> Path:
    """Writes the adjacency of a ring and of some further edges."""
    edges = [[0] * n_agents for _ in range(n_agents)]
    for i in range(n_agents):
        for j in (*((i + 1) % n_agents,), rng.randrange(n_agents)):
            if i != j:
                edges[i][j] = edges[j][i] = 1
    path = folder / "graph.json"
    path.write_text(json.dumps(edges))
    return path
