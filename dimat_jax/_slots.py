"""The slots of stacked arrays, and those of them that this process holds.

With a single process, the process holds all slots. These functions move what one
process needs, where `Placement.put` and `Placement.fetch` move what all processes need.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from dimat_jax.placement import Placement
from dimat_jax.tree import PyTree

__all__ = [
    "agent_of_slots",
    "fetch_local",
    "local_slots",
    "per_device",
    "put_each",
    "put_slots",
    "refill",
    "slots_of_devices",
    "with_sharding",
]


def agent_of_slots(placement: Placement) -> np.ndarray:
    """Returns the agent of each slot, int `[slots]`.

    Copies of the first agents fill the last slots.
    """
    return np.arange(placement.slots) % placement.n_agents


def slots_of_devices(placement: Placement) -> np.ndarray:
    """Returns the slots of each device, int `[devices, slots / devices]`.

    If several devices share an agent's batches, they count as one device.
    """
    return np.arange(placement.slots).reshape(placement.mesh.shape["agents"], -1)


def local_slots(placement: Placement) -> np.ndarray:
    """Returns the slots on the devices of this process, in ascending order."""
    process = jax.process_index()
    devices = placement.mesh.devices.reshape(placement.mesh.shape["agents"], -1)
    is_local = [device.process_index == process for device in devices[:, 0]]
    return slots_of_devices(placement)[is_local].ravel()


def per_device(placement: Placement, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Lifts a function of one device's rows to arrays that are sharded by device.

    Every argument and every result has a leading axis that is sharded over the devices.
    `fn` sees the rows of one device: `slots / devices` entries of stacked arrays, and
    one entry of arrays that have an entry for each device. Call the result from within
    `jax.jit`.
    """
    spec = PartitionSpec("agents")
    return jax.shard_map(
        fn,
        mesh=placement.mesh,
        in_specs=spec,
        out_specs=spec,
        axis_names={"agents"},
        check_vma=False,
    )


def put_slots(placement: Placement, stacked: PyTree) -> PyTree:
    """Places host arrays `[slots, ...]` on the devices.

    A process reads only the rows of its own slots. The other rows may hold anything.
    """

    def put_leaf(leaf):
        return jax.make_array_from_callback(
            leaf.shape, placement.sharding, lambda index: leaf[index]
        )

    return jax.tree.map(put_leaf, stacked)


def put_each(placement: Placement, make: Callable[[int], PyTree]) -> PyTree:
    """Places what `make(agent)` returns for each agent, stacked: `[slots, ...]`.

    A process makes only the trees of the agents on its own devices.
    """
    agents = agent_of_slots(placement)
    local = agents[local_slots(placement)].tolist()
    made = {agent: make(agent) for agent in dict.fromkeys(local)}

    def put_leaves(*leaves):
        rows = dict(zip(made, map(np.asarray, leaves), strict=True))

        def read(index):
            return np.stack([rows[agent] for agent in agents[index[0]].tolist()])

        shape = (placement.slots, *rows[local[0]].shape)
        return jax.make_array_from_callback(shape, placement.sharding, read)

    return jax.tree.map(put_leaves, *made.values())


def fetch_local(stacked: PyTree) -> PyTree:
    """Brings the rows of this process to the host: NumPy arrays `[local slots, ...]`.

    They may be views of the devices' memory, so use them before anything reuses it.
    """

    def fetch_leaf(leaf):
        # Several devices may hold the same rows.
        shards = {s.index[0].start or 0: s.data for s in leaf.addressable_shards}
        return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

    return jax.tree.map(fetch_leaf, stacked)


def refill(placement: Placement, stacked: PyTree) -> PyTree:
    """Copies the first agents of stacked arrays into the last slots once more."""
    if placement.slots == placement.n_agents:
        return stacked
    agents = agent_of_slots(placement)
    copy = jax.jit(
        lambda x: placement.pick(x, agents), out_shardings=placement.sharding
    )
    return copy(stacked)


def with_sharding(placement: Placement, abstract: PyTree) -> PyTree:
    """Adds the sharding of stacked arrays to `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement.sharding),
        abstract,
    )
