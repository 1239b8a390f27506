"""Where agents live: one code path for a CPU, N host devices, GPUs, TPUs.

Everything stacked has a leading axis of `placement.slots` entries, sharded over the
one-dimensional device mesh "agents". What an agent does alone is written for one agent
and lifted to the stack by `per_agent`; what agents do together is plain `jax.numpy` on
the stack (see `mixing.mix`), and XLA inserts the communication.

Where the number of agents is no multiple of the number of devices, the last slots hold
copies of the first agents: what runs on them stays finite. They count as absent, are
connected to nobody, and `gather` cuts them off.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from dimat_jax.errors import UserError
from dimat_jax.options import Option
from dimat_jax.tree import PyTree, stack, take

__all__ = ["Batching", "Placement", "PlacementError", "place", "request_cpu_devices"]

Batching = Literal["auto", "vmap", "unroll"]

AGENTS = Option(
    "agents", 5, "The number of agents in the network.", at_least=1, unit="agents"
)
CPU_DEVICES = Option(
    "placement.cpu_devices",
    1,
    "The number of devices that a CPU is split into.",
    at_least=1,
    unit="devices",
    changes_results=False,
)
BATCHING = Option(
    "placement.batching",
    "auto",
    "How agents that share a device run: as one batched program (vmap), or one after "
    "the other in one program (unroll). auto unrolls agents on CPUs and batches them "
    "elsewhere.",
    choices=get_args(Batching),
    changes_results=False,
)


class PlacementError(UserError):
    """Agents that cannot be laid out over the devices."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """How `n_agents` agents are laid out over the devices of `mesh`.

    Attributes:
        n_agents: the number of agents.
        mesh: a mesh with the single axis "agents".
        batching: how agents that share a device run: "vmap" as one batched program,
            "unroll" one after the other in one program. A batched convolution becomes
            a grouped one, which XLA:CPU runs about six times slower than the same
            convolutions unrolled; unrolling costs compile time for each agent.
    """

    n_agents: int
    mesh: Mesh
    batching: Literal["vmap", "unroll"]

    @property
    def slots(self) -> int:
        """Length of every stacked axis: `n_agents`, rounded up to fill the devices."""
        return -(-self.n_agents // self.mesh.size) * self.mesh.size

    @property
    def sharding(self) -> NamedSharding:
        """Of everything stacked.

        Pass it as `out_shardings` when jitting what makes a state: on one device XLA
        may answer with an equal layout of another name, and what is called with the
        state then compiles a second time.
        """
        return NamedSharding(self.mesh, PartitionSpec("agents"))

    def per_agent(
        self, fn: Callable[..., Any], in_axes: int | None | Sequence[int | None] = 0
    ) -> Callable[..., Any]:
        """Lifts a function of one agent to stacked agents.

        Args:
            fn: a pure function of pytrees of arrays.
            in_axes: for each positional argument, 0 where agents are stacked on its
                leading axis and None where all agents share it (as in `jax.vmap`).

        Returns:
            A function of stacked arguments whose results are stacked. Call it from
            within `jax.jit`.
        """

        def stacked_fn(*args):
            axes = (in_axes,) * len(args) if isinstance(in_axes, int) else in_axes
            axes = tuple(axes or (None,) * len(args))
            specs = tuple(
                PartitionSpec() if axis is None else PartitionSpec("agents")
                for axis in axes
            )
            return jax.shard_map(
                lambda *shards: self._over_shard(fn, axes, shards),
                mesh=self.mesh,
                in_specs=specs,
                out_specs=PartitionSpec("agents"),
                check_vma=False,
            )(*args)

        return stacked_fn

    def _over_shard(self, fn, axes, shards):
        """Runs `fn` on every agent of one device's shard."""
        n_local = self.slots // self.mesh.size
        if n_local > 1 and self.batching == "vmap":
            return jax.vmap(fn, in_axes=axes, axis_size=n_local)(*shards)

        # One agent a device needs no batching at all: batching rules would turn its
        # convolutions into grouped ones of one group, and cost time on some backends.
        def run(i: int):
            return fn(
                *(
                    shard if axis is None else take(shard, i)
                    for axis, shard in zip(axes, shards, strict=True)
                )
            )

        return stack([run(i) for i in range(n_local)])

    def put(self, stacked: PyTree) -> PyTree:
        """Places host arrays `[n_agents, ...]` on the devices as `[slots, ...]`."""
        # Copies of real agents fill the last slots: whatever runs on them stays finite.
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
        """float32 zeros `[slots, *shape]`, laid out like everything stacked.

        What a loop starts with should lie where the loop leaves it: a step compiles
        anew for arguments that lie elsewhere.
        """
        return jnp.zeros((self.slots, *shape), jnp.float32, device=self.sharding)

    def replicate(self, tree: PyTree) -> PyTree:
        """Places host arrays, whole, on every device."""
        sharding = NamedSharding(self.mesh, PartitionSpec())

        def put_leaf(leaf):
            leaf = np.asarray(leaf)
            return jax.make_array_from_callback(
                leaf.shape, sharding, lambda index: leaf[index]
            )

        return jax.tree.map(put_leaf, tree)

    def fetch(self, stacked: PyTree) -> PyTree:
        """Brings stacked arrays to the host: NumPy arrays `[slots, ...]`."""
        if jax.process_count() > 1:
            stacked = multihost_utils.process_allgather(stacked, tiled=True)
        # Copies: on a CPU, asarray would be a view of a buffer that a later step may
        # be given to overwrite.
        return jax.tree.map(np.array, jax.device_get(stacked))

    def gather(self, stacked: PyTree) -> PyTree:
        """As `fetch`, the agents alone: NumPy arrays `[n_agents, ...]`."""
        return jax.tree.map(lambda x: x[: self.n_agents], self.fetch(stacked))

    def keys(self, key: Key[Array, ""]) -> Key[Array, " slots"]:
        """One key for each slot; a slot's key does not depend on the device count."""
        return jax.vmap(lambda slot: jax.random.fold_in(key, slot))(
            jnp.arange(self.slots)
        )


