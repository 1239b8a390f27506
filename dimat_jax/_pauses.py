"""Says between which local steps a run saves its state, or ends, and does so."""

import signal
import time
from typing import Any

import jax

from dimat_jax._lock import Lock
from dimat_jax._processes import everywhere
from dimat_jax._signals import Signals
from dimat_jax.algorithms.base import State
from dimat_jax.errors import Interrupted
from dimat_jax.workdir import Results

__all__ = ["RunPauses"]

# Several processes ask each other about once in so many seconds whether one of them
# has received a signal.
_ASK_SECONDS = 1.0
# The largest number of steps between two such questions.
_MOST_STEPS = 10_000


class RunPauses:
    """Saves a run's state when it is due, and ends the run after a signal.

    With several processes, all of them make the same calls. They agree on the step
    after which they save or end, even if one of them alone has received a signal.

    Args:
        results: The run's files.
        every_minutes: The minutes after which a checkpoint is due; 0 for never.
        signals: The signals that the process has received.
        lock: The lock on the run's folder, in the process that has it.
    """

    def __init__(
        self,
        results: Results,
        every_minutes: float,
        signals: Signals,
        lock: Lock | None = None,
    ):
        self._results = results
        self._every_minutes = every_minutes
        self._signals = signals
        self._lock = lock
        # When the processes last asked each other, and the steps since then.
        self._asked_at = time.monotonic()
        self._n_steps = 0
        # After so many steps they ask each other again.
        self._next = 1
        if jax.process_count() > 1:
            # They end together, so none may end by itself.
            signals.defer()

    def begin(self) -> tuple[int, Any | None]:
        """The steps of the round or epoch that are done already, and their totals."""
        totals, self._results.totals = self._results.totals, None
        within = self._results.progress.within
        return within, totals if within else None

    def before_round(self, state: State) -> None:
        """Is called where no round is half done.

        Raises:
            Stopped: A callback has asked for the end of the run.
            CallbackError: A callback has failed.
            Interrupted: A signal has ended the run. In all cases it is saved.
        """
        self._results.stop_if_asked(state)
        if self._signals.is_deferring:
            self._pause(state, None, self._agreed())

    def after_step(self, state: State, totals: Any, done: int, is_last: bool) -> None:
        """Is called after a local step; see `_trainer.Pauses`.

        Raises:
            Interrupted: A signal has ended the run, and its state is saved.
        """
        # From now on there is work to lose. Until now, all that was done is on disk.
        self._signals.defer()
        if self._lock is not None:
            self._lock.check()
        self._results.progress.within = done
        number, is_due = self._agreed()
        # After the last step of a round, a checkpoint may follow anyway.
        self._pause(state, totals, (number, is_due and not is_last))

    def _pause(
        self, state: State, totals: Any | None, agreed: tuple[int, bool]
    ) -> None:
        number, is_due = agreed
        results = self._results
        if (number or is_due) and not results.is_saved:
            results.save(state, totals)
        if number:
            results.wait()
            raise Interrupted(
                number,
                f"{signal.Signals(number).name}: the run has ended after local step "
                f"{results.progress.steps_done}, and everything is saved",
                agreed=True,
            )

    def _agreed(self) -> tuple[int, bool]:
        """The signal after which all processes end, or 0; and whether all save."""
        since = time.monotonic() - self._results.saved_at
        is_due = 0 < self._every_minutes * 60 <= since
        number = self._signals.number
        if jax.process_count() == 1:
            return number, is_due
        self._n_steps += 1
        if self._n_steps < self._next:
            return 0, False
        seconds = max(time.monotonic() - self._asked_at, 1e-6)
        steps = int(self._n_steps * _ASK_SECONDS / seconds)
        steps = max(1, min(steps, 2 * self._next, _MOST_STEPS))
        answers = everywhere([number, is_due, steps])
        self._asked_at, self._n_steps = time.monotonic(), 0
        _, is_due, self._next = answers[0]
        return next((each[0] for each in answers if each[0]), 0), is_due
