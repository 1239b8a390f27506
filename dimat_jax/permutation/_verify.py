"""Verifies a declared symmetry: permutes the units and compares the outputs."""

from collections.abc import Container, Iterator
from dataclasses import replace
from functools import partial
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from dimat_jax.permutation._actions import (
    AnyPerms,
    apply,
    identity,
    invert,
    permute_leaf,
    random,
)
from dimat_jax.permutation._mistakes import Mistake, correct_spec, find_mistakes
from dimat_jax.permutation._outputs import (
    ChooseOutputs,
    Forward,
    ForwardOutputs,
    call_forward,
)
from dimat_jax.permutation._reading import read_model
from dimat_jax.permutation._sizes import group_shapes, group_sizes, validate
from dimat_jax.permutation._spec import (
    PermutationSpec,
    PermutationSpecError,
    axis_groups,
)
from dimat_jax.tree import PyTree, as_arrays, flatten, is_inexact

__all__ = ["InconclusiveError", "Verification", "verify"]

_ROUNDING = (
    "derive finds the declared symmetry in the model's operations, which leaves "
    "rounding; forward should compute in float32, and BatchNorm needs more or larger "
    "examples, as statistics of few values magnify it"
)

# Groups with fewer units are tried with a second permutation.
_FEW = 8


class InconclusiveError(PermutationSpecError):
    """Rounding or outputs that are not finite hide whether a symmetry holds."""


def verify(
    spec: PermutationSpec,
    forward: Forward,
    variables: PyTree,
    inputs: PyTree,
    key: Key[Array, ""],
    *,
    outputs: ChooseOutputs | None = None,
    tolerance: float = 1e-4,
) -> None:
    """Checks that random permutations leave a network's outputs unchanged.

    A new network hides a wrong spec: its normalisation scales, biases and statistics
    are constant, and no permutation changes a constant leaf. So verify first copies the
    variables and gives random positive values to leaves that are constant along some
    axis. (They are positive because variances must be.)

    Args:
        spec: the symmetry to check. `validate` checks its structure first.
        forward: `forward(variables, inputs) -> outputs`, where outputs are any pytree
            of arrays. It should compute in float32. To check both modes, return the
            outputs of train and of eval mode: running statistics matter only in eval
            mode.
        variables: one network's variables, initial or trained.
        inputs: a few examples. BatchNorm over too few examples magnifies rounding.
        key: the key for the random values and permutations. It is consumed.
        outputs: chooses the outputs that must not change, as in `derive`. By default
            these are all but updated variables, which must be permuted like the
            variables.
        tolerance: the largest change of an output that is allowed, relative to the
            largest absolute output.

    Raises:
        PermutationSpecError: the outputs change or are not finite. The message tells
            the size of the change and names the groups and leaves that are declared
            wrongly. These are the leaves on which the spec and `derive` disagree, or
            else the one leaf that explains the change. If the spec and `derive` agree,
            the message names rounding as the cause.
    """
    Verification(spec, forward, inputs, outputs=outputs, tolerance=tolerance)(
        variables, key
    )


