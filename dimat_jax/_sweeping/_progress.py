"""Shows how far the runs of a sweep are, from the files that they write."""

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from rich.console import Console
from rich.live import Live
from rich.table import Table

from dimat_jax._metrics import MetricsError, evaluations, read_rows
from dimat_jax._sweeping._job import LOG, PROGRESS
from dimat_jax._sweeping._plan import Job
from dimat_jax.tasks import metric_of

__all__ = ["View"]


class _Steps(NamedTuple):
    """The content of progress.json, with None for what is not known yet."""

    step: int | None = None
    steps: int | None = None
    steps_per_second: float | None = None


class _Watched:
    """A run as its files show it.

    Args:
        job: The run.

    Attributes:
        job: The run.
        state: "waiting", "running", "finished" or "failed".
        rows: The rows of metrics.jsonl.
        steps: The content of progress.json.
    """

    def __init__(self, job: Job):
        self.job = job
        self.state = "waiting"
        self.rows: list[dict[str, Any]] = []
        self.rows = self._read_rows()
        self.steps = _Steps()
        self._stamp = self._stamp_now()

    def new_rows(self) -> list[dict[str, Any]]:
        """Reads the files, and returns the rows that were written since the last time.

        A run that goes on first removes the rows behind its checkpoint, and writes them
        again.
        """
        try:
            self.steps = _Steps(**json.loads((self._folder / PROGRESS).read_text()))
        except Exception:
            pass  # The run has not written it yet, or another program has changed it.
        if self._stamp == (stamp := self._stamp_now()):
            return []
        self._stamp, n_before = stamp, len(self.rows)
        self.rows = self._read_rows()
        return self.rows[n_before:]

    def _read_rows(self) -> list[dict[str, Any]]:
        """Reads the rows. The run restores damaged ones when it goes on."""
        try:
            return read_rows(self._folder)
        except MetricsError:
            return self.rows

    @property
    def _folder(self) -> Path:
        return self.job.workdir

    def _stamp_now(self) -> tuple[int, int] | None:
        """Something that changes when metrics.jsonl does."""
        path = self._folder / "metrics.jsonl"
        try:
            status = path.stat()
        except FileNotFoundError:
            return None
        return status.st_mtime_ns, status.st_size


class View:
    """Shows the runs: a live table on a terminal, and else a line for each event.

    Use it as a context manager.

    Args:
        jobs: The runs.
        console: Where to show them.
    """

    def __init__(self, jobs: Sequence[Job], console: Console | None = None):
        self._console = console or Console()
        self._runs = {job.name: _Watched(job) for job in jobs}
        self._live = Live(
            console=self._console, auto_refresh=False, get_renderable=self._table
        )

    def __enter__(self) -> "View":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.refresh()
        self._live.stop()

    def start(self, name: str) -> None:
        """Notes that a run has been started."""
        run = self._runs[name]
        run.state = "running"
        started = sum(other.state != "waiting" for other in self._runs.values())
        self._announce(f"[{started}/{len(self._runs)}] {name}: {run.job.workdir / LOG}")

    def end(self, name: str, reason: str | None) -> None:
        """Notes that a run has ended.

        Args:
            name: The run.
            reason: Why it has failed; None if it has finished.
        """
        self.refresh()
        self._runs[name].state = "finished" if reason is None else "failed"
        self._announce(f"{name}: " + (f"failed: {reason}" if reason else "finished"))

    def refresh(self) -> None:
        """Reads the files of the runs that are running, and shows what is new."""
        for name, run in self._runs.items():
            if run.state == "running":
                for row in evaluations(run.new_rows()):
                    metric = metric_of(row)
                    self._announce(
                        f"{name}: {_place(row)}: test {metric.words} "
                        f"{row[metric.field()]:.4f}"
                    )
        if self._live.is_started:
            self._live.refresh()

    def _announce(self, line: str) -> None:
        if not self._console.is_terminal:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _table(self) -> Table:
        """A row for each run that is running, and the counts of the others."""
        table = Table()
        for heading in ("run", "state", "test metric", "step", "steps/s", "time left"):
            align = "left" if heading in ("run", "state") else "right"
            table.add_column(heading, justify=align)
        for name, run in self._runs.items():
            if run.state == "running":
                table.add_row(name, *_cells(run))
        states = [run.state for run in self._runs.values()]
        counts = {state: states.count(state) for state in ("finished", "failed")}
        waiting = states.count("waiting")
        table.caption = ", ".join(
            f"{count} {state}"
            for state, count in {**counts, "waiting": waiting}.items()
        )
        return table


def _cells(run: _Watched) -> list[str]:
    """The cells of a running run after its name."""
    step, steps, rate = run.steps
    if steps is None or step is None:
        return ["starting", "", "", "", ""]
    evaluated = evaluations(run.rows)
    shown = ""
    if evaluated:
        metric = metric_of(evaluated[-1])
        shown = metric.text(evaluated[-1][metric.field()], digits=1)
    left = timedelta(seconds=round((steps - step) / rate)) if rate else ""
    return [
        _place(run.rows[-1]) if run.rows else "pre-training",
        shown,
        f"{step}/{steps}",
        f"{rate:.3g}" if rate else "",
        str(left),
    ]


def _place(row: Mapping[str, Any]) -> str:
    """Where in a run a row is from."""
    if row["phase"] == "pretraining":
        return f"pre-training, epoch {row['epoch']}"
    epoch = f", epoch {row['epoch']}" if "epoch" in row else ""
    return f"round {row['round']} {row['phase']}{epoch}"
