"""What a GPU or TPU computes is what the CPU computes.

These tests are skipped where JAX has no accelerator. With DIMAT_TEST_ANY_DEVICE set,
they compare two host devices of the CPU, which shows that they run.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dimat_jax
from configs import quickstart
from dimat_jax import matching, models, permutation
from dimat_jax._bench._steps import gradient_flops
from dimat_jax._layouts import BATCHING
from dimat_jax._trainer import Trainer
from dimat_jax.algorithms import Task
from dimat_jax.algorithms.local import local
from dimat_jax.config import drop_unread
from dimat_jax.data.pipeline import Batch
from dimat_jax.experiment import Experiment
from dimat_jax.models import classifier
from dimat_jax.network import Network
from dimat_jax.placement import Placement, place
from dimat_jax.tree import stack

pytestmark = pytest.mark.gpu

AGENTS, CLASSES, BATCH = 3, 10, 8
LAYOUTS = [name for name in BATCHING.choices or () if name != "auto"]
# Each model, with the shape of an image.
MODELS = {
    "mlp": (8, 8, 1),
    "resnet20": (16, 16, 3),
    "vgg16": (32, 32, 3),
    "vit": (16, 16, 3),
}


def accelerator() -> list[Any]:
    # Without an accelerator it is another host device than `cpu()`.
    return jax.devices()[-1:]


def cpu() -> list[Any]:
    return jax.devices("cpu")[:1]


def one_step(name: str, placement: Placement):
    """The agents' variables and losses after one step of each agent alone."""
    shape = MODELS[name]
    model = models.MODELS[name](n_classes=CLASSES, width=0.25)
    task = Task(
        loss=classifier.loss(model),
        spec=models.permutation_spec(model),
        activations=classifier.activations(model),
        batch_statistics=classifier.batch_statistics(model),
    )
    algorithm = local(task, optax.sgd(0.1), placement)
    rng = np.random.default_rng(0)
    # The weights are drawn on the CPU, so that both devices start from the same ones.
    with jax.default_device(cpu()[0]):
        init = jax.jit(lambda key: classifier.init(model, key, np.zeros((1, *shape))))
        agents = [jax.device_get(init(jax.random.key(i))) for i in range(AGENTS)]
    batch = Batch(
        jnp.asarray(rng.normal(size=(AGENTS, BATCH, *shape)), jnp.float32),
        jnp.asarray(rng.integers(0, CLASSES, (AGENTS, BATCH)), jnp.int32),
        jnp.ones((AGENTS, BATCH), bool),
    )
    alone = np.zeros((AGENTS, AGENTS), bool)
    network = Network(np.eye(AGENTS, dtype=np.float32), alone, np.ones(AGENTS, bool))
    state = algorithm.init(placement.put(stack(agents)))
    key = jax.device_put(jax.random.key(0), placement.mesh.devices.flat[0])
    state, metrics = placement.jit(algorithm.step)(
        state, placement.put(batch), placement.replicate(network), key
    )
    return placement.gather(algorithm.variables(state)), placement.gather(
        metrics["loss"]
    )


@pytest.mark.parametrize(
    "model, layout",
    [(model, layout) for model in ("mlp", "resnet20") for layout in LAYOUTS]
    + [("vgg16", "vmap"), ("vit", "vmap")],
)
def test_a_step_of_each_layout_is_the_step_of_the_cpu(model, layout):
    with jax.default_matmul_precision("highest"):
        expected, losses = one_step(model, place(AGENTS, cpu(), "unroll"))
        found, found_losses = one_step(model, place(AGENTS, accelerator(), layout))
    np.testing.assert_allclose(found_losses, losses, rtol=1e-4)
    for (path, x), y in zip(
        jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True
    ):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(y, x, rtol=1e-3, atol=1e-4, err_msg=where)


def test_a_step_in_the_default_precision_is_near_the_step_of_the_cpu():
    # TF32 keeps 10 bits of a factor, so that a product is exact to about 1e-3.
    _, losses = one_step("resnet20", place(AGENTS, cpu(), "unroll"))
    _, found = one_step("resnet20", place(AGENTS, accelerator()))
    np.testing.assert_allclose(found, losses, rtol=2e-2)


def test_matching_finds_the_permutation_that_was_applied():
    model = models.MODELS["resnet20"](n_classes=CLASSES, width=0.5)
    spec = models.permutation_spec(model)
    rng = np.random.default_rng(1)
    images = rng.normal(size=(64, 16, 16, 3)).astype(np.float32)
    reference = jax.jit(lambda key: classifier.init(model, key, images[:1]))(
        jax.random.key(0)
    )
    hidden = permutation.random(spec, reference, jax.random.key(1))
    permutee = permutation.apply(spec, hidden, reference)
    found = matching.activation_matching(
        spec, classifier.activations(model), reference, permutee, [images]
    )
    aligned = permutation.apply(spec, found, permutee)
    for x, y in zip(jax.tree.leaves(reference), jax.tree.leaves(aligned), strict=True):
        np.testing.assert_array_equal(x, y)


def small_config(**fields):
    config = quickstart.get_config()
    config.update_from_flattened_dict(
        {
            "rounds": 2,
            "local_epochs": 0,
            "local_steps": 3,
            "pretrain.epochs": 1,
            "data.train_size": 320,
            **fields,
        }
    )
    return drop_unread(config)


def test_a_step_reuses_the_memory_of_the_state():
    experiment = Experiment(small_config())
    algorithm = experiment.algorithm
    state = algorithm.init(experiment.initial_variables())
    trainer = Trainer(
        experiment, algorithm, experiment.sampler, experiment.key("rounds")
    )
    trainer.train(state, 0, [experiment.network_at_step(0, 1)])
    weights = jax.tree.leaves(algorithm.variables(state))
    assert all(leaf.is_deleted() for leaf in weights)


class Killed(Exception):
    pass


def test_a_run_that_was_killed_goes_on_to_the_same_result(tmp_path):
    config = small_config(**{"checkpoint.every": 1})
    whole = dimat_jax.run(config, tmp_path / "whole", lambda line: None)

    def kill(line: str) -> None:
        if "round   2" in line:
            raise Killed

    with pytest.raises(Killed):
        dimat_jax.run(config, tmp_path / "killed", kill)
    resumed = dimat_jax.run(config, tmp_path / "killed", lambda line: None)
    for name in ("test_accuracy_mean", "test_loss_mean"):
        np.testing.assert_allclose(resumed[name], whole[name], rtol=1e-5)


def test_the_operations_of_a_step_are_counted_wherever_it_runs():
    config = quickstart.get_config()
    config.data.train_size = 320
    experiment = Experiment(drop_unread(config))
    images, units = config.batch_size, experiment.abstract_variables()["params"]
    products = sum(leaf.size for leaf in jax.tree.leaves(units) if leaf.ndim == 3)
    weights = products / experiment.placement.slots
    # A product forward, and two backward, of which the first layer needs one alone.
    assert 4 * images * weights < gradient_flops(experiment) < 8 * images * weights
