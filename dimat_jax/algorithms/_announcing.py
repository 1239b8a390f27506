"""Merging with compressed messages: agents announce how they have changed.

    q_i  =  Q(x_i - x^_i),    x^_i  <-  x^_i + q_i

x^_i is what the others know of agent i, and what they match and average with their own
weights as they are; what Q loses stays in the difference, and is sent later: error
feedback (the estimates are CHOCO's, Koloskova et al. 2019, arXiv 1902.00340; unlike
there, the mean over agents is not preserved while they are inexact). The first time
that two agents meet, they send what they have as it is; after that, who has missed
announcements is sent them with the next. So all know the same x^_i.

Params alone are compressed. Running statistics are few, and would not survive it: what
is left of a variance may be negative.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dimat_jax import compression
from dimat_jax.algorithms.base import Algorithm, State
from dimat_jax.compression import Compressor
from dimat_jax.placement import Placement
from dimat_jax.tree import PyTree

__all__ = ["AnnouncingState", "announcing"]


class AnnouncingState(NamedTuple):
    """Stacked: every leaf is `[agents, ...]`.

    Attributes:
        exact: the state as it is.
        known: x^, like the params, in the agent's own frame.
    """

    exact: State
    known: PyTree


def announcing(
    exact: Algorithm,
    placement: Placement,
    *,
    merge_round: Callable,
    compressor: Compressor,
) -> Algorithm:
    """A merging algorithm whose messages are compressed.

    Args:
        exact: without compression.
        placement: where the agents live.
        merge_round: `merge_round(state, announced, data, network, key) -> (state,
            announced, metrics)`, announced being the state as the others know it.
        compressor: Q.
    """

    def params(state: State) -> PyTree:
        return exact.variables(state)["params"]

    def as_known(state: AnnouncingState) -> State:
        variables = {**exact.variables(state.exact), "params": state.known}
        return exact.with_variables(state.exact, variables)

    tell = placement.per_agent(partial(compression.announce, compressor))

    @partial(jax.jit, out_shardings=placement.sharding)
    def announce(state: AnnouncingState, key):
        known = tell(params(state.exact), state.known, placement.keys(key))
        return as_known(AnnouncingState(state.exact, known))

    def communicate(state, data, network, key):
        key, compression_key = jax.random.split(key)
        announced = announce(state, compression_key)
        new, announced, metrics = merge_round(
            state.exact, announced, data, network, key
        )
        return AnnouncingState(new, params(announced)), metrics

    def init(variables):
        state = exact.init(variables)
        # A copy: a step may be given the buffers of either to overwrite.
        return AnnouncingState(state, jax.tree.map(jnp.copy, params(state)))

    def step(state, batch, network, key):
        new, metrics = exact.step(state.exact, batch, network, key)
        return AnnouncingState(new, state.known), metrics

    def aligned(state, perms):
        known = exact.aligned(as_known(state), perms)
        return AnnouncingState(exact.aligned(state.exact, perms), params(known))

    def messages(state):
        sent = exact.messages(state.exact)
        compressed = compressor.message(sent.round["params"])
        return sent._replace(
            round={**sent.round, "params": compressed}, whole=sent.round
        )

    return Algorithm(
        init=init,
        step=step,
        communicate=communicate,
        variables=lambda state: exact.variables(state.exact),
        with_variables=lambda state, variables: state._replace(
            exact=exact.with_variables(state.exact, variables)
        ),
        aligned=aligned,
        messages=messages,
    )
