"""Two small problems: least squares, and an MLP that classifies three classes.

Least squares is strongly convex, its agents' data differ, and its optimum is known. It
has no hidden units, so its symmetry is empty. Its running statistics are the mean of
the inputs; they are updated, but the loss does not depend on them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dimat_jax import models
from dimat_jax.algorithms import Task
from dimat_jax.data.pipeline import Batch, Samples
from dimat_jax.models import classifier
from dimat_jax.models._norm import norm_axes, normalise
from dimat_jax.models.classifier import tap
from dimat_jax.permutation import PermutationSpec
from dimat_jax.placement import Placement
from dimat_jax.tree import PyTree

N_AGENTS = 5

# Least squares ========================================================================

DIM, EXAMPLES = 3, 6
KEEP = 0.9  # of the running statistics


def least_squares(variables, batch, key):
    """Half the mean squared error of a linear model."""
    del key
    error = batch.inputs @ variables["params"]["x"] - batch.labels
    mask = batch.mask.astype(jnp.float32)
    weights = mask / jnp.maximum(mask.sum(), 1)
    value = 0.5 * (weights * error**2).sum()
    mean = KEEP * variables["batch_stats"]["mean"] + (1 - KEEP) * weights @ batch.inputs
    return value, ({"batch_stats": {"mean": mean}}, {"loss": value, "score": value})


CONVEX = Task(
    loss=least_squares,
    spec=PermutationSpec({"params/x": (None,), "batch_stats/mean": (None,)}),
)

_rng = np.random.default_rng(0)
# Agents whose inputs differ in scale, and whose labels come from different models.
INPUTS = _rng.standard_normal((N_AGENTS, EXAMPLES, DIM)) * np.linspace(
    0.5, 1.5, N_AGENTS
).reshape(-1, 1, 1)
LABELS = np.einsum(
    "aed,ad->ae", INPUTS, _rng.standard_normal((N_AGENTS, DIM)) + 1
) + 0.1 * _rng.standard_normal((N_AGENTS, EXAMPLES))
START = _rng.standard_normal((N_AGENTS, DIM))


def gradient(agent: int, x: np.ndarray) -> np.ndarray:
    """Computes the gradient of one agent's loss on all of its examples, in float64."""
    return INPUTS[agent].T @ (INPUTS[agent] @ x - LABELS[agent]) / EXAMPLES


HESSIANS = np.einsum("aed,aef->adf", INPUTS, INPUTS) / EXAMPLES
TARGETS = np.einsum("aed,ae->ad", INPUTS, LABELS) / EXAMPLES


def optimum(weights: np.ndarray) -> np.ndarray:
    """Finds the x at which the agents' gradients, weighted, have the sum 0.

    The weights are `[agents, dim]`.
    """
    weights = np.broadcast_to(weights, TARGETS.shape)
    return np.linalg.solve(
        (weights[:, :, None] * HESSIANS).sum(axis=0), (weights * TARGETS).sum(axis=0)
    )


OPTIMUM = optimum(np.ones(1))


def convex_variables(x: np.ndarray) -> PyTree:
    """Makes stacked variables from x `[agents, dim]`, on the host."""
    x = np.asarray(x, np.float32)
    # Statistics that differ from agent to agent: else averaging them shows nothing.
    return {"params": {"x": x}, "batch_stats": {"mean": 1 + x[:, ::-1]}}


def whole_batch(placement: Placement) -> Batch:
    """Makes a batch of all examples of all agents."""
    mask = np.ones(LABELS.shape, bool)
    return Batch(
        *placement.put((INPUTS.astype(np.float32), LABELS.astype(np.float32), mask))
    )


def without_examples(batch: Batch, *agents: int) -> Batch:
    """Makes a batch in which some agents, or by default all, have no examples."""
    chosen = np.array(agents) if agents else slice(None)
    return batch._replace(mask=batch.mask.at[chosen].set(False))


# Any problem ==========================================================================


