"""Lays out agents over devices: the same code for a CPU, host devices, GPUs and TPUs.

Stacked arrays have a leading axis of `placement.slots` entries, which is sharded over
the axis "agents" of the device mesh. If there are several devices for each agent, the
mesh has a second axis, "batch", over which the examples of an agent's batch are sharded
(see `Placement.split_batch`). A computation of one agent alone is written
for one agent, and `per_agent` lifts it to the stack. A computation between agents is
plain `jax.numpy` on the stack (see `mixing.mix`); XLA inserts the communication.

If the number of devices does not divide the number of agents, the last slots hold
copies of the first agents, so that all results stay finite. These copies count as
absent, have no neighbours, and `gather` removes them.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Int, Key

from dimat_jax import _passing
from dimat_jax._chunks import Chunked
from dimat_jax._devices import (
    CPU_DEVICES,
    check_threads,
    cores,
    request_cpu_devices,
    shared_out,
)
from dimat_jax._layouts import (
    BATCHING,
    CHUNK,
    LAYOUTS,
    PlacementError,
    Shards,
    automatic,
    lift,
)
from dimat_jax._processes import is_lost
from dimat_jax.errors import first_line
from dimat_jax.options import Option
from dimat_jax.tree import PyTree, take

__all__ = [
    "CPU_DEVICES",
    "Placement",
    "PlacementError",
    "place",
    "refusals_explained",
    "request_cpu_devices",
]

AGENTS = Option(
    "agents", 5, "The number of agents in the network.", at_least=1, unit="agents"
)


@dataclasses.dataclass(frozen=True)
class Placement:
    """The layout of `n_agents` agents over the devices of `mesh`.

    Attributes:
        n_agents: the number of agents.
        mesh: a mesh with the axis "agents", and perhaps with the axis "batch".
        batching: how agents that share a device run: the name of one of `LAYOUTS`,
            where each has a summary.
        chunk: the number of agents in a chunk, at least 1. Only the layout "chunks"
            uses it.
    """

    n_agents: int
    mesh: Mesh
    batching: str
    chunk: int = CHUNK.default

    @property
    def slots(self) -> int:
        """The length of stacked axes: `n_agents`, rounded up to fill the devices."""
        devices = self.mesh.shape["agents"]
        return -(-self.n_agents // devices) * devices

    @property
    def one_by_one(self) -> bool:
        """Whether all agents share a device, on which they run one after the other.

        A program of one agent, called for each agent, is then as fast as one program of
        all agents. It compiles once, and large results need not be stacked.
        """
        in_turn = self.batching == "unroll" or (
            self.batching == "chunks" and self.chunk == 1
        )
        return self.mesh.size == 1 and in_turn

    @property
    def sharding(self) -> NamedSharding:
        """The sharding of all stacked arrays.

        Pass it as `out_shardings` to `jax.jit` for functions that make a state. On one
        device XLA may otherwise return an equal sharding of another type, and functions
        called with the state would compile a second time.
        """
        return NamedSharding(self.mesh, PartitionSpec("agents"))

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of arrays of which every device holds a copy."""
        return NamedSharding(self.mesh, PartitionSpec())

    def per_agent(
        self, fn: Callable[..., Any], in_axes: int | None | Sequence[int | None] = 0
    ) -> Callable[..., Any]:
        """Lifts a function of one agent to stacked agents.

        Args:
            fn: a pure function of pytrees of arrays.
            in_axes: for each positional argument, 0 where agents are stacked on its
                leading axis and None where all agents share it (as in `jax.vmap`).
                One 0 or None stands for all arguments. Agents are stacked on leading
                axes alone, so there is no other axis, and no nested entry.

        Returns:
            A function of stacked arguments whose results are stacked. Call it from
            within `jax.jit`. It raises PlacementError for another number of arguments
            than `in_axes` has entries.

        Raises:
            PlacementError: an entry that is neither 0 nor None.
        """
        _check_in_axes(in_axes)

        def stacked_fn(*args):
            if in_axes is None or isinstance(in_axes, int):
                axes = (in_axes,) * len(args)
            else:
                axes = tuple(in_axes)
            if len(axes) != len(args):
                raise PlacementError(
                    f"in_axes has {len(axes)} entries for {len(args)} arguments"
                )
            return lift(fn, axes, args, self._shards)

        return stacked_fn

    def jit(
        self,
        fn: Callable[..., Any],
        *,
        donate_argnums: int | Sequence[int] = (),
        out_shardings: Sharding | None = None,
        compiler_options: dict[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Compiles a function on stacked agents, as the layout asks for.

        It is `jax.jit`, except for the layout "chunks": there each function that
        `per_agent` lifts is a program of its own, which runs for one chunk of agents
        after the other. Within other functions that are traced, such a function is a
        part of them.

        Use it for all functions in which agents compute convolutions. For others
        `jax.jit` is as good: there agents of the layout "chunks" are one batched
        program if they have no convolutions. If they have some, they are unrolled, and
        each agent adds to the time that compilation takes.

        Args:
            fn: a pure function of pytrees of arrays.
            donate_argnums: the arguments whose memory may be reused.
            out_shardings: the sharding of all results. None: each result keeps the
                sharding with which it was computed.
            compiler_options: options for XLA.
        """
        options = {
            "donate_argnums": donate_argnums,
            "out_shardings": out_shardings,
            "compiler_options": compiler_options,
        }
        if self.batching == "chunks" and self._shards.n_local > 1:
            return Chunked(fn, self._shards, **options)
        return jax.jit(fn, **options)

    @property
    def _shards(self) -> Shards:
        n_devices = self.mesh.shape["agents"]
        # A small convolution uses one core of a CPU, so a chunk runs on each core.
        # XLA runs the programs of other devices one after the other. Several processes
        # must have equal programs, and their machines may have other numbers of cores.
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        several = on_cpu and jax.process_count() == 1
        lanes = max(1, cores() // n_devices) if several else 1
        n_local = self.slots // n_devices
        return Shards(self.mesh, n_local, self.batching, self.chunk, lanes)

    @property
    def spread(self) -> bool:
        """Whether agents live on several devices."""
        return self.mesh.shape["agents"] > 1

    def pick(
        self, stacked: PyTree, indices: Int[Array | np.ndarray, " slots"]
    ) -> PyTree:
        """Gives every slot the entry of another slot: `leaf[indices]` for every leaf.

        Devices send each other what they need, and no device ever holds the entries of
        all agents.

        Args:
            stacked: a tree with leaves `[slots, ...]`.
            indices: for each slot the slot whose entry it gets.
        """
        if not self.spread:
            return take(stacked, indices)
        return _passing.pick(self.mesh, stacked, indices)

    def split_batch(self, batches: PyTree, *, shared: bool = False) -> PyTree:
        """Splits the examples of every agent's batch over the agent's devices.

        What is computed from the batch is split too, and the results are as if it had
        not been: XLA adds up the sums over examples, also those of BatchNorm. Nothing
        changes if every agent has one device, or if its devices do not divide the
        number of examples. Call it from within `jax.jit`.

        Args:
            batches: a tree with leaves `[slots, batch, ...]`.
            shared: whether all agents share the batch, so that leaves are
                `[batch, ...]`.
        """
        if (parts := self.mesh.shape.get("batch", 1)) == 1:
            return batches
        axes = ("batch",) if shared else ("agents", "batch")
        sharding = NamedSharding(self.mesh, PartitionSpec(*axes))

        def split(leaf):
            if leaf.shape[len(axes) - 1] % parts:
                return leaf
            return jax.lax.with_sharding_constraint(leaf, sharding)

        return jax.tree.map(split, batches)

    def put(self, stacked: PyTree) -> PyTree:
        """Places host arrays `[n_agents, ...]` on the devices as `[slots, ...]`."""
        # Copies of real agents fill the last slots, so that all results stay finite.
        rows = np.arange(self.slots) % self.n_agents

        def put_leaf(leaf):
            leaf = np.asarray(leaf)
            if leaf.shape[:1] != (self.n_agents,):
                raise ValueError(
                    f"expected a leading axis of {self.n_agents} agents, got an array "
                    f"of shape {leaf.shape}"
                )
            padded = leaf[rows] if self.slots != self.n_agents else leaf
            return jax.make_array_from_callback(
                padded.shape, self.sharding, lambda index: padded[index]
            )

        return jax.tree.map(put_leaf, stacked)

    def zeros(self, *shape: int) -> Array:
        """Makes float32 zeros `[slots, *shape]` with the sharding of stacked arrays.

        The initial state of a loop should have the sharding of the later ones, because
        a step compiles again for arguments of another sharding.
        """
        return jnp.zeros((self.slots, *shape), jnp.float32, device=self.sharding)

    def replicate(self, tree: PyTree) -> PyTree:
        """Places whole host arrays on every device."""

        def put_leaf(leaf):
            leaf = np.asarray(leaf)
            return jax.make_array_from_callback(
                leaf.shape, self.replicated, lambda index: leaf[index]
            )

        return jax.tree.map(put_leaf, tree)

    def fetch(self, stacked: PyTree) -> PyTree:
        """Brings stacked arrays to the host: NumPy arrays `[slots, ...]`.

        Every process receives the rows of all processes, so fetch what is small.
        """
        if jax.process_count() > 1:
            stacked = multihost_utils.process_allgather(stacked, tiled=True)
        # The arrays are copied: on a CPU, asarray would return views of buffers that a
        # later step may overwrite.
        return jax.tree.map(np.array, jax.device_get(stacked))

    def gather(self, stacked: PyTree) -> PyTree:
        """Brings the agents alone to the host: NumPy arrays `[n_agents, ...]`."""
        return jax.tree.map(lambda x: x[: self.n_agents], self.fetch(stacked))

    def keys(self, key: Key[Array, ""]) -> Key[Array, " slots"]:
        """Makes a key for each slot. It does not depend on the number of devices."""
        return jax.vmap(lambda slot: jax.random.fold_in(key, slot))(
            jnp.arange(self.slots)
        )


def place(
    n_agents: int,
    devices: Sequence[Any] | None = None,
    batching: str = BATCHING.default,
    chunk: int = CHUNK.default,
    *,
    batch_size: int = 1,
) -> Placement:
    """Lays out agents over devices.

    Args:
        n_agents: the number of agents.
        devices: the devices to use, of which equally many of each process are chosen.
            None: all devices.
        batching: the layout (see `Placement`). "auto" is "chunks" on CPUs, "grouped" on
            GPUs, and "vmap" elsewhere.
        chunk: the number of agents in a chunk, for the layout "chunks".
        batch_size: the number of examples in a batch. If there are several devices for
            each agent, the batch is split over as many of them as divide this number.
            With 1 an agent uses one device.

    Raises:
        OptionError: the layout is unknown, or `chunk` is below 1.
        PlacementError: there is no agent, there are fewer agents than processes, or
            collectives of the host devices would deadlock (see `request_cpu_devices`).
    """
    if n_agents < 1:
        raise PlacementError(f"expected at least 1 agent, got {n_agents}")
    BATCHING.check(batching)
    CHUNK.check(chunk)
    devices = list(jax.devices() if devices is None else devices)
    devices, n_parts = shared_out(devices, n_agents, batch_size)
    layout = automatic(devices[0].platform) if batching == "auto" else batching
    n_local = sum(device.process_index == jax.process_index() for device in devices)
    if devices[0].platform == "cpu":
        check_threads(n_local)
    axes = {"agents": len(devices)}
    if n_parts > 1:
        axes = {"agents": n_agents, "batch": n_parts}
    # The order of the devices stays: all devices of an agent belong to one process.
    mesh = Mesh(
        np.array(devices).reshape(tuple(axes.values())),
        tuple(axes),
        axis_types=(AxisType.Auto,) * len(axes),
    )
    return Placement(n_agents, mesh, layout, chunk)


@contextmanager
def refusals_explained(placement: Placement) -> Iterator[None]:
    """Raises the errors of XLA and of the devices as one error about the layout.

    Raises:
        PlacementError: a program does not compile, or has failed while it ran.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if is_lost(error):
            raise
        device = placement.mesh.devices.flat[0].device_kind
        others = ", ".join(name for name in LAYOUTS if name != placement.batching)
        raise PlacementError(
            f"the layout {placement.batching} does not run on {device}: "
            f"{first_line(error)}. "
            f"{BATCHING.path} can also be {others}; chunks of few agents need the "
            "least memory"
        ) from error


def _check_in_axes(in_axes: Any) -> None:
    entries = in_axes if isinstance(in_axes, Sequence) else [in_axes]
    for entry in entries:
        if entry is not None and (type(entry) is not int or entry != 0):
            raise PlacementError(
                "each entry of in_axes is 0 (agents are stacked on the leading axis) "
                f"or None (all agents share the argument), got {entry!r}"
            )
