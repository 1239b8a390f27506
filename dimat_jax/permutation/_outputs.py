"""Tells which outputs of a forward function count, and which are updated variables.

A model in training mode often returns its updated running statistics beside the logits.
They are no output that permutations must leave alone: where the units of a layer are
permuted, its statistics are permuted as well.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from dimat_jax.permutation._spec import PermutationSpecError
from dimat_jax.tree import PyTree, flatten

__all__ = ["ChooseOutputs", "Forward", "ForwardOutputs", "call_forward"]

Forward = Callable[[PyTree, PyTree], PyTree]

ChooseOutputs = Callable[[Any], PyTree]
"""`outputs(result of forward) -> the outputs that permutations must leave alone`."""

# The collection in which Flax returns what `sow` and `capture_intermediates` collect.
_INTERMEDIATES = "intermediates"


class ForwardOutputs(NamedTuple):
    """What a forward function has returned.

    Attributes:
        counted: the outputs that permutations must leave alone.
        updates: by the paths of variables, their new values. They are permuted like the
            variables. Variables that stay as they are have no entry.
    """

    counted: PyTree
    updates: dict[str, Any]


def call_forward(
    forward: Forward, variables: PyTree, inputs: PyTree, outputs: ChooseOutputs | None
) -> ForwardOutputs:
    """Calls `forward` and splits what it returns.

    Updated variables are recognised in a pair whose second entry is one of these:

    - what Flax returns with `mutable=`: a dict whose entries have the structure of
      collections of the variables, or are called "intermediates";
    - for variables `(params, state)`, as of Haiku or Equinox, a new state;
    - the variables themselves, some of them unchanged, as NNX's `nnx.state`.

    Args:
        forward: `forward(variables, inputs) -> outputs`.
        variables: the variables.
        inputs: the inputs.
        outputs: chooses the outputs that count. By default these are all outputs but
            updated variables and Flax's intermediates.

    Raises:
        PermutationSpecError: `outputs` cannot choose from the result.
    """
    # An NNX module may write into the variables that it was merged from.
    before = jax.tree.map(lambda leaf: leaf, variables)
    result = forward(variables, inputs)
    updates = _updates(result, before)
    if outputs is not None:
        try:
            return ForwardOutputs(outputs(result), updates or {})
        except (LookupError, TypeError, AttributeError) as error:
            raise PermutationSpecError(
                f"outputs= cannot choose from what forward returns, "
                f"{jax.tree.map(_type_of, result)}: {error}"
            ) from error
    if updates is None:
        return ForwardOutputs(result, {})
    return ForwardOutputs(result[0], updates)


def _updates(result: Any, variables: PyTree) -> dict[str, Any] | None:
    """The updated variables by path; None if the result is no pair with them."""
    if not isinstance(result, tuple | list) or len(result) != 2:
        return None
    new = result[1]
    if isinstance(new, Mapping) and _is_flax(variables):
        kept = {key: new[key] for key in new if key != _INTERMEDIATES}
        if all(
            key != "params" and key in variables and _alike(value, variables[key])
            for key, value in kept.items()
        ):
            return _changed(kept, variables)
    if isinstance(variables, tuple | list) and len(variables) == 2:
        params, state = variables
        # What looks like the params may be gradients.
        if not _is_leaf(new) and _alike(new, state) and not _alike(new, params):
            return _changed({"1": new}, {"1": state})
    if not _is_leaf(new) and _alike(new, variables):
        changed = _changed(new, variables)
        # Gradients look like variables, too, but no variable is among them.
        if len(changed) < len(flatten(variables)):
            return changed
    return None


def _is_flax(variables: PyTree) -> bool:
    """Whether variables are collections as of Flax Linen.

    In a dict of weights, what looks like some of its entries may be gradients.
    """
    return isinstance(variables, Mapping) and "params" in variables


def _changed(new: PyTree, old: PyTree) -> dict[str, Any]:
    before = flatten(old)
    return {
        path: leaf for path, leaf in flatten(new).items() if leaf is not before[path]
    }


def _is_leaf(tree: Any) -> bool:
    return jax.tree_util.all_leaves([tree])


def _alike(new: PyTree, old: PyTree) -> bool:
    """Whether two trees have the same paths, with arrays of the same shapes."""
    return _shapes(new) == _shapes(old)


def _shapes(tree: PyTree) -> dict[str, Any]:
    return {path: getattr(leaf, "shape", None) for path, leaf in flatten(tree).items()}


def _type_of(leaf: Any) -> str:
    return f"{getattr(leaf, 'dtype', type(leaf).__name__)}{getattr(leaf, 'shape', '')}"
