"""Tests compressed merging: the estimates that others have, and their averages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dimat_jax import permutation
from dimat_jax.algorithms import (
    ALGORITHMS,
    MERGING,
    Algorithm,
    MergeData,
    algorithm_record,
)
from dimat_jax.compression import Compressor, float16, int8, none, random_k, sign, top_k
from dimat_jax.errors import UserError
from dimat_jax.network import Network
from dimat_jax.tree import PyTree, nbytes, stack, take
from tests.algorithms.cases import KEY, Layout, links, placed
from tests.algorithms.problems import (
    N_AGENTS,
    PROBLEMS,
    START,
    convex_variables,
    shared_images,
)

NETWORKS = PROBLEMS["mlp"]
PLACEMENT = placed(Layout())
COMPRESSORS = {
    "float16": float16(),
    "int8": int8(),
    "sign": sign(),
    "top_k": top_k(0.4),
    "random_k": random_k(0.4),
}


def merging(
    name: str,
    compressor: Compressor,
    frame: str = "own",
    problem: str = "mlp",
    inner: str = "local",
) -> Algorithm:
    return ALGORITHMS[name](
        PROBLEMS[problem].task,
        optax.sgd(0.1),
        PLACEMENT,
        opt_state="keep",
        inner=inner,
        compressor=compressor,
        **({"frame": frame} if ALGORITHMS[name].aligns else {}),
    )


def now(topology: str = "ring") -> Network:
    return links(topology).at_round(1, PLACEMENT.slots)


def variables_of(algorithm: Algorithm, state) -> PyTree:
    return PLACEMENT.gather(algorithm.variables(state))


def distance(one: PyTree, other: PyTree) -> float:
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, one, other)))


def changed(variables: PyTree, seed: int) -> PyTree:
    """Draws variables that agents might have after some training."""
    rng = np.random.default_rng(seed)
    noisy = jax.tree.map(
        lambda x: np.float32(x + 0.1 * rng.standard_normal(x.shape)), variables
    )
    return PLACEMENT.put(noisy)


@pytest.mark.every_nth(2)
@pytest.mark.parametrize(
    ("name", "frame"),
    [("wa", "own"), ("dimat", "own"), ("dimat", "reference"), ("wm", "joint")],
)
def test_what_loses_nothing_changes_nothing(name, frame):
    data = MergeData(
        match=shared_images() if ALGORITHMS[name].matches_activations else None
    )
    ends = []
    for compressor in (none(), top_k(1.0)):
        algorithm = merging(name, compressor, frame)
        state = algorithm.init(PLACEMENT.put(NETWORKS.variables(N_AGENTS)))
        moved = []
        for number in range(3):
            trained = changed(variables_of(algorithm, state), number)
            state = algorithm.with_variables(state, trained)
            state, metrics = algorithm.communicate(state, data, now(), KEY)
            moved.append(metrics["moved_units"])
        ends.append((variables_of(algorithm, state), moved))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *ends)
    assert (ends[0][1][0] > 0) == (name != "wa")


@pytest.mark.parametrize("name", COMPRESSORS)
def test_what_the_others_know_comes_to_be_true_where_nothing_changes(name):
    """Error feedback sends what was lost later, until nothing is left to send."""
    algorithm = merging("wa", COMPRESSORS[name], problem="convex")
    state = algorithm.init(PLACEMENT.put(convex_variables(START)))
    new = PLACEMENT.put(convex_variables(START[::-1]))
    state = algorithm.with_variables(state, new)
    gaps = [distance(state.known, new["params"])]
    assert gaps[0] > 1
    for number in range(20):
        key = jax.random.key(number)
        state, _ = algorithm.communicate(state, MergeData(), now("disconnected"), key)
        gaps.append(distance(state.known, new["params"]))
    jax.tree.map(np.testing.assert_array_equal, algorithm.variables(state), new)
    assert gaps[1] < gaps[0]
    assert gaps[-1] < 1e-3 * gaps[0]


def test_statistics_are_sent_as_they_are():
    algorithm = merging("wa", sign(), problem="convex")
    state = algorithm.init(PLACEMENT.put(convex_variables(START)))
    other = PLACEMENT.put(convex_variables(START[::-1]))
    state = algorithm.with_variables(state, other)
    before = PLACEMENT.gather(other)
    state, _ = algorithm.communicate(state, MergeData(), now(), KEY)
    after, W = variables_of(algorithm, state), np.asarray(now().W)
    expected = W @ before["batch_stats"]["mean"]
    np.testing.assert_allclose(after["batch_stats"]["mean"], expected, atol=1e-6)
    # The params are compressed: the others get only their signs and one scale.
    assert np.abs(after["params"]["x"] - W @ before["params"]["x"]).max() > 0.05


def random_frames() -> PyTree:
    one = take(NETWORKS.variables(1), 0)
    keys = jax.random.split(jax.random.key(5), PLACEMENT.slots)
    return stack([permutation.random(NETWORKS.task.spec, one, key) for key in keys])


@pytest.mark.parametrize("inner", ["local", "sgp"])
def test_what_the_others_know_moves_into_another_frame_along_with_the_rest(inner):
    algorithm = merging("dimat", float16(), inner=inner)
    variables = NETWORKS.variables(N_AGENTS)
    state = algorithm.init(PLACEMENT.put(variables))
    state = algorithm.with_variables(state, changed(variables, 0))
    perms = random_frames()
    aligned = jax.jit(algorithm.aligned)(state, perms)

    def moved(variables):
        apply = functools.partial(permutation.apply, NETWORKS.task.spec)
        return jax.vmap(apply)(perms, variables)

    for found, expected in (
        ({"params": aligned.known}, {"params": state.known}),
        (algorithm.variables(aligned), algorithm.variables(state)),
    ):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=1e-6),
            found,
            moved(expected),
        )
    assert distance(aligned.known, algorithm.variables(aligned)["params"]) > 1e-3


@pytest.mark.parametrize("frame", ["own", "reference", "joint"])
def test_shuffled_copies_that_are_known_roughly_merge_into_roughly_the_same(frame):
    """The neighbours' estimates of agents move to the same frames as the agents."""
    algorithm = merging("dimat", float16(), frame)
    one = take(NETWORKS.variables(N_AGENTS), np.zeros(N_AGENTS, int))
    align, perms = jax.jit(algorithm.aligned), random_frames()
    copies = align(algorithm.init(PLACEMENT.put(one)), perms)
    # All agents change by the same small amount, so the estimates are out of date.
    grown = jax.tree.map(lambda x: np.float32(1.01 * x), one)
    fresh = align(algorithm.init(PLACEMENT.put(grown)), perms)
    copies = algorithm.with_variables(copies, algorithm.variables(fresh))
    data = MergeData(match=shared_images())
    merged, metrics = algorithm.communicate(copies, data, now(), KEY)
    assert metrics["moved_units"] > 0
    roots = np.zeros(N_AGENTS, int) if frame == "reference" else np.arange(N_AGENTS)
    expected = align(algorithm.init(PLACEMENT.put(grown)), take(perms, roots))
    for found in (algorithm.variables(merged)["params"], merged.known):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
            found,
            algorithm.variables(expected)["params"],
        )


