"""The runs of a sweep: checked, with their folders, and in a good order."""

import functools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dimat_jax._chosen import check_network, number_of_agents
from dimat_jax._division import check_samples, divide
from dimat_jax._fields_together import build_model
from dimat_jax._folders import check_output, strangers
from dimat_jax._inputs import FromPlugin, from_plugins
from dimat_jax._lock import LOCK_FILES
from dimat_jax._needs import check_graph_and_steps, load_checked
from dimat_jax._pretrain import pretraining_fields
from dimat_jax._starting import read_start
from dimat_jax.algorithms.conditions import no_negative_weights
from dimat_jax.config import (
    Config,
    check,
    fields_of,
    record_of,
    resolved,
    set_if_read,
)
from dimat_jax.data import sources
from dimat_jax.errors import UserError, concerning
from dimat_jax.models import classifier
from dimat_jax.workdir import Workdir

__all__ = [
    "Job",
    "check_here",
    "in_order",
    "prepare",
    "pretraining_key",
    "unfinished",
]

# The folder of the agents that runs share.
_SHARED = "pretrained"
# The names that a sweep uses in its folder.
_RESERVED = (_SHARED, "submitit")


class Job(NamedTuple):
    """One run of a sweep.

    Attributes:
        name: The run's name in the sweep.
        config: The run's config.
        workdir: The run's folder.
        from_plugins: The things of plugins that the config names. The run's process
            has to import these plugins.
    """

    name: str
    config: Config
    workdir: Path
    from_plugins: Sequence[FromPlugin] = ()

    @property
    def summary(self) -> dict[str, Any] | None:
        """The summary of the finished run; None if it has not finished."""
        return Workdir(self.workdir).read_summary(self.config.rounds)

    @property
    def is_finished(self) -> bool:
        """Whether the folder holds the finished run."""
        return self.summary is not None


def prepare(
    configs: Mapping[str, Config], workdir: Path, data_dir: str | None = None
) -> list[Job]:
    """Checks all names, configs and folders before the first run takes hours.

    Runs that pre-train the same agents share them in `workdir`/pretrained.

    Args:
        configs: The configs by name. Their folders for data and for pre-trained agents
            are set.
        workdir: The folder for all runs.
        data_dir: Where the data are; None leaves it to the configs.

    Raises:
        UserError: A config cannot be run, a name is no name of a folder of its own, or
            a folder cannot be used or holds the run of another config.
    """
    check_output(workdir, "--workdir")
    _refuse_another_kind(workdir)
    _check_names(configs)
    jobs = [Job(name, config, workdir / name) for name, config in configs.items()]
    for job in jobs:
        with concerning(f"run {job.name!r}"):
            check(job.config)
            check_graph_and_steps(resolved(fields_of(job.config)))
            check_network(job.config)
            if data_dir:
                set_if_read(job.config, "data.dir", data_dir)
            if not job.config.pretrain.cache_dir:
                shared = str(workdir / _SHARED)
                set_if_read(job.config, "pretrain.cache_dir", shared)
            Workdir(job.workdir).check(job.config)
    return [job._replace(from_plugins=from_plugins(job.config)) for job in jobs]


def check_here(jobs: Sequence[Job]) -> None:
    """Checks that this machine has the data and the memory that the runs need.

    Every data set is read once.

    Raises:
        UserError: The message names the run.
    """
    read = functools.cache(sources.read)
    for job in jobs:
        if not job.is_finished:
            with concerning(f"run {job.name!r}"):
                _check_data(job.config, read)
                if not Workdir(job.workdir).has_checkpoint:
                    read_start(job.config)


def _check_data(config: Config, read: Callable[..., sources.Dataset]) -> None:
    """Does the checks of `Experiment` that need the data, and builds no parts."""
    fields = resolved(fields_of(config))
    dataset, _ = load_checked(config, fields, read)
    division = divide(dataset.train.classes, number_of_agents(fields), fields)
    model = build_model(fields, dataset.signature)
    has_statistics = classifier.has_statistics(model)
    n_test = len(dataset.test.labels)
    check_samples(fields, division, n_test, has_statistics=has_statistics)
    record = record_of(fields)
    if has_statistics and record.uses_graph:
        no_negative_weights(f"{record.name} with BatchNorm", check_network(config))


def _refuse_another_kind(workdir: Path) -> None:
    """Refuses a folder that holds a single run, or the files of something else."""
    if (workdir / "config.json").exists():
        raise UserError(
            f"--workdir={workdir} is the folder of a single run; a sweep needs a "
            "folder of its own"
        )

    def is_own(path: Path) -> bool:
        own = path.is_dir() or path.name in LOCK_FILES
        return own or path.suffix in (".md", ".html", ".tex", ".csv", ".png", ".json")

    if foreign := strangers(workdir, is_own):
        raise UserError(
            f"--workdir={workdir} holds other files ({', '.join(foreign[:5])}); choose "
            "a new or an empty folder, or that of a sweep"
        )


def _check_names(names: Collection[str]) -> None:
    """Refuses names that are not those of different folders below the sweep's."""
    parts_of = {}
    for name in names:
        parts = Path(name).parts
        allowed = "a name must be a path below the sweep's folder, as in iid/ring-wa"
        if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
            raise UserError(f"a run has the name {name!r}; {allowed}")
        if parts[0].startswith(".") or parts[0] in _RESERVED:
            raise UserError(
                f"a run has the name {name!r}, but the sweep keeps its own files there"
            )
        if parts in parts_of:
            other = parts_of[parts]
            raise UserError(f"the runs {other!r} and {name!r} have the same folder")
        parts_of[parts] = name
    for parts, name in parts_of.items():
        for length in range(1, len(parts)):
            if parts[:length] in parts_of:
                other = parts_of[parts[:length]]
                raise UserError(
                    f"the run {name!r} would be in the folder of the run {other!r}"
                )


def pretraining_key(config: Config) -> str | None:
    """A text that is equal for runs that share pre-trained agents.

    Returns:
        The text; None for a run that shares no agents.
    """
    if not config.pretrain.epochs or not config.pretrain.cache_dir or config.init_from:
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
