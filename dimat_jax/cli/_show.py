"""Prints the names that a config can use, or the content of a config, sweep or run.

    dimat show TOPIC [--config.FIELD=VALUE ...]

TOPIC is one of

    configs, sweeps: the bundled ones;
    algorithms, callbacks, compressors, mixings, models, optimizers, partitions,
        sources, tasks, topologies: the names that a config can use;
    options: every option with its default, its range and its meaning;
    a config (quickstart, quickstart:wa, my_config.py): what it will do, to whom agents
        talk, how many steps and bytes it takes, and about how much time and memory;
        and the fields that it reads. Its fields may be overridden as for `dimat train`,
        which may also be given as --config=CONFIG;
    a sweep (sweeps/quickstart): its runs;
    the folder of a run: its fields, and how far it got.
"""

import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from tabulate import tabulate

from dimat_jax._folders import read_json
from dimat_jax._metrics import evaluations, read_rows
from dimat_jax.algorithms import ALGORITHMS
from dimat_jax.callbacks import CALLBACKS
from dimat_jax.cli import _bundled, _program
from dimat_jax.cli._field_texts import describe_fields
from dimat_jax.cli._outlook import outlook
from dimat_jax.compression import COMPRESSORS
from dimat_jax.config import (
    ROOT,
    Config,
    check,
    default_config,
    fields_of,
    resolved,
)
from dimat_jax.data.partition import PARTITIONS
from dimat_jax.data.sources import SOURCES
from dimat_jax.errors import UserError, nearest, reading
from dimat_jax.mixing import MIXINGS
from dimat_jax.models import MODELS
from dimat_jax.optimizers import OPTIMIZERS
from dimat_jax.options import Record, read
from dimat_jax.placement import request_cpu_devices
from dimat_jax.tasks import TASKS, metric_of
from dimat_jax.topology import TOPOLOGIES

__all__ = ["COMMAND"]

# The registries whose names stand in configs, by topic.
_REGISTRIES: dict[str, Mapping[str, Record]] = {
    "algorithms": ALGORITHMS,
    "callbacks": CALLBACKS,
    "compressors": COMPRESSORS,
    "mixings": MIXINGS,
    "models": MODELS,
    "optimizers": OPTIMIZERS,
    "partitions": PARTITIONS,
    "sources": SOURCES,
    "tasks": TASKS,
    "topologies": TOPOLOGIES,
}
_BUNDLED = {
    "configs": _bundled.bundled_configs,
    "sweeps": _bundled.bundled_sweeps,
}


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_float(
        "seconds",
        30,
        "For a config: how long to wait at most until a few local steps have been "
        "compiled and timed. 0 times none.",
        lower_bound=0,
    )
    # Overrides belong to a config, also if that is given without its flag.
    topic = _first_word(sys.argv)
    named = topic if topic is not None and _bundled.is_config(topic) else None
    _bundled.define_config(named, "The config to look into.", is_required=False)


def _first_word(argv: Sequence[str]) -> str | None:
    """Returns the first argument that is neither a flag nor the value of one."""
    is_switch = {name: flags.FLAGS[name].boolean for name in flags.FLAGS}
    fields = fields_of(default_config()).items()
    is_switch |= {f"config.{path}": isinstance(value, bool) for path, value in fields}
    is_switch["config"] = False
    values = flags.FlagValues()
    for name, alone in is_switch.items():
        define = flags.DEFINE_boolean if alone else flags.DEFINE_string
        define(name, None, "See `define_flags`.", flag_values=values)
    _, *words = values(argv, known_only=True)
    return next((word for word in words if not word.startswith("-")), None)


def main(topics: list[str]) -> None:
    """Prints what belongs to one topic."""
    if flags.FLAGS["config"].present:
        topics = [*topics, _bundled.name_of_given_config()]
    if len(topics) != 1:
        raise UserError(f"expected one topic; {_topics('')}")
    config = None if flags.FLAGS.config is None else _bundled.given_config()
    print(show(topics[0], config, flags.FLAGS.seconds))


