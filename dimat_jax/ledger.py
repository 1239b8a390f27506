"""What has crossed the network: rounds, and bytes by kind and by link."""

import copy
import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from dimat_jax.network import Network
from dimat_jax.topology import Adjacency
from dimat_jax.tree import PyTree, nbytes

__all__ = ["Ledger", "Message", "Messages"]

Message = dict[str, PyTree]
"""One message: for every kind of content, a tree of `jax.ShapeDtypeStruct`."""

_Links = list[tuple[int, int]]
"""Pairs (receiver, sender)."""


class Messages(NamedTuple):
    """What one agent sends another.

    Bytes are booked by kind: "params", "batch_stats", "gradients", "push_sum_weight",
    "tracker", "optimizer", ...

    Attributes:
        step: The message to each neighbour with every local step.
        round: The message to each neighbour with every communication.
        server: The message to a server with every communication. The server's answer
            has the same size.
        whole: The uncompressed form of `round`, where `round` holds compressed
            differences. Agents send it when they first meet. A neighbour that missed
            some messages gets their content together with the next message that
            reaches it, at most `whole` in all. Empty if every message can be read on
            its own; then nothing is sent later.
    """

    step: Message = {}
    round: Message = {}
    server: Message = {}
    whole: Message = {}


@dataclasses.dataclass
class Ledger:
    """Bytes and rounds so far, as Python ints (they outgrow int32, and even int64).

    Arrays that its methods take may have more slots than there are agents. The slots
    that only fill up devices do not communicate, and are left out.

    Attributes:
        n_agents: The number of agents.
        exchanges: The number of messages that agents received from a neighbour. An
            exchange with a server counts as one.
        by_kind: Bytes by kind of content. Two kinds are the ledger's own: "matching",
            and "missed" for content that was sent later.
        by_link: Bytes of every link, `[receiver][sender]`.
        server_bytes: Bytes to and from a server. They belong to no link.
        missed: `[receiver][sender]` the number of messages that the receiver has
            missed since the last one that reached it; None before the first one.
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
        """Bytes over all links, in both directions, and to and from a server."""
        return sum(self.by_kind.values())

    @property
    def comm_rounds(self) -> float:
        """Rounds as the paper counts them: an exchange with one neighbour is one round.

        This is the mean over agents if they have different numbers of neighbours.
        Matching data belong to the exchange that they are for, and add no round.
        """
        return self.exchanges / self.n_agents

    def record_steps(self, messages: Messages, networks: Sequence[Network]) -> None:
        """Books what local steps send.

        Args:
            messages: What is sent with every step.
            networks: The network of each step. Steps whose network is the same object
                are booked together, which is much faster.
        """
        message = self._sizes(messages).step
        if not message:
            return
        by_id = {id(network): network for network in networks}
        for network_id, steps in Counter(map(id, networks)).items():
            links = self._links(by_id[network_id].active_edges)
            self._exchange(message, links, steps)

    def record_round(
        self,
        messages: Messages,
        network: Network,
        edges: Adjacency,
        matching: Int[np.ndarray, "slots slots"] | None = None,
    ) -> None:
        """Books what one communication sends.

        Args:
            messages: What is sent.
            network: The network of this round. A present agent has a message for every
                agent that it has an edge to; if the edge does not work now, the content
                is sent later. An absent agent has no message.
            edges: All edges that the network has at any time.
            matching: Bytes of matching data over every link, `[receiver, sender]`.
        """
        sizes, links = self._sizes(messages), self._links(network.active_edges)
        present = self._own(network.present)
        self._exchange(sizes.round, links, 1)
        if sizes.whole:
            announced = self._own(edges) & present
            self._catch_up(sizes, links, self._links(announced))
        if matching is not None:
            for receiver, sender in self._links(matching != 0):
                size = int(matching[receiver, sender])
                self._send("matching", receiver, sender, size)
        if sizes.server:
            clients = int(present.sum())
            self.exchanges += clients
            for kind, size in sizes.server.items():
                self._book(kind, 2 * clients * size)
                self.server_bytes += 2 * clients * size

    def record(self) -> dict[str, Any]:
        """The ledger as JSON content."""
        return dataclasses.asdict(self)

    @staticmethod
    def of(record: dict[str, Any]) -> "Ledger":
        """The ledger that `record` was made from."""
        return Ledger(**copy.deepcopy(record))

    def _exchange(self, message: dict[str, int], links: _Links, times: int) -> None:
        """Books a message, given as bytes by kind, that every link carries `times`."""
        if not message:
            return
        self.exchanges += times * len(links)
        for kind, size in message.items():
            self._book(kind, times * len(links) * size)
        size = times * sum(message.values())
        for receiver, sender in links:
            self.by_link[receiver][sender] += size

    def _catch_up(self, sizes: "_Sizes", links: _Links, announced: _Links) -> None:
        """Books the content that was missed and is sent now, and what is missed now.

        Args:
            sizes: Bytes of the messages.
            links: The links that carry the message of this round.
            announced: All links that there is a message for.
        """
        size = sum(sizes.round.values())
        for receiver, sender in links:
            missed = self.missed[receiver][sender]
            self.missed[receiver][sender] = 0
            # The message itself is booked already, even if it is larger than `whole`.
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
        # The same messages are booked round after round, and measuring them is slow.
        if self._measured is None or self._measured[0] is not messages:
            self._measured = messages, _Sizes.of(messages)
        return self._measured[1]

    def _own(self, matrix: ArrayLike) -> np.ndarray:
        """The part of an array over slots that belongs to agents."""
        array = np.asarray(matrix)
        return array[tuple(slice(self.n_agents) for _ in array.shape)]

    def _links(self, edges: ArrayLike) -> _Links:
        """Pairs (receiver, sender), as Python ints: they index lists much faster."""
        receivers, senders = np.nonzero(self._own(edges))
        return list(zip(receivers.tolist(), senders.tolist(), strict=True))


class _Sizes(NamedTuple):
    """Bytes of `Messages` by kind. Kinds with 0 bytes are left out."""

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
