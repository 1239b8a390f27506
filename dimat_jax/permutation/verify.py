"""Does a declared symmetry hold? Permute the units and see if the outputs move."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from dimat_jax.permutation.actions import Perms, apply, identity, random
from dimat_jax.permutation.spec import (
    Axis,
    PermutationSpec,
    PermutationSpecError,
    validate,
)
from dimat_jax.tree import PyTree, flatten, is_inexact

__all__ = ["verify"]


def verify(
    spec: PermutationSpec,
    forward: Callable[[PyTree, PyTree], PyTree],
    variables: PyTree,
    inputs: PyTree,
    key: Key[Array, ""],
    *,
    tolerance: float = 1e-4,
) -> None:
    """Checks that random permutations leave a network's outputs unchanged.

    A fresh network hides a wrong spec: its normalisation scales, biases and statistics
    are constant, and no permutation moves a constant. So leaves that are constant along
    some axis get random positive values first (a variance stays one), in a copy.

    Args:
        spec: the symmetry to check; `validate` runs first.
        forward: `forward(variables, inputs) -> outputs`, any pytree of arrays. Return
            the outputs of train and of eval mode to check both: running statistics
            matter only in eval mode. It should compute in float32.
        variables: one network's variables (initial or trained).
        inputs: a few examples; permutations must not depend on them.
        key: consumed.
        tolerance: how far outputs may move, relative to the largest absolute output.

    Raises:
        PermutationSpecError: the outputs move, or are not finite. The message names the
            group, the leaf where a single leaf explains it, and how far they moved.
    """
    validate(spec, variables)
    noise_key, perm_key = jax.random.split(key)
    check = _Check(forward, _without_constants(variables, noise_key), inputs)
    perms = _moving(random(spec, variables, perm_key))
    if (moved := check.movement(spec, perms)) <= tolerance:
        return

    still = identity(spec, variables)
    for group in perms:
        alone = {**still, group: perms[group]}
        if (moved := check.movement(spec, alone)) > tolerance:
            cause = _cause(check, spec, alone, group, tolerance)
            raise PermutationSpecError(
                f"permuting the units of group {group!r} moves the outputs by "
                f"{moved:.1e} of the largest (allowed: {tolerance:.0e}): {cause}"
            )
    raise PermutationSpecError(
        f"permuting all groups moves the outputs by {moved:.1e} of the largest "
        f"(allowed: {tolerance:.0e}), though no group does so alone: {sorted(perms)}"
    )


class _Check:
    """Measures how far permuted variables move the outputs."""

    def __init__(self, forward, variables: PyTree, inputs: PyTree):
        # Compiled once: tracking down a guilty leaf takes many evaluations.
        self._forward = jax.jit(forward)
        self._variables = variables
        self._inputs = inputs
        self._outputs = self._run(variables)
        if not self._outputs:
            raise PermutationSpecError("forward returned no arrays; nothing to verify")
        if not all(np.isfinite(output).all() for output in self._outputs):
            raise PermutationSpecError("the outputs are not finite; nothing to verify")

    def _run(self, variables: PyTree) -> list[np.ndarray]:
        # Reduced precision would move the outputs by itself.
        with jax.default_matmul_precision("highest"):
            outputs = self._forward(variables, self._inputs)
        return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(outputs)]

    def movement(self, spec: PermutationSpec, perms: Perms) -> float:
        """The largest change of an output, relative to the largest absolute output.

        Infinite where outputs that were finite no longer are.
        """
        moved = self._run(apply(spec, perms, self._variables))
        if not all(np.isfinite(output).all() for output in moved):
            return np.inf
        return max(
            float(np.abs(after - before).max() / max(np.abs(before).max(), 1e-30))
            for before, after in zip(self._outputs, moved, strict=True)
        )

    def single_edits(
        self, spec: PermutationSpec, group: str, size: int
    ) -> Iterator[tuple[PermutationSpec, str]]:
        """Specs that differ in whether one axis belongs to a group, and what to say."""
        # Additions come first: taking a group its last axis "mends" it, too.
        leaves = flatten(self._variables)
        for leaf, axes in spec.axes.items():
            for dimension, axis in enumerate(axes):
                if axis != group and leaves[leaf].shape[dimension] == size:
                    yield (
                        _with_axis(spec, leaf, dimension, group),
                        f"{leaf!r} axis {dimension} should be in it, and is declared "
                        f"{axis!r}",
                    )
        for leaf, dimension in spec.groups[group]:
            if spec.axes[leaf][dimension] == group:
                yield (
                    _with_axis(spec, leaf, dimension, None),
                    f"{leaf!r} axis {dimension} should not be in it",
                )


def _with_axis(
    spec: PermutationSpec, leaf: str, dimension: int, axis: Axis
) -> PermutationSpec:
    axes = list(spec.axes[leaf])
    axes[dimension] = axis
    return replace(spec, axes={**spec.axes, leaf: tuple(axes)})


def _cause(
    check: _Check, spec: PermutationSpec, perms: Perms, group: str, tolerance: float
) -> str:
    for edited, what in check.single_edits(spec, group, len(perms[group])):
        # An edit may leave a group without any leaf; its permutation is just not used.
        if check.movement(edited, perms) <= tolerance:
            return what
    members = ", ".join(f"{leaf!r} axis {d}" for leaf, d in spec.groups[group])
    return f"no single leaf explains it; it permutes {members}"


def _without_constants(variables: PyTree, key: Key[Array, ""]) -> PyTree:
    """Random positive noise on the leaves that are constant along some axis."""
    leaves, treedef = jax.tree.flatten(variables)
    keys = jax.random.split(key, len(leaves))

    def perturb(leaf_key, leaf):
        if not is_inexact(leaf) or not _constant_along_an_axis(leaf):
            return leaf
        noise = jax.random.uniform(leaf_key, leaf.shape, minval=0.5, maxval=1.5)
        return jnp.where(leaf == 0, 0.1 * noise, leaf * noise).astype(leaf.dtype)

    return treedef.unflatten(map(perturb, keys, leaves))


def _constant_along_an_axis(leaf) -> bool:
    leaf = np.asarray(leaf)
    return any(
        size > 1 and bool((np.ptp(leaf, axis=axis) == 0).all())
        for axis, size in enumerate(leaf.shape)
    )


def _moving(perms: Mapping[str, Array]) -> Perms:
    """Replaces identities, which would check nothing, by a rotation."""
    return {
        group: jnp.where((perm == jnp.arange(len(perm))).all(), jnp.roll(perm, 1), perm)
        for group, perm in perms.items()
    }
