"""SCAFFOLD: control variates correct the drift of local training.

    x_i  <-  x_i - alpha (g_i(x_i) - c_i + c)             the local steps, from x_i = x
    c_i  <-  c_i - c + (x - x_i) / (K alpha)              after K of them (option II)
    x    <-  x + eta mean_i (x_i - x),    c  <-  c + (1/N) sum_i (new c_i - old c_i)

(Karimireddy et al. 2020, arXiv 1910.06378, Algorithm 1.) The mean and the last sum are
over the agents whose models the server gets, and N counts all agents, so c is always
the mean of all c_i. With plain SGD the new c_i is the mean of the gradients of the
agent's K steps, and that is how it is computed here; so other local optimizers are
possible too. Agents send their control variates with their models, and get c with x:
twice the bytes of fedavg.

If small shards idle (`data.small_shards`), every example counts the same: the means are
weighted by the numbers of examples, and a batch that is half full counts half in K and
is corrected by half.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from dimat_jax.algorithms._federated import (
    Averages,
    counted_examples,
    no_turns,
    trained,
    turn_of,
)
from dimat_jax.algorithms.base import Algorithm, Task, one_agent
from dimat_jax.algorithms.local import local
from dimat_jax.algorithms.memory import MemoryState, remembering
from dimat_jax.algorithms.record import AlgorithmRecord
from dimat_jax.algorithms.server import SERVER_RATE, average
from dimat_jax.ledger import Messages
from dimat_jax.mixing import mix
from dimat_jax.network import SAMPLED
from dimat_jax.placement import Placement

__all__ = ["RECORD", "scaffold"]


def scaffold(
    task: Task,
    tx: optax.GradientTransformation,
    placement: Placement,
    *,
    examples: Sequence[int] | None = None,
    learning_rate: float = SERVER_RATE.default,
    sampled: int = SAMPLED.default,
) -> Algorithm:
    """Trains along corrected gradients, and averages once a round.

    The memory "control" is c_i, "server_control" is c as the agent has got it, and
    "gradients" is the sum of the agent's gradients since then; the mark "counted" is
    the number of these.

    Args:
        task: the task that the agents learn.
        tx: the local optimizer; the paper uses plain SGD.
        placement: the devices on which the agents live.
        examples: the number of each agent's examples; None if all count the same.
        learning_rate: the server's factor eta; 0 stands for 1.
        sampled: the number of agents that the server draws in each round; 0 for all.

    Raises:
        OptionError: the learning rate is negative.
    """
    counts = counted_examples(placement, examples)
    server = average(learning_rate=learning_rate)
    averages = Averages(placement, counts, server, sampled > 0)

    def train(state: MemoryState, batch, key):
        mask = batch.mask
        share = (mask.any() if examples is None else mask.mean()).astype(jnp.float32)

        def correct(grads, memory):
            return jax.tree.map(
                lambda g, own, c: g - share * (own - c),
                grads,
                memory["control"],
                memory["server_control"],
            )

        state, grads, metrics = trained(task, tx, state, batch, key, correct)
        total = jax.tree.map(jnp.add, state.memory["gradients"], grads)
        state = state._replace(
            memory={**state.memory, "gradients": total},
            marks={**state.marks, "counted": state.marks["counted"] + share},
        )
        return state, metrics

    def step(state, batch, network, key):
        del network
        return placement.per_agent(train)(state, batch, placement.keys(key))

    def meet(state: MemoryState, present):
        exchanged = _exchanged(state, present, counts, placement, sampled > 0)
        return averages(exchanged, present)

    communicating = jax.jit(meet, out_shardings=placement.sharding)

    def communicate(state, data, network, key):
        del data, key
        return communicating(state, network.present), {}

    corrected = remembering(
        local(task, tx, placement),
        task,
        placement,
        memories=["change", "control", "server_control", "gradients"],
        step=step,
        marks=lambda: {**no_turns(placement), "counted": placement.zeros()},
        messages=_messages,
    )
    return corrected._replace(communicate=communicate)


def _messages(state: MemoryState) -> Messages:
    control = state.memory["control"]
    return Messages(server=one_agent({**state.local.variables, "control": control}))


def _exchanged(
    state: MemoryState,
    present: Bool[Array, " slots"],
    counts: Float[Array, " slots"],
    placement: Placement,
    sampled: bool,
) -> MemoryState:
    """Returns the states with new control variates, and with no gradients counted.

    Args:
        state: the agents' states before the server averages their models.
        present: the present agents.
        counts: what each agent counts; 0 for slots that only fill up devices.
        placement: the devices on which the agents live.
        sampled: whether the server draws agents for each round.
    """
    heard = turn_of(state.marks["turn"], present, counts).heard
    if sampled:
        # Agents that take part always deliver. One that is not drawn again keeps its
        # gradients, of which its control variate is computed each time.
        heard = jnp.ones_like(present)
    counted, memory = state.marks["counted"], state.memory

    @placement.per_agent
    def controls(heard, counted, control, total):
        known = heard & (counted > 0)
        mean = jax.tree.map(lambda g: g / jnp.where(known, counted, 1), total)
        return jax.tree.map(lambda m, c: jnp.where(known, m, c), mean, control)

    control = controls(heard, counted, memory["control"], memory["gradients"])
    W = jnp.where(present[:, None], counts / counts.sum(), jnp.eye(len(present)))
    memory = {
        **memory,
        "control": control,
        "server_control": mix(W, control, placement),
        "gradients": jax.tree.map(jnp.zeros_like, control),
    }
    marks = {**state.marks, "counted": jnp.zeros_like(counted)}
    return state._replace(memory=memory, marks=marks)


RECORD = AlgorithmRecord(
    "scaffold",
    scaffold,
    (SERVER_RATE, SAMPLED),
    summary="It is fedavg with control variates, which cancel the differences between "
    "the agents' data (Karimireddy et al. 2020).",
    optimizer="sgd",
    facts=frozenset({"examples"}),
)
