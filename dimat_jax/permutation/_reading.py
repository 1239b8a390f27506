"""Traces a model: the axes of its variables, its groups, and its taps."""

import functools
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
from jax.interpreters import partial_eval

from dimat_jax._jaxprs import ClosedJaxpr
from dimat_jax.permutation._causes import Cause, describe
from dimat_jax.permutation._declare import (
    declare_array,
    fix_undeclarable,
    name_groups,
)
from dimat_jax.permutation._jaxpr import shape_of
from dimat_jax.permutation._nodes import fixed_nodes
from dimat_jax.permutation._outputs import ChooseOutputs, Forward, call_forward
from dimat_jax.permutation._pinned import list_axes, list_layers, pinned_layers
from dimat_jax.permutation._sizes import array_leaves
from dimat_jax.permutation._spec import Axes, PermutationSpec
from dimat_jax.permutation._stacked import Stacks, find_stacks
from dimat_jax.permutation._statistics import normalising_arguments
from dimat_jax.permutation._taps import Tap, choose_taps
from dimat_jax.permutation._trace import Trace, Value, constant
from dimat_jax.permutation._units import (
    ArrayUnits,
    Units,
    atoms,
    fix,
    fixed,
    same,
    unknown,
)
from dimat_jax.tree import PyTree, as_arrays, flatten

__all__ = ["Reading", "read_model"]

# What may be done about operations that draw random numbers.
_DROPOUT = dict.fromkeys(
    ["random_bits", "rng_bit_generator", "threefry2x32"],
    " (run the model in evaluation mode, without dropout)",
)


class Reading(NamedTuple):
    """What tracing a model has told about it.

    Attributes:
        jaxpr: the model's jaxpr.
        trace: the trace through the jaxpr.
        axes: by each leaf's path, the units along its axes.
        names: the name of each group.
        stacks: the groups whose layers are stacked, and along which axes.
        n_outputs: the number of outputs that count.
        statistics: the paths of the running statistics.
    """

    jaxpr: ClosedJaxpr
    trace: Trace
    axes: dict[str, ArrayUnits]
    names: dict[Units, str]
    stacks: Stacks
    n_outputs: int
    statistics: frozenset[str]

    def spec(self, taps: Mapping[str, Tap]) -> PermutationSpec:
        """The spec of the model, with these taps."""
        axes = {
            path: declare_array(axes, self.names, self.stacks)
            for path, axes in self.axes.items()
        }
        # A spec gives a group's size only if the group has no axis to itself.
        plain = {axis for leaf_axes in axes.values() for axis in leaf_axes}
        sizes = {n: atom.size for atom, n in self.names.items() if n not in plain}
        tap_axes = {name: tap.shown_axes for name, tap in taps.items()}
        return PermutationSpec(axes, tap_axes, sizes, self.statistics)

    def taps(self) -> dict[str, Tap]:
        """The taps of the model, by name."""
        return choose_taps(
            self.trace,
            self.names.values(),
            self._tap_axes,
            _source_of_inputs(self.axes),
        )

    def _tap_axes(self, axes: ArrayUnits) -> Axes:
        """The notation of a spec for a value; no groups if it does not show all layers.

        The layers must be on axes of their own, in the order of the leaves' axes.
        """
        roots = [axis.root() for axis in axes if axis is not None]
        for atom in {atom for axis in axes for atom in atoms(axis)}:
            order = self.stacks.get(atom, ())
            if order != tuple(root for root in roots if root in order):
                return (None,) * len(axes)
        return declare_array(axes, self.names, self.stacks)

    def missing_rules(self) -> str:
        """A message that names the axes fixed only by operations without a rule.

        The message is empty if there are no such axes.
        """
        return "; ".join(
            f"derive does not know the operation {name!r}, and fixes what it touches: "
            f"{list_axes(axes, at_most=len(axes))}{_DROPOUT.get(name, '')}"
            for name, axes in self.trace.unknown.costs(self.axes).items()
        )

    def pinned(self) -> str:
        """A message on layers that look permutable, but are fixed.

        The message is empty if there is no such layer, and there are groups.
        """
        inputs = _source_of_inputs(self.axes)
        layers = pinned_layers(self.trace, self.axes, inputs)
        if self.names:
            layers = [layer for layer in layers if layer.surprises(self.n_outputs)]
            return list_layers(layers)
        reasons = {
            reason
            for axes in self.axes.values()
            for axis in axes
            for node in fixed_nodes(axis)
            for reason in node.fixed
        }
        why = list_layers(layers) or f"the reasons are: {describe(reasons)}"
        return (
            "derive finds no units that may be permuted, so that nothing can be "
            f"aligned: {why} (permutation.explain tells the reason for each axis)"
        )


