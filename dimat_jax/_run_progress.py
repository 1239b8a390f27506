"""How far a run has come."""

import dataclasses
import time
from typing import Any

from dimat_jax.ledger import Ledger

__all__ = ["Progress"]


@dataclasses.dataclass
class Progress:
    """How far a run has come. Everything else about it follows from its config.

    Attributes:
        ledger: What the agents have sent.
        epoch: The number of pre-training epochs done.
        round: The number of rounds done.
        step: The number of local steps done, those of pre-training included, when the
            current epoch of pre-training or the current round began.
        within: The number of local steps done since then.
        frames: The agents' frames after the latest merge, as JSON content; None if
            there was none. They align the agents whose average is measured.
        seen: What each agent had seen in the current round when its current epoch
            began, as `Trainer.seen` returns it; None in the first epoch.
        rows: The number of rows in metrics.jsonl.
        seconds: The wall time of the run before this process took it up.
    """

    ledger: Ledger
    epoch: int = 0
    round: int = 0
    step: int = 0
    within: int = 0
    frames: dict[str, Any] | None = None
    seen: list[list[float]] | None = None
    rows: int = 0
    seconds: float = 0.0

    def __post_init__(self):
        self._started = time.perf_counter()

    @property
    def steps_done(self) -> int:
        """The number of local steps done."""
        return self.step + self.within

    @property
    def total_seconds(self) -> float:
        """The wall time of the run, over all processes that it took."""
        return self.seconds + time.perf_counter() - self._started

    def record(self) -> dict[str, Any]:
        """The progress as JSON content."""
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "ledger": self.ledger.record(),
            "seconds": self.total_seconds,
        }

    @staticmethod
    def of(record: dict[str, Any]) -> "Progress":
        """The progress that `record` was made from. Its clock runs on."""
        return Progress(**{**record, "ledger": Ledger.of(record["ledger"])})