class Verification:
    """Verifies one spec on the variables of several networks.

    The forward function, and the application of permutations, are compiled once for all
    of them.

    Args:
        spec: as in `verify`.
        forward: as in `verify`.
        inputs: as in `verify`.
        outputs: as in `verify`.
        tolerance: as in `verify`.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        forward: Forward,
        inputs: PyTree,
        *,
        outputs: ChooseOutputs | None = None,
        tolerance: float = 1e-4,
    ):
        self._spec = spec
        self._tolerance = tolerance
        self._model = _Model(forward, inputs, outputs)
        self._apply = jax.jit(partial(apply, spec))

    def __call__(self, variables: PyTree, key: Key[Array, ""]) -> None:
        """Checks the spec on one network's variables.

        Args:
            variables: as in `verify`.
            key: as in `verify`; it is consumed.

        Raises:
            PermutationSpecError: as of `verify`. It is an `InconclusiveError` if the
                cause is rounding, or outputs that are not finite from the start.
        """
        spec, tolerance = self._spec, self._tolerance
        validate(spec, variables)
        seeds = np.asarray(jax.random.bits(key, (4,), jnp.uint32))
        rng = np.random.default_rng(seeds)
        variables = _without_constants(as_arrays(variables), rng)
        check = _Check(self._model, variables, tolerance)
        for perms in _draw_perms(spec, variables, rng):
            change = check.output_change(spec, perms, self._apply(perms, variables))
            if change > tolerance:
                self._refuse(check, perms, change, key)

    def _refuse(
        self, check: "_Check", perms: AnyPerms, change: float, key: Key[Array, ""]
    ) -> NoReturn:
        """Raises the error that says why permutations change the outputs."""
        spec, tolerance = self._spec, self._tolerance
        groups, cause = _find_cause(check, spec, perms, key)
        named = ", ".join(map(repr, groups))
        units = (
            f"the units of group{'s' * (len(groups) > 1)} {named}"
            if groups
            else "units"
        )
        error = InconclusiveError if cause == _ROUNDING else PermutationSpecError
        raise error(
            f"permuting {units} moves the outputs by {change:.1e} of the largest "
            f"(allowed: {tolerance:.0e}): {cause}"
        )


class _Model:
    """A model with the inputs on which it is checked.

    Attributes:
        forward: the forward function as it was given.
        inputs: the inputs.
        choose: chooses the outputs that count.
    """

    def __init__(self, forward: Forward, inputs: PyTree, choose: ChooseOutputs | None):
        self.forward, self.choose = forward, choose
        self.inputs = as_arrays(inputs)
        # It is compiled because the search for a wrong leaf takes many evaluations.
        self._compiled = jax.jit(lambda v, x: call_forward(forward, v, x, choose))

    def __call__(self, variables: PyTree) -> ForwardOutputs:
        # With reduced precision, rounding alone would change the outputs.
        with jax.default_matmul_precision("highest"):
            return self._compiled(variables, self.inputs)


class _Check:
    """Measures how far permuted variables change the outputs."""

    def __init__(self, model: _Model, variables: PyTree, tolerance: float):
        self.variables = variables
        self._model = model
        self._tolerance = tolerance
        result = model(variables)
        if not jax.tree.leaves(result.counted):
            raise PermutationSpecError("forward returned no arrays; nothing to verify")
        self._outputs = _as_float32(result)
        if not all(np.isfinite(output).all() for output in self._outputs):
            raise InconclusiveError("the outputs are not finite; nothing to verify")

    def output_change(
        self, spec: PermutationSpec, perms: AnyPerms, permuted: PyTree = None
    ) -> float:
        """The largest change of an output, relative to the largest absolute output.

        It is infinite if an output is no longer finite. Updated variables are permuted
        back before they are compared.

        Args:
            spec: the symmetry.
            perms: the permutations.
            permuted: the permuted variables, if they are known already.
        """
        if permuted is None:
            permuted = apply(spec, perms, self.variables)
        counted, updates = self._model(permuted)
        back = invert(perms)
        restored = {
            path: permute_leaf(spec.axes[path], back, leaf)
            for path, leaf in updates.items()
        }
        outputs = _as_float32(ForwardOutputs(counted, restored))
        if not all(np.isfinite(output).all() for output in outputs):
            return np.inf
        return max(
            float(np.abs(after - before).max() / max(np.abs(before).max(), 1e-30))
            for before, after in zip(self._outputs, outputs, strict=True)
        )

    def holds(self, spec: PermutationSpec, perms: AnyPerms) -> bool:
        """Whether these permutations leave the outputs unchanged."""
        return self.output_change(spec, perms) <= self._tolerance

    def derived(self) -> tuple[PermutationSpec, str]:
        """The derived spec, and a message on operations that derive does not know.

        Because of such operations the spec may lack symmetries. The message is empty
        if derive knows all operations.
        """
        model = self._model
        reading = read_model(model.forward, self.variables, model.inputs, model.choose)
        return reading.spec({}), reading.missing_rules()


def _as_float32(outputs: PyTree) -> list[np.ndarray]:
    def plain(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    return [np.asarray(plain(leaf), np.float32) for leaf in jax.tree.leaves(outputs)]


def _find_cause(
    check: _Check, spec: PermutationSpec, perms: AnyPerms, key: Key[Array, ""]
) -> tuple[list[str], str]:
    """Finds the groups that change the outputs, and the message on the cause.

    There are no such groups if the cause is rounding.
    """
    derived, doubt = check.derived()
    mistakes = find_mistakes(spec, derived, check.variables)
    if not mistakes:
        return [], _ROUNDING
    if not _correction_helps(check, spec, derived, mistakes, key):
        mistakes = []
    by_derive = _groups_of(mistakes, perms), _join(mistakes)
    if mistakes and not doubt:
        return by_derive
    identities = identity(spec, check.variables)
    for group in perms:
        alone = {**identities, group: perms[group]}
        if check.holds(spec, alone):
            continue
        for mistake in _single_mistakes(check, spec, group, perms[group].shape):
            # The corrected spec may have no leaf left in the group. Then the group's
            # permutation is not used.
            if check.holds(correct_spec(spec, [mistake]), alone):
                return [group], str(mistake)
        if not mistakes:
            members = ", ".join(f"{leaf!r} axis {d}" for leaf, d in spec.groups[group])
            return [group], f"no single leaf explains it; it permutes {members}"
    if mistakes:
        return by_derive[0], f"{by_derive[1]} (though {doubt})"
    return list(perms), "no group does so alone"


def _correction_helps(
    check: _Check,
    spec: PermutationSpec,
    derived: PermutationSpec,
    mistakes: list[Mistake],
    key: Key[Array, ""],
) -> bool:
    """Whether the outputs do not change once these mistakes are corrected."""
    right = correct_spec(spec, mistakes)
    sizes = group_sizes(derived, check.variables) | group_sizes(spec, check.variables)
    right = replace(right, sizes={group: sizes[group] for group in right.groups})
    return check.holds(right, random(right, check.variables, key))


def _single_mistakes(
    check: _Check, spec: PermutationSpec, group: str, shape: tuple[int, ...]
) -> Iterator[Mistake]:
    """Yields every mistake that a spec can make with one axis of a group.

    The axis belongs to the group but is not declared so, or the other way round.
    """
    # Axes that the group may lack come first. Removing the last axis of a group would
    # leave the outputs unchanged as well, but explains nothing.
    leaves = flatten(check.variables)
    for leaf, axes in spec.axes.items():
        # A leaf without the group has no axis that stacks the group's layers.
        for dimension, axis in enumerate(axes) if len(shape) == 1 else ():
            if axis != group and leaves[leaf].shape[dimension] == shape[-1]:
                yield Mistake(leaf, dimension, axis, group)
    for leaf, dimension in spec.groups[group]:
        if spec.axes[leaf][dimension] == group:
            yield Mistake(leaf, dimension, group, None)


def _groups_of(mistakes: list[Mistake], groups: Container[str]) -> list[str]:
    """Those of the groups that the mistakes name."""
    axes = [axis for mistake in mistakes for axis in (mistake.declared, mistake.right)]
    named = dict.fromkeys(group for axis in axes for group in axis_groups(axis))
    return [group for group in named if group in groups]


def _join(mistakes: list[Mistake], at_most: int = 10) -> str:
    n_more = len(mistakes) - at_most
    more = [f"and {n_more} more"] if n_more > 0 else []
    return "; ".join([*map(str, mistakes[:at_most]), *more])


def _without_constants(variables: PyTree, rng: np.random.Generator) -> PyTree:
    """Puts random positive noise on the leaves that are constant along some axis."""

    def perturb(leaf):
        if not is_inexact(leaf) or not _constant_along_an_axis(leaf):
            return leaf
        leaf = np.asarray(leaf)
        noise = rng.uniform(0.5, 1.5, leaf.shape)
        return np.where(leaf == 0, 0.1 * noise, leaf * noise).astype(leaf.dtype)

    return jax.tree.map(perturb, variables)


def _constant_along_an_axis(leaf) -> bool:
    leaf = np.asarray(leaf)
    return any(
        size > 1 and bool((np.ptp(leaf, axis=axis) == 0).all())
        for axis, size in enumerate(leaf.shape)
    )


def _draw_perms(
    spec: PermutationSpec, variables: PyTree, rng: np.random.Generator
) -> Iterator[dict[str, np.ndarray]]:
    """Yields permutations to try. None of the first ones is the identity.

    A random permutation of few units may be one that a smaller symmetry allows: every
    third one of four units keeps two pairs together. So few units are rotated once
    more. If the symmetry allows both permutations, then it allows the rotation too.

    The permutations are drawn on the host, because `random` compiles a program for each
    size of a group.
    """
    perms = {}
    for group, shape in group_shapes(spec, variables).items():
        units = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
        drawn = rng.permuted(units, axis=-1)
        is_identity = (drawn == units).all(axis=-1, keepdims=True)
        # An identity would check nothing.
        perms[group] = np.where(is_identity, np.roll(drawn, 1, axis=-1), drawn)
    yield perms
    if any(perm.shape[-1] < _FEW for perm in perms.values()):
        yield {group: np.roll(perm, 1, axis=-1) for group, perm in perms.items()}
