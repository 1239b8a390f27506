"""Matching finds the permutations that were hidden in trained networks."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dimat_jax import permutation
from dimat_jax.data.pipeline import Batch
from dimat_jax.data.sources import load
from dimat_jax.matching import activation_matching, joint_activation_matching
from dimat_jax.matching._activation import (
    LEAST_GAIN,
    ActivationScorer,
    descended,
    settle,
)
from dimat_jax.matching._descent import (
    Problem,
    every_pair_alone,
    two_networks,
)
from dimat_jax.matching._taps import tap_units, with_last_taps
from dimat_jax.models import MODELS, permutation_spec
from dimat_jax.models.classifier import activations, forward, init, loss
from dimat_jax.permutation import Perms, PermutationSpec, PermutationSpecError
from dimat_jax.tree import PyTree, flatten

# Trained networks =====================================================================


class Trained(NamedTuple):
    spec: PermutationSpec
    activations: Callable[[PyTree, Any], dict[str, jax.Array]]
    logits: Callable[[PyTree, Any], jax.Array]
    variables: PyTree
    batches: list[np.ndarray]

    def planted(self, seed: int) -> tuple[Perms, PyTree]:
        """A random permutation of the network, and the network permuted."""
        perms = permutation.random(self.spec, self.variables, jax.random.key(seed))
        return perms, permutation.apply(self.spec, perms, self.variables)

    def match(self, reference: PyTree, permutee: PyTree, **settings: Any) -> Perms:
        return activation_matching(
            self.spec,
            self.activations,
            reference,
            permutee,
            self.batches,
            **settings,
        )


def train_on_digits(model: Any, n_steps: int, batch_size: int) -> Trained:
    digits = load("digits")
    images = (digits.train.images - digits.mean.astype(np.float32)) / digits.std
    images = images.astype(np.float32)
    labels = digits.train.labels
    tx = optax.adam(3e-3)

    @jax.jit
    def step(variables, opt_state, batch):
        def of_params(params):
            key = jax.random.key(0)
            return loss(model)({**variables, "params": params}, batch, key)

        grads, (model_state, _) = jax.grad(of_params, has_aux=True)(variables["params"])
        updates, opt_state = tx.update(grads, opt_state)
        params = optax.apply_updates(variables["params"], updates)
        return {**model_state, "params": params}, opt_state

    variables = jax.jit(partial(init, model))(jax.random.key(0), images[:1])
    opt_state = tx.init(variables["params"])
    rng = np.random.default_rng(0)
    for _ in range(n_steps):
        rows = rng.integers(0, len(images), batch_size)
        batch = Batch(*map(jnp.asarray, (images[rows], labels[rows], rows >= 0)))
        variables, opt_state = step(variables, opt_state, batch)
    return Trained(
        permutation_spec(model),
        activations(model),
        jax.jit(forward(model)),
        variables,
        [images[i * batch_size : (i + 1) * batch_size] for i in range(4)],
    )


@pytest.fixture(scope="module")
def mlp() -> Trained:
    model = MODELS["mlp"](n_classes=10, hidden=(48, 32))
    return train_on_digits(model, n_steps=300, batch_size=100)


@pytest.fixture(scope="module")
def resnet20() -> Trained:
    return train_on_digits(MODELS["resnet20"](n_classes=10), n_steps=8, batch_size=24)


@pytest.fixture(scope="module", params=["mlp", "resnet20"])
def trained(request: pytest.FixtureRequest) -> Trained:
    return request.getfixturevalue(request.param)


class Recovered(NamedTuple):
    """A permutation that was planted in a network, and what matching found of it."""

    planted: Perms
    permutee: PyTree
    found: Perms


@pytest.fixture(scope="module")
def recovered(trained: Trained) -> Recovered:
    planted, permutee = trained.planted(0)
    found = trained.match(trained.variables, permutee)
    return Recovered(planted, permutee, found)


def unmistakable(trained: Trained, variables: PyTree) -> dict[str, np.ndarray]:
    """For each group, which units are alive and have no twin: bool[units].

    A group's correlations are averaged over its taps, so a unit that is dead at some of
    them has less than 1 with itself; a twin is as like it as the two are themselves.
    """
    observe = jax.jit(trained.activations)
    seen = [observe(variables, inputs) for inputs in trained.batches]
    result = {}
    for group in trained.spec.groups:
        taps = trained.spec.taps_of(group)
        alike = np.mean([correlations(seen, tap) for tap in taps], axis=0)
        itself = np.diagonal(alike)
        most_alike = (itself[:, None] + itself) / 2
        twins = (alike > 0.999 * most_alike) & ~np.eye(len(alike), dtype=bool)
        result[group] = (itself > 0) & ~twins.any(axis=1)
    return result


def correlations(seen: list, tap: str) -> np.ndarray:
    """A tap's units with each other, in float64; 0 for those that never vary."""
    units = np.concatenate([np.asarray(s[tap], np.float64) for s in seen])
    units = units.reshape(-1, units.shape[-1])
    alive = np.ptp(units, axis=0) > 0
    result = np.zeros((len(alive), len(alive)))
    result[np.ix_(alive, alive)] = np.corrcoef(units[:, alive], rowvar=False)
    return result


