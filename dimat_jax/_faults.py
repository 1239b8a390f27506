"""Faults of a network, and the agents that a server draws: options and their values."""

import dataclasses
import re
from typing import NamedTuple

from dimat_jax.errors import UserError
from dimat_jax.options import SEED, Option

__all__ = [
    "ABSENCES",
    "DROPOUT",
    "EDGE_LOSS",
    "FAULTS",
    "SAMPLED",
    "Absence",
    "Faults",
    "NetworkError",
    "faults",
    "parse_absences",
]

DROPOUT = Option(
    "faults.dropout",
    0.0,
    "The probability that an agent is absent in a round, from the first round on.",
    at_least=0,
    below=1,
)
EDGE_LOSS = Option(
    "faults.edge_loss",
    0.0,
    "The probability that a link fails in an exchange, from the first round on.",
    at_least=0,
    below=1,
)
ABSENCES = Option(
    "faults.absences",
    "",
    'The rounds in which single agents are absent. "3:1-4, 0:6-" means that agent 3 is '
    "absent in rounds 1 to 4, and agent 0 from round 6 on.",
    empty="no agent is absent",
)
SAMPLED = Option(
    "server.sampled",
    0,
    "The number of agents that the server draws in each round from those that are not "
    "absent. Only these agents get its model, train, and send it back; an agent that "
    "is not drawn keeps its state.",
    at_least=0,
    unit="agents",
    empty="all of them",
)
FAULTS = (DROPOUT, EDGE_LOSS, ABSENCES, SAMPLED, SEED)
"""The options of `faults`."""


class NetworkError(UserError):
    """A network does not fit its use or its faults. The message says why."""


class Absence(NamedTuple):
    """Some rounds in which one agent is absent. Rounds count from 1.

    Attributes:
        agent: the number of the agent.
        start: the first round in which it is absent; 1 if it joins late.
        stop: the round in which it is back; None if it does not come back.
    """

    agent: int
    start: int
    stop: int | None = None


@dataclasses.dataclass(frozen=True)
class Faults:
    """The faults of a network: agents drop out, and links fail.

    Faults are drawn anew in every round or exchange, but the seed determines them.

    Attributes:
        dropout: the probability that an agent is absent in a round.
        edge_loss: the probability that a link fails in an exchange. In an undirected
            network it then fails in both directions.
        absences: further rounds in which single agents are absent.
        seed: the seed of all draws.
        sampled: the number of agents that take part in a round, drawn from those that
            are not absent; 0 if all of them do.
    """

    dropout: float = DROPOUT.default
    edge_loss: float = EDGE_LOSS.default
    absences: tuple[Absence, ...] = ()
    seed: int = SEED.default
    sampled: int = SAMPLED.default

    def __post_init__(self):
        DROPOUT.check(self.dropout)
        SAMPLED.check(self.sampled)
        EDGE_LOSS.check(self.edge_loss)
        for agent, start, stop in self.absences:
            if agent < 0 or start < 1 or (stop is not None and stop <= start):
                raise NetworkError(
                    "an absence is (agent, the first round in which it is absent, the "
                    "round in which it is back), and rounds count from 1; got "
                    f"{(agent, start, stop)}"
                )

    @property
    def any(self) -> bool:
        """Whether there are any faults, or agents are drawn."""
        return bool(self.dropout or self.edge_loss or self.absences or self.sampled)


def parse_absences(text: str) -> tuple[Absence, ...]:
    """Reads "agent:first-last, ...": the rounds, from 1, in which agents are absent.

    Raises:
        NetworkError: the text has another form.
    """
    found = []
    for part in filter(None, map(str.strip, text.split(","))):
        match = re.fullmatch(r"(\d+):(\d+)-(\d*)", part)
        if not match:
            raise NetworkError(
                f"absences is {text!r}; expected agent:first-last or agent:first-, "
                'e.g. "3:1-4, 0:6-"'
            )
        agent, first, last = match.groups()
        found.append(Absence(int(agent), int(first), int(last) + 1 if last else None))
    return tuple(found)


def faults(
    *, dropout: float, edge_loss: float, absences: str, sampled: int, seed: int
) -> Faults:
    """Makes the faults that a config describes.

    Raises:
        OptionError: a probability is out of range.
        NetworkError: the text of the absences has another form, or an absence ends
            before it starts.
    """
    return Faults(dropout, edge_loss, parse_absences(absences), seed, sampled)
