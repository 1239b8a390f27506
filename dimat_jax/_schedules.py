"""Learning-rate schedules: the learning rate as a function of the steps of a phase.

A phase is pre-training, or all rounds. A schedule counts the steps since its beginning.
It may change the learning rate only once an epoch or once a round. The rate is then
constant in between, as in papers on federated learning, whose rates fall by rounds.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from dimat_jax.options import Option, Record, Registry, registry

__all__ = [
    "DECAY",
    "SCHEDULE",
    "SCHEDULES",
    "UNIT",
    "WARMUP",
    "WARMUP_UNIT",
    "Schedule",
    "ScheduleRecord",
    "warmed_up",
]

Schedule = Callable[[Any], Any] | float

UNITS = ("steps", "epochs", "rounds")
DECAY = Option(
    "optimizer.decay",
    0.981,
    "The factor by which the learning rate changes after every epoch, or after every "
    "unit that optimizer.unit names.",
    at_least=0,
)
UNIT = Option(
    "optimizer.unit",
    "",
    "The time after which the schedule changes the learning rate. Within an epoch or a "
    "round the rate then stays the same.",
    choices=UNITS,
    empty="exponential changes it after every epoch, and cosine after every step",
)
WARMUP_UNIT = Option(
    "optimizer.warmup_unit",
    "steps",
    "The unit of optimizer.warmup. By epochs or rounds, the learning rate stays the "
    "same within an epoch or a round.",
    choices=UNITS,
)
WARMUP = Option(
    "optimizer.warmup",
    0,
    "The number of steps, or of what optimizer.warmup_unit names, in which the "
    "learning rate rises to that of the schedule: in the k-th of n it is k/n of it. "
    "The schedule counts these steps too.",
    at_least=0,
    empty="there is no warm-up",
    opens=(WARMUP_UNIT,),
)


def constant(
    rate: float, *, total_steps: int, steps_per_epoch: int, steps_per_round: int = 0
) -> Schedule:
    """The same learning rate at every step."""
    del total_steps, steps_per_epoch, steps_per_round
    return rate


def exponential(
    rate: float,
    *,
    total_steps: int,
    steps_per_epoch: int,
    steps_per_round: int = 0,
    decay: float = DECAY.default,
    unit: str = UNIT.default,
) -> Schedule:
    """The learning rate changes by a factor after every epoch, round or step."""
    del total_steps
    steps = _steps_in(unit or "epochs", steps_per_epoch, steps_per_round)
    return optax.exponential_decay(rate, steps, decay, staircase=True)


def cosine(
    rate: float,
    *,
    total_steps: int,
    steps_per_epoch: int,
    steps_per_round: int = 0,
    unit: str = UNIT.default,
) -> Schedule:
    """The learning rate falls to 0 over all steps, along half a cosine wave."""
    falling = optax.cosine_decay_schedule(rate, max(total_steps, 1))
    steps = _steps_in(unit or "steps", steps_per_epoch, steps_per_round)
    # The first step of an epoch or a round decides about all of its steps.
    return falling if steps == 1 else lambda step: falling(step // steps * steps)


def _steps_in(unit: str, steps_per_epoch: int, steps_per_round: int) -> int:
    """Returns the number of steps in a unit, 1 at least."""
    lengths = {"steps": 1, "epochs": steps_per_epoch, "rounds": steps_per_round}
    return max(lengths[unit], 1)


def warmed_up(
    schedule: Schedule,
    *,
    steps_per_epoch: int,
    steps_per_round: int = 0,
    warmup: int = WARMUP.default,
    warmup_unit: str = WARMUP_UNIT.default,
) -> Schedule:
    """Lets the learning rate rise in equal parts at the beginning of a phase.

    In the k-th unit of time, counted from 1, the rate is that of the schedule times
    min(k / warmup, 1), so the first steps are not lost.

    Args:
        schedule: the learning rate without warm-up.
        steps_per_epoch: the number of steps in an epoch.
        steps_per_round: the number of steps in a round; 0 if there are no rounds.
        warmup: the number of units; 0 returns the schedule itself.
        warmup_unit: "steps", "epochs" or "rounds".

    Raises:
        OptionError: the number is negative, or the unit is unknown.
    """
    WARMUP.check(warmup)
    WARMUP_UNIT.check(warmup_unit)
    if warmup == 0:
        return schedule
    steps = _steps_in(warmup_unit, steps_per_epoch, steps_per_round)

    def rising(step: Any) -> Any:
        rate = schedule(step) if callable(schedule) else schedule
        units = jnp.asarray(step // steps + 1, jnp.float32)
        return rate * jnp.minimum(units / warmup, 1)

    return rising


@dataclasses.dataclass(frozen=True, eq=False)
class ScheduleRecord(Record[Schedule]):
    """A schedule's record.

    Attributes:
        uses_total: whether the rates depend on the number of steps of the whole phase.
    """

    uses_total: bool = False


SCHEDULES: Registry[ScheduleRecord] = registry(
    ScheduleRecord("constant", constant),
    ScheduleRecord("exponential", exponential, (DECAY, UNIT)),
    ScheduleRecord("cosine", cosine, (UNIT,), uses_total=True),
)
"""`SCHEDULES[name](rate, total_steps=..., steps_per_epoch=..., **options)` builds a
schedule. With `steps_per_round=...` it may change by rounds too."""

SCHEDULE = Option(
    "optimizer.schedule",
    "constant",
    "How the learning rate changes over the steps of a phase.",
    choices=SCHEDULES,
)
