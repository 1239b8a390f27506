"""NEAR-DGD: a local step, and then several gossip averages."""

from dimat_jax.algorithms import ALGORITHMS, BETWEEN_MERGES
from dimat_jax.algorithms.base import Algorithm, one_agent
from dimat_jax.algorithms.conditions import balanced
from dimat_jax.algorithms.local import local
from dimat_jax.algorithms.record import GRAPH, AlgorithmRecord
from dimat_jax.ledger import Messages
from dimat_jax.mixing import mix
from dimat_jax.options import Option

EXCHANGES = Option("orchard.exchanges", 2, "The averages after a step.", at_least=1)


def near_dgd(task, tx, placement, *, exchanges: int = EXCHANGES.default) -> Algorithm:
    """A local step, then `exchanges` gossip averages."""
    alone = local(task, tx, placement)

    def step(state, batch, network, key):
        state, metrics = alone.step(state, batch, network, key)
        variables = alone.variables(state)
        for _ in range(exchanges):
            variables = mix(network.W, variables, placement)
        return alone.with_variables(state, variables), metrics

    def messages(state):
        sent = one_agent(alone.variables(state))
        step = {kind: [tree] * exchanges for kind, tree in sent.items()}
        return Messages(step=step, turns=exchanges)

    return alone._replace(step=step, messages=messages)


RECORD = AlgorithmRecord(
    "near_dgd",
    near_dgd,
    (EXCHANGES,),
    leads_to=GRAPH,
    network=balanced,
    optimizer="sgd",
)
ALGORITHMS.add(RECORD)
BETWEEN_MERGES.add(RECORD)
