"""A permutation spec read off a traced model: nothing has to be declared.

The model is traced to a jaxpr. Every axis of every weight starts as units of its own;
each operation tells which axes hold the same units (`rules`). What is reachable from
inputs or outputs cannot be permuted; the rest are the groups.
"""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, overload

import jax
from jaxtyping import Array

from dimat_jax.permutation._declare import (
    declare,
    fix_what_cannot_be_declared,
    name_groups,
)
from dimat_jax.permutation._spec import PermutationSpec, PermutationSpecError
from dimat_jax.permutation._taps import Tap, choose_taps, show
from dimat_jax.permutation._trace import Trace, Value, constant
from dimat_jax.permutation._units import Axes, Known, Units, fix, fixed_axes, unknown
from dimat_jax.permutation._watch import watch
from dimat_jax.tree import PyTree, flatten

__all__ = ["derive"]

Forward = Callable[[PyTree, PyTree], PyTree]
Activations = Callable[[PyTree, PyTree], dict[str, Array]]


@overload
def derive(
    forward: Forward,
    variables: PyTree,
    inputs: PyTree,
    *,
    strict: bool = ...,
    with_activations: Literal[False] = ...,
) -> PermutationSpec: ...


@overload
def derive(
    forward: Forward,
    variables: PyTree,
    inputs: PyTree,
    *,
    strict: bool = ...,
    with_activations: Literal[True],
) -> tuple[PermutationSpec, Activations]: ...


def derive(
    forward: Forward,
    variables: PyTree,
    inputs: PyTree,
    *,
    strict: bool = False,
    with_activations: bool = False,
) -> Any:
    """Finds a model's permutation symmetry by tracing it.

    Weights and activations are followed through contractions, convolutions, elementwise
    operations, reductions, reshapes, concatenations and control flow. An operation that
    is not known fixes the axes that it touches, with a warning that names them. What is
    found holds for every value of the weights; `verify` checks it on some.

    Args:
        forward: `forward(variables, inputs) -> outputs`, traceable by JAX, any pytrees.
        variables: one network's variables; arrays, or `jax.ShapeDtypeStruct`s. Split
            off what is no array first (e.g. `equinox.partition`).
        inputs: an example, or a batch of them (as `forward` takes it); only shapes
            matter, but sizes of 1 tell little.
        strict: raise where an unknown operation costs a symmetry, instead of warning.
        with_activations: also return a function that shows the groups' units, for
            models that have none of their own.

    Returns:
        spec, without taps; or `(spec, activations)` with taps that
        `activations(variables, inputs) -> {tap: array}` shows: what goes into the
        contractions that use a group's units. It may be vmapped, called with other
        batch sizes, and should be jitted: it traces the model to find its way.

    Raises:
        PermutationSpecError: a leaf that is no array; or, if strict, an operation
            without a rule. `activations` does, if the inputs are of a kind with which
            the model has other units.
    """
    reading = _read(forward, variables, inputs)
    if message := reading.complaint():
        if strict:
            raise PermutationSpecError(message)
        warnings.warn(message, stacklevel=2)
    if not with_activations:
        return reading.spec({})
    spec = reading.spec(reading.taps())

    def activations(variables, inputs):
        again = _read(forward, variables, inputs)
        taps = again.taps()
        if again.spec(taps) != spec:
            raise PermutationSpecError(
                "the model has other units, or shows them elsewhere, with these inputs "
                "than with those that its spec was derived with; derive it again with "
                "inputs like these"
            )
        arguments = jax.tree.leaves((variables, inputs))
        seen = watch(again.jaxpr, arguments, {tap.place for tap in taps.values()})
        return {name: show(tap, seen[tap.place]) for name, tap in taps.items()}

    return spec, activations


class _Reading(NamedTuple):
    """What was read of a model.

    Attributes:
        jaxpr: the model's, closed.
        trace: through it.
        axes: of the leaves.
        names: of the groups.
    """

    jaxpr: Any
    trace: Trace
    axes: dict[str, Axes]
    names: dict[Units, str]

    def spec(self, taps: Mapping[str, Tap]) -> PermutationSpec:
        axes = {
            path: tuple(declare(axis, self.names) for axis in axes)
            for path, axes in self.axes.items()
        }
        # Where an axis of its own tells a group's size, the spec need not.
        plain = {axis for leaf_axes in axes.values() for axis in leaf_axes}
        sizes = {n: atom.size for atom, n in self.names.items() if n not in plain}
        return PermutationSpec(axes, {t: tap.axes for t, tap in taps.items()}, sizes)

    def taps(self) -> dict[str, Tap]:
        return choose_taps(
            self.trace,
            self.names.values(),
            partial(declare, names=self.names),
            _inputs(self.axes),
        )

    def complaint(self) -> str:
        """Which axes are fixed only because of operations without a rule."""
        costs: dict[str, list[str]] = {}
        for path, axes in self.axes.items():
            for d, axis in enumerate(axes):
                reasons = axis.root().fixed if axis is not None else frozenset()
                if reasons and reasons <= self.trace.not_known:
                    for name in reasons:
                        costs.setdefault(name, []).append(f"{path!r} axis {d}")
        return "; ".join(
            f"derive does not know the operation {name!r}, and fixes what it touches: "
            f"{', '.join(sorted(axes))}"
            for name, axes in sorted(costs.items())
        )


def _inputs(leaves: Collection[str]) -> int:
    """The source that all inputs are (see `Value`): the one behind all leaves."""
    return 1 << len(leaves)


def _read(forward: Forward, variables: PyTree, inputs: PyTree) -> _Reading:
    leaves = flatten(variables)
    for path, leaf in leaves.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise PermutationSpecError(
                f"the leaf {path!r} is no array, but {type(leaf).__name__}; split the "
                "variables from what is not traced first"
            )
    closed = jax.make_jaxpr(forward)(variables, inputs)
    axes = {p: [unknown(size) for size in leaf.shape] for p, leaf in leaves.items()}
    arguments = [Value(axes[path], 1 << n) for n, path in enumerate(leaves)] + [
        Value(fixed_axes(var.aval.shape, "an input"), _inputs(leaves))
        for var in closed.jaxpr.invars[len(leaves) :]
    ]
    trace = Trace()
    outputs = trace.read(closed.jaxpr, [*map(constant, closed.consts), *arguments])
    alive = 0
    for value in outputs:
        alive |= value.sources
        _fix_all(value.axes, "an output")
    for n, path in enumerate(leaves):
        if not alive >> n & 1:  # no output depends on it, so nothing can be said
            _fix_all(axes[path], "unused")
    for leaf_axes in axes.values():
        for axis in leaf_axes:
            fix_what_cannot_be_declared(axis)

    used = [list(leaves)[n] for n in trace.first_used if n < len(leaves)]
    # Kernels first; they say more than the bias that is added to them.
    used.sort(key=lambda path: len(axes[path]) < 2)
    names = name_groups({path: axes[path] for path in [*used, *leaves]})
    return _Reading(closed, trace, axes, names)


def _fix_all(axes: Sequence[Known], reason: str) -> None:
    for axis in axes:
        fix(axis, reason)
