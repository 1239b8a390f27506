"""Derives a permutation spec by tracing a model, so that nothing has to be declared.

The model is traced to a jaxpr. At first every axis of every weight has units of its
own. The rule of each operation tells which axes hold the same units (see `_rules`).
Units that inputs or outputs share cannot be permuted. All other units form the groups.
"""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple, overload

import jax
from jaxtyping import Array

from dimat_jax._jaxprs import ClosedJaxpr
from dimat_jax.permutation._declare import declare, fix_undeclarable, name_groups
from dimat_jax.permutation._jaxpr import shape_of
from dimat_jax.permutation._run_jaxpr import run_and_record
from dimat_jax.permutation._spec import PermutationSpec, PermutationSpecError
from dimat_jax.permutation._taps import Tap, choose_taps, read_tap
from dimat_jax.permutation._trace import Trace, Value, constant
from dimat_jax.permutation._units import (
    ArrayUnits,
    AxisUnits,
    Units,
    fix,
    fixed_axes,
    unknown,
)
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
) -> PermutationSpec | tuple[PermutationSpec, Activations]:
    """Finds a model's permutation symmetry by tracing it.

    Derive follows weights and activations through contractions, convolutions,
    elementwise operations, reductions, reshapes, concatenations and control flow. An
    operation that it does not know fixes the axes that it touches; a warning names
    these axes. The derived symmetry holds for every value of the weights. `verify`
    checks a symmetry on some values.

    Args:
        forward: `forward(variables, inputs) -> outputs`. JAX must be able to trace it.
            Its arguments and results may be any pytrees.
        variables: one network's variables: arrays, or `jax.ShapeDtypeStruct`s. Split
            off all leaves that are not arrays first (e.g. by `equinox.partition`).
        inputs: an example, or a batch of examples, as `forward` takes it. Only shapes
            matter. Use sizes above 1, because an axis of size 1 tells little.
        strict: raise an error instead of a warning if an operation without a rule
            fixes an axis.
        with_activations: also return a function that returns the activations of the
            groups' units, for models that have no such function of their own.

    Returns:
        a spec without taps; or, with activations, a pair `(spec, activations)`.
        `activations(variables, inputs) -> {tap: array}` returns an array for each tap
        of the spec: the operands of the contractions that use a group's units. It may
        be vmapped and called with other batch sizes. It traces the model each time, so
        it should be jitted.

    Raises:
        PermutationSpecError: a leaf is not an array, or, if strict, an operation
            without a rule fixes an axis. `activations` raises it if the model has
            other units with its inputs than with those given here.
    """
    reading = _read(forward, variables, inputs)
    if message := reading.missing_rules():
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
        places = {tap.place for tap in taps.values()}
        recorded = run_and_record(again.jaxpr, arguments, places)
        return {name: read_tap(tap, recorded[tap.place]) for name, tap in taps.items()}

    return spec, activations


class _Reading(NamedTuple):
    """What tracing a model has told about it.

    Attributes:
        jaxpr: the model's jaxpr.
        trace: the trace through the jaxpr.
        axes: by each leaf's path, the units along its axes.
        names: the name of each group.
    """

    jaxpr: ClosedJaxpr
    trace: Trace
    axes: dict[str, ArrayUnits]
    names: dict[Units, str]

    def spec(self, taps: Mapping[str, Tap]) -> PermutationSpec:
        """The spec of the model, with these taps."""
        axes = {
            path: tuple(declare(axis, self.names) for axis in axes)
            for path, axes in self.axes.items()
        }
        # A spec gives a group's size only if the group has no axis to itself.
        plain = {axis for leaf_axes in axes.values() for axis in leaf_axes}
        sizes = {n: atom.size for atom, n in self.names.items() if n not in plain}
        return PermutationSpec(axes, {t: tap.axes for t, tap in taps.items()}, sizes)

    def taps(self) -> dict[str, Tap]:
        """The taps of the model, by name."""
        return choose_taps(
            self.trace,
            self.names.values(),
            partial(declare, names=self.names),
            _source_of_inputs(self.axes),
        )

    def missing_rules(self) -> str:
        """A message that names the axes fixed only by operations without a rule.

        The message is empty if there are no such axes.
        """
        costs: dict[str, list[str]] = {}
        for path, axes in self.axes.items():
            for d, axis in enumerate(axes):
                reasons = axis.root().fixed if axis is not None else frozenset()
                if reasons and reasons <= self.trace.without_rule:
                    for name in reasons:
                        costs.setdefault(name, []).append(f"{path!r} axis {d}")
        return "; ".join(
            f"derive does not know the operation {name!r}, and fixes what it touches: "
            f"{', '.join(sorted(axes))}"
            for name, axes in sorted(costs.items())
        )


def _source_of_inputs(leaves: Collection[str]) -> int:
    """The source bit that all inputs share (see `Value`): the bit after the leaves'."""
    return 1 << len(leaves)


def _read(forward: Forward, variables: PyTree, inputs: PyTree) -> _Reading:
    """Traces a model. Raises a PermutationSpecError for a leaf that is not an array."""
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
        Value(fixed_axes(shape_of(var), "an input"), _source_of_inputs(leaves))
        for var in closed.jaxpr.invars[len(leaves) :]
    ]
    trace = Trace()
    outputs = trace.read(closed.jaxpr, [*map(constant, closed.consts), *arguments])
    output_sources = 0
    for value in outputs:
        output_sources |= value.sources
        _fix_all(value.axes, "an output")
    for n, path in enumerate(leaves):
        # The outputs tell nothing about a leaf on which no output depends.
        if not output_sources >> n & 1:
            _fix_all(axes[path], "unused")
    for leaf_axes in axes.values():
        for axis in leaf_axes:
            fix_undeclarable(axis)

    used = [list(leaves)[n] for n in trace.first_used if n < len(leaves)]
    # Groups are named after kernels rather than biases: a kernel's name says more.
    used.sort(key=lambda path: len(axes[path]) < 2)
    names = name_groups({path: axes[path] for path in [*used, *leaves]})
    return _Reading(closed, trace, axes, names)


def _fix_all(axes: Sequence[AxisUnits], reason: str) -> None:
    for axis in axes:
        fix(axis, reason)