def _source_of_inputs(leaves: Collection[str]) -> int:
    """The source bit that all inputs share (see `Value`): the bit after the leaves'."""
    return 1 << len(leaves)


def read_model(
    forward: Forward,
    variables: PyTree,
    inputs: PyTree,
    outputs: ChooseOutputs | None,
    is_statistic: Callable[[str], bool] | None = None,
    keep: Callable[[str, int], bool] | None = None,
) -> Reading:
    """Traces a model; see `derive` for the arguments and the errors."""
    variables, inputs = as_arrays((variables, inputs))
    leaves = array_leaves(variables)

    def traced(variables, inputs):
        return call_forward(forward, variables, inputs, outputs)

    closed, shapes = jax.make_jaxpr(traced, return_shape=True)(variables, inputs)
    # Code on which no output depends must not fix anything.
    live, _ = partial_eval.dce_jaxpr(closed.jaxpr, True, instantiate=True)
    closed = ClosedJaxpr(live, closed.consts)
    axes = {p: [unknown(size) for size in leaf.shape] for p, leaf in leaves.items()}
    arguments = [Value(axes[path], 1 << n) for n, path in enumerate(leaves)] + [
        Value(_input_axes(path, shape_of(var)), _source_of_inputs(leaves))
        for path, var in zip(
            flatten(inputs), closed.jaxpr.invars[len(leaves) :], strict=True
        )
    ]
    trace = Trace()
    results = trace.read(closed.jaxpr, [*map(constant, closed.consts), *arguments])
    counted, updates = flatten(shapes.counted), sorted(shapes.updates)
    for n, (path, value) in enumerate(zip(counted, results, strict=False)):
        for d, axis in enumerate(value.axes):
            fix(axis, Cause("output", _name_axis(path, d), n))
    for path, value in zip(updates, results[len(counted) :], strict=True):
        for old, new in zip(axes[path], value.axes, strict=True):
            same(old, new)
    _fix_kept(axes, keep)
    _fix_unused(axes, results[: len(counted)])
    for leaf_axes in axes.values():
        for axis in leaf_axes:
            fix_undeclarable(axis)

    used = [list(leaves)[n] for n in trace.first_used if n < len(leaves)]
    # Groups are named after kernels rather than biases: a kernel's name says more.
    used.sort(key=lambda path: len(axes[path]) < 2)
    names = name_groups({path: axes[path] for path in [*used, *leaves]})
    stacks = find_stacks(axes.values(), trace.occurrences)
    if is_statistic is not None:
        statistics = filter(is_statistic, leaves)
    else:
        statistics = {*updates, *_normalising(closed, list(leaves))}
    return Reading(
        closed, trace, axes, names, stacks, len(counted), frozenset(statistics)
    )


def _normalising(closed: ClosedJaxpr, paths: Sequence[str]) -> list[str]:
    """The paths of the leaves that normalise as BatchNorm's statistics do."""
    numbers = normalising_arguments(closed.jaxpr)
    return [paths[n] for n in numbers if n < len(paths)]


def _fix_kept(
    axes_of: Mapping[str, ArrayUnits], keep: Callable[[str, int], bool] | None
) -> None:
    for path, axes in axes_of.items():
        for d, axis in enumerate(axes):
            if keep is not None and keep(path, d):
                fix(axis, "the wish to keep it in place")


def _fix_unused(axes_of: Mapping[str, ArrayUnits], outputs: Iterable[Value]) -> None:
    """Fixes the units of which the outputs tell nothing.

    These are the units of leaves on which no output depends. Updated variables may
    share units with other leaves; these units are not fixed.
    """
    sources = functools.reduce(operator.or_, (value.sources for value in outputs), 0)
    used = [axes for n, axes in enumerate(axes_of.values()) if sources >> n & 1]
    known = {atom for axes in used for axis in axes for atom in atoms(axis)}
    for axes in axes_of.values():
        for axis in axes:
            for atom in list(atoms(axis)):
                if atom not in known:
                    fix(atom, Cause("unused"))


def _input_axes(path: str, shape: Sequence[int]) -> ArrayUnits:
    return [
        fixed(size, Cause("input", _name_axis(path, d))) for d, size in enumerate(shape)
    ]


def _name_axis(path: str, d: int) -> str:
    return f"{path!r} axis {d}" if path else f"axis {d}"