def average(one: PyTree, other: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: (a + b) / 2, one, other)


@pytest.mark.every_nth(2)
def test_a_planted_permutation_is_found_on_every_unmistakable_unit(trained, recovered):
    clear = unmistakable(trained, trained.variables)
    # The identity, wherever what was planted is undone.
    both = permutation.compose(recovered.planted, recovered.found)
    for group, perm in both.items():
        assert clear[group].mean() > 0.6, group  # else this would test nothing
        units = np.flatnonzero(clear[group])
        assert (recovered.planted[group][units] != units).any()
        np.testing.assert_array_equal(perm[units], units, group)


@pytest.mark.slow
def test_networks_that_were_aligned_can_be_averaged(trained, recovered):
    aligned = permutation.apply(trained.spec, recovered.found, recovered.permutee)
    inputs = trained.batches[0]
    expected = trained.logits(trained.variables, inputs)
    for network in (aligned, average(trained.variables, aligned)):
        logits = trained.logits(network, inputs)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3)
    unaligned = trained.logits(average(trained.variables, recovered.permutee), inputs)
    assert float(jnp.abs(unaligned - expected).max()) > 0.1


@pytest.mark.every_nth(2)
def test_what_is_found_are_int32_permutations_of_every_group(trained, recovered):
    sizes = permutation.group_sizes(trained.spec, trained.variables)
    assert {group: len(perm) for group, perm in recovered.found.items()} == sizes
    for perm in recovered.found.values():
        assert perm.dtype == jnp.int32
        np.testing.assert_array_equal(np.sort(perm), np.arange(len(perm)))


def test_matching_a_network_with_itself_leaves_unmistakable_units_in_place(mlp):
    found = mlp.match(mlp.variables, mlp.variables)
    for group, clear in unmistakable(mlp, mlp.variables).items():
        np.testing.assert_array_equal(found[group][clear], np.flatnonzero(clear))


def test_the_batches_may_come_from_a_generator_and_be_of_any_sizes(mlp):
    planted, permutee = mlp.planted(2)

    def batches() -> Iterator[np.ndarray]:
        inputs = np.concatenate(mlp.batches)
        yield inputs[:7]
        yield inputs[7:]

    found = activation_matching(
        mlp.spec, mlp.activations, mlp.variables, permutee, batches()
    )
    expected = mlp.match(mlp.variables, permutee)
    for group, clear in unmistakable(mlp, mlp.variables).items():
        np.testing.assert_array_equal(found[group][clear], expected[group][clear])


# Dead units ===========================================================================


def test_dead_units_harm_nobody(mlp):
    dead = np.array([3, 17, 30])
    params = mlp.variables["params"]
    layer = {**params["hidden0"], "bias": params["hidden0"]["bias"].at[dead].set(-1e3)}
    network = mlp._replace(variables={"params": {**params, "hidden0": layer}})
    clear = unmistakable(network, network.variables)
    assert not clear["hidden0"][dead].any()

    planted, permutee = network.planted(0)
    found = network.match(network.variables, permutee)
    both = permutation.compose(planted, found)
    for group, perm in both.items():
        np.testing.assert_array_equal(np.sort(perm), np.arange(len(perm)))
        units = np.flatnonzero(clear[group])
        np.testing.assert_array_equal(perm[clear[group]], units)


def test_a_network_of_dead_units_alone_is_matched_without_nan(mlp):
    zeros = jax.tree.map(jnp.zeros_like, mlp.variables)
    for found in (mlp.match(zeros, mlp.variables), mlp.match(mlp.variables, zeros)):
        for perm in found.values():
            np.testing.assert_array_equal(np.sort(perm), np.arange(len(perm)))


# As many samples as it takes ==========================================================


def read_of(batches: list[np.ndarray], read: list[int]) -> Iterator[np.ndarray]:
    for number, batch in enumerate(batches):
        read.append(number)
        yield batch


