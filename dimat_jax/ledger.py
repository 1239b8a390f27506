"""What has crossed the network: rounds, and bytes by kind and by link."""

import copy
import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from dimat_jax.topology import Adjacency
from dimat_jax.tree import PyTree, nbytes

__all__ = ["Ledger", "Message", "Messages"]

Message = dict[str, PyTree]
"""What is sent at a time: a tree of `jax.ShapeDtypeStruct` for every kind."""

_Links = list[tuple[int, int]]
"""(receiver, sender)s."""


class Messages(NamedTuple):
    """What one agent sends another.

    Kinds are what the bytes are booked under: "params", "batch_stats", "gradients",
    "push_sum_weight", "tracker", "optimizer", ...

    Attributes:
        step: to each neighbour, with every local step.
        round: to each neighbour, with every communication.
        server: to a server, and back, with every communication.
        whole: where `round` holds compressed differences: the uncompressed form, which
            agents send when they first meet. A neighbour that a message did not reach
            is sent what it missed together with the next message that reaches it, at
            most `whole` in all. Empty: every message stands for itself, and nothing is
            caught up on.
    """

    step: Message = {}
    round: Message = {}
    server: Message = {}
    whole: Message = {}


@dataclasses.dataclass
class Ledger:
    """Bytes and rounds so far, in Python ints (they outgrow int32, and int64).

    Wherever it takes arrays of agents, these may have more slots than there are agents:
    those that only fill up devices do not communicate.

    Attributes:
        n_agents: how many there are.
        exchanges: messages received from a neighbour; a server's count as one.
        by_kind: bytes by kind; also "matching", and "missed": what was caught up on.
        by_link: bytes `[receiver][sender]`.
        server_bytes: bytes to a server and from it, which are in no link.
        missed: `[receiver][sender]` how many messages the receiver has yet to be sent;
            None: it was never sent any.
    """

    n_agents: int
    exchanges: int = 0
    by_kind: dict[str, int] = dataclasses.field(default_factory=dict)
    by_link: list[list[int]] = dataclasses.field(default_factory=list)
    server_bytes: int = 0
    missed: list[list[int | None]] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        agents = range(self.n_agents)
        self.by_link = self.by_link or [[0 for _ in agents] for _ in agents]
        self.missed = self.missed or [[None for _ in agents] for _ in agents]
        self._measured: tuple[Messages, _Sizes] | None = None

    @property
    def bytes_sent(self) -> int:
        """Over all links, in both directions, and to and from a server."""
        return sum(self.by_kind.values())

    @property
    def comm_rounds(self) -> float:
        """As the paper counts: one exchange with one neighbour is one round.

        The mean over agents where their degrees differ. Matching data go along with
        the exchange that they are for.
        """
        return self.exchanges / self.n_agents

    def record_steps(
        self, messages: Messages, active_edges: Adjacency, times: int = 1
    ) -> None:
        """Books what `times` local steps send along the edges that work."""
        links = self._links(active_edges)
        self._exchange(self._sizes(messages).step, links, times)

    def record_round(
        self,
        messages: Messages,
        active_edges: Bool[np.ndarray, "slots slots"],
        present: Bool[np.ndarray, " slots"],
        edges: Adjacency,
        matching: Int[np.ndarray, "slots slots"] | None = None,
    ) -> None:
        """Books what one communication sends.

        Args:
            messages: what is sent.
            active_edges: which edges work this time.
            present: who is there.
            edges: all edges that there ever are. Whoever is present has news for all
                its receivers, now or when the edge works again; who is absent has none.
            matching: bytes of matching data that cross every link, `[receiver,
                sender]`.
        """
        sizes, links = self._sizes(messages), self._links(active_edges)
        self._exchange(sizes.round, links, 1)
        if sizes.whole:
            announced = self._own(edges) & self._own(present)
            self._catch_up(sizes, links, self._links(announced))
        if matching is not None:
            for receiver, sender in self._links(matching != 0):
                size = int(matching[receiver, sender])
                self._send("matching", receiver, sender, size)
        if sizes.server:
            clients = int(self._own(present).sum())
            self.exchanges += clients
            for kind, size in sizes.server.items():
                self._book(kind, 2 * clients * size)
                self.server_bytes += 2 * clients * size

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def of(record: dict[str, Any]) -> "Ledger":
        """The inverse of `record`."""
        return Ledger(**copy.deepcopy(record))

    def _exchange(self, message: dict[str, int], links: _Links, times: int) -> None:
        """Books a message, its bytes given by kind, along links."""
        if not message:
            return
        self.exchanges += times * len(links)
        for kind, size in message.items():
            self._book(kind, times * len(links) * size)
        size = times * sum(message.values())
        for receiver, sender in links:
            self.by_link[receiver][sender] += size

    def _catch_up(self, sizes: "_Sizes", links: _Links, announced: _Links) -> None:
        """Books what receivers are sent of messages missed, and who misses this one."""
        size = sum(sizes.round.values())
        for receiver, sender in links:
            missed = self.missed[receiver][sender]
            self.missed[receiver][sender] = 0
            # The message itself is booked already, however large `whole` is.
            extra = sizes.whole - size
            if missed is not None:
                extra = min(missed * size, extra)
            if extra > 0:
                self._send("missed", receiver, sender, extra)
        for receiver, sender in set(announced) - set(links):
            if (missed := self.missed[receiver][sender]) is not None:
                self.missed[receiver][sender] = missed + 1

    def _send(self, kind: str, receiver: int, sender: int, size: int) -> None:
        self._book(kind, size)
        self.by_link[receiver][sender] += size

    def _book(self, kind: str, size: int) -> None:
        self.by_kind[kind] = self.by_kind.get(kind, 0) + size

    def _sizes(self, messages: Messages) -> "_Sizes":
        # The same messages are booked step after step; measuring them takes longer.
        if self._measured is None or self._measured[0] is not messages:
            self._measured = messages, _Sizes.of(messages)
        return self._measured[1]

    def _own(self, matrix: np.ndarray) -> np.ndarray:
        """What of an array of slots belongs to agents."""
        return np.asarray(matrix)[tuple(slice(self.n_agents) for _ in matrix.shape)]

    def _links(self, edges: Adjacency) -> _Links:
        """(receiver, sender)s, as Python ints: indexing with them is much faster."""
        receivers, senders = np.nonzero(self._own(edges))
        return list(zip(receivers.tolist(), senders.tolist(), strict=True))


class _Sizes(NamedTuple):
    """Bytes of `Messages`, by kind; kinds of which nothing is sent are left out."""

    step: dict[str, int]
    round: dict[str, int]
    server: dict[str, int]
    whole: int

    @staticmethod
    def of(messages: Messages) -> "_Sizes":
        def by_kind(message: Message) -> dict[str, int]:
            sizes = {kind: nbytes(tree) for kind, tree in message.items()}
            return {kind: size for kind, size in sizes.items() if size}

        step, round, server, whole = map(by_kind, messages)
        return _Sizes(step, round, server, sum(whole.values()))
