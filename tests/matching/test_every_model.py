"""Both ways of matching undo what was planted in trained networks of every kind."""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dimat_jax import permutation
from dimat_jax.data.pipeline import Batch
from dimat_jax.matching import activation_matching, weight_matching, weight_similarity
from dimat_jax.matching._taps import tap_units
from dimat_jax.models.classifier import init
from dimat_jax.permutation import Perms
from dimat_jax.tree import PyTree, map_with_path
from tests.models.test_model_conformance import BATCH, SMALL, Subject, build

every_kind = pytest.mark.parametrize("case", SMALL)


class Trained(NamedTuple):
    subject: Subject
    variables: PyTree
    planted: Perms
    permutee: PyTree
    batches: list[jax.Array]

    def match(self, permutee: PyTree) -> Perms:
        subject = self.subject
        return activation_matching(
            subject.spec, subject.watch, self.variables, permutee, self.batches
        )


@cache
def trained(case: str) -> Trained:
    """A few steps of Adam from a fresh start, on noise; and a shuffled copy."""
    subject = build(case)
    tx = optax.adam(1e-2)
    variables = jax.jit(partial(init, subject.model))(
        jax.random.key(1), subject.inputs[:1]
    )
    opt_state = tx.init(variables["params"])
    batches = []
    for seed in range(6):
        inputs = jnp.asarray(subject.case.inputs(BATCH, seed))
        labels = jnp.asarray(subject.case.labels(BATCH, seed + 100))
        learnt = subject.learn(variables, Batch(inputs, labels, jnp.ones(BATCH, bool)))
        model_state, _ = learnt["aux"]
        updates, opt_state = tx.update(learnt["grads"], opt_state)
        params = optax.apply_updates(variables["params"], updates)
        variables = {**variables, **model_state, "params": params}
        batches.append(inputs)
    planted = subject.perms(seed=0)
    permutee = permutation.apply(subject.spec, planted, variables)
    return Trained(subject, variables, planted, permutee, batches)


def unmistakable(case: Trained) -> dict[str, np.ndarray]:
    """For each group, which units are alive and have no twin: bool[units]."""
    spec, sizes = (
        case.subject.spec,
        permutation.group_sizes(case.subject.spec, case.variables),
    )
    seen = [
        tap_units(spec, sizes, case.subject.watch(case.variables, inputs))
        for inputs in case.batches
    ]
    result = {}
    for group, size in sizes.items():
        alike = np.zeros((size, size))
        for tap in seen[0][group]:
            units = np.concatenate(
                [np.asarray(s[group][tap], np.float64) for s in seen]
            )
            alive = np.ptp(units, axis=0) > 0
            alike[np.ix_(alive, alive)] += np.corrcoef(units[:, alive], rowvar=False)
        itself = np.diagonal(alike)
        twins = alike > 0.999 * (itself[:, None] + itself) / 2
        np.fill_diagonal(twins, False)
        result[group] = (itself > 0) & ~twins.any(axis=1)
    return result


def assert_logits_equal(case: Trained, variables: PyTree) -> None:
    inputs = case.subject.inputs
    expected = case.subject.logits(case.variables, inputs)
    logits = case.subject.logits(variables, inputs)
    for mode, wanted in expected.items():
        scale = float(jnp.abs(wanted).max())
        np.testing.assert_allclose(logits[mode], wanted, rtol=0, atol=1e-4 * scale)


@pytest.mark.every_nth(9)
@every_kind
def test_activations_tell_every_unit_that_is_alive_and_has_no_twin(case):
    net = trained(case)
    found = net.match(net.permutee)
    both = permutation.compose(net.planted, found)
    clear = unmistakable(net)
    for group, perm in both.items():
        units = np.flatnonzero(clear[group])
        np.testing.assert_array_equal(perm[units], units, group)
    assert np.mean(np.concatenate(list(clear.values()))) > 0.7
    assert_logits_equal(net, permutation.apply(net.subject.spec, found, net.permutee))


@pytest.mark.every_nth(9)
@every_kind
def test_weights_tell_what_was_planted(case):
    net = trained(case)
    found = weight_matching(
        net.subject.spec, net.variables, net.permutee, key=jax.random.key(0), restarts=3
    )
    aligned = permutation.apply(net.subject.spec, found, net.permutee)
    assert float(weight_similarity(net.variables, net.permutee)) < 0.9
    assert float(weight_similarity(net.variables, aligned)) > 1 - 1e-5
    assert_logits_equal(net, aligned)


@pytest.mark.every_nth(9)
@every_kind
def test_dead_units_make_no_nan(case):
    net = trained(case)

    def kill(path: str, leaf: Any) -> Any:
        """The first unit of every layer gets nothing in, and gives nothing out."""
        dead = path.startswith("params/") and not path.startswith("params/head")
        return leaf.at[..., 0].set(0.0) if dead else leaf

    dead = map_with_path(kill, net.variables)
    permutee = permutation.apply(net.subject.spec, net.planted, dead)
    by_weights = weight_matching(
        net.subject.spec, dead, permutee, key=jax.random.key(0), restarts=1
    )
    for found in (net.match(permutee), by_weights):
        for group, perm in found.items():
            np.testing.assert_array_equal(np.sort(perm), np.arange(len(perm)), group)
