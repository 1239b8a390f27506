"""The methods by which models are matched before they are averaged, and the frames.

A method's record says which options it reads. A new method is a function that ends in a
record in `METHODS`, at the foot of this file.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Key
from tqdm import tqdm

from dimat_jax import matching, permutation
from dimat_jax.matching import _assignment, _weight
from dimat_jax.options import Option, Record, Registry, registry
from dimat_jax.permutation import Perms, PermutationSpec
from dimat_jax.tree import PyTree

__all__ = ["METHOD", "METHODS", "Matcher", "Problem"]

STAY = dataclasses.replace(_assignment.STAY, path="stay")
RESTARTS = dataclasses.replace(_weight.RESTARTS, path="restarts")


class Problem(NamedTuple):
    """The models to be matched, and what a method may look at.

    Attributes:
        models: the variables of each model.
        spec: the symmetry of their architecture.
        activations: a function `activations(variables, inputs) -> {tap: array}`.
        batches: the inputs on which activations are compared.
        key: the key of the random numbers.
    """

    models: Sequence[PyTree]
    spec: PermutationSpec
    activations: Callable[..., Any]
    batches: Sequence[Array]
    key: Key[Array, ""]


Matcher = Callable[[Problem], list[Perms]]
"""Finds for each model the permutations that align it with the others."""

MatchPair = Callable[[PyTree, PyTree, Key[Array, ""]], Perms]
"""Finds the permutations that align the second model with the first one."""

MatchAll = Callable[[], list[Perms]]
"""Finds the permutations that align all models with each other."""


def reference(
    problem: Problem, match_pair: MatchPair, match_all: MatchAll
) -> list[Perms]:
    """All models are aligned to the first."""
    del match_all
    first, *others = problem.models
    bar = tqdm(others, "matching", unit="", leave=False, disable=None)
    return [
        permutation.identity(problem.spec, first),
        *(
            match_pair(first, other, jax.random.fold_in(problem.key, i))
            for i, other in enumerate(bar)
        ),
    ]


def joint(problem: Problem, match_pair: MatchPair, match_all: MatchAll) -> list[Perms]:
    """All models are aligned to each other."""
    del problem, match_pair
    return match_all()


FRAMES: Registry[Record[list[Perms]]] = registry(
    Record("reference", reference), Record("joint", joint)
)
"""`FRAMES[name](problem, match_pair, match_all)` aligns the models in a frame."""

FRAME = Option(
    "frame", "reference", "The frame in which the models are averaged.", choices=FRAMES
)


def activation(frame: str = FRAME.default, stay: float = STAY.default) -> Matcher:
    """Units that are active alike are matched."""

    def match(problem: Problem) -> list[Perms]:
        models, spec, activations, batches, _ = problem

        def match_pair(first: PyTree, other: PyTree, key: Key[Array, ""]) -> Perms:
            del key
            return matching.activation_matching(
                spec, activations, first, other, batches, stay=stay
            )

        def match_all() -> list[Perms]:
            return matching.joint_activation_matching(
                spec, activations, models, batches, stay=stay
            )

        return FRAMES[frame](problem, match_pair, match_all)

    return match


def weight(
    frame: str = FRAME.default,
    stay: float = STAY.default,
    restarts: int = RESTARTS.default,
) -> Matcher:
    """Units whose weights are alike are matched."""

    def match(problem: Problem) -> list[Perms]:
        def match_pair(first: PyTree, other: PyTree, key: Key[Array, ""]) -> Perms:
            return matching.weight_matching(
                problem.spec, first, other, key=key, restarts=restarts, stay=stay
            )

        def match_all() -> list[Perms]:
            return matching.joint_weight_matching(
                problem.spec,
                problem.models,
                key=problem.key,
                restarts=restarts,
                stay=stay,
            )

        return FRAMES[frame](problem, match_pair, match_all)

    return match


def none() -> None:
    """The models are averaged as they are."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Method(Record[Matcher | None]):
    """A method of matching.

    Attributes:
        needs_data: whether it runs the models on images.
    """

    needs_data: bool = False


METHODS: Registry[Method] = registry(
    Method("activation", activation, (FRAME, STAY), needs_data=True),
    Method("weight", weight, (FRAME, STAY, RESTARTS)),
    Method("none", none),
)
"""`METHODS[name](**options)` builds a matcher, or None if nothing is to be matched."""

METHOD = Option("method", "activation", "The method of matching.", choices=METHODS)
