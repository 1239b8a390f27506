"""Runs that take a second, for the tests of sweeps."""

from pathlib import Path
from typing import Any

from configs import quickstart
from dimat_jax._metrics import read_rows
from dimat_jax._sweeping import Job, prepare
from dimat_jax.config import drop_unread

# The rounds of a run that is still going on when a test interrupts it.
MANY_ROUNDS = 120


def small(algorithm: str = "wa", **changes: Any):
    """Makes a small config. In the names of changes, double underscores are dots."""
    config = quickstart.get_config(algorithm)
    fields = {
        "agents": 3,
        "rounds": 2,
        "local_epochs": 1,
        "data.train_size": 300,
        "data.test_size": 100,
        "pretrain.epochs": 2,
    }
    fields |= {name.replace("__", "."): value for name, value in changes.items()}
    config.update_from_flattened_dict(fields)
    return drop_unread(config)


def long(**changes: Any):
    """A run that is still going on when a test interrupts it."""
    return small("wa", **{"rounds": MANY_ROUNDS, "checkpoint__every": 5, **changes})


def jobs(workdir: Path, **configs: Any) -> list[Job]:
    return prepare(configs, workdir)


def rows(workdir: Path) -> list[dict[str, Any]]:
    """The rows of a run, without the times."""
    times = ("seconds_total", "merge_seconds")
    return [
        {name: value for name, value in row.items() if name not in times}
        for row in read_rows(workdir)
    ]
