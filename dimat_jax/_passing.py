"""Passes stacked arrays between devices, from neighbour to neighbour.

Stacked arrays are sharded: a device holds the block of its own agents. Where agents
need each other's arrays, XLA by itself would gather the arrays of all agents on every
device. The functions of this module send blocks instead: in turn k every device sends
its block to the device that is k places before it (`jax.lax.ppermute`), folds the block
that it receives into its result, and forgets it. So a device never holds more than two
blocks. A turn in which no agent needs anything is left out, so on a ring whose agents
are laid out in order every device talks to the two devices beside it alone.

All leaves of one dtype travel as one array, because a message has a cost of its own.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dimat_jax.tree import PyTree, exact_dtype

__all__ = ["pick", "weighted_sums"]

Result = TypeVar("Result")


def weighted_sums(
    mesh: Mesh, weights: Float[Array, "slots slots"], stacked: PyTree
) -> PyTree:
    """Computes `sum_j weights[i, j] x_j` for every leaf `[slots, ...]`.

    Sums are computed in the dtype of `tree.exact_dtype`. Where no agent of a device has
    any weight for those of another device, their block is not sent.

    Args:
        mesh: the devices, with an axis "agents".
        weights: the weights, which all devices know.
        stacked: a tree whose leaves hold real or complex numbers.
    """

    def sums(weights, block):
        arrays, unpack = _packed(block)

        def add(totals, arrays, rows, columns):
            own = weights[rows[:, None], columns[None, :]]
            return [
                total + _product(own, array)
                for total, array in zip(totals, arrays, strict=True)
            ]

        zeros = [jnp.zeros(x.shape, exact_dtype(x.dtype)) for x in arrays]
        totals = _fold(mesh, arrays, weights != 0, zeros, add)
        return unpack([t.astype(x.dtype) for t, x in zip(totals, arrays, strict=True)])

    return _over_devices(mesh, sums)(weights, stacked)


def _product(weights: Array, array: Array) -> Array:
    dtype = exact_dtype(array.dtype)
    # GPUs and TPUs would round the factors to ten bits.
    highest = jax.lax.Precision.HIGHEST
    return jnp.matmul(weights.astype(dtype), array.astype(dtype), precision=highest)


def pick(
    mesh: Mesh, stacked: PyTree, indices: Int[Array | np.ndarray, " slots"]
) -> PyTree:
    """Gives every slot the entry of another slot: `leaf[indices]` for every leaf.

    Args:
        mesh: the devices, with an axis "agents".
        stacked: a tree with leaves `[slots, ...]`.
        indices: for each slot the slot whose entry it gets. All devices know them.
    """

    def picked(indices, block):
        arrays, unpack = _packed(block)

        def choose(chosen, arrays, rows, columns):
            place = indices[rows] - columns[0]
            here = ((place >= 0) & (place < len(columns)))[:, None]
            place = jnp.clip(place, 0, len(columns) - 1)
            return [
                jnp.where(here, array[place], old)
                for old, array in zip(chosen, arrays, strict=True)
            ]

        needed = indices[:, None] == jnp.arange(len(indices))[None, :]
        return unpack(_fold(mesh, arrays, needed, arrays, choose))

    return _over_devices(mesh, picked)(jnp.asarray(indices), stacked)


def _over_devices(mesh: Mesh, fn: Callable) -> Callable:
    """Runs `fn(shared, block)` on every device, with the block of its own agents."""
    return jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("agents")),
        out_specs=PartitionSpec("agents"),
        axis_names={"agents"},
        check_vma=False,
    )


def _fold(
    mesh: Mesh,
    arrays: list[Array],
    needed: Bool[Array, "slots slots"],
    result: Result,
    fold: Callable[[Result, list[Array], Array, Array], Result],
) -> Result:
    """Folds the blocks of all devices into this device's result, one after the other.

    Args:
        mesh: the devices.
        arrays: this device's block.
        needed: `needed[i, j]` says whether slot i needs the entry of slot j. All
            devices must know it, since all of them take part in a turn or none.
        result: the result before the first block.
        fold: `fold(result, arrays, rows, columns)` returns the result with one more
            block: `rows` are the slots of this device, `columns` those of the block.
    """
    n_devices = mesh.shape["agents"]
    device = jax.lax.axis_index("agents")
    slots = jnp.arange(len(needed)).reshape(n_devices, -1)
    size = slots.shape[1]
    blocks = needed.reshape(n_devices, size, n_devices, size).any(axis=(1, 3))
    result = fold(result, arrays, slots[device], slots[device])
    for distance in range(1, n_devices):
        sender_of = [(i + distance) % n_devices for i in range(n_devices)]

        def receive(result, sender_of=sender_of, distance=distance):
            links = [(sender, receiver) for receiver, sender in enumerate(sender_of)]
            received = [jax.lax.ppermute(x, "agents", links) for x in arrays]
            sender = (device + distance) % n_devices
            return fold(result, received, slots[device], slots[sender])

        takes_place = blocks[np.arange(n_devices), np.array(sender_of)].any()
        result = jax.lax.cond(takes_place, receive, lambda result: result, result)
    return result


def _packed(block: PyTree) -> tuple[list[Array], Callable[[list[Array]], PyTree]]:
    """Packs a device's block into one array `[slots, numbers]` for each dtype.

    Returns:
        the arrays, and a function that unpacks arrays of these shapes.
    """
    leaves, treedef = jax.tree.flatten(block)
    by_dtype: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        by_dtype.setdefault(leaf.dtype, []).append(i)
    groups = list(by_dtype.values())
    unravel = [ravel_pytree([leaves[i][0] for i in group])[1] for group in groups]
    arrays = [
        jax.vmap(lambda group: ravel_pytree(group)[0])([leaves[i] for i in group])
        for group in groups
    ]

    def unpack(arrays):
        unpacked = [None] * len(leaves)
        for group, unravel_one, array in zip(groups, unravel, arrays, strict=True):
            for i, leaf in zip(group, jax.vmap(unravel_one)(array), strict=True):
                unpacked[i] = leaf
        return jax.tree.unflatten(treedef, unpacked)

    return arrays, unpack
