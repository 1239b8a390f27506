"""The files of a run. Its folder holds these:

    config.json      the config that the run was started with
    layout.json      how agents share a device, with which the run was started
    partition.json   how many training samples of each class every agent has
    metrics.jsonl    a row for every evaluation
    metrics.digests  a digest of every row
    events.out.*     the numbers of these rows, for TensorBoard
    checkpoints/     the newest states, from which a run that was killed goes on
    summary.json     the last rows, once the run has finished
    failure.json     why the run has stopped, if a loss was no longer finite

With several processes, process 0 writes all files but the checkpoints, of which each
process writes its part. All processes must see the folder.

A folder with a config.json holds a run; one with a summary.json, a finished one.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int64

import dimat_jax
from dimat_jax._checkpoint import Checkpoints
from dimat_jax._layout_choice import LayoutChoice
from dimat_jax._lock import check_held
from dimat_jax._metrics import MetricsWriter, best_rows, read_rows, write_json
from dimat_jax._processes import from_main, is_lost, is_main
from dimat_jax._restored import SAVED_ROWS, restore, restore_from
from dimat_jax._run_progress import Progress
from dimat_jax.algorithms.base import State, Variables
from dimat_jax.config import (
    RENAMED,
    Config,
    ConfigError,
    check,
    default_config,
    drop_unread,
    fields_of,
    fields_read,
    set_if_read,
)
from dimat_jax.data.partition import class_counts
from dimat_jax.errors import NonFiniteError
from dimat_jax.experiment import Experiment
from dimat_jax.ledger import Ledger
from dimat_jax.mixing import spectral_gap

__all__ = ["FAILURE", "Progress", "Results", "Workdir", "load_agents"]

FAILURE = "failure.json"
"""The file that says why a run has stopped, if a loss was no longer finite."""

_MOST_IN_ROWS = 64
"""Rows have the bytes of every link for at most this number of agents."""


class Workdir:
    """The folder of one run.

    Args:
        path: The folder. It may be missing.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)

    @property
    def is_started(self) -> bool:
        """Whether the folder holds a run."""
        return self._config.exists()

    def check(self, config: Config) -> None:
        """Refuses a folder that cannot take the run of a config.

        Raises:
            ConfigError: The config cannot be run, or the folder holds other files or
                the run of another config.
        """
        check(config)
        if not self.is_started:
            leftovers = ("metrics.jsonl", "summary.json", "checkpoints")
            exist = [(self.path / name).exists() for name in leftovers]
            if self.path.is_file() or any(exist):
                raise ConfigError(
                    f"{self.path} is no fresh folder, and has no config.json"
                )
            return
        # Options that a run does not read do not matter to it. Older versions let a
        # config set them.
        there = fields_read(fields_of(self.read_config()))
        here = fields_read(fields_of(config))
        differing = [
            f"{field} ({there.get(field)!r} there, {here.get(field)!r} here)"
            for field in sorted(there.keys() | here.keys())
            if there.get(field) != here.get(field)
        ]
        if differing:
            raise ConfigError(
                f"{self.path} holds the run of another config; they differ in "
                f"{', '.join(differing)}. Choose another workdir"
            )

    def create(self, experiment: Experiment) -> Int64[np.ndarray, "agents classes"]:
        """Makes the folder, with config.json, layout.json and partition.json.

        Returns:
            How many training samples of each class every agent has.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        dataset, config = experiment.dataset, experiment.config
        counts = class_counts(dataset.train.labels, experiment.shards)
        names = dataset.class_names
        partition = {
            "partition": config.data.partition,
            # A small training set may lack the last classes; then so do the counts.
            "classes": names and names[: counts.shape[1]],
            "counts": counts,
        }
        write_json(self.path / "partition.json", partition)
        write_json(self._layout, experiment.layout._asdict())
        # config.json comes last, since it marks the folder as that of a run.
        write_json(self._config, json.loads(config.to_json()))
        return counts

    def read_config(self) -> Config:
        """Reads the run's config.

        Fields that an older config lacks have their defaults, and so have options that
        it sets and does not read.

        Raises:
            ConfigError: There is no config.json, or it cannot be used.
        """
        config = default_config()
        try:
            fields = json.loads(self._config.read_text())
            unknown = fields_of(fields).keys() - fields_of(config).keys()
            if unknown:
                names = [
                    f"{name} (it is {RENAMED[name]} now)" if name in RENAMED else name
                    for name in sorted(unknown)
                ]
                raise ValueError(f"there are no fields {', '.join(names)}")
            config.update(fields)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{self._config} cannot be used: {error}") from error
        return drop_unread(config)

    def read_layout(self) -> LayoutChoice | None:
        """Reads how the agents of the run share a device; None if the run is new.

        Raises:
            ConfigError: layout.json cannot be used.
        """
        if not (self.is_started and self._layout.exists()):
            return None
        try:
            return LayoutChoice.read(self._layout)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{self._layout} cannot be used: {error}") from error

    def read_summary(self) -> dict[str, Any] | None:
        """Reads summary.json; None for a run that has not finished."""
        path = self.path / "summary.json"
        return json.loads(path.read_text()) if path.exists() else None

    @property
    def _layout(self) -> Path:
        return self.path / "layout.json"

    @property
    def _config(self) -> Path:
        return self.path / "config.json"


class Results:
    """The files that a run adds to while it goes on: rows, checkpoints, the summary.

    The run goes on from the newest checkpoint, if there is one. Rows that were written
    after that checkpoint are removed, since the run will write them again. Use it as a
    context manager: at the end everything is on disk, and closed.

    Args:
        workdir: The run's folder, which exists.
        experiment: What the run's config describes.

    Attributes:
        progress: How far the run has come. The code that does the work updates it.
        totals: What the steps since the beginning of the round or epoch have added up,
            in the checkpoint that was restored; None if it was saved between two.
        saved_at: When the last checkpoint was saved, in seconds of a clock that only
            this process reads.
    """

    def __init__(self, workdir: Workdir, experiment: Experiment):
        self._workdir = workdir
        self._experiment = experiment
        self._checkpoints = Checkpoints(
            workdir.path / "checkpoints", experiment.config.checkpoint.keep
        )
        record = self._checkpoints.read_record()
        if record is None:
            self.progress = Progress(Ledger(experiment.placement.n_agents))
        else:
            self.progress = Progress.of(record)
        self.totals = None
        self.saved_at = time.monotonic()
        self._saved = None if record is None else self._done
        self._number = self._checkpoints.newest()
        self._rows = None
        if is_main():
            saved = self._checkpoints.read_attached(SAVED_ROWS)
            self._rows = MetricsWriter(workdir.path, self.progress.rows, saved)

    def __enter__(self) -> "Results":
        if is_main():
            # The run goes on, so it has not failed yet.
            (self._workdir.path / FAILURE).unlink(missing_ok=True)
        return self

    def __exit__(
        self, kind: object, error: BaseException | None, trace: object
    ) -> None:
        if self._rows is not None:
            self._rows.close()
            if isinstance(error, NonFiniteError):
                content = {"message": str(error)}
                write_json(self._workdir.path / FAILURE, content)
        # Several processes finish a checkpoint together. If one of them has died, the
        # others would wait for it.
        if not is_lost(error):
            self._checkpoints.close()

    def restore(self) -> State | None:
        """The agents' state in the newest checkpoint, on the devices.

        It is not kept here, so that its memory is free once the caller gives it up.

        Returns:
            None if there is no checkpoint.
        """
        restored = restore(self._experiment, self._checkpoints)
        if restored is None:
            return None
        _, state, self.totals = restored
        return state

    def write(
        self, phase: str, number: int, measures: dict[str, Any], metrics: dict[str, Any]
    ) -> None:
        """Adds a row to metrics.jsonl and to TensorBoard's events.

        Args:
            phase: "pretrained", "merged" or "trained".
            number: The round; 0 before the first one.
            measures: How good the agents are.
            metrics: Further entries of the row.

        Raises:
            LockError: Another process has taken the folder over.
        """
        if self._rows is None:
            return
        check_held(self._workdir.path)
        progress, ledger = self.progress, self.progress.ledger
        self._rows.write(
            {
                "round": number,
                "step": progress.steps_done,
                "phase": phase,
                **measures,
                "bytes_sent_total": ledger.bytes_sent,
                "bytes_sent_by_kind": ledger.by_kind,
                "bytes_sent_by_agent": ledger.bytes_sent_by_agent,
                **self._bytes_sent_by_link(),
                "comm_rounds_total": ledger.comm_rounds,
                "present": self._experiment.links.present(number),
                "seconds_total": progress.total_seconds,
                **metrics,
            }
        )

    def _bytes_sent_by_link(self) -> dict[str, Any]:
        """The field of the links' bytes, unless there are too many for every row."""
        ledger = self.progress.ledger
        are_few = ledger.n_agents <= _MOST_IN_ROWS
        return {"bytes_sent_by_link": ledger.by_link} if are_few else {}

    @property
    def is_saved(self) -> bool:
        """Whether the newest checkpoint has all of the progress."""
        return self._saved == self._done

    @property
    def _done(self) -> tuple[int, int, int]:
        return self.progress.epoch, self.progress.round, self.progress.within

    def save(self, state: State, totals: Any | None = None) -> None:
        """Saves a checkpoint of the agents' state and of the progress.

        Args:
            state: The state.
            totals: What the steps of an unfinished round or epoch have added up; None
                if no step of it has been done.

        Raises:
            LockError: Another process has taken the folder over.
        """
        check_held(self._workdir.path)
        progress = self.progress
        if totals is None:
            progress.within = 0
        attached = {}
        if self._rows is not None:
            progress.rows = self._rows.rows
            attached[SAVED_ROWS] = self._rows.packed()
        # Checkpoints within a round come before the one at its end.
        number = progress.epoch + progress.round
        if self._number is not None:
            number = max(number, self._number + 1)
        self._number = number
        tree = state if totals is None else {"state": state, "totals": totals}
        self._checkpoints.save(number, tree, progress.record(), attached)
        self._saved, self.saved_at = self._done, time.monotonic()

    def wait(self) -> None:
        """Waits until the checkpoints are on disk."""
        self._checkpoints.wait()

    def summarize(self) -> dict[str, Any]:
        """Writes summary.json: the last rows, and what computed them.

        Returns:
            Its content.
        """
        # A run with a summary counts as finished, so all other files come first.
        self._checkpoints.wait()
        if self._rows is not None:
            self._rows.close()
        if is_main():
            write_json(self._workdir.path / "summary.json", self._summary())
        return from_main(self._workdir.read_summary() if is_main() else None)

    def _summary(self) -> dict[str, Any]:
        rows = read_rows(self._workdir.path)
        W = self._experiment.links.mixing_matrix
        return {
            **rows[-1],
            # The last row of each phase. It also shows the agents right after the last
            # merge, before they trained on.
            **{f"last_{row['phase']}": row for row in rows},
            **best_rows(rows, "validation"),
            # These are the gaps without faults: over one period of the topology, and
            # for a single one of its steps.
            "spectral_gap": spectral_gap(W),
            "spectral_gap_per_step": spectral_gap(W, per_step=True),
            "period": len(W),
            "seconds_total": self.progress.total_seconds,
            "layout": self._experiment.layout._asdict(),
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "versions": {"dimat_jax": dimat_jax.__version__, "jax": jax.__version__},
        }


def load_agents(
    workdir: str | os.PathLike[str], data_dir: str | None = None
) -> tuple[Experiment, Variables]:
    """Loads the agents of a run, finished or not. The run's folder stays as it is.

    Args:
        workdir: The run's folder.
        data_dir: Where the run's data are now, if they have moved.

    Returns:
        The run's experiment, and the agents' variables in its newest checkpoint: NumPy
        arrays `[agents, ...]`.

    Raises:
        UserError: The folder holds no run that can be read, or no checkpoint.
    """
    folder = Workdir(workdir)
    config = folder.read_config()
    if data_dir:
        set_if_read(config, "data.dir", data_dir)
    experiment = Experiment(config)
    restored = restore_from(experiment, folder.path / "checkpoints")
    if restored is None:
        raise ConfigError(f"{folder.path} holds a run that has no checkpoint yet")
    algorithm, state, _ = restored
    return experiment, experiment.placement.gather(algorithm.variables(state))
