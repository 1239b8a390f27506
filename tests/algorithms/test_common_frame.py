"""All agents in one frame: as the last merge has linked them, or matched anew."""

import jax
import numpy as np
import pytest

from dimat_jax.algorithms import MergeData
from dimat_jax.algorithms._common_frame import Frames
from dimat_jax.network import Absence, Faults
from dimat_jax.permutation import apply, random
from dimat_jax.tree import PyTree, stack, take, unstack
from tests.algorithms.cases import (
    KEY,
    Built,
    Layout,
    case_of,
    links,
    on_placement,
    placed,
)
from tests.algorithms.problems import N_AGENTS, PROBLEMS, shared_images

DEEP = PROBLEMS["deep mlp"]
PLACEMENT = placed(Layout())
DATA = MergeData(match=shared_images())


def built(name: str, frame: str, compressor: str = "") -> Built:
    case = case_of(name, frame=frame, opt_state="reset")
    return on_placement(case._replace(compressor=compressor), "deep mlp", PLACEMENT)


def shuffled_copies() -> PyTree:
    """Five copies of one network whose units are in five orders."""
    one = take(DEEP.variables(1), 0)
    keys = jax.random.split(jax.random.key(5), N_AGENTS)
    return stack(
        [apply(DEEP.task.spec, random(DEEP.task.spec, one, key), one) for key in keys]
    )


def assert_one_model(variables: PyTree, perms: dict[str, np.ndarray]) -> None:
    """Checks that all agents are agent 0, once they are aligned."""
    agents = unstack(PLACEMENT.gather(variables))
    for number, agent in enumerate(agents):
        own = {group: perm[number] for group, perm in perms.items()}
        aligned = apply(DEEP.task.spec, own, agent) if own else agent
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), aligned, agents[0]
        )


@pytest.mark.parametrize("frame", ["own", "joint", "reference"])
@pytest.mark.parametrize("name", ["dimat", "wm"])
def test_before_the_first_merge_all_agents_are_matched(name, frame):
    algorithm = built(name, frame).algorithm
    variables = PLACEMENT.put(shuffled_copies())
    perms = algorithm.common_frame(variables, None, DATA, KEY)
    assert_one_model(variables, perms)
    identity = {group: np.arange(perm.shape[1]) for group, perm in perms.items()}
    assert all((perms[group][0] == identity[group]).all() for group in perms)
    assert any((perm[1] != identity[group]).any() for group, perm in perms.items())


@pytest.mark.every_nth(3)
@pytest.mark.parametrize("compressor", ["", "int8"])
@pytest.mark.parametrize("frame", ["own", "joint", "reference"])
@pytest.mark.parametrize("topology", ["ring", "fully_connected"])
def test_a_merge_that_links_all_agents_leaves_nothing_to_match(
    topology, frame, compressor
):
    algorithm = built("dimat", frame, compressor).algorithm
    state = algorithm.init(PLACEMENT.put(shuffled_copies()))
    network = links(topology).at_round(1, PLACEMENT.slots)
    state, metrics = algorithm.communicate(state, DATA, network, KEY)
    # Without examples, a matching would fail.
    perms = algorithm.common_frame(
        algorithm.variables(state), metrics["frames"], MergeData(), KEY
    )
    # In the frame of a root, units have moved already.
    assert (perms == {}) == (frame == "reference")
    if not compressor:
        assert_one_model(algorithm.variables(state), perms)


@pytest.mark.parametrize("frame", ["own", "joint", "reference"])
def test_agents_that_a_merge_has_not_linked_are_matched(frame):
    """On a ring of five without 1 and 4, agent 0 is alone, and 2 and 3 are a pair."""
    algorithm = built("dimat", frame).algorithm
    state = algorithm.init(PLACEMENT.put(shuffled_copies()))
    faults = Faults(absences=(Absence(1, 1), Absence(4, 1)))
    network = links("ring", faults=faults).at_round(1, PLACEMENT.slots)
    state, metrics = algorithm.communicate(state, DATA, network, KEY)
    frames: Frames = metrics["frames"]
    np.testing.assert_array_equal(frames.roots, [0, 1, 2, 2, 4])
    variables = algorithm.variables(state)
    perms = algorithm.common_frame(variables, frames, DATA, KEY)
    assert_one_model(variables, perms)
    # The pair stays together: the agents are aligned with agent 2, and it with agent 0.
    with pytest.raises(ValueError, match="MergeData.match"):
        algorithm.common_frame(variables, frames, MergeData(), KEY)


def test_algorithms_that_permute_nothing_average_units_as_they_are():
    for name in ("wa", "local", "cdsgd"):
        algorithm = on_placement(case_of(name), "deep mlp", PLACEMENT).algorithm
        variables = PLACEMENT.put(shuffled_copies())
        assert algorithm.common_frame(variables, None, DATA, KEY) == {}
