"""Measures the agents' accuracies and losses, and their consensus distance."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from dimat_jax.data.pipeline import Samples
from dimat_jax.options import Option
from dimat_jax.placement import Placement
from dimat_jax.tree import PyTree, exact_dtype

__all__ = ["Evaluation", "Evaluator", "deviation"]


EVERY = Option(
    "eval.every",
    1,
    "The number of rounds between two evaluations. The last round is always evaluated.",
    at_least=1,
    unit="rounds",
)
SAMPLES = Option(
    "eval.samples",
    0,
    "The number of test images, the same ones every time.",
    at_least=0,
    unit="images",
    empty="all of them",
)
BATCH_SIZE = Option(
    "eval.batch_size",
    500,
    "The number of test images in a batch.",
    at_least=1,
    unit="images",
)


class Evaluation(NamedTuple):
    """The results of an evaluation, on the host.

    Attributes:
        accuracy: each agent's share of correct predictions, from 0 to 1.
        loss: each agent's mean cross-entropy, in nats.
        consensus_distance: sqrt(1/N sum_i |x_i - mean|^2) over the params x_i of all N
            agents (Kong et al. 2021). It is 0 at consensus.
    """

    accuracy: Float[np.ndarray, " agents"]
    loss: Float[np.ndarray, " agents"]
    consensus_distance: float

    @property
    def accuracy_deviation(self) -> float:
        """The deviation of the accuracies over agents; see `deviation`."""
        return deviation(self.accuracy)


def deviation(values: Float[np.ndarray, " values"]) -> float:
    """Computes the sample standard deviation, with n - 1 in its divisor.

    All reported deviations are of this kind, over the agents of a run as well as over
    the runs of several seeds. It is 0 for a single value.
    """
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


class Evaluator:
    """Evaluates every agent on the same samples.

    Args:
        forward: `forward(variables, inputs) -> logits` of one agent in eval mode.
        samples: the samples, which all agents share.
        placement: the layout of the agents over devices.
    """

    def __init__(
        self,
        forward: Callable[[PyTree, Array], Float[Array, "batch classes"]],
        samples: Samples,
        placement: Placement,
    ):
        if not samples.shared:
            raise ValueError("agents are compared on samples that they share")
        self._samples = samples
        self._placement = placement

        def count(totals, variables, batch):
            logits = forward(variables, batch.inputs)
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits, batch.labels
            )
            correct = logits.argmax(axis=-1) == batch.labels
            measures = jnp.stack(
                [correct.astype(jnp.float32), losses, jnp.ones_like(losses)]
            )
            return totals + jnp.where(batch.mask, measures, 0).sum(axis=1)

        self._count = placement.jit(
            placement.per_agent(count, in_axes=(0, 0, None)), donate_argnums=0
        )
        self._distance = jax.jit(self._consensus_distance)

    def __call__(self, variables: PyTree) -> Evaluation:
        """Evaluates the stacked variables of all agents."""
        totals = self._placement.zeros(3)
        for batch in self._samples:
            totals = self._count(totals, variables, batch)
        correct, loss, n = self._placement.gather(totals).T.astype(np.float64)
        distance = self._distance(variables["params"])
        return Evaluation(correct / n, loss / n, float(distance))

    def _consensus_distance(self, params: PyTree) -> Float[Array, ""]:
        def squares(leaf):
            agents = leaf[: self._placement.n_agents].astype(exact_dtype(leaf.dtype))
            apart = agents - agents.mean(axis=0, keepdims=True)
            # The conjugate of a real number is the number itself.
            return (apart * apart.conj()).real.sum()

        total = sum(squares(leaf) for leaf in jax.tree.leaves(params))
        return jnp.sqrt(total / self._placement.n_agents)
