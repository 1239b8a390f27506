"""Every algorithm computes the same in every layout, on a small CNN with BatchNorm."""

import functools

import jax
import numpy as np
import pytest

from dimat_jax._layouts import LAYOUTS
from dimat_jax.algorithms import ALGORITHMS, MergeData
from tests.algorithms.cases import KEY, Layout, built, links
from tests.algorithms.problems import PROBLEMS, shared_images

N_AGENTS = 3
N_STEPS = 4


@functools.cache
def trained(name: str, batching: str):
    """Merges or averages before every second step, and returns the agents' variables.

    The examples that merging looks at are the same for all agents.
    """
    subject = built(name, "cnn", Layout(N_AGENTS, batching=batching))
    placement, algorithm = subject.placement, subject.algorithm
    samples = shared_images(problem="cnn")
    data = MergeData(match=samples, recalibrate=samples)
    network = links("ring", n_agents=N_AGENTS)
    state = algorithm.init(placement.put(PROBLEMS["cnn"].variables(N_AGENTS)))
    for number, batch in enumerate(PROBLEMS["cnn"].batches(placement, N_STEPS)):
        key = jax.random.fold_in(KEY, number)
        if number % 2 == 0:
            now = network.at_round(1 + number // 2, placement.slots)
            state, _ = algorithm.communicate(state, data, now, key)
        now = network.at_step(number, 1 + number // 2, placement.slots)
        state, _ = subject.step(state, batch, now, key)
    return placement.gather(algorithm.variables(state))


def cases():
    """Yields every algorithm in chunks, and two of them in every layout.

    Algorithms differ in the programs that chunks cut into parts. The other layouts see
    one agent's function at a time.
    """
    for name, algorithm in ALGORITHMS.items():
        for batching in [layout for layout in LAYOUTS if layout != "unroll"]:
            differs = batching == "chunks" or name in ("cdsgd", "wm")
            if differs and not algorithm.single:
                yield pytest.param(name, batching, id=f"{name}-{batching}")


@pytest.mark.every_nth(12)
@pytest.mark.parametrize(("name", "batching"), list(cases()))
def test_every_algorithm_computes_the_same_in_every_layout(name, batching):
    expected = trained(name, "unroll")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        trained(name, batching),
        expected,
    )
    initial = PROBLEMS["cnn"].variables(N_AGENTS)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), expected, initial)
    assert max(jax.tree.leaves(moved)) > 0.01