def test_a_planted_permutation_is_found_on_fewer_samples_than_there_are(mlp):
    planted, permutee = mlp.planted(0)
    reads, found = [], []
    for _ in range(2):
        reads.append([])
        batches = read_of(mlp.batches, reads[-1])
        few = mlp._replace(batches=batches)
        found.append(few.match(mlp.variables, permutee, as_needed=True))
    assert reads == [[0, 1]] * 2 and len(mlp.batches) == 4
    whole = mlp.match(mlp.variables, permutee)
    for group, clear in unmistakable(mlp, mlp.variables).items():
        perm = found[0][group]
        np.testing.assert_array_equal(perm, found[1][group])
        # Where the assignment is stable, it is the one that all samples lead to.
        units = np.asarray(planted[group])[perm] == np.arange(len(perm))
        assert units[clear].all()
        np.testing.assert_array_equal(perm[clear], whole[group][clear])


def scorer_of(swap_gain: float, n_batches: int) -> ActivationScorer:
    """One pair with two units, for which swapping them gains so much a unit."""
    scores = jnp.array([[[0.5, 0.5 + swap_gain], [0.5 + swap_gain, 0.5]]], jnp.float32)
    return ActivationScorer([{"g": scores}], [two_networks()], n_batches=n_batches)


@pytest.mark.parametrize(
    ("gains", "n_made"),
    [
        # From the second scorer on the same permutation is the best one.
        ([-0.1, 0.1, 0.1, -0.1], 3),
        ([0.1, 0.1, -0.1], 2),
        # The best permutation changes, but it gains less than what counts.
        ([-0.1, LEAST_GAIN / 2, 0.3], 2),
        ([-0.1, LEAST_GAIN * 2, 0.3], 3),
        # All samples are read if every doubling gains something.
        ([-0.1, 0.1, -0.1, 0.1], 4),
        ([0.1], 1),
    ],
)
def test_samples_are_doubled_until_that_gains_nothing(gains, n_made):
    made = []

    def scorers() -> Iterator[ActivationScorer]:
        for number, gain in enumerate(gains):
            made.append(gain)
            yield scorer_of(gain, 2**number)

    scorer, (perms, _) = settle(
        scorers(), lambda scorer: descended(Problem(scorer, every_pair_alone(1)))
    )
    assert len(made) == n_made and scorer.n_batches == 2 ** (n_made - 1)
    best = [1, 0] if gains[n_made - 1] > 0 else [0, 1]
    np.testing.assert_array_equal(perms["g"], [best])


def test_scores_are_brought_to_the_host_once():
    fetched = []

    def fetch(array):
        fetched.append(array.shape)
        return jax.device_get(array)

    scores = {"g": jnp.eye(2)[None], "h": jnp.eye(3)[None]}
    scorer = ActivationScorer([scores], [two_networks()], fetch=fetch)
    perms, similarity = descended(Problem(scorer, every_pair_alone(1)))
    assert sorted(fetched) == [(1, 2, 2), (1, 3, 3)]
    np.testing.assert_array_equal(scorer.total(perms), [5])
    np.testing.assert_array_equal(similarity, [1])
    assert len(fetched) == 2
    with pytest.raises(ValueError, match="read-only"):
        scorer.scores("g", perms)[0, 0, 0] = 2


def test_joint_matching_reads_as_few_samples(mlp):
    _, permutee = mlp.planted(0)
    read = []
    found = joint_activation_matching(
        mlp.spec,
        mlp.activations,
        [mlp.variables, permutee],
        read_of(mlp.batches, read),
        as_needed=True,
    )
    assert read == [0, 1]
    alone = mlp._replace(batches=mlp.batches[:2]).match(mlp.variables, permutee)
    for group, perm in alone.items():
        np.testing.assert_array_equal(found[1][group], perm)


# Staying put ==========================================================================


def test_a_unit_moves_only_if_its_correlation_gains_more_than_stay(mlp):
    _, permutee = mlp.planted(0)
    stayed = [
        np.mean([(p == np.arange(len(p))).mean() for p in found.values()])
        for found in (
            mlp.match(mlp.variables, permutee, stay=stay) for stay in (0, 0.7, 2)
        )
    ]
    assert stayed[0] < stayed[1] < stayed[2] == 1


def test_a_negative_stay_is_refused(mlp):
    with pytest.raises(ValueError, match="stay is -0.1; it must be at least 0"):
        mlp.match(mlp.variables, mlp.variables, stay=-0.1)


# What is refused ======================================================================


def test_matching_needs_a_batch(mlp):
    with pytest.raises(ValueError, match="at least one batch"):
        mlp._replace(batches=[]).match(mlp.variables, mlp.variables)


def test_a_group_without_a_tap_is_named_when_matching(mlp):
    spec = PermutationSpec(mlp.spec.axes, {"relu0": "hidden0"})
    with pytest.raises(PermutationSpecError, match="group 'hidden1' has no tap"):
        mlp._replace(spec=spec).match(mlp.variables, mlp.variables)