class Problem(NamedTuple):
    """A task, and functions that draw variables and examples for it.

    Attributes:
        task: the loss and the symmetry.
        variables: `variables(n_agents)` draws stacked variables, on the host.
        example: the shape of an input.
        labels: `labels(rng, shape)` draws labels.
    """

    task: Task
    variables: Callable[[int], PyTree]
    example: tuple[int, ...]
    labels: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]

    def batches(
        self, placement: Placement, n: int, *, same: bool = False
    ) -> list[Batch]:
        """Draws stacked batches, in which agent 1's last entry is padding.

        With `same` all agents have the same examples.
        """
        rng = np.random.default_rng(7)
        shape = (placement.n_agents, 4)
        result = []
        for _ in range(n):
            inputs = rng.standard_normal((*shape, *self.example)).astype(np.float32)
            labels, mask = self.labels(rng, shape), np.ones(shape, bool)
            if same:
                inputs[:], labels[:] = inputs[0], labels[0]
            elif placement.n_agents > 1:
                mask[1, -1] = False
            result.append(Batch(*placement.put((inputs, labels, mask))))
        return result


def mlp(*hidden: int) -> Problem:
    """Makes the problem of the MLP, whose agents start from different weights."""
    model = models.MODELS["mlp"](n_classes=3, hidden=hidden)
    return classify(model, models.permutation_spec(model), (2, 2, 1))


class CNN(nn.Module):
    """Two convolutions with BatchNorm. They have no biases, which would be redundant.

    The gradient of a redundant weight is nothing but rounding, and Adam would turn it
    into steps of full length.
    """

    norm: str = "batch"
    bn_momentum: float = 0.9

    @nn.compact
    def __call__(self, x, *, train: bool, mask=None):
        for i in range(2):
            x = nn.Conv(4, (3, 3), strides=1 + i, use_bias=False, name=f"conv{i}")(x)
            x = normalise(
                self.norm,
                x,
                train=train,
                mask=mask,
                momentum=self.bn_momentum,
                dtype=jnp.float32,
                name=f"norm{i}",
            )
            x = nn.relu(x)
            tap(self, f"relu{i}", x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


CNN_SPEC = PermutationSpec(
    {
        "params/conv0/kernel": (None, None, None, "conv0"),
        **norm_axes("batch", "norm0", "conv0"),
        "params/conv1/kernel": (None, None, "conv0", "conv1"),
        **norm_axes("batch", "norm1", "conv1"),
        "params/head/kernel": ("conv1", None),
        "params/head/bias": (None,),
    },
    taps={f"relu{i}": f"conv{i}" for i in range(2)},
)


def classify(
    model: nn.Module, spec: PermutationSpec, image: tuple[int, ...]
) -> Problem:
    """Makes the problem of a model that classifies images into three classes."""
    task = Task(
        loss=classifier.loss(model),
        spec=spec,
        activations=classifier.activations(model),
        batch_statistics=classifier.batch_statistics(model),
    )
    init = jax.jit(lambda key: classifier.init(model, key, np.zeros((1, *image))))

    def variables(n_agents: int) -> PyTree:
        agents = map(init, jax.random.split(jax.random.key(3), n_agents))
        return jax.tree.map(lambda *x: np.stack(x), *agents)

    def labels(rng, shape) -> np.ndarray:
        return rng.integers(0, 3, shape).astype(np.int32)

    return Problem(task, variables, image, labels)


PROBLEMS = {
    "convex": Problem(
        CONVEX,
        lambda n_agents: convex_variables(START[:n_agents]),
        (DIM,),
        lambda rng, shape: rng.standard_normal(shape).astype(np.float32),
    ),
    "mlp": mlp(6),
    "deep mlp": mlp(6, 5),
    "cnn": classify(CNN(), CNN_SPEC, (4, 4, 1)),
}


def shared_images(n: int = 40, problem: str = "mlp") -> Samples:
    """Draws images that all agents share, in two batches."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.standard_normal((n, *PROBLEMS[problem].example)))

    def load(indices, mask):
        labels = jnp.zeros(len(indices), jnp.int32)
        return Batch(inputs[indices], labels, jnp.asarray(mask))

    indices = np.arange(n).reshape(2, -1)
    return Samples(load, indices, np.ones_like(indices, bool), shared=True)
