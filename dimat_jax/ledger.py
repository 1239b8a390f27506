"""What has crossed the network: rounds, and bytes by kind and by link."""

import base64
import dataclasses
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Shaped
from numpy.typing import ArrayLike

from dimat_jax.network import Network
from dimat_jax.topology import Adjacency
from dimat_jax.tree import PyTree, nbytes

__all__ = ["Ledger", "Message", "Messages"]

Message = dict[str, PyTree]
"""One message: for every kind of content, a tree of `jax.ShapeDtypeStruct`."""

_Links = Bool[np.ndarray, "agents agents"]
"""Some links, as a mask `[receiver, sender]`."""

_NEVER = -1
"""Stands for the number of missed messages where no message has arrived yet."""


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
        turns: The number of messages in a step that wait for each other, such as a
            question and its answer. Each of them is a round. `step` holds the content
            of all of them together.
    """

    step: Message = {}
    round: Message = {}
    server: Message = {}
    whole: Message = {}
    turns: int = 1


@dataclasses.dataclass(eq=False)
class Ledger:
    """Bytes and rounds so far. Totals are Python ints, since they outgrow int64.

    Arrays that its methods take may have more slots than there are agents. The slots
    that only fill up devices do not communicate, and are left out.

    Attributes:
        n_agents: The number of agents.
        exchanges: The number of messages that agents received from a neighbour. An
            exchange with a server counts as one.
        by_kind: Bytes by kind of content. Three kinds are the ledger's own: "matching",
            "missed" for content that was sent later, and "images" for examples that
            agents get because they all have to look at the same ones.
        by_link: Bytes of every link, `[receiver, sender]`. They are int64, or Python
            ints in an array of objects once a link might outgrow that.
        server_bytes: Bytes to and from a server, and of images. They belong to no link.
        missed: `[receiver, sender]` the number of messages that the receiver has missed
            since the last one that reached it, int32; -1 before the first one. None as
            long as no agent has announced anything.
    """

    n_agents: int
    exchanges: int = 0
    by_kind: dict[str, int] = dataclasses.field(default_factory=dict)
    by_link: Shaped[np.ndarray, "agents agents"] = dataclasses.field(
        default_factory=lambda: np.zeros((0, 0), np.int64)
    )
    server_bytes: int = 0
    missed: Int[np.ndarray, "agents agents"] | None = None

    def __post_init__(self):
        if not self.by_link.size:
            self.by_link = np.zeros((self.n_agents, self.n_agents), np.int64)
        # No link has carried more bytes than this.
        self._most = int(self.by_link.max(initial=0))
        self._measured: tuple[Messages, _Sizes] | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ledger) and self.record() == other.record()

    @property
    def bytes_sent(self) -> int:
        """Bytes over all links, in both directions, and to and from a server."""
        return sum(self.by_kind.values())

    @property
    def bytes_sent_by_agent(self) -> list[int]:
        """Bytes that each agent sent its neighbours."""
        return _exact_sum(self.by_link, axis=0).tolist()

    @property
    def comm_rounds(self) -> float:
        """Rounds as the paper counts them: an exchange with one neighbour is one round.

        A message that answers another one is a round of its own, since it costs another
        latency. This is the mean over agents if they have different numbers of
        neighbours. Matching data belong to the exchange that they are for, and add no
        round.
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
            links = self._own(by_id[network_id].active_edges)
            self._exchange(message, links, steps, messages.turns)

    def record_round(
        self,
        messages: Messages,
        network: Network,
        edges: Adjacency,
        matching: Int[np.ndarray, "slots slots"] | None = None,
        senders: Bool[np.ndarray, " agents"] | None = None,
    ) -> None:
        """Books what one communication sends.

        Args:
            messages: What is sent.
            network: The network of this round. A present agent has a message for every
                agent that it has an edge to; if the edge does not work now, the content
                is sent later. An absent agent has no message.
            edges: All edges that the network has at any time.
            matching: Bytes of matching data over every link, `[receiver, sender]`.
            senders: The agents that send to a server; by default the present ones. The
                server answers those that are present.
        """
        sizes, links = self._sizes(messages), self._own(network.active_edges)
        present = self._own(network.present)
        self._exchange(sizes.round, links, 1)
        if sizes.whole:
            self._catch_up(sizes, links, announced=self._own(edges) & present)
        if matching is not None:
            self._add_matching(self._own(matching))
        if sizes.server:
            answers = int(present.sum())
            times = answers + int((present if senders is None else senders).sum())
            self.exchanges += answers
            for kind, size in sizes.server.items():
                self._book(kind, times * size)
                self.server_bytes += times * size

    def record_images(self, size: int) -> None:
        """Books images that agents get, once in a run.

        No link carries them: whoever sets up the run hands them out.

        Args:
            size: The bytes of all agents' images together, as they are sent.
        """
        if size:
            self._book("images", size)
            self.server_bytes += size

    def record(self) -> dict[str, Any]:
        """The ledger as JSON content."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            **fields,
            "by_kind": dict(self.by_kind),
            "by_link": _packed(self.by_link),
            "missed": None if self.missed is None else _packed(self.missed),
        }

    @staticmethod
    def of(record: dict[str, Any]) -> "Ledger":
        """The ledger that `record` was made from, or that an older version made."""
        n_agents, missed = record["n_agents"], record["missed"]
        # Older versions wrote a list of rows, with None before the first message.
        if isinstance(missed, list):
            missed = [[_NEVER if n is None else n for n in row] for row in missed]
        return Ledger(
            **{
                **record,
                "by_kind": dict(record["by_kind"]),
                "by_link": _unpacked(record["by_link"], n_agents, np.int64),
                "missed": None
                if missed is None
                else _unpacked(missed, n_agents, np.int32),
            }
        )

    def _exchange(
        self, message: dict[str, int], links: _Links, times: int, turns: int = 1
    ) -> None:
        """Books a message, given as bytes by kind, that every link carries `times`.

        It is sent in several turns if its parts wait for each other.
        """
        if not message:
            return
        n_links = int(np.count_nonzero(links))
        self.exchanges += times * turns * n_links
        for kind, size in message.items():
            self._book(kind, times * n_links * size)
        self._add(times * sum(message.values()), links)

    def _catch_up(self, sizes: "_Sizes", links: _Links, announced: _Links) -> None:
        """Books the content that was missed and is sent now, and what is missed now.

        Args:
            sizes: Bytes of the messages.
            links: The links that carry the message of this round.
            announced: All links that there is a message for.
        """
        if self.missed is None:
            self.missed = np.full(links.shape, _NEVER, np.int32)
        size = sum(sizes.round.values())
        for missed in np.unique(self.missed[links]).tolist():
            # The message itself is booked already, even if it is larger than `whole`.
            extra = sizes.whole - size
            if missed != _NEVER:
                extra = min(missed * size, extra)
            if extra > 0:
                late = links & (self.missed == missed)
                self._book("missed", extra * int(np.count_nonzero(late)))
                self._add(extra, late)
        self.missed[links] = 0
        self.missed += announced & ~links & (self.missed != _NEVER)

    def _add_matching(self, matching: Int[np.ndarray, "agents agents"]) -> None:
        if matching.any():
            self._book("matching", int(_exact_sum(matching)))
            self._add(matching, matching != 0)

    def _add(self, sizes: int | np.ndarray, links: _Links) -> None:
        """Adds bytes to the links that a mask selects.

        Args:
            sizes: the bytes of each link `[receiver, sender]`, or one number for all.
            links: the mask.
        """
        self._most += int(np.max(sizes))
        if self._most >= 2**63 and self.by_link.dtype != object:
            self.by_link = self.by_link.astype(object)
        if self.by_link.dtype == object and isinstance(sizes, np.ndarray):
            sizes = sizes.astype(object)
        np.add(self.by_link, sizes, out=self.by_link, where=links)

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


def _exact_sum(sizes: Shaped[np.ndarray, "agents agents"], axis: int | None = None):
    """Sums bytes, each below 2^63, to Python ints in an array of objects."""
    if sizes.dtype == object:
        return np.sum(sizes, axis=axis)
    # Each half of the digits can be summed in int64, over up to 2^31 links.
    high, low = (sizes >> 32).sum(axis=axis), (sizes & (2**32 - 1)).sum(axis=axis)
    return np.asarray(high).astype(object) * 2**32 + np.asarray(low).astype(object)


def _packed(matrix: Shaped[np.ndarray, "agents agents"]) -> list | str:
    """A matrix as JSON content: compressed text, or lists of Python ints."""
    if matrix.dtype == object:
        if matrix.max(initial=0) >= 2**63:
            return matrix.tolist()
        matrix = matrix.astype(np.int64)
    # As lists, the links of 4096 agents would take gigabytes.
    return base64.b64encode(zlib.compress(matrix.tobytes(), level=1)).decode()


def _unpacked(packed: list | str, n_agents: int, dtype: Any) -> np.ndarray:
    """The matrix of `_packed`, or of the lists of numbers that older versions wrote."""
    if isinstance(packed, str):
        content = zlib.decompress(base64.b64decode(packed))
        return np.frombuffer(content, dtype).reshape(n_agents, n_agents).copy()
    largest = max((size for row in packed for size in row), default=0)
    return np.array(packed, object if largest >= 2**63 else dtype)


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

        step, round, server, whole = map(by_kind, messages[:4])
        return _Sizes(step, round, server, sum(whole.values()))
