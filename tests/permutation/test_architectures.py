"""Architectures from their public descriptions: is all of their symmetry found?"""

import contextlib

import jax
import numpy as np
import pytest

from dimat_jax import permutation
from dimat_jax.matching import activation_matching, weight_matching
from dimat_jax.permutation import PermutationSpecWarning, derive, group_shapes, verify
from dimat_jax.tree import flatten, stack
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


@pytest.mark.every_nth(12)
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

    # Two agents are permuted at once.
    plans = [permutation.random(spec, a, jax.random.key(n)) for n in (1, 2)]
    networks = jax.jit(jax.vmap(lambda perms: permutation.apply(spec, perms, a)))(
        stack(plans)
    )
    for n, planted in enumerate(plans):
        alone = flatten(permutation.apply(spec, planted, a))
        for path, leaf in flatten(networks).items():
            np.testing.assert_array_equal(leaf[n], alone[path], err_msg=path)

    planted, b = plans[0], jax.tree.map(lambda leaf: leaf[0], networks)
    by_weights = weight_matching(spec, a, b, key=KEY, restarts=5)
    by_activations = activation_matching(spec, activations, a, b, [inputs])
    for group, perm in permutation.invert(planted).items():
        np.testing.assert_array_equal(by_weights[group], perm, f"weights: {group}")
        np.testing.assert_array_equal(
            by_activations[group], perm, f"activations: {group}"
        )
