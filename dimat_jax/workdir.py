"""The files of a run. Its folder holds these:

    config.json      the config that the run was started with
    layout.json      how agents share a device, with which the run was started
    model.json       what is needed to read the agents without their data
    inputs.json      digests of the data and of files that the config names, versions
    graph.file.json  a copy of such a file, if the config names one (or .npy)
    partition.json   how many training samples of each class every agent has
    metrics.jsonl    a row for every evaluation, and for every epoch in between
    metrics.digests  a digest of every row
    events.out.*     the numbers of these rows, for TensorBoard
    checkpoints/     the newest states, from which a run that was killed goes on
    summary.json     the last rows, once the run has finished
    digests.json     digests of the JSON files above
    failure.json     why the run has stopped, if a loss was no longer finite

With several processes, process 0 writes all files but the checkpoints, of which each
process writes its part. All processes must see the folder.

A folder with a config.json holds a run; one with a summary.json, a finished one.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import jax
from absl import logging

import dimat_jax
from dimat_jax._checkpoint import Checkpoints
from dimat_jax._events import About
from dimat_jax._loaded_run import load_agents
from dimat_jax._lock import check_held
from dimat_jax._metrics import (
    MetricsWriter,
    best_rows,
    read_evaluations,
    read_rows,
    write_json,
)
from dimat_jax._partition_picture import partition_picture
from dimat_jax._processes import from_main, is_lost, is_main
from dimat_jax._restored import SAVED_ROWS, restore
from dimat_jax._run_folder import Workdir
from dimat_jax._run_progress import Progress
from dimat_jax.algorithms.base import State
from dimat_jax.callbacks import CallbackError, Callbacks, Run
from dimat_jax.config import fields_of, fields_read
from dimat_jax.data.partition import class_counts
from dimat_jax.errors import NonFiniteError
from dimat_jax.experiment import Experiment
from dimat_jax.ledger import Ledger
from dimat_jax.mixing import spectral_gap

__all__ = ["FAILURE", "Progress", "Results", "Stopped", "Workdir", "load_agents"]

FAILURE = "failure.json"
"""The file that says why a run has stopped, if a loss was no longer finite."""

_MOST_IN_ROWS = 64
"""Rows have the bytes of every link for at most this number of agents."""


class Stopped(Exception):
    """A callback has ended the run, whose state is saved. The text is the reason."""


class Results:
    """The files that a run adds to while it goes on: rows, checkpoints, the summary.

    The run goes on from the newest checkpoint, if there is one. Rows that were written
    after that checkpoint are removed, since the run will write them again. Use it as a
    context manager: at the end everything is on disk, and closed.

    Args:
        workdir: The run's folder, which exists.
        experiment: What the run's config describes.
        callbacks: What gets every row, beside the callbacks that the config names.

    Attributes:
        progress: How far the run has come. The code that does the work updates it.
        totals: What the steps since the beginning of the round or epoch have added up,
            in the checkpoint that was restored; None if it was saved between two.
        saved_at: When the last checkpoint was saved, in seconds of a clock that only
            this process reads.
    """

    def __init__(
        self,
        workdir: Workdir,
        experiment: Experiment,
        callbacks: Sequence[Callable[[dict[str, Any]], Any]] = (),
    ):
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
            self._rows = MetricsWriter(
                workdir.path, self.progress.rows, saved, self._about()
            )
        self._callbacks = self._start(callbacks)
        self._stopped = ""

    def _start(self, more: Sequence[Callable[..., Any]]) -> Callbacks | None:
        """Makes the callbacks; None if there are none. Process 0 has them."""
        config = self._experiment.config
        if not config.callbacks and not more:
            return None
        if not is_main():
            return Callbacks({})
        path = self._workdir.path
        run = Run(path, config.to_dict(), read_rows(path))
        return Callbacks.start(fields_of(config), run, more)

    def __enter__(self) -> "Results":
        if is_main():
            # The run goes on, so it has not failed yet.
            (self._workdir.path / FAILURE).unlink(missing_ok=True)
        return self

    def __exit__(
        self, kind: object, error: BaseException | None, trace: object
    ) -> None:
        with ExitStack() as stack:
            # Several processes finish a checkpoint together. If one of them has died,
            # the others would wait for it.
            if not is_lost(error):
                stack.callback(self._checkpoints.close)
            if self._rows is not None:
                stack.callback(self._rows.close)
            if self._rows is not None and isinstance(error, NonFiniteError):
                content = {"message": str(error)}
                write_json(self._workdir.path / FAILURE, content, digested=True)

    def _about(self) -> About:
        """What TensorBoard shows of the run beside its rows."""
        options = fields_read(fields_of(self._experiment.config))
        experiment = self._experiment
        counts = class_counts(experiment.dataset.train.classes, experiment.shards)
        return About(options, partition_picture(counts), experiment.learnt.metric)

    def restore(self) -> State | None:
        """The agents' state in the newest checkpoint, on the devices.

        It is not kept here, so that its memory is free once the caller gives it up.

        Returns:
            None if there is no checkpoint.
        """
        restored = restore(self._experiment, self._checkpoints)
        if restored is None:
            return None
        self.totals = restored.totals
        return restored.state

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
        row = {
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
        self._add(row)

    def _add(self, row: dict[str, Any]) -> None:
        """Adds a row, which the callbacks get too."""
        assert self._rows is not None
        written = self._rows.write(row)
        if self._callbacks is not None:
            self._callbacks(written)

    def stop_if_asked(self, state: State) -> None:
        """Ends the run if a callback has asked for it, or has failed. It is saved.

        It is called between two rounds, by all processes.

        Raises:
            Stopped: A callback has asked for it.
            CallbackError: A callback has failed.
        """
        if self._callbacks is None:
            return
        reason, failure = from_main([self._callbacks.reason, str(self._failure)])
        if (reason or failure) and not self.is_saved:
            self.save(state)
        if failure:
            self.wait()
            raise CallbackError(
                f"{failure}; the run is saved. The same command goes on, also with "
                "other callbacks"
            )
        if reason:
            self._stopped = reason
            raise Stopped(reason)

    @property
    def _failure(self) -> CallbackError | str:
        failed = self._callbacks and self._callbacks.error
        return failed or ""

    def write_epoch(
        self, phase: str, number: int, epoch: int, metrics: dict[str, Any]
    ) -> None:
        """Adds a row for an epoch between two evaluations.

        Args:
            phase: "pretraining" or "training".
            number: The round; 0 for pre-training.
            epoch: The number of epochs of pre-training or of the round that are done.
            metrics: Further entries of the row.

        Raises:
            LockError: Another process has taken the folder over.
        """
        if self._rows is None:
            return
        check_held(self._workdir.path)
        done = {"round": number, "step": self.progress.steps_done, "phase": phase}
        seconds = {"seconds_total": self.progress.total_seconds}
        self._add({**done, "epoch": epoch, **metrics, **seconds})

    def pretraining_rows(self) -> list[dict[str, Any]]:
        """The rows of pre-training's epochs that are written."""
        rows = read_rows(self._workdir.path) if self._rows is not None else []
        return [row for row in rows if row["phase"] == "pretraining"]

    def write_pretraining_rows(self, rows: Sequence[dict[str, Any]]) -> None:
        """Adds rows of pre-training's epochs that another run has done.

        Epochs that this run has done before are left out.
        """
        if self._rows is not None:
            check_held(self._workdir.path)
            known = {row["epoch"] for row in self.pretraining_rows()}
            for row in rows:
                if row["epoch"] not in known:
                    self._add(row)

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
        for_good = totals is None and self.keeps(progress.round)
        record = progress.record()
        self._checkpoints.save(number, tree, record, attached, for_good=for_good)
        self._saved, self.saved_at = self._done, time.monotonic()

    def keeps(self, number: int) -> bool:
        """Whether the checkpoint at the end of a round is kept for good."""
        every = self._experiment.config.checkpoint.keep_every
        return every > 0 and number > 0 and number % every == 0

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
            path = self._workdir.path / "summary.json"
            write_json(path, self._summary(), digested=True)
        summary = from_main(self._workdir.read_summary() if is_main() else None)
        if self._callbacks is not None:
            self._callbacks.end(summary)
        if self._failure:
            logging.warning("%s; the run has finished without it", self._failure)
        return summary

    def _summary(self) -> dict[str, Any]:
        rows = read_evaluations(self._workdir.path)
        W, learnt = self._experiment.links.mixing_matrix, self._experiment.learnt
        stopped = {"reason": self._stopped, "round": self.progress.round}
        return {
            **rows[-1],
            # Whether a callback has ended the run before its last round.
            **({"stopped": stopped} if self._stopped else {}),
            # The last row of each phase. It also shows the agents right after the last
            # merge, before they trained on.
            **{f"last_{row['phase']}": row for row in rows},
            **best_rows(rows, "validation", learnt.shown),
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
