"""Merging with compressed messages: agents announce how they have changed.

    q_i  =  Q(x_i - x^_i),    x^_i  <-  x^_i + q_i

x^_i is the other agents' estimate of the params of agent i. Agents are matched by these
estimates, so that both ends of a link find the same permutation, and average the
estimates of the others with their own exact params. What Q loses stays in the
difference x_i - x^_i, and is sent later (error feedback). The estimates are CHOCO's
(Koloskova et al. 2019, arXiv 1902.00340); unlike there, the mean over agents is not
preserved while the estimates are inexact. When two agents are linked for the first
time, they send their x^ in full. Later, an agent that has missed announcements gets
them together with the next one. So all agents have the same x^_i.

Only params are compressed. Running statistics are small, and compression would harm
them: a variance that is compressed may become negative.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from dimat_jax.algorithms._frames import Views
from dimat_jax.algorithms.base import Algorithm, MergeData, Metrics, State
from dimat_jax.compression import Compressor, announce
from dimat_jax.network import Network
from dimat_jax.placement import Placement
from dimat_jax.tree import PyTree

__all__ = ["AnnouncingState", "announcing"]


class AnnouncingState(NamedTuple):
    """The agents' states, stacked: every leaf is `[agents, ...]`.

    Attributes:
        exact: the state of the algorithm without compression.
        known: the estimate x^, shaped like the params and in the agent's own frame.
    """

    exact: State
    known: PyTree


def announcing(
    exact: Algorithm,
    placement: Placement,
    *,
    merge_round: Callable[
        [Views, MergeData, Network, Key[Array, ""]], tuple[Views, Metrics]
    ],
    compressor: Compressor,
) -> Algorithm:
    """Makes a merging algorithm whose messages are compressed.

    Args:
        exact: the algorithm without compression.
        placement: the devices on which the agents live.
        merge_round: `merge_round(views, data, network, key) -> (views, metrics)` is one
            round of the algorithm.
        compressor: the compressor Q.
    """

    def params(state: State) -> PyTree:
        return exact.variables(state)["params"]

    def as_known(state: AnnouncingState) -> State:
        variables = {**exact.variables(state.exact), "params": state.known}
        return exact.with_variables(state.exact, variables)

    update_known = placement.per_agent(partial(announce, compressor))

    @partial(jax.jit, out_shardings=placement.sharding)
    def announced_state(state: AnnouncingState, key):
        known = update_known(params(state.exact), state.known, placement.keys(key))
        return as_known(AnnouncingState(state.exact, known))

    def communicate(state, data, network, key):
        if data is None:
            new, metrics = exact.communicate(state.exact, data, network, key)
            return state._replace(exact=new), metrics
        key, compression_key = jax.random.split(key)
        views = Views(state.exact, announced_state(state, compression_key))
        views, metrics = merge_round(views, data, network, key)
        return AnnouncingState(views.own, params(views.announced)), metrics

    def init(variables):
        state = exact.init(variables)
        # The estimate is a copy, because a step may reuse the buffers of the params.
        return AnnouncingState(state, jax.tree.map(jnp.copy, params(state)))

    def aligned(state, perms):
        known = exact.aligned(as_known(state), perms)
        return AnnouncingState(exact.aligned(state.exact, perms), params(known))

    def messages(state):
        sent = exact.messages(state.exact)
        announced = {**sent.round, "params": compressor.message(sent.round["params"])}
        return sent._replace(round=announced, whole=sent.round)

    return exact._replace(
        init=init,
        step=_of_exact(exact.step),
        ahead=exact.ahead and _of_exact(exact.ahead),
        communicate=communicate,
        variables=lambda state: exact.variables(state.exact),
        with_variables=_on_exact(exact.with_variables),
        with_statistics=_on_exact(exact.with_statistics),
        aligned=aligned,
        messages=messages,
    )


def _on_exact(replace: Callable[[State, PyTree], State]) -> Callable[..., State]:
    """Lifts a function that replaces a part of the exact state."""

    def replace_in_exact(state: AnnouncingState, part: PyTree) -> AnnouncingState:
        return state._replace(exact=replace(state.exact, part))

    return replace_in_exact


def _of_exact(step: Callable[..., tuple[State, Metrics]]):
    """Makes a step on `AnnouncingState`s of one on exact states."""

    def step_of_exact(state: AnnouncingState, batch, network, key):
        new, metrics = step(state.exact, batch, network, key)
        return AnnouncingState(new, state.known), metrics

    return step_of_exact
