"""What a merge must know of an architecture: a bundled one, or a user's function."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from dimat_jax import merge, permutation
from dimat_jax.errors import UserError
from dimat_jax.models import classifier, permutation_spec
from dimat_jax.permutation import PermutationSpec
from dimat_jax.tree import PyTree

__all__ = ["Subject", "bundled", "own"]


class Subject(NamedTuple):
    """An architecture, as functions of one network's variables.

    Attributes:
        spec: its permutation symmetry.
        forward: `forward(variables, inputs) -> logits`, in evaluation mode.
        outputs: the outputs that the symmetry must leave alone, in all modes.
        activations: `activations(variables, inputs) -> {tap: array}`.
        batch_statistics: what `merge.recalibrate` needs; None without BatchNorm.
        unit_moments: what `merge.repair` needs; None if units cannot be rescaled.
        unmended: the reason why there is neither of these; "" if there is one.
    """

    spec: PermutationSpec
    forward: Callable[[PyTree, Any], Any]
    outputs: Callable[[PyTree, Any], Any]
    activations: Callable[[PyTree, Any], Any]
    batch_statistics: Callable[..., Any] | None
    unit_moments: Callable[..., Any] | None
    unmended: str = ""


def bundled(module: classifier.Model) -> Subject:
    """Knows a model of `MODELS`."""
    spec = permutation_spec(module)
    return Subject(
        spec,
        classifier.forward(module),
        classifier.both_modes(module),
        classifier.activations(module),
        classifier.batch_statistics(module),
        classifier.unit_moments(module, spec) if spec.groups else None,
    )


def own(
    where: str, forward: Callable[..., Any], variables: PyTree, inputs: Any
) -> Subject:
    """Derives what must be known from a user's function.

    Args:
        where: the name of the function in messages.
        forward: `forward(variables, inputs) -> outputs`; with running statistics also
            `forward(variables, inputs, train=True) -> (outputs, updated variables)`.
        variables: one network's variables.
        inputs: a batch of inputs.

    Raises:
        UserError: the function cannot be called like this, or the network has running
            statistics and the function has no `train`.
    """
    try:
        logits = jax.eval_shape(forward, variables, inputs)
    except UserError:
        raise
    except Exception as error:  # a user's function can raise any error
        shapes = jax.tree.map(lambda x: tuple(x.shape), inputs)
        raise UserError(
            f"{where}(variables, inputs) raises {type(error).__name__} for inputs of "
            f"shape {shapes}: {error}"
        ) from error
    if getattr(logits, "ndim", None) != 2:
        raise UserError(
            f"{where}(variables, inputs) must return logits [batch, classes], got "
            f"{jax.tree.map(lambda x: tuple(x.shape), logits)}"
        )
    spec, activations = permutation.derive(
        forward, variables, inputs, with_activations=True
    )
    known = Subject(spec, forward, forward, activations, None, None)
    if not spec.statistics:
        try:
            moments = merge.unit_moments(forward, variables, inputs)
        except merge.MergeError as error:
            return known._replace(unmended=str(error))
        return known._replace(unit_moments=moments)
    if "train" not in inspect.signature(forward).parameters:
        raise UserError(
            f"{where}: the model has running statistics "
            f"({sorted(spec.statistics)[0]!r}), which must be measured anew after a "
            "merge; let the function take train=False, and with train=True return "
            "(outputs, updated variables)"
        )
    statistics = merge.batch_statistics(
        lambda v, x: forward(v, x, train=True), variables, inputs
    )
    return known._replace(batch_statistics=statistics)
