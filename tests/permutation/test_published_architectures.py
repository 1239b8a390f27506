"""Architectures from their public descriptions: is all of their symmetry found?"""

import contextlib

import jax
import numpy as np
import pytest

from dimat_jax import permutation
from dimat_jax.matching import activation_matching, weight_matching
from dimat_jax.permutation import PermutationSpecWarning, derive, group_shapes, verify
from dimat_jax.tree import flatten, is_inexact
from tests.permutation.architectures import ARCHITECTURES

KEY = jax.random.key(0)


@pytest.fixture(autouse=True, scope="module")
def programs_that_compile_fast():
    """The programs are tiny: compiling them takes longer than running them."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def test_there_are_forty_architectures():
    assert len(ARCHITECTURES) >= 40


@pytest.mark.every_nth(40)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_has_the_groups_that_a_person_counts(name):
    forward, a, inputs, shapes, doubts = ARCHITECTURES[name]()
    doubtful = pytest.warns(PermutationSpecWarning, match=doubts)
    with doubtful if doubts else contextlib.nullcontext():
        spec, activations = derive(
            forward, a, inputs, strict=True, with_activations=True
        )
    assert sorted(group_shapes(spec, a).values()) == sorted(shapes)
    assert all(spec.taps_of(group) for group in spec.groups)
    verify(spec, forward, a, inputs, KEY)

    # Two agents are permuted at once, and back again.
    @jax.jit
    @jax.vmap
    def there_and_back(perms):
        permuted = permutation.apply(spec, perms, a)
        return permuted, permutation.apply(spec, permutation.invert(perms), permuted)

    plans = [permutation.random(spec, a, jax.random.key(n)) for n in (1, 2)]
    both, back = there_and_back(jax.tree.map(lambda *perms: np.stack(perms), *plans))
    for path, leaf in flatten(a).items():
        if is_inexact(leaf):
            expected = np.stack([leaf, leaf])
            np.testing.assert_array_equal(flatten(back)[path], expected, path)
    planted, b = plans[0], jax.tree.map(lambda leaf: leaf[0], both)
    by_weights = weight_matching(spec, a, b, key=KEY, restarts=2)
    by_activations = activation_matching(spec, activations, a, b, [inputs])
    for group, perm in permutation.invert(planted).items():
        np.testing.assert_array_equal(by_weights[group], perm, f"weights: {group}")
        np.testing.assert_array_equal(
            by_activations[group], perm, f"activations: {group}"
        )