def show(topic: str, config: Config | None = None, seconds: float = 0) -> str:
    """Describes one topic.

    Args:
        topic: one of those in the help text.
        config: the config, with overrides, if the topic is one.
        seconds: how long to wait for the times of a config's local steps.

    Raises:
        UserError: there is no such topic, or it cannot be described.
    """
    if config is not None:
        return _config(config, seconds)
    if topic in _BUNDLED:
        files = _BUNDLED[topic]()
        return _listed({name: _bundled.summary(path) for name, path in files.items()})
    if topic in _REGISTRIES:
        records = _REGISTRIES[topic]
        return _listed({name: record.meaning for name, record in records.items()})
    if topic == "options":
        return describe_fields()
    if (Path(topic) / "config.json").is_file():
        return _run(Path(topic))
    if topic.removeprefix("configs/").startswith("sweeps/"):
        return "\n".join(_bundled.load_runs(topic))
    if _bundled.is_config(topic):
        return _config(_bundled.load_config(topic), seconds)
    if Path(topic.partition(":")[0]).is_file():
        return "\n".join(_bundled.load_runs(topic))
    raise UserError(f"there is nothing to show for {topic!r}; {_topics(topic)}")


def _topics(given: str) -> str:
    configs = _bundled.bundled_configs()
    return nearest(given, [*_BUNDLED, *_REGISTRIES, "options", *configs])


def _listed(meanings: Mapping[str, str]) -> str:
    width = max(map(len, meanings))
    lines = [f"{name:{width}}  {text}".rstrip() for name, text in meanings.items()]
    return "\n".join(lines)


def _config(config: Config, seconds: float) -> str:
    """Says what a config will do, and which fields it reads."""
    check(config)
    # Another process times a few steps, and needs the accelerators.
    jax.config.update("jax_platforms", "cpu")
    request_cpu_devices(config.placement.cpu_devices)
    names = read(ROOT, resolved(fields_of(config)))
    return f"{outlook(config, seconds)}\n\n{_table(config, names)}"


def _table(
    config: Config | Mapping[str, Any], names: Collection[str] | None = None
) -> str:
    """Makes a table of a config's fields, with the defaults that differ from them.

    Args:
        config: the config.
        names: the paths of the fields that are shown; by default all of them.
    """
    fields, defaults = _texts(config), _texts(default_config())
    rows = [
        (field, value, defaults.get(field) if value != defaults.get(field) else "")
        for field, value in fields.items()
        if names is None or field in names
    ]
    header = ("field", "value", "default, if different")
    return tabulate(rows, header, tablefmt="simple", disable_numparse=True)


def _texts(config: Config | Mapping[str, Any]) -> dict[str, str]:
    """Returns a config's fields as text, by dotted path. Text values keep quotes."""
    return {path: repr(value) for path, value in fields_of(config).items()}


def _run(workdir: Path) -> str:
    """Shows a run's config, and its last evaluation."""
    config = read_json(workdir / "config.json")
    with reading(workdir / "config.json"):
        table, rounds = _table(config), config["rounds"]
    rows = read_rows(workdir)
    evaluated = evaluations(rows)
    state = "finished" if (workdir / "summary.json").exists() else "not finished"
    with reading(workdir / "metrics.jsonl"):
        if evaluated:
            last = evaluated[-1]
            metric = metric_of(last)
            state += (
                f"; round {last['round']} of {rounds}, {last['phase']}: mean test "
                f"{metric.words} {metric.text(last[metric.field()])}"
            )
        elif rows:
            metric = metric_of(rows[-1], "train")
            value = rows[-1][metric.field(split="train")]
            state += (
                f"; epoch {rows[-1]['epoch']} of pre-training: mean training "
                f"{metric.words} {metric.text(value)}"
            )
    return f"{table}\n\n{state}"


COMMAND = _program.Command("show", __doc__, main, define_flags)
