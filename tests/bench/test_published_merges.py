"""The schedule of the published code merges to the same as a merge round does."""

import jax
import numpy as np
import pytest

from configs import quickstart
from dimat_jax._bench._agents import agents_of
from dimat_jax._bench._published import PublishedSchedule
from dimat_jax.config import drop_unread
from dimat_jax.errors import UserError
from dimat_jax.experiment import Experiment
from dimat_jax.models import to_torch
from dimat_jax.tree import flatten, map_with_path, stack, unstack


def experiment_of(**changes) -> Experiment:
    config = quickstart.get_config("dimat")
    fields = {
        "agents": 3,
        "data.train_size": 100,
        "data.test_size": 20,
        "merge.frame": "own",
        "merge.stay": 0.0,
        "merge.opt_state": "reset",
        "merge.match_data": "proxy",
        "merge.match_samples": 50,
        "merge.batch_size": 20,
    }
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    config.update_from_flattened_dict({**fields, **changes})
    return Experiment(drop_unread(config))


@pytest.mark.every_nth(4)
@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("topology", ["ring", "star"])
def test_the_published_schedule_merges_to_the_same(norm, topology):
    changes = {"model__norm": norm, "topology": topology}
    if norm == "batch":
        # The published schedule has the same batches for both.
        changes |= {"batch_norm__data": "proxy", "batch_norm__samples": 50}
        changes |= {"batch_norm__batch_size": 20}
    experiment = experiment_of(**changes)
    data, network = experiment.merge_data(1), experiment.network_at_round(1)
    assert data.match is not None
    # Units that no image activates could be matched in any order. Small weights and
    # positive biases activate all of them.
    start = map_with_path(
        lambda path, leaf: leaf + 1 if path.endswith("bias") else leaf * 0.1,
        agents_of(experiment, ""),
    )
    algorithm = experiment.algorithm
    ours, metrics = algorithm.communicate(
        algorithm.init(start), data, network, jax.random.key(0)
    )
    assert metrics["moved_units"] > 0
    theirs = stack(PublishedSchedule(experiment.task)(start, data.match, network))
    for path, leaf in flatten(algorithm.variables(ours)).items():
        np.testing.assert_allclose(
            leaf, flatten(theirs)[path], rtol=1e-4, atol=1e-5, err_msg=path
        )


# Two devices have four slots for the three agents.
@pytest.mark.parametrize("devices", [1, 2])
def test_agents_are_read_from_stacked_arrays(tmp_path, devices):
    experiment = experiment_of(placement__cpu_devices=devices)
    expected = flatten(experiment.placement.gather(agents_of(experiment, "")))
    np.savez(tmp_path / "agents.npz", **expected)
    read = agents_of(experiment, str(tmp_path / "agents.npz"))
    found = flatten(experiment.placement.gather(read))
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[path])


@pytest.mark.slow
def test_agents_are_read_from_pytorch_files(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    experiment = experiment_of(model__name="resnet20", model__width=0.25)
    agents = experiment.placement.gather(agents_of(experiment, ""))
    for number, agent in enumerate(unstack(agents)):
        arrays = {
            key: np.ascontiguousarray(x)
            for key, x in to_torch("resnet20", agent).items()
        }
        safetensors.save_file(arrays, tmp_path / f"agent{number}.safetensors")
    found = flatten(agents_of(experiment, str(tmp_path)))
    for path, leaf in flatten(agents).items():
        np.testing.assert_array_equal(found[path], leaf, path)


def test_agents_that_do_not_fit_are_refused(tmp_path):
    experiment = experiment_of()
    arrays = flatten(experiment.placement.gather(agents_of(experiment, "")))
    path = tmp_path / "agents.npz"
    leaf = next(iter(arrays))
    for content, message in (
        ({p: x[:2] for p, x in arrays.items()}, "is of shape"),
        ({p: x for p, x in arrays.items() if p != leaf}, f"the agents lack {leaf}"),
        ({**arrays, "params/other": np.ones(3)}, "the model lacks params/other"),
    ):
        np.savez(path, **content)
        with pytest.raises(UserError, match=message):
            agents_of(experiment, str(path))
    with pytest.raises(UserError, match="neither an .npz file, nor"):
        agents_of(experiment, str(tmp_path / "nothing"))
