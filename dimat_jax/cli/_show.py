"""Prints the names that a config can use, or the content of a config, sweep or run.

    dimat show TOPIC

TOPIC is one of

    configs, sweeps: the bundled ones;
    algorithms, callbacks, compressors, mixings, models, optimizers, partitions,
        sources, topologies: the names that a config can use;
    options: every option with its default, its range and its meaning;
    a config (quickstart, quickstart:wa, my_config.py): its fields, and which of them
        differ from the defaults;
    a sweep (sweeps/quickstart): its runs;
    the folder of a run: its fields, and how far it got.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

from dimat_jax._folders import read_json
from dimat_jax._metrics import evaluations, read_rows
from dimat_jax.algorithms import ALGORITHMS
from dimat_jax.callbacks import CALLBACKS
from dimat_jax.cli import _bundled, _program
from dimat_jax.cli._field_texts import describe_fields
from dimat_jax.compression import COMPRESSORS
from dimat_jax.config import Config, default_config, fields_of
from dimat_jax.data.partition import PARTITIONS
from dimat_jax.data.sources import SOURCES
from dimat_jax.errors import UserError, nearest, reading
from dimat_jax.mixing import MIXINGS
from dimat_jax.models import MODELS
from dimat_jax.optimizers import OPTIMIZERS
from dimat_jax.options import Record
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
    "topologies": TOPOLOGIES,
}
_BUNDLED = {
    "configs": _bundled.bundled_configs,
    "sweeps": _bundled.bundled_sweeps,
}


def main(topics: list[str]) -> None:
    """Prints what belongs to one topic."""
    if len(topics) != 1:
        raise UserError(f"expected one topic; {_topics('')}")
    print(_shown(topics[0]))


def _shown(topic: str) -> str:
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
    name = topic.partition(":")[0]
    if name.removeprefix("configs/").removesuffix(".py") in _bundled.bundled_configs():
        return _config(_bundled.load_config(topic))
    if Path(name).is_file():
        return _file(topic)
    raise UserError(f"there is nothing to show for {topic!r}; {_topics(topic)}")


def _topics(given: str) -> str:
    configs = _bundled.bundled_configs()
    return nearest(given, [*_BUNDLED, *_REGISTRIES, "options", *configs])


def _listed(meanings: Mapping[str, str]) -> str:
    width = max(map(len, meanings))
    lines = [f"{name:{width}}  {text}".rstrip() for name, text in meanings.items()]
    return "\n".join(lines)


def _file(topic: str) -> str:
    """Shows a file of the user: a sweep if it defines `get_runs`, else a config."""
    path = Path(topic.partition(":")[0])
    with reading(path):
        is_sweep = "def get_runs" in path.read_text(encoding="utf-8")
    if is_sweep:
        return "\n".join(_bundled.load_runs(topic))
    return _config(_bundled.load_config(topic))


def _config(config: Config | Mapping[str, Any]) -> str:
    """Makes a table of a config's fields, with the defaults that differ from them."""
    fields, defaults = _texts(config), _texts(default_config())
    rows = [
        (field, value, defaults.get(field) if value != defaults.get(field) else "")
        for field, value in fields.items()
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
        table, rounds = _config(config), config["rounds"]
    rows = read_rows(workdir)
    evaluated = evaluations(rows)
    state = "finished" if (workdir / "summary.json").exists() else "not finished"
    with reading(workdir / "metrics.jsonl"):
        if evaluated:
            last = evaluated[-1]
            accuracy = 100 * last["test_accuracy_mean"]
            state += (
                f"; round {last['round']} of {rounds}, {last['phase']}: mean test "
                f"accuracy {accuracy:.2f} %"
            )
        elif rows:
            accuracy = 100 * rows[-1]["train_accuracy_mean"]
            state += (
                f"; epoch {rows[-1]['epoch']} of pre-training: mean training accuracy "
                f"{accuracy:.2f} %"
            )
    return f"{table}\n\n{state}"


COMMAND = _program.Command("show", __doc__, main)