def test_a_tap_that_the_activations_lack_is_named_when_matching(mlp):
    def half(variables, inputs):
        return {"relu0": mlp.activations(variables, inputs)["relu0"]}

    with pytest.raises(PermutationSpecError, match=r"tap 'relu1'.*\['relu0'\]"):
        mlp._replace(activations=half).match(mlp.variables, mlp.variables)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_activations_that_are_not_finite_are_refused(mlp, bad):
    inputs = mlp.batches[0].copy()
    inputs[0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match="finite"):
        mlp._replace(batches=[inputs]).match(mlp.variables, mlp.variables)


# Any network ==========================================================================


class Layer(NamedTuple):
    weight: np.ndarray  # [out, in], as PyTorch has it


def test_networks_outside_flax_with_channels_first_are_matched():
    rng = np.random.default_rng(0)
    layers = [Layer(rng.normal(size=shape)) for shape in ((12, 3), (9, 12), (2, 9))]
    layers = jax.tree.map(np.float32, layers)
    spec = PermutationSpec(
        {
            "0/weight": ("first", None),
            "1/weight": ("second", "first"),
            "2/weight": (None, "second"),
        },
        {"tanh0": (None, "first", None), "tanh1": (None, "second", None)},
    )

    def channels_first(layers, x):  # [batch, channels, positions]
        seen = {}
        for i, layer in enumerate(layers[:-1]):
            x = seen[f"tanh{i}"] = jnp.tanh(jnp.einsum("oi,bip->bop", layer.weight, x))
        return seen

    planted = permutation.random(spec, layers, jax.random.key(1))
    batches = rng.normal(size=(3, 10, 3, 4)).astype(np.float32)
    permutee = permutation.apply(spec, planted, layers)
    found = activation_matching(spec, channels_first, layers, permutee, batches)
    aligned = permutation.apply(spec, found, permutee)
    for path, leaf in flatten(aligned).items():
        np.testing.assert_array_equal(leaf, flatten(layers)[path])


def test_a_network_without_hidden_units_has_nothing_to_match():
    spec = PermutationSpec({"weight": (None, None)})
    variables = {"weight": np.zeros((2, 3))}
    found = activation_matching(
        spec, lambda v, x: {}, variables, variables, [np.zeros((4, 2))]
    )
    assert found == {}


def test_with_last_taps_only_the_last_tap_of_each_group_counts():
    """Three taps show the same units; at the last one they are in another order."""
    rng = np.random.default_rng(0)
    early, late = rng.permutation(6), rng.permutation(6)
    weights = rng.standard_normal((3, 20, 6)).astype(np.float32)
    shuffled = np.stack(
        [weights[0][:, early], weights[1][:, early], weights[2][:, late]]
    )
    spec = PermutationSpec(
        {"w": (None, None, "units")}, taps=dict.fromkeys(["a", "b", "c"], "units")
    )

    def activations(variables, inputs):
        return {tap: inputs @ variables["w"][i] for i, tap in enumerate("abc")}

    batches = [jnp.asarray(rng.standard_normal((200, 20)), jnp.float32)]
    found = {}
    for name, used in (("all", spec), ("last", with_last_taps(spec))):
        assert used.taps_of("units") == (["c"] if name == "last" else ["a", "b", "c"])
        perms = activation_matching(
            used, activations, {"w": weights}, {"w": shuffled}, batches
        )
        found[name] = np.asarray(perms["units"])
    np.testing.assert_array_equal(found["last"], np.argsort(late))
    np.testing.assert_array_equal(found["all"], np.argsort(early))


def test_a_tap_may_be_the_last_one_of_one_group_alone():
    spec = PermutationSpec(
        {"w": ("a", "b")}, taps={"first": "a", "both": ("a", "b"), "end": "b"}
    )
    last = with_last_taps(spec)
    assert last.taps_of("a") == ["both"] and last.taps_of("b") == ["end"]
    assert last.tap_axes("both", 3) == spec.tap_axes("both", 3)


def test_with_last_taps_running_statistics_stay_statistics():
    spec = PermutationSpec(
        {"w": ("a",), "mean": ("a",)}, taps={"tap": "a"}, statistics={"mean"}
    )
    assert with_last_taps(spec).statistics == {"mean"}


def test_a_complex_activation_is_two_samples():
    rng = np.random.default_rng(0)
    real, imaginary = rng.normal(size=(2, 3, 4)).astype(np.float32)
    spec = PermutationSpec({"w": (None, "units")}, taps={"tap": "units"})
    shown = {"tap": jnp.asarray(real + 1j * imaginary)}
    found = tap_units(spec, {"units": 4}, shown)["units"]["tap"]
    expected = np.stack([real, imaginary], axis=1).reshape(6, 4)
    np.testing.assert_array_equal(found, expected)
