"""The runs of a sweep: checked, with their folders, and in a good order."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dimat_jax._pretrain import pretraining_fields
from dimat_jax.config import Config, check, set_if_read
from dimat_jax.experiment import check_network
from dimat_jax.workdir import Workdir

__all__ = ["Job", "in_order", "prepare", "pretraining_key", "unfinished"]


class Job(NamedTuple):
    """One run of a sweep.

    Attributes:
        name: The run's name in the sweep.
        config: The run's config.
        workdir: The run's folder.
    """

    name: str
    config: Config
    workdir: Path

    @property
    def is_finished(self) -> bool:
        """Whether the folder holds the finished run."""
        return Workdir(self.workdir).read_summary() is not None


def prepare(
    configs: Mapping[str, Config], workdir: Path, data_dir: str | None = None
) -> list[Job]:
    """Checks all configs and folders before the first run takes hours.

    Runs that pre-train the same agents share them in `workdir`/pretrained.

    Args:
        configs: The configs by name. Their folders for data and for pre-trained agents
            are set.
        workdir: The folder for all runs.
        data_dir: Where the data are; None leaves it to the configs.

    Raises:
        UserError: A config cannot be run, or a folder holds the run of another config.
    """
    jobs = [Job(name, config, workdir / name) for name, config in configs.items()]
    for job in jobs:
        check(job.config)
        check_network(job.config)
        if data_dir:
            set_if_read(job.config, "data.dir", data_dir)
        if not job.config.pretrain.cache_dir:
            shared = str(workdir / "pretrained")
            set_if_read(job.config, "pretrain.cache_dir", shared)
        Workdir(job.workdir).check(job.config)
    return jobs


def pretraining_key(config: Config) -> str | None:
    """A text that is equal for runs that share pre-trained agents.

    Returns:
        The text; None for a run that shares no agents.
    """
    if not config.pretrain.epochs or not config.pretrain.cache_dir:
        return None
    fields = pretraining_fields(config)
    return json.dumps([config.pretrain.cache_dir, fields], sort_keys=True)


def in_order(jobs: Sequence[Job]) -> list[Job]:
    """Puts runs that pre-train different agents first.

    Jobs that start together then rarely wait for each other: only one of them can
    pre-train the same agents at a time.
    """
    keys: set[str] = set()
    first, others = [], []
    for job in jobs:
        key = pretraining_key(job.config)
        (others if key in keys else first).append(job)
        if key is not None:
            keys.add(key)
    return first + others


def unfinished(jobs: Sequence[Job]) -> list[Job]:
    """Leaves out the runs that have finished, and prints their folders."""
    left = []
    for job in jobs:
        if job.is_finished:
            print(f"{job.workdir} holds this run, finished", flush=True)
        else:
            left.append(job)
    return left
