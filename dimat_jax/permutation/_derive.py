"""Derives a permutation spec by tracing a model, so that nothing has to be declared.

The model is traced to a jaxpr. At first every axis of every weight has units of its
own. The rule of each operation tells which axes hold the same units (see `_rules`).
Units that inputs or outputs share cannot be permuted. All other units form the groups.
"""

import warnings
from collections.abc import Callable
from typing import Literal, overload

import jax
from jaxtyping import Array

from dimat_jax.permutation._outputs import ChooseOutputs, Forward
from dimat_jax.permutation._reading import read_model
from dimat_jax.permutation._run_jaxpr import run_and_record
from dimat_jax.permutation._spec import (
    PermutationSpec,
    PermutationSpecError,
    PermutationSpecWarning,
)
from dimat_jax.permutation._taps import read_tap
from dimat_jax.tree import PyTree, as_arrays

__all__ = ["derive"]

Activations = Callable[[PyTree, PyTree], dict[str, Array]]


@overload
def derive(
    forward: Forward,
    variables: PyTree,
    inputs: PyTree,
    *,
    outputs: ChooseOutputs | None = ...,
    is_statistic: Callable[[str], bool] | None = ...,
    keep: Callable[[str, int], bool] | None = ...,
    strict: bool = ...,
    with_activations: Literal[False] = ...,
) -> PermutationSpec: ...


@overload
def derive(
    forward: Forward,
    variables: PyTree,
    inputs: PyTree,
    *,
    outputs: ChooseOutputs | None = ...,
    is_statistic: Callable[[str], bool] | None = ...,
    keep: Callable[[str, int], bool] | None = ...,
    strict: bool = ...,
    with_activations: Literal[True],
) -> tuple[PermutationSpec, Activations]: ...


def derive(
    forward: Forward,
    variables: PyTree,
    inputs: PyTree,
    *,
    outputs: ChooseOutputs | None = None,
    is_statistic: Callable[[str], bool] | None = None,
    keep: Callable[[str, int], bool] | None = None,
    strict: bool = False,
    with_activations: bool = False,
) -> PermutationSpec | tuple[PermutationSpec, Activations]:
    """Finds a model's permutation symmetry by tracing it.

    Derive follows weights and activations through contractions, convolutions,
    elementwise operations, reductions, reshapes, concatenations, control flow and
    collectives over a vmapped axis. Code on which no output depends is left out. An
    operation that derive does not know fixes the axes that it touches, and an array
    that `forward` captures is fixed whatever it contains. The derived symmetry holds
    for every value of the weights. `verify` checks a symmetry on some values, and
    `explain` tells for each axis why it is fixed.

    Layers that are stacked along a fixed axis (`nn.scan`, a vmapped ensemble, experts)
    have permutations of their own; see `Stack`. Units along an axis that is permuted
    itself (attention heads, the members of an ensemble whose mean counts) have one
    permutation for all of its entries, unless `keep` fixes that axis.

    A warning (a `PermutationSpecWarning`) names the axes that operations without a rule
    have fixed, and the layers that look permutable but are fixed, with the reason and
    what may be done. It also tells if there is no group at all.

    Args:
        forward: `forward(variables, inputs) -> outputs`. JAX must be able to trace it.
            Its arguments and results may be any pytrees.
        variables: one network's variables: arrays, or `jax.ShapeDtypeStruct`s. Split
            off all leaves that are not arrays first (e.g. by `equinox.partition`).
        inputs: an example, or a batch of examples, as `forward` takes it. Only shapes
            matter. Use sizes above 1, because an axis of size 1 tells little.
        outputs: chooses the outputs that count from what `forward` returns, for
            example `lambda out: out[0]`. By default all outputs count, except updated
            variables beside them: what Flax returns with `mutable=` (captured
            intermediates too), the new state of variables `(params, state)`, or the
            state of an NNX module. Updated variables are permuted like the variables.
        is_statistic: whether the leaf with a path is a running statistic. By default
            these are the updated variables, and the leaves that normalise as BatchNorm
            does in evaluation mode: `(x - mean) * rsqrt(variance + epsilon)`.
        keep: `keep(leaf, dimension)` says whether an axis is to be fixed, although it
            could be permuted. If it stacks layers, each keeps its place and has
            permutations of its own.
        strict: raise an error if an operation without a rule has cost a symmetry.
        with_activations: also return a function that returns the activations of the
            groups' units, for models that have no such function of their own.

    Returns:
        a spec without taps; or, with activations, a pair `(spec, activations)`.
        `activations(variables, inputs) -> {tap: array}` returns an array for each tap
        of the spec: the operands of the contractions that use a group's units. It may
        be vmapped and called with other batch sizes. It traces the model each time, so
        it should be jitted.

    Raises:
        PermutationSpecError: a leaf is not an array, `outputs` cannot choose from what
            `forward` returns, or, if strict, an operation without a rule fixes an axis.
            `activations` raises it if the model has other units with its inputs than
            with those given here.
    """
    reading = read_model(forward, variables, inputs, outputs, is_statistic, keep)
    missing = reading.missing_rules()
    if missing and strict:
        raise PermutationSpecError(missing)
    if doubts := [text for text in (missing, reading.pinned()) if text]:
        warnings.warn("; ".join(doubts), PermutationSpecWarning, stacklevel=2)
    if not with_activations:
        return reading.spec({})
    spec = reading.spec(reading.taps())

    def activations(variables, inputs):
        variables, inputs = as_arrays((variables, inputs))
        again = read_model(forward, variables, inputs, outputs, is_statistic, keep)
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