def place(
    n_agents: int,
    devices: Sequence[Any] | None = None,
    batching: Batching = BATCHING.default,
) -> Placement:
    """Lays out agents over devices (default: all; never more devices than agents).

    `batching="auto"` unrolls agents on CPUs and vmaps them elsewhere.

    Raises:
        PlacementError: fewer than one agent, an unknown batching, or host devices whose
            collectives would deadlock (see `request_cpu_devices`).
    """
    if n_agents < 1:
        raise PlacementError(f"expected at least 1 agent, got {n_agents}")
    devices = list(jax.devices() if devices is None else devices)[:n_agents]
    on_cpu = devices[0].platform == "cpu"
    if batching == "auto":
        batching = "unroll" if on_cpu else "vmap"
    if batching not in ("vmap", "unroll"):
        raise PlacementError(f"batching is auto, vmap or unroll, got {batching!r}")
    n_local = sum(device.process_index == jax.process_index() for device in devices)
    if on_cpu and n_local > 1 and _thread_pool_size() < _threads_for(n_local):
        raise PlacementError(
            f"{n_local} host devices share a pool of {_thread_pool_size()} threads, in "
            "which collectives deadlock; call request_cpu_devices before JAX starts, "
            f"or set PJRT_NPROC={_threads_for(n_local)} in the environment"
        )
    mesh = jax.make_mesh(
        (len(devices),), ("agents",), axis_types=(AxisType.Auto,), devices=devices
    )
    return Placement(n_agents, mesh, batching)


def request_cpu_devices(n_devices: int) -> None:
    """Splits the CPU into `n_devices` devices. Call it before JAX first computes.

    An in-process collective holds a thread of XLA's pool for each device, and programs
    that wait for it hold others. The pool is no larger than the number of cores unless
    PJRT_NPROC says so: with too few threads the rendezvous is never complete and XLA
    aborts the process.

    Raises:
        RuntimeError: JAX has started already.
        PlacementError: `n_devices` < 1.
    """
    if n_devices < 1:
        raise PlacementError(f"expected at least 1 CPU device, got {n_devices}")
    jax.config.update("jax_num_cpu_devices", n_devices)
    if _thread_pool_size() < _threads_for(n_devices):
        os.environ["PJRT_NPROC"] = str(_threads_for(n_devices))


def _threads_for(n_devices: int) -> int:
    """Threads with which collectives do not deadlock.

    Measured (jax 0.10.2), dispatching forwards and all-gathers without waiting for
    them: 2 devices hang with 3 threads and 5 devices with 9, while 2 with 4, 5 with 10
    and 8 with 16 do not.
    """
    return 2 * n_devices


def _thread_pool_size() -> int:
    """Threads that XLA:CPU's client has, or will have, for running devices."""
    if requested := os.environ.get("PJRT_NPROC"):
        return int(requested)
    # XLA counts the cores that the process may use, where the system tells it.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