def test_moments_are_not_compressed():
    options = {"opt_state": "merge", "compressor": float16()}
    with pytest.raises(UserError, match="'keep' or 'reset'"):
        ALGORITHMS["wa"](NETWORKS.task, optax.adam(0.1), PLACEMENT, **options)


def test_an_inner_algorithm_brings_its_own_compressor():
    """By its name as an argument, and by the combined record, it is the same."""
    task, tx = PROBLEMS["mlp"].task, optax.sgd(0.1)
    by_argument = ALGORITHMS["wa"](task, tx, PLACEMENT, inner="choco")
    by_record = algorithm_record("wa", "choco")(task, tx, PLACEMENT)
    variables = PLACEMENT.put(NETWORKS.variables(N_AGENTS))
    sent = [a.messages(a.init(variables)) for a in (by_argument, by_record)]
    assert nbytes(sent[0].round) == nbytes(sent[1].round)
    whole = nbytes(take(variables, 0))
    assert nbytes(sent[0].round) < whole / 3  # int8, which is CHOCO's own


def test_a_merging_record_must_be_put_on_top_of_an_algorithm():
    with pytest.raises(TypeError, match="wa merges on top of another algorithm"):
        MERGING["wa"](PROBLEMS["mlp"].task, optax.sgd(0.1), PLACEMENT)
