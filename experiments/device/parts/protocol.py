"""The paper's protocol on CIFAR-100, as long as time allows.

Five agents pre-train alone, each on its own fifth of the images. All algorithms then go
on from the same agents, on a ring: in every round they communicate, are evaluated, and
train for two epochs. The number of epochs of pre-training follows from the time of a
step; rounds go on until a cell's time is over.
"""

import contextlib
import math
import shutil
import time
from pathlib import Path
from typing import Any

import dimat_jax
from configs import cifar100_resnet20
from dimat_jax._metrics import read_evaluations
from dimat_jax.config import Config, drop_unread
from experiments.device._cells import Cell, LeftOut, Log, read_record
from experiments.device._subject import Steps, layout_fields
from experiments.device.parts import Settings
from experiments.device.parts.layouts import best_layout

__all__ = ["cells"]

_AGENTS = 5
_WIDTH = 1
_ROUNDS = 20
_MOST_EPOCHS = 100
# The share of the part's time that pre-training is to take, and may take.
_PRETRAINS, _PRETRAINS_AT_MOST = 0.35, 0.6
# The share of its limit after which a run ends by itself, with what it has. If its
# process was killed instead, the next run would wait for a new one.
_ENDS = 0.85
# What is compared, with the fields that differ from the config's.
_RUNS: dict[str, dict[str, Any]] = {
    "dimat own": {"algorithm": "dimat", "merge.frame": "own"},
    "wa": {"algorithm": "wa"},
    "cdsgd": {"algorithm": "cdsgd"},
    "dimat reference": {
        "algorithm": "dimat",
        "merge.frame": "reference",
        "merge.stay": 0.1,
    },
    "local": {"algorithm": "local"},
}
# The entries of a row in metrics.jsonl that are kept.
_KEPT = ("round", "step", "phase", "test_accuracy_mean", "test_accuracy_std")
_KEPT += ("test_loss_mean", "consensus_distance", "seconds_total")


def cells(settings: Settings) -> list[Cell]:
    """The cells of this part: pre-training, then each algorithm."""
    pretrains = settings.seconds * _PRETRAINS_AT_MOST
    each = settings.seconds * (1 - _PRETRAINS) / len(_RUNS)
    return [Cell("pretrain", pretrains, _pretrain(settings))] + [
        Cell(name, each, _run(settings, name, each)) for name in _RUNS
    ]


def _config(settings: Settings, epochs: int, fields: dict[str, Any]) -> Config:
    if settings.data is None and not settings.tiny:
        raise LeftOut("there is no folder with CIFAR-100 (--data)")
    config = cifar100_resnet20.get_config()
    width = 0.25 if settings.tiny else _WIDTH
    layouts = read_record(settings.out / "layouts.json")
    common: dict[str, Any] = {
        "agents": _AGENTS,
        "topology": "ring",
        "data.dir": str(settings.data or ""),
        "model.width": width,
        "rounds": _ROUNDS,
        "pretrain.epochs": epochs,
        "pretrain.cache_dir": str(settings.work / "pretrained-cifar100"),
        "pretrain.checkpoint_every": _MOST_EPOCHS,
        "checkpoint.every": _ROUNDS,
        "merge.match_data": "proxy",
        "merge.match_samples": 5000,
        "batch_norm.data": "proxy",
        "batch_norm.samples": 5000,
        **layout_fields(best_layout(layouts, "resnet20", width, _AGENTS)),
    }
    if settings.tiny:
        common |= {
            "data.name": "random" if settings.data is None else "cifar100",
            "rounds": 1,
            "local_epochs": 1,
            "batch_size": 20,
            "pretrain.batch_size": 20,
            "data.train_size": 200,
            "data.test_size": 100,
            "merge.batch_size": 50,
            "merge.match_samples": 100,
            "batch_norm.samples": 100,
            "eval.batch_size": 50,
        }
    config.update_from_flattened_dict(common | fields)
    return drop_unread(config)


def _pretrain(settings: Settings):
    def measure(log: Log) -> None:
        started = time.perf_counter()
        config = _config(settings, 1, _RUNS["local"])
        steps = Steps(config)
        seconds, _ = steps.seconds()
        epoch = seconds * steps.experiment.sampler.steps_per_epoch
        left = settings.seconds * _PRETRAINS - (time.perf_counter() - started)
        epochs = 1 if settings.tiny else max(1, min(int(left / epoch), _MOST_EPOCHS))
        log.note(step_seconds=seconds, epoch_seconds=epoch, epochs=epochs)
        # Without rounds, the run pre-trains, keeps the agents for others, and ends.
        alone = _config(settings, epochs, {**_RUNS["local"], "rounds": 0})
        _rows_of(alone, settings.work / "protocol" / "pretrain", log)

    return measure


def _run(settings: Settings, name: str, seconds: float):
    def measure(log: Log) -> None:
        if "epochs" not in log.figures["pretrain"]:
            raise LeftOut("pre-training did not get far enough")
        config = _config(settings, log.figures["pretrain"]["epochs"], _RUNS[name])
        folder = settings.work / "protocol" / name.replace(" ", "-")
        with contextlib.suppress(_OutOfTime):
            _rows_of(config, folder, log, _ENDS * seconds)

    return measure


class _OutOfTime(Exception):
    """Ends a run before its cell is over time."""


def _rows_of(config: Config, folder: Path, log: Log, seconds: float = math.inf) -> None:
    """Runs a config, and notes the row of each evaluation as soon as it is there.

    Raises:
        _OutOfTime: an evaluation ended after `seconds`.
    """
    started = time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)

    def note_rows(line: str) -> None:
        rows = [{k: row.get(k) for k in _KEPT} for row in read_evaluations(folder)]
        log.note(rows=rows)
        if time.perf_counter() - started > seconds:
            raise _OutOfTime

    dimat_jax.run(config, folder, note_rows)
    note_rows("")
