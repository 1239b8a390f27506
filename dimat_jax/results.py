"""Runs and sweeps from Python and in notebooks, with results that can be looked into.

result = dimat_jax.run(config)
result.rows  # a pandas.DataFrame
result.figure()  # a matplotlib Figure
result.agents["params"]  # every array has a leading axis of agents

results = dimat_jax.sweep({"one": config, "other": other}, seeds=3)
results.tables["Mean test accuracy of the agents (%)"]
"""

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import pandas as pd
from tqdm import auto, tqdm

from dimat_jax import _sweeping, reports, train
from dimat_jax._compile_cache import keep_compiled
from dimat_jax._lock import check_free, held
from dimat_jax._metrics import read_rows
from dimat_jax.algorithms.base import Variables
from dimat_jax.config import Config, copy_of
from dimat_jax.errors import SweepError, UserError
from dimat_jax.experiment import Experiment
from dimat_jax.reports import Runs
from dimat_jax.sweeps import over_seeds
from dimat_jax.tasks import metric_of

__all__ = ["RunResult", "SweepResult", "run", "sweep"]

# A pandas.DataFrame, and a matplotlib Figure; see `reports`.
DataFrame = Any
Figure = Any


class _Folder:
    """A folder of results. A temporary one is removed once nothing refers to this.

    Args:
        workdir: The folder; None for a temporary one.

    Attributes:
        path: The folder.
    """

    def __init__(self, workdir: str | os.PathLike[str] | None):
        if workdir is not None:
            self.path = Path(workdir)
            return
        if jax.process_count() > 1:
            raise UserError("several processes need a workdir that all of them see")
        self.path = Path(tempfile.mkdtemp(prefix="dimat_jax-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


class RunResult(dict[str, Any]):
    """A finished run: the content of its summary.json, and what its folder holds.

    A temporary folder is there as long as this object is.

    Args:
        folder: The run's folder.
        summary: The content of summary.json.
    """

    def __init__(self, folder: _Folder, summary: Mapping[str, Any]):
        super().__init__(summary)
        self._folder = folder

    def __repr__(self) -> str:
        metric = metric_of(self)
        return (
            f"RunResult({str(self.workdir)!r}: round {self['round']}, test "
            f"{metric.words} {metric.text(self[metric.field()])})"
        )

    @property
    def workdir(self) -> Path:
        """The run's folder."""
        return self._folder.path

    @cached_property
    def rows(self) -> DataFrame:
        """The rows of metrics.jsonl: evaluations, and epochs between them."""
        return pd.DataFrame(read_rows(self.workdir))

    @property
    def experiment(self) -> Experiment:
        """The parts of the run: its data, its model, its network and so on."""
        return self._loaded[0]

    @property
    def agents(self) -> Variables:
        """The agents' variables at the end: NumPy arrays `[agents, ...]`."""
        return self._loaded[1]

    @cached_property
    def _loaded(self) -> tuple[Experiment, Variables]:
        return train.load_agents(self.workdir)

    @cached_property
    def runs(self) -> Runs:
        """The run as `reports` take it, for all of their tables and figures."""
        return reports.load(self.workdir)

    def figure(self, measure: str = "", against: str = "rounds") -> Figure:
        """Draws a measure over the rounds; see `reports.curves_figure`."""
        return reports.curves_figure(self.runs, measure=measure, against=against)


class SweepResult:
    """The finished runs of a sweep.

    Args:
        folder: The sweep's folder.
        results: The results of the runs, by name.
    """

    def __init__(self, folder: _Folder, results: Mapping[str, RunResult]):
        self._folder = folder
        self._results = dict(results)

    def __repr__(self) -> str:
        return f"SweepResult({str(self.workdir)!r}: {', '.join(self._results)})"

    def __getitem__(self, name: str) -> RunResult:
        return self._results[name]

    @property
    def names(self) -> list[str]:
        """The names of the runs."""
        return list(self._results)

    @property
    def workdir(self) -> Path:
        """The sweep's folder."""
        return self._folder.path

    @cached_property
    def runs(self) -> Runs:
        """The runs as `reports` take them, for all of their tables and figures."""
        return reports.load(self.workdir)

    @property
    def rows(self) -> DataFrame:
        """The evaluations of all runs, with the fields in which they differ."""
        return self.runs.evaluations

    @property
    def tables(self) -> dict[str, DataFrame]:
        """The tables of the report, by title: means and deviations over the seeds."""
        return reports.tables(self.runs)

    def figure(self, measure: str = "", against: str = "rounds") -> Figure:
        """Draws a measure over the rounds; see `reports.curves_figure`."""
        return reports.curves_figure(self.runs, measure=measure, against=against)


def run(
    config: Config,
    workdir: str | os.PathLike[str] | None = None,
    log: Callable[[str], None] = print,
    make_bar: Callable[..., tqdm] = auto.tqdm,
    callbacks: Sequence[Callable[[dict[str, Any]], Any]] = (),
) -> RunResult:
    """Runs a config, or what is left of it; see `train.run`.

    Compiled programs are kept on disk for later processes, as the command line does.

    Args:
        config: A config as `config.default_config` describes.
        workdir: The run's folder. By default it is a temporary one, which is removed
            together with the result.
        log: A function that receives a line of text for every evaluation and epoch.
        make_bar: The class of the progress bar. By default it suits notebooks and
            terminals.
        callbacks: Functions that receive every row; see `train.run`.

    Raises:
        UserError: The config cannot be run; see `train.run` for this and other errors.
    """
    keep_compiled()
    folder = _Folder(workdir)
    summary = train.run(config, folder.path, log, make_bar, callbacks)
    return RunResult(folder, summary)


def sweep(
    configs: Mapping[str, Config],
    workdir: str | os.PathLike[str] | None = None,
    *,
    seeds: int | None = None,
    jobs: int = 1,
) -> SweepResult:
    """Runs many configs, or what is left of them, as `dimat sweep` does.

    Args:
        configs: The configs by name; `sweeps.grid` makes them. They are not changed.
        workdir: The folder for all runs. By default it is a temporary one, which is
            removed together with the result.
        seeds: The number of seeds with which every run is repeated, from 0 on. None:
            every config has its own seed.
        jobs: The number of runs that go on at a time, each in a process with its part
            of the CPU cores. On accelerators it is 1, because this process holds them.

    Raises:
        SweepError: Some runs have failed. The others are in the folder.
        UserError: A config or the folder cannot be used, or `jobs` is too large.
    """
    keep_compiled()
    if jobs < 1 or (jobs > 1 and jax.default_backend() != "cpu"):
        raise UserError(
            f"jobs is {jobs}; it must be at least 1, and on accelerators 1, because "
            "this process holds them. `dimat sweep --jobs` shares them out"
        )
    folder = _Folder(workdir)
    runs = {name: copy_of(config) for name, config in configs.items()}
    plans = _sweeping.prepare(over_seeds(runs, seeds) if seeds else runs, folder.path)
    _sweeping.check_here(plans)
    with held(folder.path, print):
        for plan in plans:
            check_free(plan.workdir)
        if jobs > 1:
            shares = _sweeping.share_out(jobs, 1)
            failures = _sweeping.run_side_by_side(plans, shares)
        else:
            failures = _sweeping.run_here(plans)
    if failures:
        lines = [f"    {name}: {reason}" for name, reason in failures.items()]
        raise SweepError(
            f"{len(failures)} of {len(plans)} runs have failed\n" + "\n".join(lines)
        )
    results = {
        plan.name: RunResult(_Folder(plan.workdir), plan.summary or {})
        for plan in plans
    }
    return SweepResult(folder, results)
