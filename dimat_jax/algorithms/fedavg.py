"""Federated averaging: a server averages all agents, for comparison.

    x_i  <-  sum_k (n_k / n) x_k            once a round

The sum is over the present agents. Between two averages every agent trains alone
(McMahan et al. 2017, arXiv 1602.05629, Algorithm 1). There is no graph: every agent
exchanges messages with the server. An agent that has been absent gets the average, and
enters the next average after it has trained from this one.

The server may make more of the average; see `algorithms.server`. It may also draw a
fixed number of agents for each round, as in the paper (`server.sampled`).

FedProx draws local training to the server's model x: every agent descends on

    F_k(x_k) + mu / 2 |x_k - x|^2

(Li et al. 2020, arXiv 1812.06127, Algorithm 2).

In the paper n_k is the number of agent k's examples, and agents take steps in the same
proportion; `data.small_shards=idle` gives that. Then an agent counts about n_k^2 in the
objective (Wang et al. 2020, arXiv 2007.07481, section 3). If small shards are repeated,
all agents take equally many steps and all n_k are equal: every agent counts 1/N, as for
all other algorithms.
"""

from collections.abc import Sequence
from functools import partial

import jax
import optax

from dimat_jax.algorithms._federated import (
    Averages,
    counted_examples,
    no_turns,
    trained,
)
from dimat_jax.algorithms.base import Algorithm, Task, one_agent
from dimat_jax.algorithms.local import local
from dimat_jax.algorithms.memory import MemoryState, remembering
from dimat_jax.algorithms.record import AlgorithmRecord
from dimat_jax.algorithms.server import SERVER_OPTIMIZER, ServerOptimizer, average
from dimat_jax.ledger import Messages
from dimat_jax.network import SAMPLED
from dimat_jax.options import Option
from dimat_jax.placement import Placement

__all__ = ["RECORDS", "fedavg", "fedprox"]

PROXIMAL = Option(
    "server.proximal",
    0.1,
    "The weight mu with which local training is drawn to the server's model: half the "
    "squared distance from it, times mu, is added to the loss.",
    above=0,
)


def fedavg(
    task: Task,
    tx: optax.GradientTransformation,
    placement: Placement,
    *,
    examples: Sequence[int] | None = None,
    server: ServerOptimizer = average(),  # noqa: B008
    sampled: int = SAMPLED.default,
) -> Algorithm:
    """Trains locally, and takes a weighted average once a round.

    Running statistics are averaged like the params. Optimizer states are kept.

    Args:
        task: the task that the agents learn.
        tx: the local optimizer; the paper uses plain SGD.
        placement: the devices on which the agents live.
        examples: n_k, the number of each agent's examples; None if all count the same.
        server: what the server makes of the average.
        sampled: the number of agents that the server draws in each round; 0 for all.
    """
    return _federated(task, tx, placement, examples, server, sampled, proximal=0.0)


def fedprox(
    task: Task,
    tx: optax.GradientTransformation,
    placement: Placement,
    *,
    examples: Sequence[int] | None = None,
    server: ServerOptimizer = average(),  # noqa: B008
    sampled: int = SAMPLED.default,
    proximal: float = PROXIMAL.default,
) -> Algorithm:
    """Trains locally, drawn to the server's model, and averages once a round.

    Args:
        task: the task that the agents learn.
        tx: the local optimizer. The paper asks for any inexact solver; SGD here.
        placement: the devices on which the agents live.
        examples: n_k, the number of each agent's examples; None if all count the same.
        server: what the server makes of the average.
        sampled: the number of agents that the server draws in each round; 0 for all.
        proximal: the weight mu; see `PROXIMAL`.

    Raises:
        OptionError: mu is not above 0.
    """
    PROXIMAL.check(proximal)
    return _federated(task, tx, placement, examples, server, sampled, proximal)


def _federated(
    task: Task,
    tx: optax.GradientTransformation,
    placement: Placement,
    examples: Sequence[int] | None,
    server: ServerOptimizer,
    sampled: int,
    proximal: float,
) -> Algorithm:
    """Builds FedProx, or FedAvg if `proximal` is 0."""

    def correct(grads, memory):
        if proximal == 0:
            return grads
        return jax.tree.map(lambda g, d: g + proximal * d, grads, memory["change"])

    def train(state: MemoryState, batch, key):
        state, _, metrics = trained(task, tx, state, batch, key, correct)
        return state, metrics

    def step(state, batch, network, key):
        del network
        return placement.per_agent(train)(state, batch, placement.keys(key))

    counts = counted_examples(placement, examples)
    averages = Averages(placement, counts, server, sampled > 0)
    average = jax.jit(averages, out_shardings=placement.sharding)

    def communicate(state, data, network, key):
        del data, key
        return average(state, network.present), {}

    federated = remembering(
        local(task, tx, placement),
        task,
        placement,
        memories=["change", *server.moments],
        step=step,
        marks=partial(no_turns, placement),
        messages=lambda state: Messages(server=one_agent(state.local.variables)),
    )
    return federated._replace(communicate=communicate)


RECORDS = (
    AlgorithmRecord(
        "fedavg",
        fedavg,
        (SAMPLED,),
        leads_to=(SERVER_OPTIMIZER,),
        summary="A server averages all agents once a round (McMahan et al. 2017), or "
        "takes a step towards the average (FedAvgM, FedAdagrad, FedAdam, FedYogi).",
        optimizer="sgd",
        facts=frozenset({"examples", "server"}),
    ),
    AlgorithmRecord(
        "fedprox",
        fedprox,
        (PROXIMAL, SAMPLED),
        leads_to=(SERVER_OPTIMIZER,),
        summary="It is fedavg, but local training is drawn to the server's model (Li "
        "et al. 2020).",
        optimizer="sgd",
        facts=frozenset({"examples", "server"}),
    ),
)
