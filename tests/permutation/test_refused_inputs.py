"""What people pass to the tools by mistake, or from another library."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax.training.train_state import TrainState

from dimat_jax import merge, permutation
from dimat_jax.errors import UserError
from dimat_jax.matching import (
    MatchingError,
    activation_matching,
    joint_activation_matching,
    joint_weight_matching,
    solve_assignment,
    weight_matching,
    weight_similarity,
)
from dimat_jax.merge import MergeError
from dimat_jax.permutation import (
    PermutationSpecError,
    derive,
    explain,
    validate,
    verify,
)

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(30, 3)).astype(np.float32)
A = {
    "in": RNG.normal(size=(3, 5)).astype(np.float32),
    "bias": RNG.normal(size=5).astype(np.float32),
    "out": RNG.normal(size=(5, 2)).astype(np.float32),
}


def forward(v, x):
    return jnp.tanh(x @ v["in"] + v["bias"][None]) @ v["out"]


SPEC, ACTIVATIONS = derive(forward, A, X, with_activations=True)
PLANTED = permutation.random(SPEC, A, KEY)
B = jax.tree.map(np.asarray, permutation.apply(SPEC, PLANTED, A))


def by_weights(a: Any, b: Any) -> Any:
    return weight_matching(SPEC, a, b, key=KEY)


def by_activations(a: Any, b: Any, batches: Any = (X,)) -> Any:
    return activation_matching(SPEC, ACTIVATIONS, a, b, batches)


# Training states ======================================================================

STATE = TrainState.create(apply_fn=forward, params=A, tx=optax.sgd(0.1))
TOOLS: dict[str, Callable[[Any], Any]] = {
    "derive": lambda v: derive(forward, v, X),
    "explain": lambda v: explain(forward, v, X),
    "validate": lambda v: validate(SPEC, v),
    "verify": lambda v: verify(SPEC, forward, v, X, KEY),
    "group_sizes": lambda v: permutation.group_sizes(SPEC, v),
    "identity": lambda v: permutation.identity(SPEC, v),
    "random": lambda v: permutation.random(SPEC, v, KEY),
    "weight_matching": lambda v: by_weights(v, v),
    "activation_matching": lambda v: by_activations(v, v),
    "unit_moments": lambda v: merge.unit_moments(forward, v, X),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_training_state_is_refused_with_a_mend(tool):
    with pytest.raises(PermutationSpecError, match=r"'step' is no.*state\.params"):
        TOOLS[tool](STATE)


# PyTorch's tensors ====================================================================


def tensors(tree: Any) -> Any:
    return jax.tree.map(torch.tensor, tree)


def test_tensors_are_taken_for_arrays_everywhere():
    a, b, x = tensors(A), tensors(B), torch.tensor(X)
    spec, activations = derive(forward, a, x, with_activations=True)
    assert spec == SPEC
    assert str(explain(forward, a, x)) == str(explain(forward, A, X))
    validate(SPEC, a)
    verify(SPEC, forward, a, x, KEY)
    for found in (
        by_weights(a, b),
        by_activations(a, b, [x]),
        activation_matching(spec, activations, a, b, [x]),
    ):
        aligned = permutation.apply(SPEC, found, b)
        jax.tree.map(np.testing.assert_array_equal, aligned, A)
    jax.tree.map(np.testing.assert_array_equal, merge.average([a, a]), A)
    assert weight_similarity(a, a) == pytest.approx(1)


# Batches ==============================================================================


@pytest.mark.parametrize("kind", [tuple, list])
def test_batches_with_labels_are_explained(kind):
    labels = np.zeros(len(X), np.int32)
    loader = [kind([X, labels])]
    with pytest.raises(MatchingError, match=r"\(30, 3\) and \(30,\).*x for x, _ in"):
        by_activations(A, B, loader)
    moments = merge.unit_moments(forward, A, X)
    with pytest.raises(MergeError, match="x for x, _ in loader"):
        merge.repair(moments, A, [A, A], loader)


def test_an_error_of_the_model_itself_is_raised_as_it_is():
    with pytest.raises(TypeError, match="dot_general"):
        by_activations(A, B, [X[:, :2]])


def test_a_model_may_take_pairs():
    def of_pair(v, pair):
        return forward(v, pair[0] + pair[1])

    pair = (X, X[::-1])
    spec, activations = derive(of_pair, A, pair, with_activations=True)
    found = activation_matching(spec, activations, A, B, [pair])
    inverse = permutation.invert(PLANTED)
    for group, perm in found.items():
        np.testing.assert_array_equal(perm, inverse[group])


# Networks that cannot be matched ======================================================

NAN = {**A, "in": A["in"] * np.nan}
WIDER = {
    "in": np.ones((3, 6), np.float32),
    "bias": np.ones(6, np.float32),
    "out": np.ones((6, 2), np.float32),
}


@pytest.mark.parametrize(
    "match",
    [
        lambda: by_weights(A, NAN),
        lambda: by_activations(A, NAN),
        lambda: by_weights(A, WIDER),
        lambda: by_activations(A, WIDER),
        lambda: by_activations(A, B, []),
        lambda: joint_weight_matching(SPEC, [], key=KEY),
        lambda: joint_activation_matching(SPEC, ACTIVATIONS, [], [X]),
        lambda: solve_assignment(np.full((2, 2), np.nan)),
        lambda: solve_assignment(np.ones((2, 3))),
    ],
)
def test_networks_that_cannot_be_matched_raise_one_type_of_error(match):
    with pytest.raises(MatchingError) as error:
        match()
    # One type serves for all that a user can get wrong.
    assert isinstance(error.value, UserError)
