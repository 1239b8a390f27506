"""Runs go on with more rounds than they began with, if that changes none of them."""

import json
from pathlib import Path
from typing import Any

from dimat_jax._digests import DIGESTS, with_digest, without_digest
from dimat_jax._folders import read_json
from dimat_jax._metrics import write_bytes, write_json
from dimat_jax._run_options import PRETRAIN_EPOCHS, ROUNDS
from dimat_jax._schedules import SCHEDULE, SCHEDULES
from dimat_jax.config import Config, ConfigError, fields_of, resolved

__all__ = ["check_rounds", "set_rounds"]


def check_rounds(folder: Path, there: Config, here: Config) -> None:
    """Refuses another number of rounds than a run's, unless the run can go on to it.

    Args:
        folder: The run's folder.
        there: The config of the run.
        here: The config that is asked for, which differs in its rounds alone.

    Raises:
        ConfigError: The run has begun more rounds, or the steps that it has taken
            depend on the number of rounds.
    """
    before, now = there.rounds, here.rounds
    if before == now:
        return
    schedule = resolved(fields_of(here))[SCHEDULE.path]
    if SCHEDULES[schedule].uses_total:
        raise ConfigError(
            f"{folder} holds a run of {before} rounds, and config.{ROUNDS.path} is "
            f"{now}: with config.{SCHEDULE.path}={schedule!r} every learning rate "
            "depends on the number of rounds, so the run cannot go on to another one. "
            f"Choose another workdir; with config.init_from={folder} a new run begins "
            "with the agents of this one"
        )
    begun = _rounds_begun(folder, there)
    if now < begun:
        raise ConfigError(
            f"config.{ROUNDS.path} is {now}, but {folder} holds a run that has begun "
            f"round {begun}. Choose at least {begun}, or another workdir"
        )


def set_rounds(workdir: Path, rounds: int) -> int | None:
    """Writes another number of rounds into a run's config.json.

    A run that has finished is one that has not then.

    Returns:
        The former number; None if it is the same.
    """
    path = workdir / "config.json"
    content = read_json(path, dict, ConfigError)
    before = content.get(ROUNDS.path, ROUNDS.default)
    if before == rounds:
        return None
    # If a crash comes in between, the folder holds a run of the former number of
    # rounds that only lacks its summary. A file without a digest is not verified.
    (workdir / "summary.json").unlink(missing_ok=True)
    others = without_digest(path)
    if others is not None:
        write_bytes(path.with_name(DIGESTS), others)
    write_json(path, {**content, ROUNDS.path: rounds})
    if others is not None:
        write_bytes(path.with_name(DIGESTS), with_digest(path, path.read_bytes()))
    return before


def _rounds_begun(folder: Path, config: Config) -> int:
    """The number of rounds that the newest checkpoint has begun; 0 without any."""
    found = (folder / "checkpoints").glob("*/record/metadata")
    records = {
        int(path.parts[-3]): path for path in found if path.parts[-3].isdecimal()
    }
    epochs = fields_of(config)[PRETRAIN_EPOCHS.path]
    for number in sorted(records, reverse=True):
        try:
            record: dict[str, Any] = json.loads(records[number].read_bytes())
            in_rounds = record["epoch"] >= epochs
            return record["round"] + (in_rounds and record["within"] > 0)
        except (OSError, ValueError, LookupError, TypeError):
            continue  # It is damaged, so the run will not go on from it.
    return 0
