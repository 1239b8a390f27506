"""What `merge.recalibrate` needs: a batch's means and variances, in any pytree."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dimat_jax._mending import MergeError
from dimat_jax.permutation._outputs import Forward, call_forward
from dimat_jax.tree import PyTree, flatten, is_inexact, map_with_path

__all__ = ["batch_statistics"]

# The number of steps that running statistics are told to have seen. A correction for
# their start at 0, as Haiku and Equinox have it, does nothing any more.
_MANY_STEPS = 2**20


def batch_statistics(
    forward: Forward, variables: PyTree, inputs: PyTree
) -> Callable[[PyTree, PyTree, Any], dict[str, Array]]:
    """Makes the function that `recalibrate` needs, from any model with BatchNorm.

    Running statistics are moving averages: `new = m * old + (1 - m) * batch`. So the
    model is asked for the new statistics, and the old ones are taken out of them.

    Args:
        forward: `forward(variables, inputs) -> (outputs, updated variables)`, in
            training mode, in one of the forms that `permutation.derive` knows.
        variables: one network's variables.
        inputs: a batch of inputs.

    Returns:
        `statistics(variables, inputs, mask) -> {path: array}`: the statistics of one
        batch. The mask must select all examples.

    Raises:
        MergeError: forward returns no updated statistics, or it does not update them
            as a moving average.
    """
    leaves = flatten(variables)

    def updated(variables, inputs):
        return call_forward(forward, variables, inputs, None).updates

    new = jax.eval_shape(updated, variables, inputs)
    kinds = {path: _kind(leaves[path]) for path in new}
    floating = [path for path, kind in kinds.items() if kind == "statistic"]
    if not floating:
        raise MergeError(
            "forward returns no updated statistics; call the model in training mode "
            "and return (outputs, updated variables)"
        )
    run = jax.jit(updated)
    start = _ready(variables, run(variables, inputs), kinds)
    shares = {path: _old_share(run, start, inputs, path) for path in floating}

    def step(variables, inputs):
        """The statistics of a batch, if the layers before are right already."""
        old, new = flatten(variables), updated(variables, inputs)
        batch = {p: (new[p] - shares[p] * old[p]) / (1 - shares[p]) for p in floating}
        return map_with_path(lambda p, leaf: batch.get(p, leaf), variables)

    # Some models normalise by the running statistics while they are trained. There, the
    # statistics of a layer are right only after those of all layers before it.
    n_steps, state, compiled = 0, start, jax.jit(step)
    while n_steps <= len(floating):
        before, state = state, compiled(state, inputs)
        n_steps += 1
        if all(_close(flatten(before)[p], flatten(state)[p]) for p in floating):
            break

    def statistics(variables, inputs, mask):
        del mask
        state = _ready(variables, updated(variables, inputs), kinds)
        for _ in range(max(n_steps - 1, 1)):
            state = step(state, inputs)
        found = flatten(state)
        return {p: found[p].astype(jnp.float32) for p, k in kinds.items() if k}

    return statistics


def _kind(leaf: Any) -> str:
    """What an updated leaf is: a statistic, a counter, a flag, or something else."""
    if is_inexact(leaf):
        return "statistic"
    if jnp.issubdtype(leaf.dtype, jnp.signedinteger):
        return "counter"
    return "flag" if leaf.dtype == bool else ""


def _ready(
    variables: PyTree, new: Mapping[str, Array], kinds: Mapping[str, str]
) -> PyTree:
    """Variables that have seen many steps, so that starts are no exception."""

    def ready(path, leaf):
        match kinds.get(path):
            case "counter":
                return jnp.full_like(leaf, _MANY_STEPS)
            case "flag":
                return new[path]
            case _:
                return leaf

    return map_with_path(ready, variables)


def _old_share(run: Callable[..., Any], start: PyTree, inputs: PyTree, path: str):
    """How much of an old statistic its update keeps: m of `m * old + (1 - m) * new`."""

    def updated(value):
        changed = map_with_path(
            lambda p, leaf: jnp.full_like(leaf, value) if p == path else leaf, start
        )
        return np.asarray(run(changed, inputs)[path], np.float64)

    at_zero = updated(0)
    shares = updated(1) - at_zero
    share = float(shares.mean())
    # What is no moving average, as a maximum, may look like one in two points.
    further = (updated(100) - at_zero) / 100
    alike = np.allclose([shares, further], share, atol=1e-3)
    if not alike or not -1e-3 < share < 1 - 1e-5:
        raise MergeError(
            f"{path!r} is not updated as a moving average, so that the statistics of "
            "a batch cannot be told from it; write a function that measures them"
        )
    # Of a share of 0.99, digits that are lost would count a hundred times.
    return round(share, 6)


def _close(one: Array, other: Array) -> bool:
    scale = float(jnp.abs(other).max())
    return bool(jnp.abs(one - other).max() <= 1e-4 * max(scale, 1e-30))
