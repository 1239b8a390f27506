"""Does a declared symmetry hold? Permute the units and see if the outputs move."""

import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from dimat_jax.permutation._actions import Perms, apply, identity, random
from dimat_jax.permutation._derive import derive
from dimat_jax.permutation._mistakes import Mistake, mended, mistakes
from dimat_jax.permutation._spec import (
    PermutationSpec,
    PermutationSpecError,
    axis_groups,
    group_sizes,
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
        inputs: a few examples; permutations must not depend on them. BatchNorm over
            too few magnifies rounding.
        key: consumed.
        tolerance: how far outputs may move, relative to the largest absolute output.

    Raises:
        PermutationSpecError: the outputs move, or are not finite. The message says how
            far they moved, and names the groups and the leaves that are declared wrong:
            those where the spec departs from what `derive` finds, or else the one leaf
            that explains it. Where it does not depart, rounding is named.
    """
    validate(spec, variables)
    noise_key, perm_key = jax.random.split(key)
    check = _Check(forward, _without_constants(variables, noise_key), inputs, tolerance)
    perms = _moving(random(spec, variables, perm_key))
    moved = check.movement(spec, perms)
    if moved <= tolerance:
        return
    groups, cause = _cause(check, spec, perms, perm_key)
    named = ", ".join(map(repr, groups))
    units = (
        f"the units of group{'s' * (len(groups) > 1)} {named}" if groups else "units"
    )
    raise PermutationSpecError(
        f"permuting {units} moves the outputs by {moved:.1e} of the largest (allowed: "
        f"{tolerance:.0e}): {cause}"
    )


class _Check:
    """Measures how far permuted variables move the outputs."""

    def __init__(self, forward, variables: PyTree, inputs: PyTree, tolerance: float):
        self.variables = variables
        self._inputs = inputs
        self._tolerance = tolerance
        self._eager = forward
        # Compiled once: tracking down a guilty leaf takes many evaluations.
        self._forward = jax.jit(forward)
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
        moved = self._run(apply(spec, perms, self.variables))
        if not all(np.isfinite(output).all() for output in moved):
            return np.inf
        return max(
            float(np.abs(after - before).max() / max(np.abs(before).max(), 1e-30))
            for before, after in zip(self._outputs, moved, strict=True)
        )

    def holds(self, spec: PermutationSpec, perms: Perms) -> bool:
        """Whether these permutations leave the outputs where they are."""
        return self.movement(spec, perms) <= self._tolerance

    def derived(self) -> tuple[PermutationSpec, str]:
        """What the model's operations say, and why that may be too little."""
        arguments = (self._eager, self.variables, self._inputs)
        try:
            return derive(*arguments, strict=True), ""
        except PermutationSpecError as doubt:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it is told with the cause
                return derive(*arguments), str(doubt)


def _cause(
    check: _Check, spec: PermutationSpec, perms: Perms, key: Key[Array, ""]
) -> tuple[list[str], str]:
    """The groups at fault (none: it is rounding), and what to say of them."""
    derived, doubt = check.derived()
    wrong = mistakes(spec, derived, check.variables)
    if not wrong:
        return [], (
            "derive finds the declared symmetry in the model's operations, which "
            "leaves rounding; forward should compute in float32, and BatchNorm needs "
            "more or larger examples, as statistics of few values magnify it"
        )
    if not _mending_helps(check, spec, derived, wrong, key):
        wrong = []
    by_derive = _groups(wrong, perms), _listed(wrong)
    if wrong and not doubt:
        return by_derive
    still = identity(spec, check.variables)
    for group in perms:
        alone = {**still, group: perms[group]}
        if check.holds(spec, alone):
            continue
        for mistake in _single_mistakes(check, spec, group, len(perms[group])):
            # A group may be left without any leaf; its permutation is just not used.
            if check.holds(mended(spec, [mistake]), alone):
                return [group], str(mistake)
        if not wrong:
            members = ", ".join(f"{leaf!r} axis {d}" for leaf, d in spec.groups[group])
            return [group], f"no single leaf explains it; it permutes {members}"
    if wrong:
        return by_derive[0], f"{by_derive[1]} (though {doubt})"
    return list(perms), "no group does so alone"


def _mending_helps(
    check: _Check,
    spec: PermutationSpec,
    derived: PermutationSpec,
    wrong: list[Mistake],
    key: Key[Array, ""],
) -> bool:
    """Whether the outputs stay where they are without what is said to be wrong."""
    right = mended(spec, wrong)
    sizes = group_sizes(derived, check.variables) | group_sizes(spec, check.variables)
    right = replace(right, sizes={group: sizes[group] for group in right.groups})
    return check.holds(right, random(right, check.variables, key))


def _single_mistakes(
    check: _Check, spec: PermutationSpec, group: str, size: int
) -> Iterator[Mistake]:
    """All that can be wrong about whether one axis belongs to a group."""
    # What may be missing comes first: taking a group its last axis "mends" it, too.
    leaves = flatten(check.variables)
    for leaf, axes in spec.axes.items():
        for dimension, axis in enumerate(axes):
            if axis != group and leaves[leaf].shape[dimension] == size:
                yield Mistake(leaf, dimension, axis, group)
    for leaf, dimension in spec.groups[group]:
        if spec.axes[leaf][dimension] == group:
            yield Mistake(leaf, dimension, group, None)


def _groups(wrong: list[Mistake], groups: Container[str]) -> list[str]:
    """The groups that mistakes are about."""
    axes = [axis for mistake in wrong for axis in (mistake.declared, mistake.right)]
    named = dict.fromkeys(group for axis in axes for group in axis_groups(axis))
    return [group for group in named if group in groups]


def _listed(wrong: list[Mistake], at_most: int = 10) -> str:
    more = [f"and {len(wrong) - at_most} more"] if len(wrong) > at_most else []
    return "; ".join([*map(str, wrong[:at_most]), *more])


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
